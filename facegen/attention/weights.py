"""What an adapter brings to an attention layer: key/value projections of a token stream, and low-rank additions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class KV(nn.Module):
    """Key and value projections of one token stream at one cross-attention layer, without biases.

    `to_q` is there only for streams that are mixed in as "gated": it makes its own query from the text attention's
    output.
    """

    def __init__(self, token_width: int, width: int, *, own_query: bool = False) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_width, width, bias=False)
        self.to_v = nn.Linear(token_width, width, bias=False)
        self.to_q = nn.Linear(width, width, bias=False) if own_query else None


class LowRank(nn.Module):
    """`up(down(x)) * gain`: what a low-rank adapter adds to the linear layer `W x`."""

    def __init__(self, in_width: int, out_width: int, rank: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, rank, bias=False)
        self.up = nn.Linear(rank, out_width, bias=False)
        self.gain = gain
        nn.init.normal_(self.down.weight, std=1.0 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.down(x))
        return out if self.gain == 1.0 else out * self.gain

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down (r, in), up (out, r)) with the gain inside `up`: the form in which the processor takes it."""
        return self.down.weight, self.up.weight if self.gain == 1.0 else self.up.weight * self.gain


class LayerLora(nn.Module):
    """Low-rank additions to one attention layer's query, key, value and output projections; any may be missing."""

    def __init__(
        self,
        *,
        q: LowRank | None = None,
        k: LowRank | None = None,
        v: LowRank | None = None,
        out: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = q, k, v, out


def add_low_rank(x: Tensor, base: Tensor, pairs: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """`base + Σ up(down(x))`; x (…, in), base (…, out)."""
    for down, up in pairs:
        base = base + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return base


def layer_widths(processor_names: list[str], block_out_channels: tuple[int, ...]) -> list[int]:
    """Hidden width of each attention layer, by its position in `list(unet.attn_processors)`.

    The rule of every official adapter: mid → last width, up_blocks.k → reversed widths, down_blocks.k → widths.
    """
    widths = []
    for name in processor_names:
        if name.startswith("mid_block"):
            widths.append(block_out_channels[-1])
        elif name.startswith("up_blocks."):
            widths.append(block_out_channels[::-1][int(name.split(".")[1])])
        else:
            widths.append(block_out_channels[int(name.split(".")[1])])
    return widths


__all__ = ["KV", "LayerLora", "LowRank", "add_low_rank", "layer_widths"]
