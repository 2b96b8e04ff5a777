"""A sheet grows by what is finished, and begins nothing that would not be finished in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.bench.sheet import Sheet


def test_it_stops_in_time_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    table = Sheet(tmp_path / "new" / "table.md", minutes=1)
    for piece in table.each(["a", "b", "c", "d"]):
        clock[0] += 25
        table.add(f"| {piece} |\n")
        assert table.out is not None
        assert f"| {piece} |" in table.out.read_text("utf-8")  # at once
    assert table.out is not None
    assert table.out.read_text("utf-8") == "| a |\n| b |\n\nNo time was left for c, d.\n"


def test_without_a_limit_everything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    table = Sheet()
    assert list(table.each(range(3))) == [0, 1, 2]
    table.add("told")
    assert capsys.readouterr().out == "told"
