"""The order of the house: lower floors import nothing above, and a few habits that a machine can guard."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The checkout holds three packages at its top level that are installed inside facegen.
FOLDERS = {
    "facegen": "facegen",
    "adapters": "facegen.adapters",
    "demos": "facegen.demos",
    "pipelines": "facegen.pipelines",
}

# From the ground up. A module may import from its own floor and from those below.
FLOORS = (
    {"errors", "allocator"},
    {"request", "files", "manifest", "download", "preprocessing"},
    {"images", "hub", "checkpoints"},
    {"attention", "face", "restoration", "world"},
    {"conditions", "examples", "metadata", "look"},
    {"economy", "few_steps", "eight_bits"},
    {"models", "lending", "memory", "schedulers", "given_noise"},
    {"denoise", "sliding"},
    {"patch", "steering"},
    {"adapter", "adapters"},
    {"training", "evaluation", "report"},
    {"loading", "repair"},
    {"pipeline"},
    {"pipelines"},
    {"doctor", "hello", "weights_verb"},
    {"cli", "demos", "__main__"},  # the command line opens the demo, the demo takes no task from it
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# One thing per file: the files of these folders are strangers to one another.
STRANGERS = ("facegen.adapters", "facegen.pipelines")


@cache
def files() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            # rglob does not follow the links facegen/{adapters,demos,pipelines}; should it ever, each file counts once.
            if folder == "facegen" and relative.parts[0] in FOLDERS:
                continue
            parts = (package, *relative.with_suffix("").parts)
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = path
    return found


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """The same with each file parsed."""
    return {name: (path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for name, path in files().items()}


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of facegen that is imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "facegen")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "facegen":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def floor(name: str) -> int | None:
    """The floor of a dotted name; None for the package itself (its version)."""
    parts = name.split(".")
    return FLOOR_OF.get(parts[1]) if len(parts) > 1 else None


def test_every_module_has_a_floor() -> None:
    homeless = {name for name in files() if name != "facegen" and floor(name) is None}
    assert not homeless


@pytest.mark.parametrize("name", sorted(files()))
def test_lower_floors_import_nothing_above(name: str) -> None:
    path, tree = modules()[name]
    own = floor(name)
    above = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for line, imported in imports(tree)
        if (other := floor(imported)) is not None and own is not None and other > own
    ]
    assert not above


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imports(modules()["facegen"][1]))


@pytest.mark.parametrize("package", STRANGERS)
def test_strangers_do_not_import_one_another(package: str) -> None:
    meetings = [
        f"{name}:{line} imports {imported}"
        for name, (_, tree) in modules().items()
        if name.startswith(f"{package}.")
        for line, imported in imports(tree)
        if imported.startswith(f"{package}.")
    ]
    assert not meetings


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def offenders(wrong: Callable[[ast.Call, str], bool]) -> list[str]:
    """Places where `wrong(call, name)` holds."""
    return [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in modules().values()
        for call, name in calls(tree)
        if wrong(call, name)
    ]


def test_nothing_prints() -> None:
    assert not offenders(lambda call, name: name == "print")


def test_no_relative_imports() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_pickles_are_read_for_weights_only() -> None:
    def unsafe(call: ast.Call, name: str) -> bool:
        if name in ("pickle.load", "pickle.loads", "torch.jit.load"):
            return True
        if name != "torch.load":
            return False
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("weights_only")
        return not (isinstance(value, ast.Constant) and value.value is True)

    assert not offenders(unsafe)


def test_pickles_are_read_in_one_place() -> None:
    elsewhere = offenders(lambda call, name: name == "torch.load")
    assert {place.split(":")[0] for place in elsewhere} <= {"facegen/checkpoints.py"}


def test_the_global_generator_is_left_alone() -> None:
    """Except in training, where layers draw their first weights, and dropout its masks, from nowhere else."""
    shared_state = ("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "np.random.seed", "random.seed")
    seeding = offenders(lambda call, name: name in shared_state)
    assert not [place for place in seeding if not place.startswith("facegen/training/")]


def test_every_draw_names_its_generator() -> None:
    """Except first weights, which nn.Linear and its kin draw from the global generator too."""
    draws = ("torch.randn", "torch.rand", "torch.randint", "torch.randperm", "torch.multinomial", "torch.normal")
    weights = {
        id(inner)
        for _, tree in modules().values()
        for call, name in calls(tree)
        if name in ("nn.Parameter", "torch.nn.Parameter")
        for inner in ast.walk(call)
    }

    def careless(call: ast.Call, name: str) -> bool:
        if id(call) in weights:
            return False
        if name in ("torch.randn_like", "torch.rand_like"):  # they take no generator on every supported torch
            return True
        return name in draws and "generator" not in {keyword.arg for keyword in call.keywords}

    assert not offenders(careless)


def test_nothing_swallows_every_error() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not silent


def test_no_package_registry_is_named() -> None:
    host = re.compile(r"pypi\.org|pythonhosted|extra-index-url|/opt/|anaconda\.org", re.IGNORECASE)
    texts = [
        ROOT / name for name in ("README.md", "pyproject.toml", "constraints.txt", ".ci/run") if (ROOT / name).exists()
    ]
    named = [
        str(path.relative_to(ROOT))
        for path in [*texts, *(path for path, _ in modules().values())]
        if host.search(path.read_text(encoding="utf-8"))
    ]
    assert not named


def test_import_is_light() -> None:
    """`import facegen` and the command line's help pull in no heavy package."""
    import subprocess
    import sys

    heavy = ("torch", "diffusers", "transformers", "insightface", "cv2", "gradio", "onnxruntime")
    first = "import facegen.cli" if (ROOT / "facegen" / "cli.py").exists() else "import facegen"
    code = f"import sys; {first}; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
