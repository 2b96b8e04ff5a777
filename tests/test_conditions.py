"""Conditions: what they refuse, when they act, how strongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from facegen.attention.weights import KV
from facegen.conditions import (
    ChannelsCondition,
    Condition,
    ControlCondition,
    KeepCondition,
    ReferenceCondition,
    TextCondition,
    TokenCondition,
    in_span,
    pair,
    scale_at,
)
from facegen.errors import WrongMask, WrongRequest


def test_a_span_holds_whole_steps_only() -> None:
    """The rule of diffusers' control_guidance_start and _end."""
    acting = [i for i in range(10) if in_span((0.2, 0.75), i, 10)]
    assert acting == [2, 3, 4, 5, 6]
    assert all(in_span((0.0, 1.0), i, 7) for i in range(7))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0]),
        ([0.0, 1.0], [0.0, 0.5, 1.0]),
        ([0.3], [0.3, 0.3, 0.3]),
        (lambda progress: 1 - progress, [1.0, 0.5, 0.0]),
    ],
)
def test_scale_curves(scale: Any, expected: list[float]) -> None:
    assert [scale_at(scale, i, 3) for i in range(3)] == pytest.approx(expected)


def test_strength_is_zero_outside_the_span() -> None:
    condition = Condition(span=(0.5, 1.0), scale=[1.0, 2.0, 3.0, 4.0])
    assert [condition.strength(i, 4) for i in range(4)] == [0.0, 0.0, 3.0, 4.0]
    assert not condition.constant
    assert Condition(scale=0.4).constant


@pytest.mark.parametrize("span", [(-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_wrong_spans_are_refused(span: tuple[float, float]) -> None:
    with pytest.raises(WrongRequest, match="span"):
        Condition(span=span)


def test_wrong_shapes_are_refused() -> None:
    flat = torch.zeros(1, 4, 8)
    with pytest.raises(WrongRequest, match="pair"):
        TextCondition(embeds=flat)
    with pytest.raises(WrongRequest, match="pair"):
        TokenCondition(tokens=flat, layers={})
    with pytest.raises(WrongRequest, match="pair"):
        ReferenceCondition(states={0: flat})
    with pytest.raises(WrongRequest, match="pair"):
        ChannelsCondition(channels=flat)
    with pytest.raises(WrongRequest, match="height"):
        ControlCondition(controlnet=torch.nn.Identity(), image=flat)
    with pytest.raises(WrongMask):
        TokenCondition(tokens=torch.zeros(2, 1, 4, 8), layers={}, mask=torch.ones(8, 8))
    with pytest.raises(WrongMask):
        KeepCondition(latents=torch.zeros(1, 4, 8, 8), mask=torch.ones(1, 8, 8), noise=torch.zeros(1, 4, 8, 8))
    with pytest.raises(WrongRequest, match="same shape"):
        KeepCondition(latents=torch.zeros(1, 4, 8, 8), mask=torch.ones(1, 1, 8, 8), noise=torch.zeros(1, 4, 4, 4))


def test_a_prompt_has_no_strength() -> None:
    with pytest.raises(WrongRequest, match="guidance"):
        TextCondition(embeds=torch.zeros(2, 1, 4, 8), scale=0.5)


def test_a_gated_stream_needs_its_query() -> None:
    tokens = torch.zeros(2, 1, 4, 8)
    TokenCondition(tokens=tokens, layers={1: KV(8, 16, own_query=True)}, mix="gated")
    with pytest.raises(WrongRequest, match="to_q"):
        TokenCondition(tokens=tokens, layers={1: KV(8, 16)}, mix="gated")


def test_an_empty_curve_is_refused() -> None:
    with pytest.raises(WrongRequest, match="curve"):
        Condition(scale=[])


def test_pair_stacks_the_halves() -> None:
    both = pair(torch.zeros(3, 5), torch.ones(3, 5))
    assert both.shape == (2, 3, 5)
    assert both[0].sum() == 0
    assert both[1].sum() == 15
