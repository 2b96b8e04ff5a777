"""The quick walk gives what diffusers' forward gives, under everything that may act, and steps aside where it must."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.attention.weights import KV
from facegen.conditions import (
    Condition,
    ControlCondition,
    LoraCondition,
    LowRankWeights,
    ReferenceCondition,
    TextCondition,
    TokenCondition,
)
from facegen.models import packed, quick
from facegen.models.base import Model
from facegen.models.packed import pack, unpack
from facegen.models.shortcut import Shortcut

pytestmark = pytest.mark.skipif(not packed.available(), reason="this PyTorch has no oneDNN")
STEP = torch.tensor(400)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sdxl"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model.from_pretrained(request.getfixturevalue(request.param), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


@pytest.fixture(scope="module")
def acting(model: Model, text: TextCondition) -> dict[str, list[Condition]]:
    """Conditions of every kind that reaches into the UNet, by name."""
    from diffusers import ControlNetModel

    layers = {layer.index: KV(model.text_width, layer.width) for layer in model.attention_layers if layer.cross}
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    tokens = TokenCondition(tokens=draw(1, 2, 1, 4, model.text_width), layers=layers, mask=mask, scale=0.7)
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for place, parameter in enumerate(net.controlnet_down_blocks.parameters()):
        parameter.data = draw(place, *parameter.shape) / 20
    net.eval().requires_grad_(False)
    image = draw(2, 1, 3, 64, 64).sigmoid()
    own = ControlCondition(controlnet=net, image=image, embeds=draw(3, 2, 1, 5, model.text_width), mask=mask)
    states = model.reference_states(draw(4, 1, 4, 8, 8), 300, text)
    names = [name for name, part in model.unet.named_modules() if name.endswith(("to_q", "conv1", "ff.net.0.proj"))]
    low = {name: _low(model.unet.get_submodule(name), place) for place, name in enumerate(names)}
    return {
        "nothing": [],
        "tokens": [tokens],
        "control": [ControlCondition(controlnet=net, image=image, scale=0.6)],
        "control with tokens": [own],
        "reference": [ReferenceCondition(states=states, scale=0.5)],
        "lora": [LoraCondition(layers=low, scale=0.8)],
        "all": [tokens, own, ReferenceCondition(states=states), LoraCondition(layers=low)],
    }


def _low(part: Any, seed: int) -> LowRankWeights:
    shape = part.weight.shape
    return LowRankWeights(draw(seed, 2, *shape[1:]) / 8, draw(seed + 1, shape[0], 2, *[1] * (len(shape) - 2)) / 8, 1.0)


def predicted(model: Model, conditions: list[Condition], sample: Tensor, guidance: bool = True) -> Tensor:
    batch = len(sample) // 2 if guidance else len(sample)
    with torch.no_grad(), model.prepare(conditions, batch, guidance) as prepared:
        return model.predict(sample, STEP, prepared.throughout())


class Packed:
    """The model and its ControlNets packed inside the `with`."""

    def __init__(self, model: Model, conditions: list[Condition]) -> None:
        self.parts = [model.unet, *(one.controlnet for one in conditions if isinstance(one, ControlCondition))]

    def __enter__(self) -> None:
        pack(*self.parts)

    def __exit__(self, *error: object) -> None:
        unpack(*self.parts)


@pytest.mark.parametrize("name", ["nothing", "tokens", "control", "control with tokens", "reference", "lora", "all"])
def test_equals_the_plain_forward(
    model: Model, text: TextCondition, acting: dict[str, list[Condition]], name: str
) -> None:
    conditions = [text, *acting[name]]
    halves = torch.cat([draw(5, 1, 4, 8, 8)] * 2)
    for sample, guidance in ((halves, True), (draw(6, 2, 4, 8, 8), True), (draw(7, 1, 4, 8, 8), False)):
        exact = predicted(model, conditions, sample, guidance)
        with Packed(model, conditions):
            assert quick.plan(model.unet) is not None
            found = predicted(model, conditions, sample, guidance)
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert quick.plan(model.unet) is None  # not packed any more


def test_sizes_that_halve_unevenly(model: Model, text: TextCondition) -> None:
    sample = torch.cat([draw(8, 1, 4, 7, 9)] * 2)
    exact = predicted(model, [text], sample)
    with Packed(model, []):
        assert torch.allclose(predicted(model, [text], sample), exact, atol=1e-5)


def test_what_both_halves_share_is_computed_once(model: Model, text: TextCondition) -> None:
    rows: list[int] = []
    conv: Any = model.unet.conv_in
    hook = conv.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    watched = conv.register_forward_hook(lambda module, args, output: None)  # a hooked layer is called as a module
    try:
        with Packed(model, []):
            predicted(model, [text], torch.cat([draw(5, 1, 4, 8, 8)] * 2))
            predicted(model, [text], draw(6, 2, 4, 8, 8))
    finally:
        hook.remove()
        watched.remove()
    # SDXL's halves differ in their time embedding: a pooled prompt is in it.
    assert rows == [2 if model.extra_channels or text.pooled is not None else 1, 2]


def test_a_short_step_equals_the_whole_one_at_the_same_latents(
    model: Model, text: TextCondition, acting: dict[str, list[Condition]]
) -> None:
    conditions = [text, *acting["control"]]
    sample = torch.cat([draw(5, 1, 4, 8, 8)] * 2)
    with (
        Packed(model, conditions),
        torch.no_grad(),
        model.prepare(conditions, 1, True) as prepared,
    ):
        shortcut = Shortcut(model)
        whole = shortcut.predict(sample, STEP, prepared.throughout(), whole=True)
        short = shortcut.predict(sample, STEP, prepared.throughout(), whole=False)
        assert torch.allclose(short, whole, atol=1e-5)


def test_gradients_and_other_networks_take_the_usual_way(model: Model, text: TextCondition) -> None:
    sample = draw(5, 2, 4, 8, 8).requires_grad_()
    with Packed(model, []):
        with model.prepare([text], 1, True) as prepared:
            model.predict(sample, STEP, prepared.throughout()).sum().backward()
        other = copy.deepcopy(model.unet)
        assert quick.plan(other) is not None
        odd = copy.deepcopy(model.unet)
        odd.down_blocks[0].resnets[0].output_scale_factor = 2.0
        assert quick.plan(odd) is None
    assert sample.grad is not None
    assert sample.grad.isfinite().all()


def test_a_frozen_convolution_holds_its_weights_once() -> None:
    layer = torch.nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    before = layer.weight.clone()
    pack(layer)
    x = draw(1, 1, 16, 8, 8)
    with torch.no_grad():
        first = layer(x)
        assert "weight" not in layer._parameters
        assert torch.equal(layer.state_dict()["weight"], before)
        layer(x)
        assert torch.equal(copy.deepcopy(layer).weight, before)
        layer(x)
        layer.weight.mul_(2)
        assert not torch.allclose(layer(x), first)
        layer.load_state_dict({"weight": before, "bias": layer.bias})
        assert torch.equal(layer(x), first)
    assert layer.double().weight.dtype == torch.float64


def test_wearing_a_lora_leaves_packed_weights_where_they_are(
    model: Model, text: TextCondition, acting: dict[str, list[Condition]]
) -> None:
    conditions = [text, *acting["lora"]]
    with Packed(model, []):
        conv: Any = model.unet.conv_in
        predicted(model, conditions, draw(6, 2, 4, 8, 8))
        laid = conv.__dict__["_laid"]
        predicted(model, conditions, draw(6, 2, 4, 8, 8))
        assert conv.__dict__["_laid"] is laid
