"""What a file is follows from its keys and shapes, whatever its name; every door refuses what does not fit.

The shapes are those of the published files (sizes as in the sources that the adapters name), built without memory.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from facegen import checkpoints
from facegen.adapter import find_adapters, recognise
from facegen.adapters.ip_adapter_faceid import variant_of
from facegen.adapters.storymaker import PeopleProjection
from facegen.checkpoints import Shapes
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongAdapter
from facegen.face.embed import ArcFace, IResNet
from facegen.face.parsing_networks import BiSeNet, ParseNet, Parser
from facegen.models.base import Model
from facegen.models.control import load_controlnet
from facegen.models.e4e import E4E
from facegen.models.eva import EvaSizes, EvaTower
from facegen.models.lora import load_lora
from facegen.models.projections import FacePlusProjection, FaceProjection, LinearProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.transface import TransFace
from facegen.restoration.restorer import Restorer
from tests.adapters.conftest import make

NAMES = (
    "ip-adapter.bin", "weights.bin", "mask.bin", "pulid_v1.1.safetensors", "photomaker-v1.bin", "animator.ckpt",
    "wplus_adapter.bin", "ip-adapter-plus-face_sd15.bin", "ip-adapter-faceid-plusv2_sd15.bin",
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin", "adapter_maj_mask.ckpt", "embeddings_gs-0.pt", "InstantID.bin",
)  # fmt: skip


def keys(module: Callable[[], nn.Module], prefix: str) -> Shapes:
    with torch.device("meta"):
        return {f"{prefix}{key}": tuple(value.shape) for key, value in module().state_dict().items()}


def streams(width: int, word: str = "ip", prefix: str = "ip_adapter.", rank: int = 0, own: bool = False) -> Shapes:
    """Two layers of a decoupled attention."""
    found: dict[str, tuple[int, ...]] = {}
    for index in (1, 3):
        found |= {f"{prefix}{index}.to_{part}_{word}.weight": (320, width) for part in "kv"}
        found |= {f"{prefix}{index}.to_q_{word}.weight": (320, 320)} if own else {}
        if rank:
            found[f"{prefix}{index}.to_q_lora.down.weight"] = (rank, 320)
            found[f"{prefix}{index}.to_q_lora.up.weight"] = (320, rank)
    return found


CLIP = PerceiverSizes(1280, 768, 768, depth=4, heads=12)
FACE = PerceiverSizes(512, 1280, 2048, depth=4, heads=20)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor."
PUBLISHED: Mapping[str, tuple[str, Shapes]] = {
    "instantid": ("instantid", keys(lambda: Resampler(FACE, 16), "image_proj.") | streams(2048)),
    "faceid": (
        "ip_adapter_faceid",
        keys(lambda: FaceProjection(ProjectionSizes(512, 1024, 4, 768)), "image_proj.") | streams(768, rank=128),
    ),
    "faceid sdxl": (
        "ip_adapter_faceid",
        keys(lambda: FaceProjection(ProjectionSizes(512, 1024, 4, 2048)), "image_proj.") | streams(2048, rank=128),
    ),
    "faceid plus": (
        "ip_adapter_faceid",
        keys(lambda: FacePlusProjection(ProjectionSizes(512, 1024, 4, 768), CLIP), "image_proj.")
        | streams(768, rank=128),
    ),
    "faceid portrait": (
        "ip_adapter_faceid",
        keys(lambda: FaceProjection(ProjectionSizes(512, 1024, 16, 768)), "image_proj.") | streams(768),
    ),
    "ip-adapter": ("ip_adapter", keys(lambda: LinearProjection(1024, 4, 768), "image_proj.") | streams(768)),
    "ip-adapter sdxl": ("ip_adapter", keys(lambda: LinearProjection(1280, 4, 2048), "image_proj.") | streams(2048)),
    "ip-adapter plus": ("ip_adapter", keys(lambda: Resampler(CLIP, 16), "image_proj.") | streams(768)),
    "ip-adapter full face": (
        "ip_adapter",
        {"image_proj.proj.0.weight": (1280, 1280), "image_proj.proj.2.weight": (768, 1280),
         "image_proj.proj.3.weight": (768,), **streams(768)},
    ),
    "storymaker": (
        "storymaker",
        keys(
            lambda: PeopleProjection(
                ProjectionSizes(512, 1024, 4, 2048), PerceiverSizes(1280, 2048, 2048, depth=4, heads=32),
                PerceiverSizes(1280, 1280, 2048, depth=4, heads=20), 16,
            ),
            "image_proj_model.",
        )
        | streams(2048, rank=128),
    ),
    "photomaker": (
        "photomaker",
        {"id_encoder.visual_projection_2.weight": (1280, 1024), "id_encoder.fuse_module.layer_norm.weight": (2048,),
         "lora_weights.unet.down_blocks.1.attentions.0.x.lora.down.weight": (64, 640)},
    ),
    "pulid": (
        "pulid",
        {"id_adapter.latents": (1, 32, 1024), "id_adapter.proj_out": (1024, 2048),
         "id_adapter_attn_layers.1.id_to_k.weight": (640, 2048)},
    ),
    "w+": (
        "wplus",
        {"w_proj.proj_0.weight": (768, 2048), "w_proj.norm.weight": (768,)}
        | streams(768, "wplus", "wplus_adapter.", own=True),
    ),
    "fact": (
        "facechain_fact",
        keys(lambda: Resampler(PerceiverSizes(512, 1024, 768, depth=4, heads=12), 16), "local_fac_prj.")
        | {f"{BLOCK}alpha_attn": (), f"{BLOCK}linear.weight": (320, 768)},
    ),
    "id-animator": (
        "id_animator",
        keys(lambda: Resampler(CLIP, 16), "image_proj.") | streams(768, "face", "face_adapter.", rank=128),
    ),
    "precisecontrol": (
        "precisecontrol",
        {"meta_id_net.stylegan_mlp.self_attn.norm1.weight": (512,),
         "meta_id_net.stylegan_mlp.final_mlp.net.0.weight": (2048, 9728)},
    ),
}  # fmt: skip


def claimants(shapes: Shapes, name: str) -> set[str]:
    return {kind.name for kind in find_adapters().values() if kind.detect(shapes, name)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("published", [one for one in PUBLISHED if one != "instantid"])
def test_one_family_claims_a_published_file_under_any_name(published: str, name: str) -> None:
    family, shapes = PUBLISHED[published]
    assert claimants(shapes, name) == {family}


@pytest.mark.parametrize("name", NAMES)
def test_where_keys_cannot_tell_the_name_is_a_hint(name: str) -> None:
    """InstantID and FaceID-unnorm have the same keys and sizes; Plus and PlusV2 too."""
    _, shapes = PUBLISHED["instantid"]
    assert claimants(shapes, name) == {"ip_adapter_faceid" if "faceid" in name else "instantid"}
    _, plus = PUBLISHED["faceid plus"]
    assert variant_of(plus, name) == ("plusv2" if "plusv2" in name else "plus")


OTHERS: Mapping[str, tuple[str, Shapes]] = {
    "expression, linear": (
        "Arc2Face expression adapter", {"image_proj.proj.weight": (3072, 55), **streams(768)},
    ),
    "expression, two layers": (
        "Arc2Face expression adapter",
        {"image_proj.proj.0.weight": (110, 55), "image_proj.proj.2.weight": (3072, 110),
         "image_proj.norm.weight": (768,), **streams(768)},
    ),
    "e4e": ("e4e encoder", {f"state_dict.encoder.{key}": shape for key, shape in keys(E4E, "").items()}),
    "eva": ("EVA-CLIP picture tower", keys(lambda: EvaTower(EvaSizes(1024, 2730, 768, 24, 64, 14, 336)), "visual.")),
    "transface": (
        "TransFace recogniser",
        {"patch_embed.proj.weight": (512, 3, 9, 9), "pos_embed": (1, 144, 512), "blocks.0.attn.qkv.weight": (1536, 512),
         "senet.0.weight": (8, 144)},
    ),
    "recogniser": ("face recogniser", keys(lambda: IResNet.of_depth(18), "")),
    "bisenet": ("BiSeNet face parsing network", keys(BiSeNet, "")),
    "parsenet": ("ParseNet face parsing network", keys(ParseNet, "")),
    "single file": ("whole Stable Diffusion model", {"model.diffusion_model.out.2.bias": (4,)}),
    "kohya": ("LoRA", {"lora_unet_mid_block_x.lora_down.weight": (4, 320)}),
    "peft": ("LoRA", {"unet.mid_block.x.lora_A.weight": (4, 320)}),
    "unknown": ("holds weights of no known kind", {"some.weight": (1,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["x.safetensors", "ip-adapter-faceid_sd15.safetensors", "mask.safetensors"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_adapter_is_told_by_what_it_is(other: str, name: str, tmp_path: Path) -> None:
    kind, shapes = OTHERS[other]
    assert claimants(shapes, name) == set()
    small = {key: torch.zeros(()) if not shape else torch.zeros(1) for key, shape in shapes.items()}
    for key in ("image_proj.proj.weight", "image_proj.proj.0.weight"):
        if key in small:
            small[key] = torch.zeros(shapes[key])
    with pytest.raises(WrongAdapter, match=kind):
        recognise(checkpoints.write(tmp_path / name, small))


@pytest.mark.parametrize("family", sorted(find_adapters().keys() - {"arc2face", "expression"}))
def test_a_real_small_file_is_recognised_under_misleading_names(
    family: str, tiny_folder: Path, tiny_sdxl: Path, weights: Path, tmp_path: Path
) -> None:
    base = Model.from_pretrained(tiny_sdxl if family == "photomaker" else tiny_folder, device="cpu")
    dim = {"instantid": 512, "ip_adapter": 1024}.get(family, 18)
    saved = make(family, base, weights, dim).save(tmp_path)
    file = saved if saved.is_file() else next(path for path in saved.iterdir() if path.suffix == ".bin")
    (tmp_path / "copies").mkdir()
    for name in ("weights.bin", "mask.bin", "ip-adapter-plus_sd15.bin", "pulid_v1.1.safetensors"):  # the format too
        assert recognise(Path(shutil.copy(file, tmp_path / "copies" / name))).name == family


# --- every door -----------------------------------------------------------------------------------------------------


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def controlnet(path: Path, model: Model) -> None:
    """A ControlNet's folder with this file in it."""
    from diffusers import ControlNetModel

    folder = path.parent / "net"
    ControlNetModel.from_unet(model.unet).save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(path, folder / "diffusion_pytorch_model.bin")
    load_controlnet(folder, model.unet)


