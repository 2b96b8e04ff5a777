"""The protocols of the tasks: what they ask for, what they count, on a painter whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from facegen.cli import MEASURES
from facegen.evaluation.edits import PROTOCOLS, Plan, Table, run
from facegen.report import Likeness, Matched, Obedience, Report

PLAN = Plan(people=3, steps=1, size=96)
INSIDE = {"pixels changed outside": 0.0, "repaired": 1.0}


@dataclass
class Painter:
    """Hands back the photo of the person as if it had painted it."""

    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, task: str, **fields: Any) -> Any:
        if task == "size":
            return 96, 96 * fields["count"]
        self.asked.append((task, fields))
        people = fields.get("people", ())
        photo = fields.get("source") or (fields.get("faces") or (fields.get("image"),))[0] or people[0][0]
        match = Matched(likeness=Likeness(cosine=1.0, judge="x"), at_home=True)
        report = Report(
            faces=len(people),
            people=(match,) * len(people),
            obedience=Obedience(asked=("a", "b"), hit=("a", "b") if fields.get("repair") else ("a",)),
            measures=INSIDE if fields.get("repair") else {**INSIDE, "repaired": 0.0},
        )
        return type("Made", (), {"images": [photo], "reports": [report]})()


def test_the_command_line_offers_every_protocol() -> None:
    assert set(PROTOCOLS) | {"likeness"} == set(MEASURES)


@pytest.mark.parametrize("name", ["inpaint", "swap", "people", "repair", "expression"])
def test_a_perfect_painter_gets_a_perfect_table(mini: Path, name: str) -> None:
    painter = Painter()
    seen: list[tuple[int, int]] = []
    table = run(name, painter, PLAN, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(painter.asked)
    assert all(fields["seed"] == 1 and fields["num_inference_steps"] == 1 for _, fields in painter.asked)
    rows = table.rows
    if name == "inpaint":
        assert rows["from another photo"]["likeness"] > 0.8
        assert rows["from another photo"]["changed outside"] == 0
        assert rows["the photo (ceiling)"]["likeness"] < 1
    elif name == "swap":
        assert rows["both"]["to source"] > 0.8
        assert rows["both"]["found among 3"] == 1
        assert rows["both"]["expression error"] > 0
        assert rows["the target itself"]["expression error"] == rows["the target itself"]["pose error, degrees"] == 0
    elif name == "people":
        assert rows["2 people, masks"] == {"right count": 1, "likeness": 1, "matched": 1, "in their place": 1}
        assert {len(fields["people"]) for _, fields in painter.asked} == {2, 3}
    elif name == "repair":
        assert (rows["as it is"]["prompt"], rows["repaired"]["prompt"]) == (0.5, 1)
        assert rows["repaired"]["pictures repaired"] == 1
    else:
        assert rows["drawn (ceiling)"]["error"] < rows["no control"]["error"] + 0.2
        assert rows["adapter"]["likeness"] > 0.8
        assert all(bool(fields["expression"]) == (place >= 3) for place, (_, fields) in enumerate(painter.asked))


def test_a_table_is_aligned_and_plain() -> None:
    table = Table("T", {"a": {"x": 1.0}, "bb": {"x": 0.25, "a long column": 2.0}})
    lines = str(table).splitlines()
    assert lines[0] == "T"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].endswith("–")
    assert table.to_json()["rows"]["bb"]["x"] == 0.25
