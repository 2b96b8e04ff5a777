"""Noise that the caller gives instead of a seed: checked at the door, put in place of what a run would draw."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from facegen.errors import WrongRequest

if TYPE_CHECKING:
    from torch import Tensor


def checked(latents: Any, count: int) -> Tensor:
    """Unit-variance noise (count, C, h, w), one row for each picture; WrongRequest."""
    import torch

    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or latents.ndim != 4:
        shown = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise WrongRequest(f"latents must be noise as a tensor of numbers (N, C, h, w), not {shown}.")
    if len(latents) != count:
        raise WrongRequest(f"latents hold the noise of {len(latents)} pictures, but {count} are asked for.")
    if not bool(latents.isfinite().all()):
        raise WrongRequest("latents hold numbers that are not finite (NaN or infinity); give noise of unit variance.")
    return latents


def instead(drawn: Tensor, given: Tensor | None) -> Tensor:
    """The noise (B, C, h, w) that was given in place of what was drawn; WrongRequest where its shape does not fit.

    It is drawn all the same: schedulers that add noise go on drawing from where the seed's own noise ended.
    """
    if given is None:
        return drawn
    if given.shape[1:] != drawn.shape[1:]:
        raise WrongRequest(
            f"latents hold noise of {tuple(given.shape[1:])} for each picture, but at this size the model starts from"
            f" {tuple(drawn.shape[1:])}."
        )
    return given.to(drawn)


def told(latents: Tensor | None) -> str:
    """How it is written down in a picture; empty for a seed's noise."""
    if latents is None:
        return ""
    numbers = latents.detach().cpu().float().contiguous().numpy().tobytes()
    return f"given noise {tuple(latents.shape)}, SHA-256 {hashlib.sha256(numbers).hexdigest()}"
