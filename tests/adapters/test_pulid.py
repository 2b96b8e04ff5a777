"""PuLID: its attention, its encoders' tokens, what EVA-CLIP sees, and its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from facegen import checkpoints, schedulers
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.pulid import ASIDE, MANNERS, PuLID, Version, grey_face, start
from facegen.attention.backends import math as attend
from facegen.attention.processor import StreamGroup, merge_heads, mix
from facegen.conditions import TokenCondition
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongRequest
from facegen.models.base import Model
from facegen.models.eva import EvaSizes, EvaTower, rotary
from facegen.models.id_tokens import IDFormer, TokenSizes

DIM, VIEW = 18, 8
ASKED = AdapterRequest(height=64, width=64)
VERSIONS: tuple[Version, ...] = ("v1", "v1.1")
Photos = Callable[[int], Any]
Call = Callable[..., Tensor]


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VERSIONS)
def pulid(request: pytest.FixtureRequest, model: Model, fresh: Callable[[str], PuLID]) -> PuLID:
    other = fresh("pulid")
    assert other.eva is not None
    sizes = TokenSizes(DIM + other.eva.sizes.output, VIEW, (12, 10), (8, 8), 64, model.text_width, 2, 3, 5)
    adapter = PuLID.fresh(model, DIM, eva=other.eva, parser=other.parser, version=request.param, sizes=sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().requires_grad_(False).eval()
    return adapter


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ortho", ["ortho", "ortho_v2"])
def test_what_lies_along_the_prompt_is_taken_out(ortho: Any) -> None:
    query, key, value = drawn(2, 3, 6, 4), drawn(2, 3, 5, 4, seed=3), drawn(2, 3, 5, 4, seed=4)
    own_key, own_value = drawn(2, 3, 9, 4, seed=5), drawn(2, 3, 9, 4, seed=6)
    group = StreamGroup(own_key, own_value, torch.tensor([0.7]), (None,), ortho=ortho)
    hidden = merge_heads(attend(query, key, value))
    found = merge_heads(attend(query, own_key, own_value))
    along = (hidden * found).sum(1, keepdim=True) / hidden.square().sum(1, keepdim=True) * hidden
    share = torch.zeros(2, 6, 1)
    if ortho == "ortho_v2":  # without 1/√d, over the first five tokens
        share = (query @ own_key.transpose(-1, -2)).softmax(-1)[..., :5].sum(-1).mean(1)[..., None]
    wanted = hidden + 0.7 * (found + (share - 1) * along)
    got = mix(query, (key, value), [group], attend)
    assert torch.allclose(got, wanted, atol=1e-6)
    if ortho == "ortho":
        assert torch.allclose(((got - hidden) * hidden).sum(1), torch.zeros(2, 12), atol=1e-5), "for each channel"
    plain = mix(query, (key, value), [group._replace(ortho=None)], attend)
    assert not torch.allclose(got, plain, atol=1e-3)
    nothing = torch.zeros_like(value)  # SDXL's empty prompt
    assert torch.allclose(mix(query, (key, nothing), [group], attend), 0.7 * found, atol=1e-6)


@pytest.mark.parametrize("name", ["fidelity", "style", "plain"])
def test_manners(pulid: PuLID, model: Model, call: Call, photos: Photos, name: str) -> None:
    assert pulid.manner is MANNERS[pulid.version]["fidelity"]
    pulid.manner = MANNERS[pulid.version][name]
    conditions = pulid.conditions([photos(1)], ASKED, model)
    (one,) = conditions
    assert isinstance(one, TokenCondition)
    assert (one.mix, one.scale) == (pulid.manner.mix, 0.8)
    count = one.tokens.shape[2] - pulid.manner.zeros
    assert count == (2 + 5 if pulid.version == "v1" else 3)
    assert not bool(one.tokens[:, :, count:].any()), "zeros, of which keys and values are zeros"
    assert bool(one.tokens[:, :, :count].any())
    assert torch.equal(call([replace(one, scale=0.0)]), call([]))
    assert not torch.allclose(call(conditions), call([]), atol=1e-4)


# --- tokens ---------------------------------------------------------------------------------------------------------


def inputs(pulid: PuLID, photos: int) -> tuple[Tensor, list[Tensor]]:
    vectors = drawn(1, photos, pulid.encoder.sizes.vector) * 3
    return vectors, [drawn(1, photos, 5, VIEW, seed=10 + place) for place in range(5)]


def test_several_photos(pulid: PuLID) -> None:
    """v1 sets their tokens side by side, of all but the first only the vector's; v1.1 reads them together."""
    pulid.manner = replace(pulid.manner, zeros=0)
    vectors, views = inputs(pulid, 3)
    one, three = pulid.tokens(vectors[:, :1], [view[:, :1] for view in views]), pulid.tokens(vectors, views)
    if pulid.version == "v1.1":
        assert isinstance(pulid.encoder, IDFormer)
        assert torch.equal(three[0], one[0]), "the other half reads one photo's zeros"
        wanted = pulid.encoder(vectors, [view.flatten(1, 2) for view in views])
        assert torch.allclose(three[1], wanted, atol=1e-6)
        assert not torch.allclose(three[1], one[1], atol=1e-4)
        return
    each = [pulid.encoder(vectors[:, i], [view[:, i] for view in views]) for i in range(3)]
    assert torch.allclose(three[1], torch.cat([each[0], each[1][:, :2], each[2][:, :2]], dim=1), atol=1e-6)
    pulid.blend = True
    assert torch.allclose(pulid.tokens(vectors, views)[1], torch.cat(each, dim=1), atol=1e-6)
    nothing = pulid.encoder(torch.zeros(1, vectors.shape[-1]), [torch.zeros(1, 5, VIEW)] * 5)
    assert torch.allclose(three[0], torch.cat([nothing, nothing[:, :2], nothing[:, :2]], dim=1), atol=1e-6)


