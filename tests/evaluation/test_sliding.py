"""The matrix of the sliders: zero for what moves nothing, and what a painter does move stands in its column."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageEnhance

from facegen.evaluation.edits import Bench, Plan, run
from facegen.evaluation.judges import load_judges
from facegen.evaluation.sliding import COLUMNS, OWN, matrix, read
from facegen.models.sliders import SLIDERS

PLAN = Plan(people=2, steps=1, size=96)


@dataclass
class Painter:
    """Hands back the photo of the person, darker by the slider's strength if it is told to."""

    darkens: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, task: str, **fields: Any) -> Any:
        self.asked.append(fields)
        photo: Image.Image = fields["faces"][0]
        strength = sum(fields.get("sliders", {}).values()) if self.darkens else 0
        picture = ImageEnhance.Brightness(photo).enhance(1 - 0.3 * strength)
        return type("Made", (), {"images": [picture], "reports": []})()


def test_every_row_has_a_slider_and_a_column() -> None:
    assert set(OWN) <= set(SLIDERS)
    assert {column for column, _ in OWN.values()} == set(COLUMNS)


def test_sliders_that_move_nothing_leave_the_matrix_at_zero(mini: Path) -> None:
    painter, seen = Painter(), list[tuple[int, int]]()
    table = run("sliders", painter, PLAN, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(painter.asked), len(painter.asked)) == (46, 46)
    assert set(table.rows) == {"none", *OWN}
    for name, row in table.rows.items():
        if name == "none":
            assert row["likeness"] > 0.9
            continue
        assert all(row[column] == 0 for column in COLUMNS)
        assert row["same person"] == pytest.approx(1.0)
        assert (row["monotone"], row["counted as same"], row["pixels still"]) == (0, 1, 1)
        assert row["hit"] == row["hit at rest"]


def test_what_moves_stands_in_its_column(mini: Path) -> None:
    bench = Bench(Painter(darkens=True), load_judges(mini), PLAN, lambda done, total: None)
    with torch.no_grad():
        first = bench.drawn(0)
        rows = matrix(bench, first, ("skin", "blond"))
    assert rows["skin"]["monotone"] == 1
    assert rows["skin"]["skin light"] < -0.2
    assert rows["blond"]["monotone"] == 0  # its hair went dark
    assert rows["blond"]["pixels still"] < 0.5


def test_lightness_of_what_is_not_there_is_not_known(mini: Path) -> None:
    with torch.no_grad():
        found = read(load_judges(mini), [Image.new("RGB", (96, 96), "white")])
    assert found.shape == (1, len(COLUMNS))
    assert bool(found[0, COLUMNS.index("age")].isfinite())
