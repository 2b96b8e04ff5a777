"""A layer's prompt and token streams laid side by side, as the fused kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from facegen.attention.processor import KeyValue, StreamGroup


@dataclass(frozen=True, eq=False)
class Segments:
    """The prompt's tokens and all streams', one after the other: everything of a layer but the query.

    key, value: (R, H, N, d) contiguous, N over all segments; bounds: (S + 1,) int32, where each begins and the last
    ends, segment 0 being the prompt; scales: (S,) float32, the prompt's is 1; masks: (S, L) float32 or None;
    lengths: tokens of each segment.
    """

    key: Tensor
    value: Tensor
    bounds: Tensor
    scales: Tensor
    masks: Tensor | None
    lengths: tuple[int, ...]


def fusable(streams: Sequence[StreamGroup]) -> bool:
    """Whether one pass can serve them all: there is one, and all are plain sums under masks that are not learnt."""
    return bool(streams) and not any(
        group.to_q is not None
        or group.ortho is not None
        or any(mask is not None and mask.requires_grad for mask in group.masks)
        for group in streams
    )


def side_by_side(text: KeyValue, streams: Sequence[StreamGroup], dtype: torch.dtype) -> Segments:
    """text: (R, H, N, d) each; every stream must have the same R, H and d."""
    rows = text[0].shape[0]
    keys, values, scales = [text[0]], [text[1]], [text[0].new_ones(1, dtype=torch.float32)]
    masks: list[Tensor | None] = [None]
    for group in streams:
        keys += group.key.split(rows)
        values += group.value.split(rows)
        scales.append(group.scales.float())
        masks += group.masks
    lengths = tuple(key.shape[2] for key in keys)
    assert min(lengths) > 0, "a segment without tokens has no softmax"
    stacked = None
    shaped = [mask for mask in masks if mask is not None]
    if shaped:
        plain = torch.ones_like(shaped[0].reshape(-1), dtype=torch.float32)
        stacked = torch.stack([plain if mask is None else mask.reshape(-1).float() for mask in masks])
    return Segments(
        torch.cat([key.to(dtype) for key in keys], dim=2).contiguous(),
        torch.cat([value.to(dtype) for value in values], dim=2).contiguous(),
        torch.tensor([0, *accumulate(lengths)], device=keys[0].device, dtype=torch.int32),
        torch.cat(scales),
        stacked,
        lengths,
    )
