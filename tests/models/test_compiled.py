"""Compiled networks give the same, and nothing that changes between steps and calls compiles them anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor

from facegen.attention.weights import KV
from facegen.conditions import Condition, ControlCondition, TokenCondition
from facegen.denoise import Guidance, denoise
from facegen.models.base import Model
from facegen.models.compiled import compile_networks, undo
from facegen.schedulers import build, start


class Counted:
    """A compiler that runs what it is given as it is, and counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        self.count += 1
        return graph.forward


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_steps_adapters_and_scales_compile_nothing_anew(tiny_sd15: Path) -> None:
    model = Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    net.eval().requires_grad_(False)
    for place, parameter in enumerate(net.controlnet_down_blocks.parameters()):
        parameter.data = draw(place, *parameter.shape) / 20

    def adapter(seed: int) -> dict[int, KV]:
        torch.manual_seed(seed)
        return {layer.index: KV(model.text_width, layer.width) for layer in model.attention_layers if layer.cross}

    def painted(layers: dict[int, KV], scale: Any, control: Any, prompt: str, steps: int) -> Tensor:
        conditions: list[Condition] = [
            model.encode_text([prompt], ["blurry"]),
            TokenCondition(tokens=draw(steps, 2, 1, 4, model.text_width), layers=layers, scale=scale),
            ControlCondition(controlnet=net, image=draw(1, 1, 3, 64, 64).sigmoid(), scale=control),
        ]
        scheduler = build("ddim", model.scheduler_config, steps)
        return denoise(model, start(scheduler, draw(2, 1, 4, 8, 8)), scheduler, conditions, Guidance(5.0))

    one, other = adapter(1), adapter(2)
    calls = [
        (one, 0.8, 0.5, "a face", 2),
        (one, 0.3, 1.0, "a hat", 3),
        (other, 1.0, 0.2, "a face", 2),
        (other, lambda done: 1 - done / 2, lambda done: 0.5 + done / 4, "red hair", 4),
    ]
    exact = [painted(*call) for call in calls]
    counted = Counted()
    compile_networks(model.unet, net, backend=counted)
    try:
        found = [painted(*calls[0])]
        once = counted.count
        assert once >= 2  # the UNet and the ControlNet
        found += [painted(*call) for call in calls[1:]]
        assert counted.count == once
    finally:
        undo(model.unet, net)
        torch._dynamo.reset()
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(painted(*calls[0]), exact[0])
