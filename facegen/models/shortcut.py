"""Steps that run the UNet's outermost blocks only and take what lies deeper from an earlier, whole step.

The features that enter the last up block change slowly from step to step (DeepCache, arXiv 2312.00858). A short step
computes the first down block, its skip connections and the last up block; ControlNets do not run, their residuals at
the skip connections are those of the whole step. At the latents of the whole step itself a short one gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen.models import quick
from facegen.models.quick import Deep

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.models.prepared import Now


class Shortcut:
    """The deep features of one run; `predict` decides nothing: whether a step is whole comes from outside."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kept: Deep | None = None

    def predict(self, sample: Tensor, timestep: Tensor, now: Now, *, whole: bool) -> Tensor:
        """As `Model.predict`; the first step, and one with more rows than were kept, is whole whatever is asked."""
        kept = self._kept
        if whole or kept is None or kept.state.shape[0] < sample.shape[0]:
            return self._whole(sample, timestep, now)
        # Where guidance ended, the conditional half goes on alone: [u1 … uB, c1 … cB].
        rows = sample.shape[0]
        return self._short(
            sample, timestep, now, Deep(kept.state[-rows:], tuple(residual[-rows:] for residual in kept.residuals))
        )

    def _whole(self, sample: Tensor, timestep: Tensor, now: Now) -> Tensor:
        seen: list[Deep] = []
        with self._watched(seen):
            output = self.model.predict(sample, timestep, now, seen)
        self._kept = seen[-1]
        return output

    @contextmanager
    def _watched(self, seen: list[Deep]) -> Iterator[None]:
        """Inside, diffusers' forward tells what enters its last up block."""
        unet = self.model.unet
        residuals: list[tuple[Tensor, ...]] = [()]

        def entering(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            residuals[:] = [given.get("down_block_additional_residuals") or ()]

        def deep(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen.append(Deep(given["hidden_states"], tuple(residuals[0][: len(module.resnets)])))

        hooks = [
            unet.register_forward_pre_hook(entering, with_kwargs=True),
            unet.up_blocks[-1].register_forward_pre_hook(deep, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _short(self, sample: Tensor, timestep: Tensor, now: Now, kept: Deep) -> Tensor:
        model, prepared = self.model, now.prepared
        unet: Any = model.unet
        noisy = sample.to(model.dtype)
        text = now.text
        context = prepared.rows(text.embeds)
        acting = prepared.attention(now, (sample.shape[-2], sample.shape[-1]))
        attention = {"context": acting}
        whole = prepared.channels(now, noisy)
        steps = torch.as_tensor(timestep, device=sample.device)
        emb = model.embedding(whole, steps, context, model.added(text, prepared, sample))
        route = quick.fits(unet, whole, acting)
        if route is not None:
            look = quick.look(whole, emb, context, acting, prepared.guidance)
            return quick.shallow(route, whole, look, kept).to(sample.dtype)
        emb = emb.expand(len(whole), -1)

        x = unet.conv_in(whole)
        skips = [x]
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        attentions = getattr(first, "attentions", None) or [None] * len(first.resnets)
        for resnet, attend in zip(first.resnets, attentions, strict=True):
            x = resnet(x, emb)
            if attend is not None:
                x = attend(x, context, cross_attention_kwargs=attention, return_dict=False)[0]
            skips.append(x)
        if kept.residuals:
            skips = [skip + residual for skip, residual in zip(skips, kept.residuals, strict=True)]
        more = {"encoder_hidden_states": context, "cross_attention_kwargs": attention}
        x = last(
            hidden_states=kept.state,
            temb=emb,
            res_hidden_states_tuple=tuple(skips),
            **(more if getattr(last, "has_cross_attention", False) else {}),
        )
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))).to(sample.dtype)
