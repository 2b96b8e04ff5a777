"""The protocols of the tasks: what they ask for, what they count, on a painter whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.cli import MEASURES
from facegen.errors import NoFaceFound, WeightsMissing
from facegen.evaluation.edits import PROTOCOLS, WISHES, Plan, Table, not_shown, run
from facegen.evaluation.judges import load_judges
from facegen.report import Likeness, Matched, Obedience, Report
from facegen.world.facts import describe
from facegen.world.sampling import HELD_OUT_FROM, scenes_for
from facegen.world.words import parse_prompt

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
    assert set(PROTOCOLS) | {"likeness", "quality"} == set(MEASURES)


@pytest.mark.parametrize("name", ["inpaint", "swap", "people", "repair", "expression", "geometry", "restore"])
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
        assert rows["both"]["found among 3"] == rows["trained"]["found among 3"] == 1
        assert rows["both"]["expression error"] > 0
        assert rows["the target itself"]["expression error"] == rows["the target itself"]["pose error, degrees"] == 0
    elif name == "people":
        assert rows["2 people, masks"] == {"right count": 1, "likeness": 1, "matched": 1, "in their place": 1}
        assert {len(fields["people"]) for _, fields in painter.asked} == {2, 3}
    elif name == "repair":
        assert (rows["as it is"]["prompt"], rows["repaired"]["prompt"]) == (0.5, 1)
        assert rows["repaired"]["pictures repaired"] == 1
        assert {fields.get("apart") for _, fields in painter.asked} == {None, "layers", "predictions"}
    elif name == "restore":
        assert [len(rows), len(painter.asked)] == [15, 36]
        assert rows["light: restored"].items() >= rows["light: bicubic"].items()  # the painter hands the photo back
        assert rows["light: bicubic"]["PSNR, dB"] > rows["heavy: bicubic"]["PSNR, dB"] + 2
        assert rows["light: bicubic"]["distance"] < rows["heavy: bicubic"]["distance"]
        assert rows["light: bicubic"]["likeness"] > rows["heavy: bicubic"]["likeness"]
        assert {fields.get("alignment") for _, fields in painter.asked} == {None, 0.0}
        assert {fields.get("fidelity") for _, fields in painter.asked} == {None, 1.0}
    elif name == "geometry":
        assert rows["drawn (ceiling)"]["points, % of eyes"] < 15 < rows["depth"]["points, % of eyes"]
        assert rows["drawn (ceiling)"]["parts"] > rows["depth"]["parts"]
        assert rows["drawn (ceiling)"]["edges"] == pytest.approx(1, abs=0.02)
        assert rows["normals"] == rows["no control"]  # the painter hands the photo back
        kinds = [fields.get("geometry_kind") for _, fields in painter.asked[::3]]
        assert kinds == [None, "landmarks", "depth", "normals", "sketch", "landmarks"]
        assert [set(fields["pose"]) for _, fields in painter.asked if "pose" in fields] == [
            {"yaw", "pitch", "roll", "shift_x", "shift_y", "zoom"}
        ] * 3
    else:
        assert -1 <= rows["adapter"]["r smile"] <= 1
        assert rows["drawn (ceiling)"]["error"] < rows["no control"]["error"] + 0.2
        assert rows["adapter"]["likeness"] > 0.8
        ways = [{"expression", "expression_from"} & set(fields) for _, fields in painter.asked]
        assert ways == [set()] * 3 + [{"expression"}] * 3 + [{"expression_from"}] * 3
        given = [fields["expression_from"] for _, fields in painter.asked[6:]]
        assert all(one not in [fields["faces"][0] for _, fields in painter.asked] for one in given)  # somebody else's


def test_a_model_that_never_learnt_to_swap_has_no_such_row(mini: Path) -> None:
    painter = Painter()

    def call(task: str, **fields: Any) -> Any:
        if fields.get("method") == "trained":
            raise WeightsMissing("There is no such net.")
        return painter(task, **fields)

    seen: list[tuple[int, int]] = []
    table = run("swap", call, PLAN, lambda done, total: seen.append((done, total)))
    assert set(table.rows) == {"the target itself", "drawn (ceiling)", "adapters", "guidance", "both"}
    assert table.rows["drawn (ceiling)"]["to source"] > table.rows["the target itself"]["to source"]
    assert table.notes == ("There is no such net.",)
    assert seen[-1] == (12, 12)


def test_a_table_is_aligned_and_plain() -> None:
    table = Table("T", {"a": {"x": 1.0}, "bb": {"x": 0.25, "a long column": 2.0}})
    lines = str(table).splitlines()
    assert lines[0] == "T"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].endswith("–")
    assert table.to_json()["rows"]["bb"]["x"] == 0.25


def test_wishes_are_what_a_picture_does_not_show() -> None:
    scenes = scenes_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 6), [0] * 6)
    chosen = not_shown(scenes, 3)
    for row, wishes in enumerate(chosen):
        assert len(set(wishes)) == 3
        for words in wishes:
            assert not set(parse_prompt(words)) <= set(describe(scenes, row))
    assert {words for wishes in chosen for words in wishes} == set(WISHES)


def test_a_photo_without_a_face_stays_damaged(mini: Path) -> None:
    def blind(task: str, **fields: Any) -> Any:
        raise NoFaceFound("There is no face.")

    seen: list[tuple[int, int]] = []
    rows = run("restore", blind, Plan(people=2, steps=1, size=96), lambda done, total: seen.append((done, total))).rows
    assert rows["heavy: restored"] == {**rows["heavy: bicubic"], "no face found": 1.0}
    assert seen[-1] == (24, 24)  # two people, three degrees, four ways


def test_the_distance_of_looks_is_zero_for_the_same_picture(mini: Path) -> None:
    judges = load_judges(mini)
    pictures = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert judges.distance(pictures, pictures).abs().max() < 1e-6
    nearer, further = (judges.distance(pictures, pictures + level * 0.2) for level in (0.1, 1.0))
    assert (nearer < further).all()
    alone = judges.distance(pictures[:1], pictures[:1] * 0.5)
    assert torch.allclose(alone, judges.distance(pictures, pictures * 0.5)[:1], atol=1e-5)
