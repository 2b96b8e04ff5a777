"""Reports as a page."""

from __future__ import annotations

from facegen.demos import reports
from facegen.report import Likeness, Obedience, Provenance, Report

JUDGED = Report(
    likeness=Likeness(cosine=0.6, judge="the judge", ceiling=0.8, floor=0.0, threshold=0.4),
    faces=1,
    obedience=Obedience(asked=("red hair", "glasses"), hit=("red hair",)),
    provenance=Provenance(facegen="1", model="mini", seed=7, licence="free"),
    seconds=1.25,
)


def test_caption_is_short() -> None:
    assert reports.caption(JUDGED) == "likeness 0.60 · prompt 1/2 · seed 7"
    assert reports.caption(Report()) == ""


def test_table_says_yes_and_no() -> None:
    html = reports.table([JUDGED])
    assert "yes 0.60" in html
    assert '<span class="tag yes">red hair</span>' in html
    assert '<span class="tag no">glasses</span>' in html
    assert "strangers are 0.00" in html
    assert reports.table([]) == ""


def test_meter_lies_between_floor_and_ceiling() -> None:
    assert JUDGED.likeness is not None
    assert "width:75%" in reports.meter(JUDGED.likeness)
    assert "left:50%" in reports.meter(JUDGED.likeness)
    assert reports.meter(Likeness(cosine=0.6, judge="j")) == ""


def test_what_is_not_judged_says_why() -> None:
    html = reports.table([Report(not_judged={"likeness": "no face found", "prompt": "no judge"})])
    assert "no face found" in html
    assert "no judge" in html


def test_words_are_escaped() -> None:
    shown = Report(obedience=Obedience(asked=("<b>bold</b>",), hit=()))
    assert "<b>bold" not in reports.table([shown])
    assert "<i>" not in reports.progress(0.5, "<i>x</i>")
