"""Weights in eight bits: how far off they are, how much memory they take, and that what is worn and lent works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen.conditions import ControlCondition, LoraCondition, LowRankWeights
from facegen.denoise import Guidance, denoise
from facegen.eight_bits import EightBitConv2d, EightBitLinear, Weights, check, shrink
from facegen.errors import WrongRequest
from facegen.memory import Memory, MemoryPlan, weight
from facegen.models.base import Model
from facegen.models.packed import available, pack
from facegen.schedulers import build, start

SECOND = torch.device("cpu:0")  # the CPU by another name: every loan is made
KINDS: tuple[Weights, ...] = ("int8", "fp8")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(24, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 4, 1))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    net[0].weight.data[3] = 0  # as a fresh ControlNet's
    return net.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_off_by_no_more_than_a_step(kind: Weights, dtype: torch.dtype) -> None:
    plain, small = layers(dtype), layers(dtype)
    shrink(small, kind)
    for before, after in zip(plain, small, strict=True):
        if isinstance(before, nn.Unflatten):
            continue
        assert isinstance(after, EightBitLinear | EightBitConv2d)
        exact, found = before.weight.float(), after.whole().float()
        assert after.whole().dtype == dtype
        peak = exact.flatten(1).abs().amax(1).view(-1, *[1] * (exact.ndim - 1))
        rounding = 2 * torch.finfo(dtype).eps * peak
        step = peak / 254 if kind == "int8" else torch.maximum(exact.abs() / 16, peak / 448 / 512)
        assert bool(((found - exact).abs() <= step * 1.001 + rounding).all())
        assert not torch.equal(found, exact)
    assert bool((small[0].whole()[3] == 0).all())
    x = draw(2, 5, 24).to(dtype)
    assert 0 < off(small(x).float(), plain(x).float()) < (0.02 if kind == "int8" else 0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_they_take_a_byte_each_and_survive_a_cast(kind: Weights) -> None:
    net = layers()
    numbers = sum(part.weight.numel() for part in net if hasattr(part, "weight"))
    rest = weight(net) - 4 * numbers
    shrink(net, kind)
    rows = 32 + 12 + 4
    assert weight(net) == numbers + 4 * rows + rest
    before = net.state_dict()
    shrink(net, "int8")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "done once"
    net.to(torch.float16)
    assert weight(net) == numbers + 2 * rows + rest // 2
    assert net(draw(3, 2, 24).half()).dtype == torch.float16


@torch.no_grad()
def picture(model: Model) -> Tensor:
    """Latents of a run with a ControlNet, and a LoRA."""
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(
        model.unet, load_weights_from_unet=False, conditioning_embedding_out_channels=(4, 4, 4, 4)
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in net.requires_grad_(False).eval().parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.memory.place(net)
    layer = next(one for one in model.attention_layers if not one.cross)
    low = LowRankWeights(draw(6, 2, layer.width), draw(7, layer.width, 2))
    worn = LoraCondition(layers={layer.name.removesuffix("processor") + "to_q": low})
    text = model.encode_text(["a face"], "blurry")
    hint = ControlCondition(controlnet=net, image=draw(8, 1, 3, 64, 64).sigmoid())
    scheduler = build("ddim", model.scheduler_config, 2)
    return denoise(model, start(scheduler, draw(9, 1, 4, 8, 8)), scheduler, [text, hint, worn], Guidance(4.0))


def load(folder: Path, **more: Any) -> Model:
    return Model.from_pretrained(folder, dtype=torch.float32, device="cpu", **more)


@pytest.mark.parametrize("family", ["tiny_sd15", "tiny_sdxl"])
def test_a_run_is_near_the_whole_one_and_lending_changes_no_bit(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    exact = picture(load(folder))
    assert torch.equal(picture(load(folder, weights="whole")), exact)
    small = load(folder, weights="int8")
    found = picture(small)
    assert 0 < off(found, exact) < 0.03
    for offload in ("model", "sequential"):
        model = load(folder, weights="int8")
        model.memory = Memory(MemoryPlan(SECOND, torch.float32, offload), weights="int8")
        for network in (model.unet, model.vae, *model.text_encoders().values()):
            model.memory.place(network)
        assert torch.equal(picture(model), found)


def test_what_shrinks_and_what_stays(tiny_sdxl: Path) -> None:
    plain, small = load(tiny_sdxl), load(tiny_sdxl, weights="int8")
    for name, network in {"unet": small.unet, **small.text_encoders()}.items():
        assert weight(network) < weight(getattr(plain, name))
        assert not [one for one in network.modules() if type(one) is nn.Linear]
    assert weight(small.vae) == weight(plain.vae)
    assert [type(part) for part in (small.unet.conv_in, small.unet.conv_out)] == [nn.Conv2d] * 2
    assert small.dtype == small.unet.dtype == torch.float32


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
def test_packing_takes_what_is_whole_and_leaves_the_rest(tiny_sd15: Path) -> None:
    model = load(tiny_sd15, weights="int8")
    plain = picture(model)
    kept = weight(model.unet)
    pack(model.unet, *model.text_encoders().values())
    found = picture(model)
    assert float((found - plain).abs().max()) < 1e-4 * float(plain.abs().max())
    assert weight(model.unet) <= kept
    assert any(isinstance(part, EightBitConv2d) for part in model.unet.modules())


def test_the_pipeline_takes_the_choice_and_mini_stays_near(mini: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline

    pipe, small = (GeneratePipeline.from_pretrained("mini", weights=kind) for kind in ("whole", "int8"))
    assert weight(small.model.unet) < 0.35 * weight(pipe.model.unet)
    x, now = draw(4, 2, *pipe.model.latent_shape(64, 64)), torch.tensor(400)

    def predicted(model: Model) -> Tensor:
        text = model.encode_text(["a person with red hair"], ["blurry"])
        with torch.no_grad(), model.prepare([text], 1, True) as prepared:
            return model.predict(x, now, prepared.throughout())

    assert 0 < off(predicted(small.model), predicted(pipe.model)) < 0.03


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(WrongRequest, match="whole, int8, fp8"):
        check("int4", SECOND)
    with pytest.raises(WrongRequest, match="int8"):
        check("fp8", torch.device("mps"))
