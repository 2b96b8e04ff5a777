"""Hands and things over finished pictures."""

from __future__ import annotations

import pytest
import torch

from facegen import examples
from facegen.world.front import THINGS, cover
from facegen.world.render import PARSING, Rendering, render

FRONT = PARSING.index("front")


@pytest.fixture(scope="module")
def drawn() -> Rendering:
    return render(examples.scene("example:4"), 96)


def _covered(drawn: Rendering, kind: str | None, seed: int = 0, chance: float = 1.0) -> tuple[torch.Tensor, ...]:
    pictures, classes = drawn.rgb.expand(12, -1, -1, -1), drawn.parsing.expand(12, -1, -1)
    return cover(pictures, classes, torch.Generator().manual_seed(seed), chance=chance, kind=kind)


@pytest.mark.parametrize("kind", THINGS)
def test_a_thing_has_its_class_and_a_look_of_its_own(drawn: Rendering, kind: str) -> None:
    pictures, classes = _covered(drawn, kind)
    front = classes == PARSING.index("cloth" if kind == "cloth" else "front")
    if kind == "cloth":
        front &= drawn.parsing != PARSING.index("cloth")
    other = classes != drawn.parsing
    assert {PARSING[one] for one in classes[other].unique().tolist()} <= {"front", "cloth"}
    assert classes.dtype == drawn.parsing.dtype
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    share = front.float().mean((1, 2))
    assert float(share.max()) < 0.8
    assert int((share > 0.01).sum()) >= 8
    changed = (pictures - drawn.rgb).abs().amax(1) > 0.02
    assert float(changed[front].float().mean()) > 0.9


def test_hands_reach_over_the_face_from_the_border(drawn: Rendering) -> None:
    front = _covered(drawn, "hand")[1] != drawn.parsing  # with its sleeve
    rim = torch.cat([front[:, 0], front[:, -1], front[:, :, 0], front[:, :, -1]], 1)
    assert int(rim.any(1).sum()) >= 10
    face = torch.isin(drawn.parsing, torch.tensor([PARSING.index(name) for name in ("skin", "nose")]))
    assert int((front & face).flatten(1).any(1).sum()) >= 8


def test_the_same_generator_draws_the_same_and_chance_is_kept(drawn: Rendering) -> None:
    first, again, other = (_covered(drawn, None, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    pictures, classes = _covered(drawn, None, chance=0.0)
    assert torch.equal(pictures, drawn.rgb.expand_as(pictures))
    assert torch.equal(classes, drawn.parsing.expand_as(classes))
    assert 0 < int((_covered(drawn, None, chance=0.5)[1] == FRONT).flatten(1).any(1).sum()) < 12
    with pytest.raises(ValueError, match="no thing called 'foot'"):
        _covered(drawn, "foot")
