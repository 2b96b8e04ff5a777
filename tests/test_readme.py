"""The README says what the code does."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path

import pytest

from facegen import cli
from facegen.pipeline import task, tasks
from facegen.request import table

MARKED = re.compile(r"(<!-- fields of (\w+): begin -->\n)(.*?)(<!-- fields of \w+: end -->)", re.DOTALL)


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def _blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


def test_tables_of_fields_are_up_to_date(root: Path, readme: str) -> None:
    """FACEGEN_UPDATE_README=1 writes them anew."""
    fresh = MARKED.sub(lambda found: f"{found[1]}{table(task(found[2]).request_class)}\n{found[4]}", readme)
    if os.environ.get("FACEGEN_UPDATE_README"):
        (root / "README.md").write_text(fresh, encoding="utf-8")
        return
    assert readme == fresh, "run FACEGEN_UPDATE_README=1 python -m pytest tests/test_readme.py"


def test_every_task_has_its_table(readme: str) -> None:
    assert {found[2] for found in MARKED.finditer(readme)} == set(tasks())


def test_linked_files_exist(root: Path, readme: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)|<img[^>]+src=\"([^\"]+)\"", readme)
    assert links
    missing = [link for pair in links for link in pair if link and not (root / link).exists()]
    assert not missing


def test_python_examples_are_python(readme: str) -> None:
    blocks = _blocks(readme, "python")
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_commands_are_known(readme: str) -> None:
    """Every `facegen …` line of the README passes the command line's own parser."""
    known = cli.commands()
    lines = [line.split("#")[0] for block in _blocks(readme, "bash") for line in block.splitlines()]
    calls = [line.split("&&")[-1].strip().removeprefix(".venv/bin/") for line in lines]
    shown = [shlex.split(call)[1:] for call in calls if call.startswith("facegen ")]
    assert shown
    for verb, *words in shown:
        assert verb in known, verb
        _, unknown = cli._parser(verb, known[verb]).parse_known_args(words)
        assert not unknown, (verb, unknown)


def test_constraints_and_readme_name_the_same_torch(root: Path, readme: str) -> None:
    (pinned,) = re.findall(r"^torch==(\S+)$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"torch==([\d.]+\d)", readme + (root / ".ci" / "run").read_text(encoding="utf-8"))
    assert set(named) == {pinned}
