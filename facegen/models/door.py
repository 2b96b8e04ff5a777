"""A diffusers folder's files are compared with what their configuration promises, before the library loads them.

The libraries would leave out what is too much, and stop on what is missing with a word about themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from facegen import checkpoints
from facegen.errors import CheckpointBroken

# diffusers' old names of the autoencoder's attention, which it still reads
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_PREFIX = "text_model."
SPARE = {"text_projection.weight", "logit_scale"}  # of a whole CLIP, which some text encoders were saved from


def check(folder: Path, stem: str, variant: str, build: Callable[[Mapping[str, Any]], nn.Module]) -> None:
    """CheckpointBroken names the keys of a part that are missing, unknown or of another shape.

    build: the module of a configuration's plain values; it is built without memory. stem: of the files' names.
    """
    shapes = _shapes(folder, stem, variant)
    if not shapes:
        return  # in a layout that only the library knows
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise CheckpointBroken(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    with torch.device("meta"):
        own = {_plain(key): value for key, value in build(config).state_dict().items()}
    given = {_plain(key): torch.empty(shape, device="meta") for key, shape in shapes.items() if not _needless(key)}
    for key in SPARE - own.keys():
        given.pop(key, None)
    checkpoints.check({key: value for key, value in own.items() if not _needless(key)}, given, path=folder)


def _shapes(folder: Path, stem: str, variant: str) -> dict[str, tuple[int, ...]]:
    middle = f".{variant}" if variant else ""
    for suffix in (checkpoints.SAFE, ".bin"):
        whole = folder / f"{stem}{middle}{suffix}"
        shards = [*folder.glob(f"{stem}{middle}-*-of-*{suffix}"), *folder.glob(f"{stem}-*-of-*{middle}{suffix}")]
        files = [whole] if whole.is_file() else sorted(set(shards))
        if files:
            return {key: shape for file in files for key, shape in checkpoints.shapes(file).items()}
    return {}


def _plain(key: str) -> str:
    for old, new in _OLD.items():
        if ".attentions." in key and "transformer_blocks" not in key:
            key = key.replace(old, new)
    return key.removeprefix(_PREFIX)


def _needless(key: str) -> bool:
    return key.endswith(("position_ids", "num_batches_tracked"))
