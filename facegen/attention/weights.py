"""What an adapter brings to an attention layer: key/value projections of a token stream, and low-rank additions."""

from __future__ import annotations

import torch
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

    @property
    def sizes(self) -> tuple[int, int]:
        """Widths of the tokens and of the layer."""
        return self.to_k.in_features, self.to_k.out_features

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R, N, token width) → keys and values (R, N, width)."""
        return self.to_k(tokens), self.to_v(tokens)


class GatedLinear(nn.Module):
    """x·gelu(gate), both from one linear layer, `proj` in files."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class GatedFeedForward(nn.Module):
    """Widen by four with a gate, narrow again: `net.0.proj` and `net.2` in files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class SelfProjections(nn.Module):
    """Query, key, value and output projections of a self-attention, under the names that files give them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))


class GatedSelf(nn.Module):
    """Self-attention of the picture together with tokens, and a feed-forward, each behind a learned gate.

    It acts ahead of a block's text attention: x + s·tanh(alpha_attn)·attn(norm1([x ; linear(tokens)])), then
    + s·tanh(alpha_dense)·ff(norm2(x)). ln: takes the place of the block's own norm before the text attention; None
    leaves that. Source: github modelscope/facechain `face_adapter/face_attention_processor_v1.py`, after GLIGEN.
    """

    def __init__(self, token_width: int, width: int, *, own_norm: bool = False) -> None:
        super().__init__()
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(token_width, width)
        self.attn = SelfProjections(width)
        self.ff = GatedFeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.ln = nn.LayerNorm(width) if own_norm else None

    @property
    def sizes(self) -> tuple[int, int]:
        """Widths of the tokens and of the layer."""
        return self.linear.in_features, self.linear.out_features

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R, N, token width) → their keys and values (R, N, width): the part that no step changes."""
        inside = self.norm1(self.linear(tokens))
        return self.attn.to_k(inside), self.attn.to_v(inside)


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


__all__ = [
    "KV",
    "GatedFeedForward",
    "GatedSelf",
    "LayerLora",
    "LowRank",
    "SelfProjections",
    "add_low_rank",
    "layer_widths",
]
