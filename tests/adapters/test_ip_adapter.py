"""IP-Adapter and ID-Animator: what they see of photos, and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter, recognise
from facegen.adapters.id_animator import IDAnimator
from facegen.adapters.ip_adapter import IPAdapter, Variant, cut_out
from facegen.conditions import TokenCondition
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter
from facegen.models.base import Model
from facegen.models.clip import ClipView, Sight, load_clip_from
from facegen.models.resampler import PerceiverSizes, Resampler

CLIP, POOLED = 24, 8  # what the tiny image encoder gives
ASKED = AdapterRequest(height=64, width=64)
VARIANTS: tuple[Variant, ...] = ("plain", "plus", "plus-face", "full-face")
Photos = Callable[[int], Any]
Call = Callable[..., Tensor]


@pytest.fixture
def clip(weights: Path) -> ClipView:
    return ClipView(load_clip_from(weights / "clip-vit-h").eval(), bgr=False)


def shaken(adapter: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().requires_grad_(False).eval()
    return adapter


def made(variant: Variant, model: Model, clip: ClipView | None) -> IPAdapter:
    width = model.text_width
    resampler = Resampler(PerceiverSizes(CLIP, width, width, depth=1, heads=1), 3) if "plus" in variant else None
    dim = POOLED if variant == "plain" else CLIP
    return shaken(IPAdapter.fresh(model, dim, variant=variant, projector=resampler, clip=clip))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, model: Model, clip: ClipView) -> IPAdapter:
    return made(request.param, model, clip)


def test_the_pictures_are_those_of_transformers(clip: ClipView, photos: Photos) -> None:
    """Plain variants see the whole photo as CLIP's own preprocessing shows it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from facegen.models.clip import centre, clip_pixels

    image = photos(1).image
    processor = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    wanted = processor(images=image, return_tensors="pt").pixel_values
    assert torch.allclose(clip_pixels(centre(image, 112)), wanted, atol=1e-6)


def test_what_each_variant_sees(variant: IPAdapter, clip: ClipView, model: Model, photos: Photos) -> None:
    seen = variant.gather([photos(1), photos(2)])
    assert seen.shape == ((1, 2, 1, POOLED) if variant.variant == "plain" else (1, 2, 5, CLIP))
    (condition,) = variant.conditions([photos(1), photos(2)], ASKED, model)
    assert isinstance(condition, TokenCondition)
    tokens = {"plain": 4, "plus": 3, "plus-face": 3, "full-face": 5}[variant.variant]
    assert condition.tokens.shape == (2, 1, 2 * tokens, model.text_width), "photos stand side by side"
    assert condition.scale == 1.0
    face = cut_out(photos(1).image, photos(1).points)
    assert face.size[0] == face.size[1] < max(photos(1).image.size)


def test_the_other_half_sees_grey(variant: IPAdapter, clip: ClipView, model: Model) -> None:
    """Zero pixels through CLIP for patch tokens, zeros for the pooled embedding; also for photos of nobody."""
    zero = torch.zeros(1, 3, clip.size, clip.size)
    grey = torch.zeros(1, 1, POOLED) if variant.variant == "plain" else clip.features(zero)
    shape = (1, 5, CLIP) if variant.variant != "plain" else (1, 1, POOLED)
    uncond, cond = variant.tokens(torch.zeros(shape))
    # Rows of one matrix product: how it is cut among threads moves the last bit.
    assert torch.allclose(uncond, cond, atol=1e-6)
    assert torch.allclose(uncond, variant.projector(grey), atol=1e-6)
    some = variant.tokens(torch.ones(2, *shape[1:]))
    assert torch.allclose(some[0, :1], uncond, atol=1e-6)
    assert not torch.allclose(some[1, :1], uncond, atol=1e-3)


def test_files_keep_the_variant(
    variant: IPAdapter, model: Model, weights: Path, tmp_path: Path, photos: Photos
) -> None:
    file = variant.save(tmp_path / "models")
    names = {"plain": "ip-adapter_sd15.bin"}
    assert file.name == names.get(variant.variant, f"ip-adapter-{variant.variant}_sd15.bin")
    (tmp_path / "image_encoder").symlink_to(weights / "clip-vit-h")
    for source in (file, tmp_path / "models"):
        again = load_adapter(source, model)
        assert isinstance(again, IPAdapter)
        assert again.variant == variant.variant
        first, second = (one.conditions([photos(1)], ASKED, model)[0] for one in (variant, again))
        assert torch.equal(first.tokens, second.tokens)  # type: ignore[attr-defined]


