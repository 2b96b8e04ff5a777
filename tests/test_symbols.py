"""What facegen takes from the libraries that change most, in one list: an upgrade that breaks us is seen here first.

tests/symbols.json is that list. FACEGEN_UPDATE_SYMBOLS=1 writes it anew from the code.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("symbols.json")
FOLDERS = ("facegen", "adapters", "pipelines", "demos")
PACKAGES = ("diffusers", "insightface", "peft", "transformers")


def is_ours(name: str) -> bool:
    """Whether a dotted name belongs to one of the packages."""
    return name.split(".")[0] in PACKAGES


@cache
def module(name: str) -> ModuleType | None:
    """The module of a dotted name, None where it names something inside a module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def symbols(source: str) -> Iterator[str]:
    """Everything a file takes from the packages: imports, inside functions and for types too, and what it reads off the
    modules and classes that it imports.
    """
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name):
                    yield alias.name
                    bound[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_ours(name.value):
                yield name.value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (found := _read(node, bound)):
            yield found


def _read(node: ast.Attribute, bound: dict[str, str]) -> str | None:
    """`diffusers.models.X` and `X.from_config` → their names; None for what is read off an object."""
    parts = ast.unparse(node).split(".")
    start = bound.get(parts[0])
    if start is None or not all(part.isidentifier() for part in parts):
        return None
    name = start
    for part in parts[1:]:
        if module(name) is None and not isinstance(resolved(name), type):
            return None
        name = f"{name}.{part}"
    return name


def resolved(name: str) -> Any:
    """What a dotted name stands for; AttributeError where the installed version does not have it."""
    found = module(name)
    if found is not None:
        return found
    home, _, last = name.rpartition(".")
    return getattr(resolved(home), last)


@cache
def used() -> dict[str, list[str]]:
    """Every symbol by package, sorted; of a chain `a.b.c` each link."""
    found: set[str] = set()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder != "facegen" or path.relative_to(ROOT / folder).parts[0] not in FOLDERS:
                found |= set(symbols(path.read_text(encoding="utf-8")))
    found |= {f"diffusers.{name}" for name in by_name()}
    return {package: sorted(one for one in found if one.split(".")[0] == package) for package in PACKAGES}


def by_name() -> set[str]:
    """The schedulers, which are read off diffusers by names in a table."""
    from facegen.schedulers import SCHEDULERS

    return {name for name, _ in SCHEDULERS.values()}


def allowed() -> dict[str, list[str]]:
    """The list."""
    listed: dict[str, list[str]] = json.loads(LIST.read_text(encoding="utf-8"))
    return listed


def test_the_list_is_what_the_code_takes() -> None:
    if os.environ.get("FACEGEN_UPDATE_SYMBOLS"):
        LIST.write_text(json.dumps(used(), indent=2) + "\n", encoding="utf-8")
    new = {package: sorted(set(names) - set(allowed()[package])) for package, names in used().items()}
    gone = {package: sorted(set(names) - set(used()[package])) for package, names in allowed().items()}
    assert not any(new.values()), f"taken, but not in {LIST.name}: {new}"
    assert not any(gone.values()), f"in {LIST.name}, but no longer taken: {gone}"


@pytest.mark.parametrize("symbol", [one for names in allowed().values() for one in names] if LIST.is_file() else [])
def test_the_installed_version_has_it(symbol: str) -> None:
    assert resolved(symbol) is not None


def test_nothing_else_is_read_by_a_name_that_is_made_up() -> None:
    """`getattr(diffusers, name)` escapes the list; only the table of schedulers may do it."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "facegen" and path.relative_to(ROOT / folder).parts[0] in FOLDERS:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                    name = ast.unparse(node.args[0])
                    if is_ours(name):
                        found.append(str(path.relative_to(ROOT)))
    assert set(found) <= {"facegen/schedulers.py"}


def test_every_way_of_taking_is_seen() -> None:
    source = """
import diffusers
import transformers.models.clip as clip
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from peft import LoraConfig
def load(name):
    from diffusers.models import unets as nets
    import insightface.app
    import importlib
    importlib.import_module("diffusers.utils")
    return nets.unet_2d_condition.UNet2DConditionModel, diffusers.DDIMScheduler, clip.CLIPTextModel.from_pretrained
"""
    found = set(symbols(source))
    assert found >= {
        "diffusers",
        "diffusers.utils",
        "diffusers.models.unets",
        "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
        "diffusers.DDIMScheduler",
        "peft.LoraConfig",
        "insightface.app",
    }
    assert "transformers.models.clip.CLIPTextModel.from_pretrained" in found
