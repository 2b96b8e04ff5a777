"""Figures that were measured while the embedded model was made, kept in ``assets/mini/mini.json``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from facegen.files import write_json

MINI = Path(__file__).resolve().parents[1] / "assets" / "mini"


@contextmanager
def _locked(path: Path, patience: float = 30.0) -> Iterator[None]:
    """Hold ``path`` as a lock file; one left behind by a killed process is taken over after ``patience`` seconds."""
    start = time.monotonic()
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() - start > patience:
                path.unlink(missing_ok=True)
            time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def record(stage: str, figures: Mapping[str, Any], path: Path = MINI / "mini.json") -> None:
    """Merge ``figures`` into the entry of ``stage``; safe when several stages finish at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        stages: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        stages[stage] = dict(sorted({**stages.get(stage, {}), **figures}.items()))
        write_json(path, dict(sorted(stages.items())))
