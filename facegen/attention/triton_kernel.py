"""Decoupled cross-attention in one pass over the queries: the prompt and every token stream, masks and scales inside.

    out = softmax(q kᵀ/√d) v + Σ_s scale_s · mask_s · softmax(q k_sᵀ/√d) v_s

A query is read once and an output written once, which is the floor for memory traffic: keys and values of some hundred
tokens stay in the cache. How many streams there are, their lengths and strengths are run-time values; only the head
dimension, the precision and the tile sizes are compiled in. Head dimensions that are no power of two are cut in two
(40 = 32 + 8, 80 = 64 + 16, 160 = 128 + 32), so that the matrix units do not multiply padding.

Backward: one launch over the queries (their gradient, and each stream's row sums, from which the gradient of its scale
follows), one over the tokens (gradients of keys and values). Importing this needs Triton; without a GPU the kernels run
under TRITON_INTERPRET=1.
"""

# Kernels are written in Triton's dialect, whose arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from facegen.attention.segments import Segments

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """rows: queries of a program; text, tokens: tokens of a tile in the prompt and in a stream; warps, stages."""

    rows: int
    text: int
    tokens: int
    warps: int
    stages: int


# By head dimension, for Hopper. 128 queries are two warpgroups' worth of wgmma rows, and with 64 channels the one
# float32 accumulator takes 32 registers of each of 256 threads: two programs share a multiprocessor. From 80 channels
# on 64 queries and one warpgroup leave registers for it. Prompts have 77 tokens, and three tiles of 32 waste 19
# columns where one of 128 wastes 51. Streams have 4 to 16 tokens: one tile of 16 is the smallest a matrix unit takes.
# Two stages let the next tile's loads run under this one's products; there is no more to overlap in three tiles.
# tests/bench/bench_attention.py --tune measures the alternatives.
LAUNCHES = {40: Launch(128, 32, 16, 8, 2), 64: Launch(128, 32, 16, 8, 2), 80: Launch(64, 32, 16, 4, 2)}
WIDE = Launch(64, 32, 16, 4, 2)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# The interpreter keeps bfloat16 as the integers of its bits, and its dot multiplies those.
WIDEN = tl.constexpr(interpreted())


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load(base, rows, row_stride, live, d: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of channels FIRST… of a (·, d) matrix; zeros outside."""
    channels = FIRST + tl.arange(0, WIDTH)
    return tl.load(
        base + rows[:, None] * row_stride + channels[None, :], mask=live[:, None] & (channels < d)[None, :], other=0.0
    )


@triton.jit
def _store(base, rows, row_stride, live, d: tl.constexpr, value, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    tl.store(
        base + rows[:, None] * row_stride + channels[None, :],
        value.to(base.dtype.element_ty),
        mask=live[:, None] & (channels < d)[None, :],
    )


@triton.jit
def _products(a0, a1, base, rows, live, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a · bᵀ over both cuts of the channels, b the given rows of a contiguous (·, d) matrix."""
    b0 = _load(base, rows, d, live, d, 0, D0)
    found = _dot(a0, tl.trans(b0), PRECISION)
    if D1 > 0:
        b1 = _load(base, rows, d, live, d, D0, D1)
        found += _dot(a1, tl.trans(b1), PRECISION)
    return found


@triton.jit
def _gather(o0, o1, p, base, rows, live, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr):
    """o + p · v over both cuts."""
    v0 = _load(base, rows, d, live, d, 0, D0)
    o0 += _dot(p.to(v0.dtype), v0, PRECISION)
    if D1 > 0:
        v1 = _load(base, rows, d, live, d, D0, D1)
        o1 += _dot(p.to(v1.dtype), v1, PRECISION)
    return o0, o1


@triton.jit
def _weight(scales, masks, segment, rows, live, length, MASKED: tl.constexpr):
    """scale · mask of a segment at each query."""
    scale = tl.load(scales + segment)
    if MASKED:
        return scale * tl.load(masks + segment * length + rows, mask=live, other=0.0)
    return scale + tl.zeros_like(rows).to(tl.float32)


@triton.jit
def _forward(
    q, k, v, out, lse, scales, masks, bounds,
    q_row, q_place, heads, length, tokens, segments, to_log2, d: tl.constexpr,
    ROWS: tl.constexpr, TEXT: tl.constexpr, TOKENS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ONE: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; ONE: every stream fits a tile; KEEP: the backward pass will want `lse`."""
    both = tl.program_id(1).to(tl.int64)  # row · heads + head
    row, head = both // heads, both % heads
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = places < length
    q += row * q_row + head * d
    k += both * tokens * d
    v += both * tokens * d
    out += (row * length * heads + head) * d
    lse += both * length
    every = tl.num_programs(1).to(tl.int64) * length
    q0 = _load(q, places, q_place, live, d, 0, D0)
    q1 = q0
    o0 = tl.zeros([ROWS, D0], tl.float32)
    o1 = tl.zeros([ROWS, 16], tl.float32)
    if D1 > 0:
        q1 = _load(q, places, q_place, live, d, D0, D1)
        o1 = tl.zeros([ROWS, D1], tl.float32)

    # The prompt, with a running maximum.
    end = tl.load(bounds + 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, end, TEXT):
        columns = first + tl.arange(0, TEXT)
        there = columns < end
        logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        o0 *= shrink[:, None]
        o1 *= shrink[:, None]
        o0, o1 = _gather(o0, o1, p, v, columns, there, d, D0, D1, PRECISION)
        top = higher
    gain = _weight(scales, masks, 0, places, live, length, MASKED) / total
    o0 *= gain[:, None]
    o1 *= gain[:, None]
    if KEEP:
        tl.store(lse + places, top + tl.log2(total), mask=live)

    # The streams: weighed before they are summed, so that one accumulator serves all.
    for segment in range(1, segments):
        begin = tl.load(bounds + segment)
        end = tl.load(bounds + segment + 1)
        weight = _weight(scales, masks, segment, places, live, length, MASKED)
        if ONE:
            columns = begin + tl.arange(0, TOKENS)
            there = columns < end
            logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
            logits = tl.where(there[None, :], logits, float("-inf"))
            top = tl.max(logits, 1)
            p = tl.exp2(logits - top[:, None])
            total = tl.sum(p, 1)
            o0, o1 = _gather(o0, o1, p * (weight / total)[:, None], v, columns, there, d, D0, D1, PRECISION)
        else:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            for first in range(begin, end, TOKENS):
                columns = first + tl.arange(0, TOKENS)
                there = columns < end
                logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
                logits = tl.where(there[None, :], logits, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, 1))
                total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
                top = higher
            for first in range(begin, end, TOKENS):
                columns = first + tl.arange(0, TOKENS)
                there = columns < end
                logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
                p = tl.where(there[None, :], tl.exp2(logits - top[:, None]), 0.0)
                o0, o1 = _gather(o0, o1, p * (weight / total)[:, None], v, columns, there, d, D0, D1, PRECISION)
        if KEEP:
            tl.store(lse + segment * every + places, top + tl.log2(total), mask=live)

    _store(out, places, heads * d, live, d, o0, 0, D0)
    if D1 > 0:
        _store(out, places, heads * d, live, d, o1, D0, D1)


@triton.jit
def _backward_queries(
    q, k, v, grad, lse, sums, grad_q, scales, masks, bounds,
    q_row, q_place, heads, length, tokens, segments, to_log2, root, d: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient; sums (S, R·H, L): Σ over channels of a segment's own output times the gradient."""
    both = tl.program_id(1).to(tl.int64)
    row, head = both // heads, both % heads
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = places < length
    q += row * q_row + head * d
    k += both * tokens * d
    v += both * tokens * d
    grad += (row * length * heads + head) * d
    grad_q += both * length * d
    every = tl.num_programs(1).to(tl.int64) * length
    q0 = _load(q, places, q_place, live, d, 0, D0)
    g0 = _load(grad, places, heads * d, live, d, 0, D0)
    q1, g1 = q0, g0
    found0 = tl.zeros([ROWS, D0], tl.float32)
    found1 = tl.zeros([ROWS, 16], tl.float32)
    if D1 > 0:
        q1 = _load(q, places, q_place, live, d, D0, D1)
        g1 = _load(grad, places, heads * d, live, d, D0, D1)
        found1 = tl.zeros([ROWS, D1], tl.float32)
    for segment in range(segments):
        begin = tl.load(bounds + segment)
        end = tl.load(bounds + segment + 1)
        weight = _weight(scales, masks, segment, places, live, length, MASKED)
        here = segment * every + both * length + places
        level = tl.load(lse + here, mask=live, other=0.0)
        along = tl.zeros([ROWS], tl.float32)
        for first in range(begin, end, TOKENS):
            columns = first + tl.arange(0, TOKENS)
            there = columns < end
            logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
            p = tl.where(there[None, :], tl.exp2(logits - level[:, None]), 0.0)
            along += tl.sum(p * _products(g0, g1, v, columns, there, d, D0, D1, PRECISION), 1)
        tl.store(sums + here, along, mask=live)
        for first in range(begin, end, TOKENS):
            columns = first + tl.arange(0, TOKENS)
            there = columns < end
            logits = _products(q0, q1, k, columns, there, d, D0, D1, PRECISION) * to_log2
            p = tl.where(there[None, :], tl.exp2(logits - level[:, None]), 0.0)
            tilt = _products(g0, g1, v, columns, there, d, D0, D1, PRECISION) - along[:, None]
            found0, found1 = _gather(
                found0, found1, p * tilt * (weight * root)[:, None], k, columns, there, d, D0, D1, PRECISION
            )
    _store(grad_q, places, d, live, d, found0, 0, D0)
    if D1 > 0:
        _store(grad_q, places, d, live, d, found1, D0, D1)


@triton.jit
def _backward_tokens(
    q, k, v, grad, lse, sums, grad_k, grad_v, scales, masks, bounds, tiles,
    q_row, q_place, heads, length, tokens, to_log2, root, d: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values; tiles (·, 2): each tile's segment and first token."""
    both = tl.program_id(1).to(tl.int64)
    row, head = both // heads, both % heads
    segment = tl.load(tiles + 2 * tl.program_id(0))
    columns = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, TOKENS)
    there = columns < tl.load(bounds + segment + 1)
    q += row * q_row + head * d
    k += both * tokens * d
    v += both * tokens * d
    grad += (row * length * heads + head) * d
    grad_k += both * tokens * d
    grad_v += both * tokens * d
    here = (segment * tl.num_programs(1).to(tl.int64) + both) * length
    k0 = _load(k, columns, d, there, d, 0, D0)
    v0 = _load(v, columns, d, there, d, 0, D0)
    k1, v1 = k0, v0
    dk0 = tl.zeros([TOKENS, D0], tl.float32)
    dv0 = tl.zeros([TOKENS, D0], tl.float32)
    dk1 = tl.zeros([TOKENS, 16], tl.float32)
    dv1 = tl.zeros([TOKENS, 16], tl.float32)
    if D1 > 0:
        k1 = _load(k, columns, d, there, d, D0, D1)
        v1 = _load(v, columns, d, there, d, D0, D1)
        dk1 = tl.zeros([TOKENS, D1], tl.float32)
        dv1 = tl.zeros([TOKENS, D1], tl.float32)
    for first in range(0, length, ROWS):
        places = first + tl.arange(0, ROWS)
        live = places < length
        q0 = _load(q, places, q_place, live, d, 0, D0)
        g0 = _load(grad, places, heads * d, live, d, 0, D0)
        logits = _dot(k0, tl.trans(q0), PRECISION)  # (TOKENS, ROWS)
        given = _dot(v0, tl.trans(g0), PRECISION)
        q1, g1 = q0, g0
        if D1 > 0:
            q1 = _load(q, places, q_place, live, d, D0, D1)
            g1 = _load(grad, places, heads * d, live, d, D0, D1)
            logits += _dot(k1, tl.trans(q1), PRECISION)
            given += _dot(v1, tl.trans(g1), PRECISION)
        level = tl.load(lse + here + places, mask=live, other=0.0)
        along = tl.load(sums + here + places, mask=live, other=0.0)
        weight = _weight(scales, masks, segment, places, live, length, MASKED)
        p = tl.where(there[:, None] & live[None, :], tl.exp2(logits * to_log2 - level[None, :]), 0.0)
        p = p * weight[None, :]
        tilt = p * (given - along[None, :]) * root
        dv0 += _dot(p.to(g0.dtype), g0, PRECISION)
        dk0 += _dot(tilt.to(q0.dtype), q0, PRECISION)
        if D1 > 0:
            dv1 += _dot(p.to(g1.dtype), g1, PRECISION)
            dk1 += _dot(tilt.to(q1.dtype), q1, PRECISION)
    _store(grad_k, columns, d, there, d, dk0, 0, D0)
    _store(grad_v, columns, d, there, d, dv0, 0, D0)
    if D1 > 0:
        _store(grad_k, columns, d, there, d, dk1, D0, D1)
        _store(grad_v, columns, d, there, d, dv1, D0, D1)


def cuts(d: int) -> tuple[int, int]:
    """A head dimension → the widths of its two cuts, powers of two of at least 16; the second may be 0."""
    first = max(16, 1 << (d.bit_length() - 1))
    rest = d - first
    return first, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


def _precision(query: Tensor) -> str:
    """float32 is multiplied as float32 unless PyTorch is told that its matrix products may be TF32."""
    return "tf32" if query.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scales: Tensor, segments: Segments, launch: Launch
    ) -> Tensor:
        rows, heads, length, d = query.shape
        count = len(segments.lengths)
        keep = any(ctx.needs_input_grad)
        out = torch.empty(rows, length, heads * d, device=query.device, dtype=query.dtype)
        shape = (count, rows * heads, length) if keep else (1,)
        lse = torch.empty(shape, device=query.device, dtype=torch.float32)
        d0, d1 = cuts(d)
        masks = scales if segments.masks is None else segments.masks
        _forward[(triton.cdiv(length, launch.rows), rows * heads)](
            query, key, value, out, lse, scales, masks, segments.bounds,
            query.stride(0), query.stride(2), heads, length, key.shape[2], count, LOG2E * d**-0.5,
            d=d, ROWS=launch.rows, TEXT=launch.text, TOKENS=launch.tokens, D0=d0, D1=d1,
            ONE=max(segments.lengths[1:], default=0) <= launch.tokens, MASKED=segments.masks is not None,
            KEEP=keep, PRECISION=_precision(query), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, scales, lse)
        ctx.segments, ctx.launch = segments, launch
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scales, lse = ctx.saved_tensors
        segments, launch = ctx.segments, ctx.launch
        rows, heads, length, d = query.shape
        count = len(segments.lengths)
        grad = gradients[0].contiguous()
        d0, d1 = cuts(d)
        masks = scales if segments.masks is None else segments.masks
        sums = torch.empty_like(lse)
        grad_q = torch.empty(query.shape, device=query.device, dtype=query.dtype)
        # Half the tile, since queries and gradients are held at once; the matrix units want 64 rows where they fit.
        tile = launch.rows // 2 if d0 + d1 > 128 else min(launch.rows, 64)
        common: dict[str, Any] = {
            "d": d, "D0": d0, "D1": d1, "MASKED": segments.masks is not None, "PRECISION": _precision(query),
            "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
        sizes = (query.stride(0), query.stride(2), heads, length, key.shape[2])
        scale = (LOG2E * d**-0.5, d**-0.5)
        _backward_queries[(triton.cdiv(length, tile), rows * heads)](
            query, key, value, grad, lse, sums, grad_q, scales, masks, segments.bounds, *sizes, count, *scale,
            ROWS=tile, TOKENS=launch.tokens, **common,
        )  # fmt: skip
        grad_k = grad_v = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_k, grad_v = torch.empty_like(key), torch.empty_like(value)
            starts, first = [], 0
            for segment, size in enumerate(segments.lengths):
                starts += [(segment, place) for place in range(first, first + size, launch.text)]
                first += size
            tiles = torch.tensor(starts, device=query.device, dtype=torch.int32)
            _backward_tokens[(len(starts), rows * heads)](
                query, key, value, grad, lse, sums, grad_k, grad_v, scales, masks, segments.bounds, tiles, *sizes,
                *scale, ROWS=tile, TOKENS=launch.text, **common,
            )  # fmt: skip
        grad_scales = None
        if ctx.needs_input_grad[3]:
            seen = sums if segments.masks is None else sums * segments.masks[:, None]
            grad_scales = seen.sum((1, 2)).to(scales.dtype)
        return grad_q, grad_k, grad_v, grad_scales, None, None


def fused(query: Tensor, segments: Segments, launch: Launch | None = None) -> Tensor:
    """query (R, H, L, d) → (R, L, H·d), in the query's dtype; see the module's text.

    Differentiable in the query, keys, values and scales. A query whose heads do not lie side by side in memory, as
    heads split off a projection's output do, is copied.
    """
    if query.stride(3) != 1 or query.stride(1) != query.shape[3]:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    launch = launch or LAUNCHES.get(query.shape[-1], WIDE)
    found = _Fused.apply(query, segments.key, segments.value, segments.scales, segments, launch)
    return cast(Tensor, found)
