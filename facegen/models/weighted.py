"""Prompts in which parts weigh more or less, and of any length: (word), (word:1.3), [word].

Round brackets weigh 1.1 or what stands behind the colon, square ones 1/1.1, nested ones multiply; a backslash makes a
bracket a letter. A text longer than the encoder is read in pieces, and shorter ones are padded to the longest given
alone, not to the encoder's length: so numbers differ from those of the plain reading of the same text. Arithmetic of
InstantID's full pipeline, after diffusers' community pipeline lpw_stable_diffusion_xl.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUND, SQUARE = 1.1, 1 / 1.1
PIECES = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:([+-]?(?:\d+\.?\d*|\.\d+))\)|[^\\()\[\]:]+|:")


def parse(text: str) -> list[tuple[str, float]]:
    """A prompt -> its parts with their weights; neighbours of one weight are one part."""
    parts: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [(part, weight * factor) for part, weight in parts[start:]]

    for found in PIECES.finditer(text):
        piece, number = found[0], found[1]
        if piece.startswith("\\"):
            parts.append((piece[1:], 1.0))
        elif piece in "([":
            (open_round if piece == "(" else open_square).append(len(parts))
        elif number is not None and open_round:
            weigh(open_round.pop(), float(number))
        elif piece == ")" and open_round:
            weigh(open_round.pop(), ROUND)
        elif piece == "]" and open_square:
            weigh(open_square.pop(), SQUARE)
        else:
            parts.append((piece, 1.0))
    for start in open_round:
        weigh(start, ROUND)
    for start in open_square:
        weigh(start, SQUARE)
    merged: list[tuple[str, float]] = []
    for part, weight in parts or [("", 1.0)]:
        if merged and merged[-1][1] == weight:
            part = merged.pop()[0] + part
        merged.append((part, weight))
    return merged


def spelled(texts: Sequence[str], tokenizer: Any, longest: int) -> list[tuple[Tensor, Tensor]]:
    """Texts (B) -> pieces of at most `longest` tokens: ids (B, L) and weights (B, L) each.

    All texts are padded with the last token to the longest one, then cut; every piece gets its own first and last.
    """
    first, last = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    rows = []
    for text in texts:
        pairs = [
            (one, weight) for part, weight in parse(text) for one in tokenizer(part, add_special_tokens=False).input_ids
        ]
        rows.append(pairs)
    length, room = max(map(len, rows)), longest - 2
    padded = [[*row, *[(last, 1.0)] * (length - len(row))] for row in rows]
    pieces = []
    for start in range(0, length + 1, room):  # a text that fills its pieces has an empty one behind them
        here = [[(first, 1.0), *row[start : start + room], (last, 1.0)] for row in padded]
        ids, weights = torch.tensor([[i for i, _ in row] for row in here]), [[w for _, w in row] for row in here]
        # Published with the weights in half precision: 1.1 is 1.0996.
        pieces.append((ids, torch.tensor(weights, dtype=torch.float16)))
    return pieces


def emphasised(embeds: Tensor, weights: Tensor) -> Tensor:
    """Embeddings (B, L, D), weights (B, L): each moved away from, or towards, the one of the last token."""
    end, weights = embeds[:, -1:], weights.to(embeds)[..., None]
    return torch.where(weights == 1.0, embeds, end + (embeds - end) * weights)
