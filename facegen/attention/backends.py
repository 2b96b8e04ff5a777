"""Ways to compute softmax(q kᵀ / √d + bias) v, as values: a backend is a function and travels with the call.

All take q (R, H, L, d), k and v (R, H, N, d) and an optional additive bias that broadcasts to (R, H, L, N), and give
(R, H, L, d).

A later fused kernel (text attention and all token streams in one launch) has its door in
`facegen.attention.processor.mix`: that function sees the query, the text's keys and values and every stream at once,
and nothing else calls a backend for cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.errors import PackageMissing, WrongRequest

Backend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: flash, memory-efficient or plain, as the device allows."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def math(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Explicit softmax in float32: slow, needs the whole (L, N) matrix, the same on every device; for checks."""
    logits = (query.float() @ key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.float()
    return (logits.softmax(dim=-1) @ value.float()).to(query.dtype)


def xformers(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """xformers' memory-efficient attention; raises PackageMissing without xformers."""
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PackageMissing(
            "The xformers attention backend needs the package xformers; install it or use 'sdpa'."
        ) from error
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2]).to(query.dtype)
    # xformers wants (R, L, H, d)
    out = memory_efficient_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_bias=bias)
    return torch.as_tensor(out).transpose(1, 2)


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "math": math, "xformers": xformers}


def backend_by_name(name: str) -> Backend:
    """The backend called so; raises WrongRequest with the list of names."""
    if name not in BACKENDS:
        raise WrongRequest(f"There is no attention backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]
