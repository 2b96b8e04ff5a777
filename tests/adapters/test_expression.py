"""The expression adapter: units by name, only the layers that carry it, nothing of the person."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.adapter import AdapterRequest
from facegen.adapters.expression import UNITS, Expression, coefficients
from facegen.conditions import TokenCondition
from facegen.errors import WrongRequest
from facegen.models.base import Model


def test_units_by_name() -> None:
    row = coefficients({"smile": 0.7, "gaze_x": -1})
    assert row.shape == (1, len(UNITS))
    assert row[0, UNITS.index("smile")] == pytest.approx(0.7)
    assert int((row != 0).sum()) == 2
    with pytest.raises(WrongRequest, match="There is no expression 'grin'"):
        coefficients({"grin": 1})
    with pytest.raises(WrongRequest, match="smile must be from 0 to 1"):
        coefficients({"smile": -0.5})


def test_a_fresh_one_changes_nothing_and_only_the_later_half_carries_it(
    model: Model, call: Callable[..., Tensor]
) -> None:
    adapter = Expression.fresh(model)
    names = {layer.index: layer.name for layer in model.attention_layers}
    assert adapter.layers
    assert all(names[index].startswith("up_blocks") for index in adapter.layers)
    row = coefficients({"smile": 1.0})
    with torch.no_grad():
        (condition,) = adapter.conditions_from_embeddings(row, model, AdapterRequest())
        assert isinstance(condition, TokenCondition)
        assert condition.layers.keys() == adapter.layers.keys()
        assert torch.allclose(call([condition]), call([]), atol=1e-5)


def test_another_expression_is_another_picture_and_no_strength_is_none(
    model: Model, call: Callable[..., Tensor], fresh: Callable[[str], Any]
) -> None:
    adapter = fresh("expression")
    with torch.no_grad():
        smile, frown, none = (
            call(adapter.conditions_from_embeddings(coefficients(values), model, AdapterRequest(scale=scale)))
            for values, scale in (({"smile": 1.0}, 1.0), ({"frown": 1.0}, 1.0), ({"smile": 1.0}, 0.0))
        )
    assert not torch.allclose(smile, frown, atol=1e-4)
    assert torch.equal(none, call([]))


def test_an_expression_is_read_off_a_photo(mini: Path) -> None:
    from facegen import examples
    from facegen.face.parse import small_net
    from facegen.images import to_pil
    from facegen.world.render import render

    class Seen:
        def __init__(self, **values: float) -> None:
            drawn = render(examples.scene("example:5").with_values(**values), 128)
            self.image, self.points = to_pil(drawn.rgb), drawn.landmarks5[0].numpy()
            self.embedding = self.points[:, 0]

    adapter = Expression.__new__(Expression)
    adapter.reader = small_net(mini / "judges" / "attributes", "for the test")
    with torch.no_grad():
        open_, closed = (adapter.read(Seen(jaw_open=value, smile=0.0)) for value in (0.9, 0.0))
    assert open_[UNITS.index("jaw_open")] > closed[UNITS.index("jaw_open")] + 0.2
