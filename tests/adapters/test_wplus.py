"""The W+ adapter and e4e, against the numbers of their reference code and by themselves."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from facegen import checkpoints, schedulers
from facegen.adapter import AdapterRequest, delayed, load_adapter
from facegen.adapters.wplus import WPlus
from facegen.conditions import TokenCondition
from facegen.denoise import Guidance, denoise
from facegen.errors import CheckpointBroken, WrongRequest
from facegen.face.align import ffhq_crop
from facegen.models.base import Model
from facegen.models.e4e import E4E

SINGLE, RUN = 1e-5, 2e-5


def rel(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden/wplus/wplus_golden.safetensors")


@pytest.fixture(scope="module")
def base(shared: Path) -> Model:
    return Model.from_pretrained(shared / "golden/wplus/base_sd15", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def official(shared: Path, base: Model) -> WPlus:
    return WPlus.from_pretrained(shared / "golden/wplus/wplus_adapter.bin", base)


def test_tokens(golden: dict[str, Tensor], official: WPlus) -> None:
    uncond, cond = official.tokens(golden["w"])
    assert rel(uncond, golden["tokens_uncond"]) <= SINGLE
    assert rel(cond, golden["tokens_cond"]) <= SINGLE
    assert torch.equal(official.tokens(golden["w"].flatten(1))[1], cond)


def test_one_call(golden: dict[str, Tensor], base: Model, official: WPlus) -> None:
    text = base.encode_text(["a photo of a woman"], ["lowres"])
    conditions = official.conditions_from_embeddings(golden["w"], base, AdapterRequest(scale=0.8))
    with torch.no_grad(), base.prepare([text, *conditions], 1, True) as prepared:
        got = base.predict(golden["unet_x"], 300, prepared.throughout())
    assert rel(got, golden["unet_eps_t300"]) <= SINGLE


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_run(golden: dict[str, Tensor], base: Model, official: WPlus, share: float) -> None:
    asked = AdapterRequest(scale=0.8, span=delayed(share))
    conditions = [
        base.encode_text(["a photo of a woman"], ["lowres"]),
        *official.conditions_from_embeddings(golden["w"], base, asked),
    ]
    scheduler = schedulers.build("model", base.scheduler_config, 4)
    latents = golden["latents_in"] * scheduler.init_noise_sigma
    got = denoise(base, latents, scheduler, conditions, Guidance(7.5))
    assert rel(got, golden[f"latents_out_start{int(share * 100)}"]) <= RUN


@pytest.mark.parametrize("steps", [3, 10, 30, 50])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_the_delay_is_the_official_one(steps: int, share: float) -> None:
    kv: dict[int, Any] = {}
    condition = TokenCondition(tokens=torch.zeros(2, 1, 1, 4), layers=kv, span=delayed(share))
    acts = [condition.strength(index, steps) > 0 for index in range(steps)]
    assert acts == [index > min(30, int(share * steps)) for index in range(steps)]


@pytest.fixture
def wplus(fresh: Callable[[str], WPlus]) -> WPlus:
    return fresh("wplus")


def test_the_prompt_has_the_first_fifth(wplus: WPlus, model: Model) -> None:
    (condition,) = wplus.conditions_from_embeddings(torch.ones(1, wplus.embedding_dim), model)
    assert condition.strength(1, 10) == 0
    assert condition.strength(9, 10) == 1


def test_names_of_accelerate(wplus: WPlus, model: Model, tmp_path: Path) -> None:
    tensors = checkpoints.read(wplus.save(tmp_path))
    old = {"w_proj.": "w_proj_model.", "wplus_adapter.": "adapter_modules."}
    renamed = {}
    for key, value in tensors.items():
        prefix = next(name for name in old if key.startswith(name))
        renamed[old[prefix] + key.removeprefix(prefix)] = value
    checkpoints.write(tmp_path / "wplus_adapter.bin", renamed)
    again = load_adapter(tmp_path, model)
    code = torch.ones(1, wplus.embedding_dim)
    assert torch.equal(again.tokens(code), wplus.tokens(code))  # type: ignore[attr-defined]


def test_query_weights_must_be_there(wplus: WPlus, model: Model, tmp_path: Path) -> None:
    tensors = {key: value for key, value in checkpoints.read(wplus.save(tmp_path)).items() if ".to_q_" not in key}
    checkpoints.write(tmp_path / "wplus_adapter.bin", tensors)
    with pytest.raises(CheckpointBroken, match="lacks to_q_wplus"):
        load_adapter(tmp_path, model)


def test_a_code_has_18_rows(model: Model) -> None:
    with pytest.raises(WrongRequest, match="18 rows"):
        WPlus.fresh(model, 500)


def test_several_photos_are_averaged(wplus: WPlus, model: Model, photos: Callable[[int], Any]) -> None:
    faces = [photos(1), photos(2)]
    codes = [torch.tensor(face.embedding)[None] for face in faces]
    with torch.no_grad():
        (one,) = wplus.conditions(faces, AdapterRequest(), model)
        wanted = wplus.tokens((codes[0] + codes[1]) / 2)
    assert torch.allclose(one.tokens, wanted, atol=1e-6)  # type: ignore[attr-defined]


@pytest.fixture
def directions(tmp_path: Path) -> dict[str, Any]:
    """Edit directions in the three official layouts beside the adapter."""
    generator = torch.Generator().manual_seed(8)
    found: dict[str, Any] = {
        "age": torch.randn(1, 1, generator=generator),
        "lipstick": torch.randn(18, 1, generator=generator),
        "mean": torch.randn(1, 1, generator=generator),
        "comp": torch.randn(3, 1, 1, generator=generator),
        "std": torch.rand(3, generator=generator) + 0.5,
    }
    for name in ("interfacegan_directions", "latent_directions", "gan_space"):
        (tmp_path / "w_direction" / name).mkdir(parents=True)
    torch.save(found["age"], tmp_path / "w_direction/interfacegan_directions/age.pt")
    np.save(tmp_path / "w_direction/latent_directions/lipstick.npy", found["lipstick"].numpy())
    np.save(tmp_path / "w_direction/latent_directions/age.npy", found["lipstick"].numpy())
    torch.save({name: found[name] for name in ("mean", "comp", "std")}, tmp_path / "w_direction/gan_space/ffhq_pca.pt")
    (tmp_path / "w_direction/gan_space/ganspace_configs.csv").write_text("width\t2\t0\t4\t20\n")
    return found


def test_edits(wplus: WPlus, model: Model, tmp_path: Path, directions: dict[str, Any]) -> None:
    """Each kind of direction as the official script applies it."""
    again = load_adapter(wplus.save(tmp_path), model)
    assert isinstance(again, WPlus)
    code = torch.randn(1, 18, 1, generator=torch.Generator().manual_seed(9))
    place = (code[0, 0] - directions["mean"][0]) @ directions["comp"][2].flatten() / directions["std"][2]
    rows = torch.zeros(18, 1)
    rows[0:4] = (3.0 - place) * directions["comp"][2] * directions["std"][2]
    coarse = directions["lipstick"].clone()
    coarse[8:] = 0
    for edit, wanted in (
        ({"interfacegan/age": 2.0}, code + 2 * directions["age"]),
        ({"lipstick": -1.5}, code - 1.5 * coarse),
        ({"width": 3.0}, code + rows),
        ({"lipstick": 1.0, "width": 3.0}, code + coarse + rows),
    ):
        assert torch.allclose(again.directions.edited(code, edit), wanted, atol=1e-6), edit
        (condition,) = again.conditions_from_embeddings(code.flatten(1), model, AdapterRequest(edits=edit))
        assert torch.allclose(condition.tokens, again.tokens(wanted), atol=1e-5)  # type: ignore[attr-defined]
    for name, words in (("age", "say interfacegan/age or latent/age"), ("lipstik", "did you mean 'lipstick'")):
        with pytest.raises(WrongRequest, match=words):
            again.directions.edited(code, {name: 1.0})


def test_a_damaged_direction(wplus: WPlus, model: Model, tmp_path: Path, directions: dict[str, Any]) -> None:
    (tmp_path / "w_direction/latent_directions/age.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(CheckpointBroken, match=r"age\.npy is truncated or damaged"):
        load_adapter(wplus.save(tmp_path), model)


def test_what_e4e_sees(wplus: WPlus) -> None:
    """Half the size, and white where the parser sees no person."""
    generator = np.random.default_rng(1)
    crop = Image.fromarray(generator.integers(0, 255, (512, 512, 3), dtype=np.uint8))
    plain = wplus.view(crop)
    assert plain.shape == (3, 256, 256)
    small = np.asarray(crop.resize((256, 256), Image.Resampling.BICUBIC), np.float32)
    assert np.allclose(plain.permute(1, 2, 0).numpy(), (small - 127.5) / 127.5, atol=1e-5)

    class Left:
        """Background in the left half."""

        def mask(self, images: Tensor, parts: Any) -> Tensor:
            assert set(parts) == {"background", "cloth"}
            found = torch.zeros(1, 1, 512, 512)
            found[..., :256] = 1
            return found

    wplus.parser = Left()  # type: ignore[assignment]
    seen = wplus.view(crop)
    assert bool((seen[..., :120] == 1).all())
    assert torch.equal(seen[..., 136:], plain[..., 136:])


def test_alignment_levels_the_eyes() -> None:
    """Five dots on a turned face come to their places, whatever the turn."""
    upright = np.array([[-20, -15], [20, -15], [0, 5], [-14, 27], [14, 27]], np.float64)
    places = []
    for degrees in (0, 25, -40):
        turn = np.deg2rad(degrees)
        points = upright @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + 150
        image = Image.new("RGB", (300, 300), "white")
        x, y = points[0]
        ImageDraw.Draw(image).ellipse([x - 3, y - 3, x + 3, y + 3], fill="black")
        dark = np.argwhere(np.asarray(ffhq_crop(image, points).convert("L")) < 128)
        places.append(dark.mean(axis=0))
    assert np.allclose(places[0], places[1], atol=3)
    assert np.allclose(places[0], places[2], atol=3)
    assert 90 < places[0][0] < 128, "the eyes are above the middle"
    assert places[0][1] < 128, "the left one to the left"


@pytest.fixture(scope="module")
def e4e_golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden/e4e/e4e_golden.safetensors")


def filled(key: str, shape: list[int]) -> Tensor:
    """Rule CRC-e4e of the shared data's README."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    drawn = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 1 + 0.05 * drawn if key.endswith(("weight", "running_var")) else 0.05 * drawn
    if "linear.weight" in key:
        return drawn
    fan_in = int(np.prod(shape[1:]))
    return drawn * ((2 / fan_in) ** 0.5 * 0.7)


def test_e4e_has_the_official_keys(shared: Path) -> None:
    manifest = json.loads((shared / "golden/e4e/e4e_encoder.fill.json").read_text())["tensors"]
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in E4E().state_dict().items()}
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    assert {key: own[key] for key in own.keys() - counters} == {
        key: shape for key, shape in manifest.items() if not key.endswith("num_batches_tracked")
    }


@pytest.mark.slow
def test_e4e(shared: Path, e4e_golden: dict[str, Tensor], tmp_path: Path) -> None:
    manifest = json.loads((shared / "golden/e4e/e4e_encoder.fill.json").read_text())["tensors"]
    weights = {key: filled(key, shape) for key, shape in manifest.items() if not key.endswith("num_batches_tracked")}
    nested = {
        "state_dict": {f"encoder.{key}": value for key, value in weights.items()},
        "latent_avg": e4e_golden["latent_avg"],
    }
    torch.save(nested, tmp_path / "e4e_ffhq_encode.pt")
    encoder = E4E.from_file(tmp_path / "e4e_ffhq_encode.pt")
    got = encoder(e4e_golden["image"])
    assert rel(got, e4e_golden["wplus"]) <= RUN
    assert rel(got - encoder.latent_avg, e4e_golden["codes"]) <= RUN
