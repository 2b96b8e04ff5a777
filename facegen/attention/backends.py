"""Ways to compute softmax(q kᵀ / √d + bias) v, as values: a backend is a function and travels with the call.

All take q (R, H, L, d), k and v (R, H, N, d) and an optional additive bias that broadcasts to (R, H, L, N), and give
(R, H, L, d).

`triton` is more than such a function: `facegen.attention.processor.mix`, which sees the query, the prompt's keys and
values and every stream at once, gives all of them to one kernel when it finds this backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.attention.segments import Segments
from facegen.errors import PackageMissing, WrongRequest

Backend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: flash, memory-efficient or plain, as the device allows."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def math(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Explicit softmax in float32, or float64 for such inputs: slow, needs the whole (L, N) matrix; for checks."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(wide)
    return (logits.softmax(dim=-1) @ value.to(wide)).to(query.dtype)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, width = query.shape, query.shape[-1]
        # (R * H, L, d), (R * H, N, d), (R * H, N, d)
        query, key, value = (x.reshape(-1, x.shape[2], width) for x in (query * width**-0.5, key, value))
        weights = torch.bmm(query, key.mT).float().softmax(-1).to(query.dtype)
        found = torch.bmm(weights, value)
        ctx.save_for_backward(query, key, value, weights, found)
        return found.view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights, found = ctx.saved_tensors
        rows, heads, _, width = gradients[0].shape
        given = gradients[0].reshape(found.shape)
        # The softmax's share is one number per query (Dao et al. 2022, FlashAttention, eq. 4).
        tilt = (given * found).sum(-1, keepdim=True)
        logits = torch.bmm(given, value.mT).sub_(tilt).mul_(weights)
        parts = torch.bmm(logits, key) * width**-0.5, torch.bmm(logits.mT, query), torch.bmm(weights.mT, given)
        of_query, of_key, of_value = (part.view(rows, heads, -1, width) for part in parts)
        return of_query, of_key, of_value


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Batched matrix products and a backward pass of our own: for training on a CPU, where PyTorch's are slow.

    Keeps the (L, N) weights in the inputs' precision for the backward pass. With a bias: `sdpa`.
    """
    if bias is not None:
        return sdpa(query, key, value, bias)
    return cast(Tensor, _Plain.apply(query, key, value))


def for_training(device: torch.device) -> Backend | None:
    """`plain` on a CPU, where its backward pass is several times faster than the fused one's; None: the model's own."""
    return plain if device.type == "cpu" else None


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


def triton(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`sdpa` wherever there is one set of keys; cross-attention with streams takes the fused kernel (see `mix`)."""
    return sdpa(query, key, value, bias)


def fused_kernel(query: Tensor) -> Callable[[Tensor, Segments], Tensor]:
    """The kernel behind `triton`; raises PackageMissing without Triton, WrongRequest where it cannot run."""
    try:
        from facegen.attention import triton_kernel
    except ImportError as error:
        raise PackageMissing(
            f"The triton attention backend needs the package triton ({error}); install it or use 'sdpa'."
        ) from error
    if query.device.type != "cuda" and not triton_kernel.interpreted():
        raise WrongRequest(
            "The triton attention backend needs a CUDA device; use 'sdpa' here, or set TRITON_INTERPRET=1 to check it."
        )
    return triton_kernel.fused


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "math": math, "plain": plain, "xformers": xformers, "triton": triton}


def backend_by_name(name: str) -> Backend:
    """The backend called so; raises WrongRequest with the list of names."""
    if name not in BACKENDS:
        raise WrongRequest(f"There is no attention backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]
