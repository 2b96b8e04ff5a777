"""Steps that run the UNet's outermost blocks only and take what lies deeper from an earlier, whole step.

The features that enter the last up block change slowly from step to step (DeepCache, arXiv 2312.00858). A short step
computes the first down block, its skip connections and the last up block; ControlNets do not run, their residuals at
the skip connections are those of the whole step. At the latents of the whole step itself a short one gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.models.prepared import Now


@dataclass(eq=False)
class _Kept:
    """deep: what the last up block was given, (R, C, h, w); residuals: ControlNets' at the outermost skips, or ()."""

    deep: Tensor
    residuals: tuple[Tensor, ...]


class Shortcut:
    """The deep features of one run; `predict` decides nothing: whether a step is whole comes from outside."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kept: _Kept | None = None

    def predict(self, sample: Tensor, timestep: Tensor, now: Now, *, whole: bool) -> Tensor:
        """As `Model.predict`; the first step, and one with more rows than were kept, is whole whatever is asked."""
        kept = self._kept
        if whole or kept is None or kept.deep.shape[0] < sample.shape[0]:
            return self._whole(sample, timestep, now)
        # Where guidance ended, the conditional half goes on alone: [u1 … uB, c1 … cB].
        rows = sample.shape[0]
        return self._short(
            sample, timestep, now, _Kept(kept.deep[-rows:], tuple(residual[-rows:] for residual in kept.residuals))
        )

    def _whole(self, sample: Tensor, timestep: Tensor, now: Now) -> Tensor:
        unet = self.model.unet
        seen: dict[str, Any] = {}

        def entering(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen["residuals"] = given.get("down_block_additional_residuals") or ()

        def deep(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen["deep"] = given["hidden_states"]

        hooks = [
            unet.register_forward_pre_hook(entering, with_kwargs=True),
            unet.up_blocks[-1].register_forward_pre_hook(deep, with_kwargs=True),
        ]
        try:
            output = self.model.predict(sample, timestep, now)
        finally:
            for hook in hooks:
                hook.remove()
        skips = len(unet.up_blocks[-1].resnets)
        self._kept = _Kept(seen["deep"], tuple(seen["residuals"][:skips]))
        return output

    def _short(self, sample: Tensor, timestep: Tensor, now: Now, kept: _Kept) -> Tensor:
        model, prepared = self.model, now.prepared
        unet: Any = model.unet
        noisy = sample.to(model.dtype)
        text = now.text
        context = prepared.rows(text.embeds)
        attention = {"context": prepared.attention(now, (sample.shape[-2], sample.shape[-1]))}
        emb = unet.time_embedding(unet.get_time_embed(noisy, torch.as_tensor(timestep, device=sample.device)))
        further = unet.get_aug_embed(emb, context, model.added(text, prepared, sample))
        emb = emb if further is None else emb + further

        x = unet.conv_in(prepared.channels(now, noisy))
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
            hidden_states=kept.deep,
            temb=emb,
            res_hidden_states_tuple=tuple(skips),
            **(more if getattr(last, "has_cross_attention", False) else {}),
        )
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))).to(sample.dtype)
