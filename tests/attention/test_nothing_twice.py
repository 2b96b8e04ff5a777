"""What is constant over the steps is computed once per call, and what does not act is not computed at all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.attention.weights import KV
from facegen.conditions import Condition, ControlCondition, TextCondition, TokenCondition
from facegen.denoise import Guidance, denoise
from facegen.models import prepared as prepared_module
from facegen.models.base import Model
from facegen.schedulers import build, start

STEPS = 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


@pytest.fixture
def net(model: Model) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).requires_grad_(False)


def control(net: Any, **more: Any) -> ControlCondition:
    return ControlCondition(controlnet=net, image=draw(1, 1, 3, 64, 64).sigmoid(), **more)


def stream(model: Model, seed: int = 1, **more: Any) -> TokenCondition:
    layers = {layer.index: KV(model.text_width, layer.width) for layer in model.attention_layers if layer.cross}
    return TokenCondition(tokens=draw(seed, 2, 1, 4, model.text_width), layers=layers, **more)


class Calls(Counter[str]):
    """Forward calls by the names given to modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.hooks = [module.register_forward_hook(self._note(name)) for name, module in modules.items()]

    def _note(self, name: str) -> Any:
        def note(*_: Any) -> None:
            self[name] += 1

        return note


def run(model: Model, conditions: list[Condition], size: int = 8) -> Tensor:
    scheduler = build("ddim", model.scheduler_config, STEPS)
    return denoise(model, start(scheduler, draw(3, 1, 4, size, size)), scheduler, conditions, Guidance(5.0))


def text_layer(model: Model) -> Any:
    return next(layer.module for layer in model.attention_layers if layer.cross)


def test_keys_and_hints_are_computed_once_per_call(model: Model, text: TextCondition, net: Any) -> None:
    tokens = stream(model)
    first: Any = next(iter(tokens.layers.values()))
    prompt = text_layer(model)
    calls = Calls(
        prompt_key=prompt.to_k,
        prompt_value=prompt.to_v,
        prompt_query=prompt.to_q,
        stream_key=first.to_k,
        stream_value=first.to_v,
        hint=net.controlnet_cond_embedding,
        control=net.controlnet_mid_block,
    )
    try:
        run(model, [text, tokens, control(net)])
        once = {"prompt_key": 1, "prompt_value": 1, "stream_key": 1, "stream_value": 1, "hint": 1}
        assert calls == {**once, "prompt_query": STEPS, "control": STEPS}
        calls.clear()
        # Nor does a curve of strengths, or a span, compute any of them again.
        run(model, [text, stream(model, 2), control(net, scale=lambda done: 1 - done / 2)])
        assert calls["prompt_key"] == calls["hint"] == 1
    finally:
        for hook in calls.hooks:
            hook.remove()


def test_masks_are_resized_once_per_resolution(
    model: Model, text: TextCondition, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[str, tuple[int, int]]] = []

    def noted(x: Tensor, *, size: tuple[int, int], mode: str = "nearest") -> Tensor:
        sizes.append((mode, size))
        return F.interpolate(x, size=size, mode=mode)

    class Functional:
        interpolate = staticmethod(noted)

    monkeypatch.setattr(prepared_module, "F", Functional)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    run(model, [text, stream(model, mask=mask), stream(model, 2, mask=mask), control(net, mask=mask)])
    assert len(sizes) == len(set(sizes))
    assert {size for mode, size in sizes if mode == "bilinear"} == {(8, 8), (4, 4)}  # of the residuals
    assert {size for mode, size in sizes if mode == "bicubic"} <= {(8, 8), (4, 4)}  # of the attention layers


@pytest.mark.parametrize(
    "idle", [{"scale": 0.0}, {"scale": [0.0, 0.0]}, {"span": (1.0, 1.0)}, {"mask": torch.zeros(1, 64, 64)}]
)
def test_what_never_acts_costs_nothing(model: Model, text: TextCondition, net: Any, idle: dict[str, Any]) -> None:
    tokens = stream(model, **idle)
    first: Any = next(iter(tokens.layers.values()))
    calls = Calls(key=first.to_k, hint=net.controlnet_cond_embedding, control=net.controlnet_mid_block)
    plain = run(model, [text])
    assert torch.equal(run(model, [text, tokens, control(net, **idle)]), plain)
    assert not calls


def test_outside_its_span_a_condition_costs_nothing(model: Model, text: TextCondition, net: Any) -> None:
    """A ControlNet is not run, and a stream is not attended to."""
    tokens = stream(model, span=(0.0, 0.4))
    calls = Calls(control=net.controlnet_mid_block)
    seen: list[int] = []
    with torch.no_grad(), model.prepare([text, tokens, control(net, span=(0.6, 1.0))], 1, True) as prepared:
        for index in range(STEPS):
            now = prepared.active(index, STEPS)
            context = prepared.attention(now, (8, 8))
            seen.append(sum(len(layer.streams) for layer in context.layers.values()))
            model.predict(draw(4, 2, 4, 8, 8), torch.tensor(400), now)
    layers = len(tokens.layers)
    assert seen == [layers, layers, 0, 0, 0]
    assert calls == {"control": 2}


def test_a_curve_of_strengths_stacks_nothing_anew(model: Model, text: TextCondition) -> None:
    people = [stream(model, seed, scale=lambda done, seed=seed: 1 - done / seed) for seed in (2, 3)]
    with torch.no_grad(), model.prepare([text, *people], 1, True) as prepared:
        steps = [prepared.attention(prepared.active(i, STEPS), (8, 8)) for i in range(STEPS)]
        assert prepared.rows(text.embeds) is prepared.rows(text.embeds)
    index = next(iter(people[0].layers))
    groups = [step.layers[index].streams[0] for step in steps]
    assert all(group.key is groups[0].key and group.value is groups[0].value for group in groups)
    assert len({tuple(group.scales.tolist()) for group in groups}) == STEPS


def test_a_curve_of_a_controlnet_leaves_the_layers_alone(model: Model, text: TextCondition, net: Any) -> None:
    conditions = [text, stream(model), control(net, scale=lambda done: 1 - done / 2)]
    with torch.no_grad(), model.prepare(conditions, 1, True) as prepared:
        first, second = (prepared.attention(prepared.active(i, STEPS), (8, 8)).layers for i in (0, 1))
    assert first is second
