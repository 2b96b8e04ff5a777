"""What is installed is what lies in the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

LINKS = ("adapters", "demos", "pipelines")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built by setuptools in this environment: nothing is downloaded."""
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(root / name, tree / name)
    for name in ("facegen", *LINKS):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(root / name, tree / name, symlinks=True, ignore=ignored)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative(root: Path, name: str) -> None:
    link = root / "facegen" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_every_package_is_listed(root: Path, project: dict[str, Any]) -> None:
    folders = {".".join(path.parent.relative_to(root).parts) for path in (root / "facegen").rglob("__init__.py")}
    own = {folder for folder in folders if folder.split(".")[-1] not in LINKS}
    for name in LINKS:
        parents = {path.parent.relative_to(root) for path in (root / name).rglob("*.py")}
        own |= {".".join(("facegen", *parent.parts)) for parent in parents}
    assert set(project["tool"]["setuptools"]["packages"]) == own


def test_every_folder_with_code_is_a_package(root: Path) -> None:
    folders = {path.parent for name in ("facegen", *LINKS) for path in (root / name).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_wheel_holds_the_tree(wheel: Path) -> None:
    tree = wheel.parent.parent
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, installed in {"facegen": "facegen", **{name: f"facegen/{name}" for name in LINKS}}.items():
        for path in (tree / folder).rglob("*"):
            relative = path.relative_to(tree / folder)
            linked = folder == "facegen" and relative.parts[0] in LINKS
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if linked or hidden or not path.is_file():
                continue
            if path.suffix in (".py", ".css", ".typed") or relative.parts[0] == "assets":
                expected.add(f"{installed}/{relative.as_posix()}")
    assert inside == expected


def test_wheel_names_its_command_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "facegen = facegen.cli:main" in archive.read(entries).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)


def test_assets_stay_small(root: Path) -> None:
    """80 MB in all and 16 MB a file: what a repository carries without help."""
    sizes = {path: path.stat().st_size for path in (root / "facegen" / "assets").rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 80e6
    assert not [str(path) for path, size in sizes.items() if size > 16e6]


def test_constraints_pin_every_requirement(root: Path, project: dict[str, Any]) -> None:
    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    metadata = project["project"]
    wanted = [*metadata["dependencies"], *metadata["optional-dependencies"]["test"]]
    assert {canonical(re.split(r"[<>=!~ \[;]", line)[0]) for line in wanted} <= pinned
