"""A LoRA folded into packed weights paints what the worn one does, and leaves every bit where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen.conditions import Condition, LoraCondition, LowRankWeights, TextCondition
from facegen.models import folded, packed
from facegen.models.base import Model
from facegen.models.packed import PackedConv2d, pack, unpack

pytestmark = pytest.mark.skipif(not packed.available(), reason="this PyTorch has no oneDNN")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    folder: Path = request.getfixturevalue(request.param)
    model = Model.from_pretrained(folder, dtype=torch.float32, device="cpu")
    pack(model.unet)
    yield model
    unpack(model.unet)


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


def lora(model: Model, seed: int, **more: Any) -> LoraCondition:
    """On every kind of layer: convolutions of 1 and 3, with a stride, linear ones with and without a bias."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "conv1", "conv_shortcut", "0.conv")
    layers = {}
    for place, (name, part) in enumerate(model.unet.named_modules()):
        if name.endswith((*ends, "time_emb_proj")):
            shape = _shape(part)
            down = draw(seed + place, 2, *shape[1:]) / 8
            up = draw(seed + place + 1, shape[0], 2, *[1] * (len(shape) - 2)) / 8
            layers[name] = LowRankWeights(down.half(), up.half(), 0.7)
    return LoraCondition(layers=layers, **more)


def _shape(part: Any) -> tuple[int, ...]:
    if isinstance(part, nn.Conv2d):
        return part.out_channels, part.in_channels, *part.kernel_size
    return part.out_features, part.in_features


def predicted(model: Model, conditions: list[Condition], index: int = 0) -> Tensor:
    with torch.no_grad(), model.prepare(conditions, 1, True) as prepared:
        return model.predict(torch.cat([draw(5, 1, 4, 8, 8)] * 2), torch.tensor(400), prepared.active(index, 4))


def hooked(model: Model) -> int:
    return sum(len(part._forward_hooks) for part in model.unet.modules())


def computed_with(model: Model) -> list[Any]:
    """What the layers compute with: the objects themselves."""
    laid = [part.held() for part in model.unet.modules() if isinstance(part, PackedConv2d)]
    return [one for held in laid for one in held] + list(model.unet.parameters())


def close(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("warm", [False, True])
def test_folded_is_worn_and_nothing_stays(
    model: Model, text: TextCondition, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = lora(model, 100), lora(model, 900, scale=-0.4)
    for part in model.unet.modules():
        part.__dict__.pop("_size", None)  # as if no picture had been made yet
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}  # plain again, too
    if warm:
        predicted(model, [text])
    held = computed_with(model)
    found = predicted(model, [text, one, other])
    if warm:  # else the other convolutions were laid out by now
        assert all(a is b for a, b in zip(computed_with(model), held, strict=True))
    again = predicted(model, [text, one, other])
    plain = predicted(model, [text])
    monkeypatch.setattr(folded, "LARGEST", 0)
    worn = predicted(model, [text, one, other])
    assert close(found, worn)
    assert close(again, worn)
    assert not close(found, plain)
    after = model.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(predicted(model, [text]), plain)


def test_what_folds_costs_a_step_no_hook(model: Model, text: TextCondition) -> None:
    for one, hooks in (
        (lora(model, 100, scale=0.5), False),
        (lora(model, 100, scale=[0.5, 0.9]), True),
        (lora(model, 100, scale=lambda done: 1 - done), True),
        (lora(model, 100, span=(0.0, 0.5)), True),
    ):
        with torch.no_grad(), model.prepare([text, one], 1, True):
            assert hooked(model) == (len(one.layers) if hooks else 0)
    with model.prepare([text, lora(model, 100)], 1, True):
        assert hooked(model) > 0  # with gradients
    assert hooked(model) == 0


def test_beside_a_curve_of_strengths(model: Model, text: TextCondition, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = [text, lora(model, 100, scale=0.5), lora(model, 900, scale=[0.9, 0.1])]
    found = [predicted(model, conditions, index) for index in (0, 3)]
    monkeypatch.setattr(folded, "LARGEST", 0)
    for index, one in zip((0, 3), found, strict=True):
        assert close(one, predicted(model, conditions, index))


def test_an_error_inside_puts_everything_back(model: Model, text: TextCondition) -> None:
    plain = predicted(model, [text])
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), model.prepare([text, lora(model, 100)], 1, True):
        raise RuntimeError("stop")
    assert torch.equal(predicted(model, [text]), plain)


def test_layers_of_another_kind_are_left_to_hooks(model: Model, text: TextCondition) -> None:
    one = lora(model, 100)
    unpack(model.unet.mid_block)
    try:
        with torch.no_grad(), model.prepare([text, one], 1, True):
            assert hooked(model) == sum(name.startswith("mid_block") for name in one.layers) > 0
    finally:
        pack(model.unet.mid_block)