def test_the_encoders(pulid: PuLID) -> None:
    """What each token is made of, written down a second time."""
    vectors, views = inputs(pulid, 1)
    encoder, rows = pulid.encoder, [view[:, 0] for view in views]
    mapper = [encoder.get_submodule(f"mapping_{place}") for place in range(5)]
    if not isinstance(encoder, IDFormer):
        patch = [encoder.get_submodule(f"mapping_patch_{place}") for place in range(5)]
        wanted = [encoder.body(vectors[:, 0]).view(1, 2, -1)]
        for place, row in enumerate(rows):
            wanted.append(mapper[place](row[:, :1]) + patch[place](row[:, 1:]).mean(1, keepdim=True))
        assert torch.allclose(encoder(vectors[:, 0], rows), torch.cat(wanted, dim=1), atol=1e-6)
        return
    own = encoder.id_embedding_mapping(vectors).view(1, 2, -1)
    latents = torch.cat([encoder.latents, own], dim=1)
    for place, row in enumerate(rows):  # one layer to a view here
        latents = encoder.layers[place](torch.cat([own, mapper[place](row)], dim=1), latents)
    assert torch.allclose(encoder(vectors, rows), latents[:, :3] @ encoder.proj_out, atol=1e-6)


def test_heads_are_read_off_the_file() -> None:
    former = IDFormer(TokenSizes(DIM, VIEW, (12, 10), (8, 8), 64, 32, 2, 3, 5, heads=3))
    again = IDFormer.from_shapes({key: tuple(value.shape) for key, value in former.state_dict().items()})
    assert again.sizes == former.sizes


def test_raw_embedding_and_unit_view(pulid: PuLID, model: Model) -> None:
    assert pulid.eva is not None
    pixels, embedding = drawn(1, 3, 28, 28), drawn(1, DIM, seed=3) * 5
    whole, views = pulid.eva(pixels)
    wanted = pulid.tokens(
        torch.cat([embedding, whole / whole.norm()], dim=-1)[:, None], [view[:, None] for view in views]
    )
    (one,) = pulid.conditions_from_embeddings(embedding, model, replace(ASKED, clip=pixels))
    assert torch.allclose(one.tokens[:, :, : wanted.shape[2]], wanted, atol=1e-5)  # type: ignore[attr-defined]
    with pytest.raises(WrongRequest, match="not its embedding alone"):
        pulid.conditions_from_embeddings(embedding, model)
    with pytest.raises(WrongRequest, match="1 faces do not fit 1 pictures of 2 photos"):
        pulid.conditions_from_embeddings(embedding.expand(1, 2, -1), model, replace(ASKED, clip=pixels))


# --- EVA-CLIP ---------------------------------------------------------------------------------------------------------


