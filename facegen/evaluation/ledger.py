"""Figures that are kept as they come, so that a long measurement that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from facegen.errors import WrongRequest
from facegen.evaluation.edits import Table
from facegen.files import write_json

Figures = Mapping[str, float]


class Ledger:
    """Figures by name, written to a file as they come; those of another plan are forgotten."""

    def __init__(self, path: Path | None, plan: Mapping[str, Any]) -> None:
        self.path, self.plan = path, json.loads(json.dumps(plan))
        self.rows: dict[str, dict[str, float]] = {}
        if path is not None and path.is_file():
            kept = _read(path)
            self.rows = kept["rows"] if kept.get("plan") == self.plan else {}

    def row(self, name: str, measure: Callable[[], Figures]) -> dict[str, float]:
        """The figures of that name, measured if they are not there yet."""
        if name not in self.rows:
            self.rows[name] = {key: round(float(value), 5) for key, value in measure().items()}
            self._write()
        return self.rows[name]

    def table(self, part: str, title: str, notes: Sequence[str] = ()) -> Table:
        """The rows whose names begin with ``part/``."""
        rows = {name.split("/", 1)[1]: row for name, row in self.rows.items() if name.split("/", 1)[0] == part}
        return Table(title, rows, tuple(notes))

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, {"plan": self.plan, "rows": self.rows})


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text("utf-8"))
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or "rows" not in kept:
        raise WrongRequest(f"{path} is no table of this measure; give another file with --output.")
    return kept


def weights_of(folder: Path) -> str:
    """A checksum of all files of a folder that hold weights: figures of other weights are not carried on."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".onnx"):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