DOORS: Mapping[str, Callable[[Path, Model], object]] = {
    **{
        name: lambda path, model, kind=kind: kind.from_pretrained(path, model)  # type: ignore[misc]
        for name, kind in find_adapters().items()
        if name != "arc2face"
    },
    "any adapter": lambda path, model: recognise(path),
    "base": lambda path, model: Model.from_pretrained(path, device="cpu"),
    "controlnet": controlnet,
    "lora": load_lora,
    "restorer": lambda path, model: Restorer.from_pretrained(path),
    "parser": lambda path, model: Parser.from_file(path),
    "recogniser": lambda path, model: ArcFace.from_pretrained(path),
    "e4e": lambda path, model: E4E.from_file(path),
    "eva": lambda path, model: EvaTower.from_file(path),
    "transface": lambda path, model: TransFace.from_file(path),
}


def one_sentence(error: FacegenError, path: Path) -> None:
    text = str(error)
    assert "\n" not in text
    assert str(path.parent) in text
    assert text.endswith(".")


@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_with_code_is_not_opened(
    door: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    for content in (lambda: torch.save({"w": torch.ones(1), "x": _Evil()}, path),
                    lambda: path.write_bytes(pickle.dumps({"x": _Evil()}))):  # fmt: skip
        content()
        with pytest.raises(CheckpointBroken, match=r"not opened for safety|damaged") as error:
            DOORS[door](path, model)
        one_sentence(error.value, path)
        shutil.rmtree(tmp_path / "net", ignore_errors=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_truncated_file(door: str, model: Model, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "half.pth", {"w": torch.ones(5000)})
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(CheckpointBroken, match="damaged") as error:
        DOORS[door](path, model)
    one_sentence(error.value, path)


@pytest.mark.parametrize("door", DOORS)
def test_a_file_of_something_else(door: str, model: Model, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "other.pth", {"quite.other.weight": torch.ones(2)})
    with pytest.raises((WrongAdapter, CheckpointBroken)) as error:
        DOORS[door](path, model)
    one_sentence(error.value, path)


@pytest.mark.parametrize("door", DOORS)
def test_no_file(door: str, model: Model, tmp_path: Path) -> None:
    if door == "controlnet":
        with pytest.raises(WeightsMissing):
            load_controlnet(tmp_path, model.unet)
        return
    with pytest.raises(WeightsMissing):
        DOORS[door](tmp_path / "nowhere.pth", model)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_controlnet_whose_keys_do_not_fit(model: Model, tmp_path: Path, change: str) -> None:
    from diffusers import ControlNetModel
    from safetensors.torch import load_file, save_file

    ControlNetModel.from_unet(model.unet).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, key = load_file(file), "conv_in.bias"
    if change == "missing":
        tensors.pop(key)
    else:
        key = key if change == "shape" else "strange.bias"
        tensors[key] = torch.ones(3)
    save_file(tensors, file)
    with pytest.raises(CheckpointBroken, match=key.replace(".", r"\.")) as error:
        load_controlnet(tmp_path, model.unet)
    one_sentence(error.value, file)
