"""Adapters of different families in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.adapter import Adapter, AdapterRequest
from facegen.conditions import Condition, LoraCondition, LowRankWeights
from facegen.models.base import Model

ASKED = AdapterRequest(height=64, width=64)
STREAMS = ("facechain_fact", "id_animator", "ip_adapter", "ip_adapter_faceid", "wplus")
Call = Callable[..., Tensor]
Made = Callable[..., list[Condition]]


@pytest.fixture
def made(fresh: Callable[[str], Adapter], photos: Callable[[int], Any], model: Model) -> Made:
    """made(name, seed, **request): the conditions of a person's adapter."""

    def conditions(name: str, seed: int = 1, **more: Any) -> list[Condition]:
        return fresh(name).conditions([photos(seed)], replace(ASKED, **more), model)

    return conditions


@pytest.mark.parametrize(("first", "second"), list(combinations(STREAMS, 2)))
def test_two_families_in_any_order(first: str, second: str, made: Made, call: Call) -> None:
    a, b = made(first, 1), made(second, 2)
    both = call([*a, *b])
    assert torch.allclose(both, call([*b, *a]), atol=1e-5)
    assert not torch.allclose(both, call(a), atol=1e-4)
    assert not torch.allclose(both, call(b), atol=1e-4)
    assert torch.equal(call([*a, *made(second, 2, scale=0.0)]), call(a)), "strength 0 is not there at all"


def test_prompt_controlnet_tokens_and_loras_together(made: Made, model: Model, call: Call) -> None:
    """The words of PreciseControl, InstantID with its drawing, FACT ahead of the text, and two style LoRAs."""
    layer = next(one for one in model.attention_layers if not one.cross)
    name = layer.name.removesuffix("processor") + "to_q"
    generator = torch.Generator().manual_seed(1)
    loras: list[Condition] = [
        LoraCondition(
            layers={
                name: LowRankWeights(
                    torch.randn(2, layer.width, generator=generator) * 0.3,
                    torch.randn(layer.width, 2, generator=generator) * 0.3,
                )
            }
        )
        for _ in range(2)
    ]
    parts = [
        made("precisecontrol", prompt="a photo of sks person"),
        made("instantid", 2),
        made("facechain_fact", 3),
        loras,
    ]
    whole = call([one for part in parts for one in part])
    for order in list(permutations(parts))[::7]:
        assert torch.allclose(call([one for part in order for one in part]), whole, atol=1e-5)
    for left_out in parts:
        rest = [one for part in parts if part is not left_out for one in part]
        assert not torch.allclose(call(rest), whole, atol=1e-5)
