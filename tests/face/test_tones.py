"""Tones of skin carried over: towards the photo's, as far as asked, learnt from skin alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facegen.face import tones

SIDE = 96


def _pictures() -> tuple[Tensor, Tensor, Tensor]:
    """A photo of skin, the same painted far too pale with a dark mouth, and the hole it was painted into."""
    ramp = torch.linspace(0.6, 0.4, SIDE).expand(3, SIDE, SIDE) * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)
    hole = torch.zeros(1, SIDE, SIDE)
    hole[:, 16:80, 16:80] = 1
    pale = torch.where(hole > 0, ramp * 0.5 + 0.5, ramp)
    pale[:, 60:64, 36:60] = 0.2
    return ramp, pale, hole


def _skin(made: Tensor) -> tuple[Tensor, Tensor]:
    chances = torch.ones_like(made[:1])
    mouth = chances.clone()
    mouth[:, 60:64, 36:60] = 0
    return mouth, chances


@pytest.mark.parametrize("much", [0.25, 0.5, 1.0])
def test_skin_comes_as_near_as_asked(much: float) -> None:
    seen, made, hole = _pictures()
    skin = (hole * _skin(made)[0]).bool().expand(3, -1, -1)
    before, after = (
        float((one - seen)[skin].mean()) for one in (made, tones.near_skin(made, seen, hole, _skin(made), much=much))
    )
    assert before > 0.25
    assert after == pytest.approx((1 - much) * before, abs=0.01)


def test_features_move_with_the_skin() -> None:
    seen, made, hole = _pictures()
    near = tones.near_skin(made, seen, hole, _skin(made), much=1.0)
    assert bool((near[:, 62, 48] < near[:, 50, 48] - 0.2).all()), "the mouth is still darker"
    same = tones.same_skin(made, seen, hole, (_skin(made)[0], _skin(made)[0]))
    assert torch.equal(same[:, 62, 48], made[:, 62, 48]), "the same person's own lips have their own colour"
    assert float((same - seen)[:, 50, 48].abs().mean()) < 0.05


def test_nothing_asked_or_nothing_known_changes_nothing() -> None:
    seen, made, hole = _pictures()
    assert torch.equal(tones.near_skin(made, seen, hole, _skin(made), much=0.0), made)
    assert torch.equal(tones.near_skin(made, seen, torch.zeros_like(hole), _skin(made), much=1.0), made)
