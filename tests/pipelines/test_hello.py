"""The README's first command, on tiny weights: a labelled sheet and its portraits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from facegen import metadata
from facegen.cli import main
from facegen.hello import LOOKS
from facegen.world.words import parse_prompt


@pytest.fixture
def whole(tiny: Path, tiny_pack: Path, tmp_path: Path) -> Path:
    """A model that brings its own pack and adapters, laid out as mini is."""
    shutil.copytree(tiny, tmp_path / "whole")
    shutil.copytree(tiny_pack, tmp_path / "whole" / "pack")
    return tmp_path / "whole"


def test_a_sheet_and_its_portraits(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--model", str(whole), "--count", "3", "--steps", "1", "--device", "cpu", "-o", str(out), "--json"]
    assert main(["hello", "example:12", *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for _, prompt in LOOKS[:3]]
    assert sorted(path.name for path in out.iterdir()) == [
        "hello-1.png", "hello-2.png", "hello-3.png", "hello-sheet.png",
    ]  # fmt: skip
    record = metadata.read(out / "hello-2.png")
    assert record.photos()[0]["path"] == "example:12"
    assert len(record.request["adapters"]) == 1
    with Image.open(out / "hello-sheet.png") as sheet:
        assert sheet.width > 3 * 192


def test_every_look_asks_for_what_can_be_judged() -> None:
    assert len(LOOKS) == 12
    assert all(parse_prompt(prompt) for _, prompt in LOOKS)
