"""Sheets show what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from facegen.errors import OutputUnwritable, WrongRequest
from facegen.world.parameters import EXPRESSION
from facegen.world.render import PARSING
from facegen.world.sheets import SheetPlan, expressions_sheet, parsing_colors, save_sheet, sheet


def test_pictures_stand_in_rows_with_room_for_labels() -> None:
    pictures = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bare = sheet(pictures, 3)
    assert bare.size == (3 * 34 + 2, 2 * 34 + 2)
    labelled = sheet(pictures, 3, ["a label that is much too long"] * 5, ["one", "two"])
    assert labelled.width > bare.width
    assert labelled.height > bare.height
    first = torch.tensor(list(bare.crop((2, 2, 34, 34)).tobytes())).view(32, 32, 3)
    assert torch.equal(first, (pictures[0] * 255).round().long().permute(1, 2, 0))
    with pytest.raises(ValueError, match="at least one"):
        sheet(pictures[:0], 3)


def test_every_class_of_the_parsing_has_a_colour_of_its_own() -> None:
    colors = parsing_colors(torch.arange(len(PARSING)).view(1, 1, -1))
    assert colors.shape == (1, 3, 1, len(PARSING))
    assert len({tuple(color) for color in (colors[0, :, 0].T * 255).round().tolist()}) == len(PARSING)


def test_sheets_are_saved(tmp_path: Path) -> None:
    path = save_sheet(tmp_path / "new" / "truth.png", "truth", SheetPlan(people=1, size=32))
    with Image.open(path) as picture:
        assert picture.width > 5 * 32
    assert expressions_sheet(SheetPlan(people=1, size=16)).width >= 16 * (len(EXPRESSION) + 1)
    with pytest.raises(WrongRequest, match="sheets are"):
        save_sheet(tmp_path / "x.png", "hats")
    with pytest.raises(OutputUnwritable):
        save_sheet(tmp_path / "x.unknown", "truth", SheetPlan(people=1, size=16))
    with pytest.raises(WrongRequest):
        SheetPlan(people=0)