def test_an_image_encoder_of_another_width(model: Model, clip: ClipView, tmp_path: Path, weights: Path) -> None:
    width = model.text_width
    projector = Resampler(PerceiverSizes(7, width, width, depth=1, heads=1), 3)
    file = IPAdapter.fresh(model, 7, variant="plus", projector=projector).save(tmp_path)
    (tmp_path / "image_encoder").symlink_to(weights / "clip-vit-h")
    with pytest.raises(WrongAdapter, match=r"7 wide, the image encoder in .* gives 24"):
        load_adapter(file, model)


def test_without_an_image_encoder(model: Model, photos: Photos) -> None:
    with pytest.raises(WeightsMissing, match="put its image_encoder beside"):
        made("plus", model, None).conditions([photos(1)], ASKED, model)


def test_features_of_another_encoder(model: Model, clip: ClipView) -> None:
    with pytest.raises(WrongAdapter, match="gives 5 tokens"):
        made("plus", model, clip).tokens(torch.ones(1, 9, CLIP))


def test_families_with_like_keys(model: Model, tmp_path: Path, fresh: Callable[[str], Any]) -> None:
    """Plus has InstantID's keys and plain has those of Arc2Face's expression adapter: width and name tell."""
    assert recognise(made("plus", model, None).save(tmp_path / "plus")) is IPAdapter
    assert recognise(fresh("ip_adapter_faceid").save(tmp_path)).name == "ip_adapter_faceid"
    assert recognise(fresh("instantid").save(tmp_path / "instantid")).name == "instantid"
    shapes = {"image_proj.proj.weight": (8, 55), "ip_adapter.1.to_k_ip.weight": (4, 4)}
    assert not IPAdapter.detect(shapes, "exp_adapter.bin")
    assert IPAdapter.detect({**shapes, "image_proj.proj.weight": (8, 1024)}, "any.bin")
    assert not Sight(None).pooled


# --- ID-Animator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def animator(model: Model, clip: ClipView) -> IDAnimator:
    width = model.text_width
    sizes = PerceiverSizes(CLIP, width, width, depth=1, heads=1)
    return shaken(IDAnimator.fresh(model, CLIP, sizes=sizes, rank=2, clip=clip))


def test_photos_are_averaged_as_tokens(animator: IDAnimator, model: Model, photos: Photos) -> None:
    both = animator.conditions([photos(1), photos(2)], ASKED, model)[0]
    alone = [animator.conditions([photos(seed)], ASKED, model)[0] for seed in (1, 2)]
    mean = (alone[0].tokens + alone[1].tokens) / 2  # type: ignore[attr-defined]
    assert torch.allclose(both.tokens, mean, atol=1e-6)  # type: ignore[attr-defined]
    assert both.scale == 0.8


def test_lora_is_on_the_text_attention_alone(animator: IDAnimator, model: Model, call: Call) -> None:
    assert set(animator.streams.lora or {}) == {layer.index for layer in model.attention_layers if layer.cross}
    features = torch.ones(1, 5, CLIP)
    conditions = animator.conditions_from_embeddings(features, model, replace(ASKED, scale=0.0))
    assert torch.equal(call(conditions), call([]))


def test_the_face_is_aligned_small_and_enlarged(animator: IDAnimator, clip: ClipView, photos: Photos) -> None:
    from facegen.face.align import norm_crop
    from facegen.models.clip import clip_pixels

    photo = photos(1)
    crop = Image.fromarray(np.asarray(norm_crop(photo.image, photo.points, 112))).resize((112, 112))
    wanted = clip.features(clip_pixels(np.array(crop)))
    assert torch.allclose(animator.gather([photo])[0], wanted, atol=1e-6)


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_checkpoints_of_the_training(animator: IDAnimator, model: Model, tmp_path: Path, wrapped: str) -> None:
    tensors = checkpoints.read(animator.save(tmp_path / "own"))
    old = {"image_proj.": "image_proj_model.", "face_adapter.": "adapter_modules."}
    renamed = {}
    for key, value in tensors.items():
        prefix = next(name for name in old if key.startswith(name))
        renamed[wrapped + old[prefix] + key.removeprefix(prefix)] = value
    assert any(key.endswith("1.to_q_lora.down.weight") for key in renamed)
    torch.save({"state_dict": renamed, "epoch": 3}, tmp_path / "animator.ckpt")
    again = load_adapter(tmp_path, model)
    assert isinstance(again, IDAnimator)
    features = torch.ones(1, 5, CLIP)
    assert torch.equal(again.tokens(features)[1], animator.tokens(features)[1])
    torch.save({"state_dict": {**renamed, "optimizer.w": torch.ones(1)}}, tmp_path / "more.ckpt")
    with pytest.raises(CheckpointBroken, match=r"do not belong there: optimizer\.w"):
        load_adapter(tmp_path / "more.ckpt", model)
