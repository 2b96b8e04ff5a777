"""Directions in StyleGAN's W+ space: adding one to a face's code edits the face (smile, age, glasses).

| where | what | its effect at strength s |
|---|---|---|
| `w_direction/interfacegan_directions/<name>.pt` | (1, 512) or (18, 512) | w + s·d in every row |
| `w_direction/latent_directions/<name>.npy` | (18, 512) | w + s·d in the coarse rows alone |
| `w_direction/gan_space/{ffhq_pca.pt, ganspace_configs.csv}` | principal components | s deviations along one of them |
| `all_delta_w_dict.json` (PreciseControl) | {name: 18 x 512 numbers} | w + s·d in every row |

Sources: github csxmli2016/w-plus-adapter `script/utils_direction.py`, rishubhpar/PreciseControl.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.errors import CheckpointBroken, WrongRequest

FOLDER, TABLE = "w_direction", "all_delta_w_dict.json"
COARSE = 8  # rows that say shape and pose, not colour and texture

Direction = Callable[[Tensor, float], Tensor]
"""(codes (B, 18, D), strength) -> what to add to them, (B, 18, D)."""


class Directions:
    """Those found beside an adapter, by "<kind>/<name>"; the kind may be left out where one kind alone has the name."""

    def __init__(self, found: Mapping[str, Direction]) -> None:
        self.found = dict(found)

    @classmethod
    def beside(cls, folder: Path) -> Directions:
        """All that lie in a folder in the official layouts; CheckpointBroken."""
        found: dict[str, Direction] = {}
        for path in sorted((folder / FOLDER / "interfacegan_directions").glob("*.pt")):
            found[f"interfacegan/{path.stem}"] = _straight(_tensor(path))
        for path in sorted((folder / FOLDER / "latent_directions").glob("*.npy")):
            found[f"latent/{path.stem}"] = _straight(_tensor(path), rows=COARSE)
        space = folder / FOLDER / "gan_space"
        if (space / "ganspace_configs.csv").is_file():
            found |= _ganspace(space)
        if (folder / TABLE).is_file():
            table = json.loads((folder / TABLE).read_text("utf-8"))
            found |= {f"delta/{name}": _straight(torch.tensor(rows)) for name, rows in table.items()}
        return cls(found)

    def edited(self, codes: Tensor, edits: Mapping[str, float]) -> Tensor:
        """Codes (B, 18, D) after these edits, all measured from the same code; WrongRequest for an unknown name."""
        moved = codes
        for name, strength in edits.items():
            moved = moved + self[name](codes, strength)
        return moved

    def __getitem__(self, name: str) -> Direction:
        fitting = [full for full in self.found if name in (full, full.partition("/")[2])]
        if len(fitting) == 1:
            return self.found[fitting[0]]
        if fitting:
            raise WrongRequest(f"There are several directions called {name!r}; say {' or '.join(fitting)}.")
        names = list(self.found)
        close = difflib.get_close_matches(name, [*names, *(full.partition("/")[2] for full in names)], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names) or 'none'}."
        raise WrongRequest(f"There is no edit direction called {name!r} beside the adapter; {hint}")


def _straight(direction: Tensor, rows: int | None = None) -> Direction:
    """Along (1, D) or (18, D), in the first `rows` rows."""

    def along(codes: Tensor, strength: float) -> Tensor:
        step = strength * direction.to(codes).expand(codes.shape[1:])
        if rows is not None:
            step = torch.cat([step[:rows], torch.zeros_like(step[rows:])])
        return step.expand_as(codes)

    return along


def _ganspace(folder: Path) -> dict[str, Direction]:
    path = folder / "ffhq_pca.pt"
    pca = checkpoints.read(path)
    checkpoints.require(pca, "mean", "comp", "std", path=path)
    found: dict[str, Direction] = {}
    with (folder / "ganspace_configs.csv").open(encoding="utf-8", newline="") as file:
        for name, *numbers in csv.reader(file, delimiter="\t"):
            component, start, end = (int(number) for number in numbers[:3])
            found[f"ganspace/{name}"] = _component(pca, component, slice(start, end))
    return found


def _component(pca: Mapping[str, Tensor], component: int, rows: slice) -> Direction:
    """To the place `strength` deviations from the mean along a component; how far it is, the first row says."""

    def along(codes: Tensor, strength: float) -> Tensor:
        mean, axis = pca["mean"].to(codes).reshape(-1), pca["comp"][component].to(codes).reshape(-1)
        deviation = pca["std"].to(codes).reshape(-1)[component]
        place = (codes[:, 0] - mean) @ axis / deviation  # (B,)
        step = torch.zeros_like(codes)
        step[:, rows] = ((strength - place) * deviation)[:, None, None] * axis
        return step

    return along


def _tensor(path: Path) -> Tensor:
    if path.suffix == ".npy":
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointBroken(f"{path} is truncated or damaged; fetch the file again.") from error
    else:
        found = checkpoints.content(path)
    if not isinstance(found, Tensor) or not 1 <= found.ndim <= 3:
        raise CheckpointBroken(f"{path} is no direction of W+ codes; fetch the file again.")
    return found.float().reshape(-1, found.shape[-1])