def test_rotary_positions() -> None:
    cos, sin = rotary(3, 8)
    assert cos.shape == sin.shape == (9, 8)
    for row in range(3):
        for column in range(3):
            for place, at in ((row, 0), (column, 4)):
                angles = [place / 3 * 16, place / 3 * 16 / 100]
                wanted = torch.tensor([angles[0], angles[0], angles[1], angles[1]])
                assert torch.allclose(cos[3 * row + column, at : at + 4], wanted.cos(), atol=1e-5)
                assert torch.allclose(sin[3 * row + column, at : at + 4], wanted.sin(), atol=1e-5)


def test_the_tower_and_its_file(tmp_path: Path) -> None:
    tower = EvaTower(EvaSizes(width=8, inner=8, output=6, depth=21, head=4, patch=14, image=28))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    tower.requires_grad_(False)
    pixels = drawn(1, 3, 28, 28)
    whole, hidden = tower(pixels)
    assert whole.shape == (1, tower.sizes.output)
    patches = torch.nn.functional.conv2d(pixels, *tower.patch_embed.proj.parameters(), stride=14).flatten(2)
    x = torch.cat([tower.cls_token, patches.transpose(1, 2)], dim=1) + tower.pos_embed
    for place, block in enumerate(tower.blocks):
        if place in (4, 8, 12, 16, 20):
            assert torch.allclose(hidden[place // 4 - 1], x, atol=1e-5)
        x = block(x, (tower.cos, tower.sin))
    assert torch.allclose(whole, tower.head(tower.norm(x[:, 0])), atol=1e-5)
    assert {norm.eps for norm in tower.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-6}
    file = tmp_path / "whole.pt"
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    table = {"visual.rope.freqs_cos": torch.zeros(4, 4), "visual.blocks.0.attn.rope.freqs_sin": torch.zeros(4, 4)}
    everything = {**state, **table, "text.logit": torch.zeros(1)}
    for content in (everything, {"model": everything}, {"module": everything}):
        again = EvaTower.from_file(checkpoints.write(file, content))
        assert again.sizes == tower.sizes
        assert torch.equal(again(pixels)[0], whole), "the rotary table is computed"
    state.pop("visual.head.weight")
    with pytest.raises(CheckpointBroken, match=r"lacks head\.weight"):
        EvaTower.from_file(checkpoints.write(file, state))
    with pytest.raises(WrongAdapter, match="not EVA02-CLIP's picture tower"):
        EvaTower.from_file(checkpoints.write(file, {"x": torch.zeros(1)}))


def test_a_grey_face_on_white(photos: Photos) -> None:
    class Halves:
        """Says that the left half of an aligned face is hair and the right half background."""

        def mask(self, images: Tensor, parts: Any) -> Tensor:
            assert set(parts) == set(ASIDE)
            assert images.shape == (1, 3, 512, 512)
            return (torch.arange(512) >= 256).float().expand(1, 1, 512, -1)

    pixels = grey_face(photos(1), Halves(), 64)  # type: ignore[arg-type]
    mean, deviation = (
        torch.tensor(value).view(3, 1, 1) for value in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
    )
    colours = pixels[0] * deviation + mean
    assert torch.allclose(colours[:, :, 40:], torch.ones(3, 64, 24), atol=1e-3)
    left = colours[:, :, :24]
    assert torch.allclose(left[0], left[1], atol=1e-3)
    assert torch.allclose(left[0], left[2], atol=1e-3)
    assert float(left.std()) > 0.02


# --- files ------------------------------------------------------------------------------------------------------------


def test_official_layout(pulid: PuLID, model: Model, tmp_path: Path, call: Call, photos: Photos) -> None:
    file = pulid.save(tmp_path)
    assert file.name == ("pulid_v1.bin" if pulid.version == "v1" else "pulid_v1.1.safetensors")
    shapes = checkpoints.shapes(file)
    assert {key.split(".")[0] for key in shapes} == {"id_adapter", "id_adapter_attn_layers"}
    cross = {layer.index for layer in model.attention_layers if layer.cross}
    names = {f"id_adapter_attn_layers.{index}.{part}.weight" for index in cross for part in ("id_to_k", "id_to_v")}
    assert names == {key for key in shapes if key.startswith("id_adapter_attn_layers.")}
    again = load_adapter(file, model)
    assert isinstance(again, PuLID)
    assert again.encoder.sizes == pulid.encoder.sizes or pulid.version == "v1"
    first, second = (call(one.conditions([photos(1)], ASKED, model)) for one in (pulid, again))
    assert torch.equal(first, second)


def test_errors_name_the_keys_of_the_file(pulid: PuLID, model: Model, tmp_path: Path) -> None:
    file = pulid.save(tmp_path)
    tensors = checkpoints.read(file)
    encoder = "id_adapter.latents" if pulid.version == "v1.1" else "id_adapter.body.3.bias"
    for lost in ("id_adapter_attn_layers.1.id_to_k.weight", encoder):
        checkpoints.write(file, {key: value for key, value in tensors.items() if key != lost})
        with pytest.raises(CheckpointBroken, match=r"id_to_k|latents|body|lacks"):
            load_adapter(file, model)
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("id_adapter_attn_layers."))
    checkpoints.write(file, {key: value for key, value in tensors.items() if f".{last}.id_to_v" not in key})
    with pytest.raises(CheckpointBroken, match=rf"lacks id_adapter_attn_layers\.{last}\.id_to_v\.weight"):
        load_adapter(file, model)
    checkpoints.write(file, {**tensors, "more.weight": torch.zeros(1)})
    with pytest.raises(CheckpointBroken, match=r"do not belong there: more\.weight"):
        load_adapter(file, model)


def test_photos_need_the_tower_and_the_parser(
    pulid: PuLID, model: Model, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "empty"))
    again = load_adapter(pulid.save(tmp_path / "adapter"), model)
    assert isinstance(again, PuLID)
    assert again.eva is None
    with pytest.raises(WeightsMissing, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt, which is not on this machine"):
        again.conditions([photos(1)], ASKED, model)
    again.eva = pulid.eva
    with pytest.raises(WeightsMissing, match=r"parsing_bisenet\.pth.*facexlib"):
        again.conditions([photos(1)], ASKED, model)
    other = EvaTower(EvaSizes(width=4, inner=4, output=6, depth=21, head=4, patch=14, image=28))
    checkpoints.write(tmp_path / "adapter/EVA02_CLIP_L_336_psz14_s6B.pt", other.state_dict())
    with pytest.raises(WrongAdapter, match="states 8 wide, the tower beside it gives 4"):
        load_adapter(tmp_path / "adapter", model)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_published_loop_is_dpm_karras(model: Model) -> None:
    """DPM-Solver++(2M) in the space where noise has variance σ², for a model that answers with a fixed direction."""
    config = {**model.scheduler_config, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = schedulers.build("dpm++ karras", config, 6)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    trained = ((1 - kept) / kept) ** 0.5
    low, high = trained[0] ** (1 / 7), trained[-1] ** (1 / 7)
    levels = [*((high + np.linspace(0, 1, 6) * (low - high)) ** 7), 0.0]
    nearest = [int(np.abs(np.log(level) - np.log(trained)).argmin()) for level in levels[:-1]]
    assert scheduler.timesteps.tolist() == nearest
    noise, direction = drawn(1, 4, 8, 8).double(), drawn(1, 4, 8, 8, seed=3).double()

    def answer(latents: Tensor) -> Tensor:
        return torch.tanh(latents * direction)

    x, old = noise * levels[0], None
    for now, after in pairwise(levels):
        clean = x - now * answer(x / (now**2 + 1) ** 0.5)
        mixed = clean
        if old is not None and after:
            ratio = np.log(old[0] / now) / np.log(now / after)
            mixed = clean + (clean - old[1]) / (2 * ratio)
        x = x * (after / now) + mixed * (1 - after / now)
        old = now, clean
    latents = start(scheduler, noise)
    for step in scheduler.timesteps:
        latents = scheduler.step(answer(latents), step, latents, return_dict=False)[0]
    assert float((latents - x).abs().max() / x.abs().max()) < 1e-4


def test_beside_another_adapter(
    pulid: PuLID, model: Model, photos: Photos, call: Call, fresh: Callable[[str], Any]
) -> None:
    mine = pulid.conditions([photos(1)], ASKED, model)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    other = fresh("instantid").conditions([photos(2)], replace(ASKED, mask=mask), model)
    both = call([*mine, *other])
    assert torch.allclose(both, call([*other, *mine]), atol=1e-5)
    assert not torch.allclose(both, call(mine), atol=1e-4)
    assert torch.equal(call([*mine, *(replace(one, scale=0.0) for one in other)]), call(mine))
