"""A report is one honest line, and plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from facegen.face.types import Face
from facegen.report import Judges, Likeness, Obedience, Provenance, Report

PROVENANCE = Provenance(facegen="0.1.0", model="mini", adapters={"arc2face": "ab"}, seed=7)


def face(side: float) -> Face:
    return Face(
        box=np.array([0, 0, side, side], np.float32),
        points=np.zeros((5, 2), np.float32),
        score=0.9,
        embedding=np.full(4, side, np.float32),
        image=Image.new("RGB", (8, 8)),
    )


class Detector:
    def __init__(self, *sides: float) -> None:
        self.found = [face(side) for side in sides]

    def faces(self, photo: Any, *, what: str = "photo") -> list[Face]:
        return self.found


class Judge:
    name, ceiling, floor, threshold = "ruler", 0.8, 0.05, 0.4

    def cosine(self, one: Face, references: Sequence[Face]) -> float:
        return float(one.box[2]) / 100


class Words:
    def obedience(self, prompt: str, image: Any) -> Obedience:
        asked = tuple(prompt.split(", "))
        return Obedience(asked=asked, hit=asked[:1])


def test_the_line_says_the_person_the_faces_and_the_prompt() -> None:
    judges = Judges(detector=Detector(10, 71), likeness=Judge(), prompt=Words())
    report = judges.report(None, [face(1)], "red hair, glasses", PROVENANCE)
    assert str(report) == (
        "same person 0.71 (photos of one person 0.80, strangers 0.05) · faces 2 · prompt 1 of 2 (not glasses) · seed 7"
    )
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["likeness"]["same"] is True
    assert plain["provenance"]["ai_generated"] is True
    assert plain["obedience"] == {"asked": ["red hair", "glasses"], "hit": ["red hair"]}


def test_what_is_not_judged_says_why() -> None:
    judges = Judges(detector=Detector(50), reasons={"likeness": "no second pack beside buffalo_l"})
    report = judges.report(None, [face(1)], "x", PROVENANCE)
    assert "likeness not judged: no second pack beside buffalo_l" in str(report)
    assert "prompt not judged: no judge fits these weights" in str(report)
    faceless = Judges(detector=Detector(), likeness=Judge()).report(None, [face(1)], "", PROVENANCE)
    assert str(faceless) == "faces 0 · seed 7 · likeness not judged: no face found"


def test_nobody_asked_for_is_not_judged_as_a_failure() -> None:
    report = Judges(detector=Detector(50), likeness=Judge()).report(None, [], "", PROVENANCE, ["two people"])
    assert str(report) == "faces 1 · seed 7 · two people"


def test_below_the_threshold_it_is_another_person() -> None:
    assert str(Likeness(cosine=0.1, judge="j", threshold=0.4)) == "another person 0.10"
    assert str(Likeness(cosine=0.1, judge="j")) == "likeness 0.10"
    assert str(Report(obedience=Obedience(asked=(), hit=()), faces=1)) == "faces 1"
