"""Everything that may steer a denoising step: a closed set of frozen data, combined by `list + list`.

Shapes. A `Pair` is a tensor (2, B, …): row 0 is what the unconditional half of classifier-free guidance sees, row 1
the conditional half; B is 1 (the same for all pictures) or the number of pictures. Region masks are (1, H, W) in
picture space, 1 where the condition acts. With guidance on, a model runs the batch [u1 … uB, c1 … cB]; with it off
only row 1 is used.

Every condition has a span, the part of the run in which it acts: step i of n is inside (start, end) when i/n >= start
and (i+1)/n <= end (diffusers' `control_guidance_start/end`), and a scale: a number, a list of numbers spread evenly
over the run, or a function of progress in [0, 1]. A condition whose scale is 0 at a step is left out of that step
altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from facegen.attention.weights import KV, GatedSelf, LayerLora
from facegen.errors import WrongMask, WrongRequest

Pair: TypeAlias = Tensor
"""(2, B, …): [unconditional, conditional], then the batch (1 or the number of pictures)."""

Scale: TypeAlias = float | Sequence[float] | Callable[[float], float]
Span: TypeAlias = tuple[float, float]
Mix: TypeAlias = Literal["add", "gated", "ahead", "ortho", "ortho_v2"]
Resize: TypeAlias = Literal["bicubic", "nearest"]


def pair(uncond: Tensor, cond: Tensor) -> Pair:
    """Two tensors (B, …) of one shape → (2, B, …)."""
    return torch.stack([uncond, cond])


def in_span(span: Span, index: int, total: int) -> bool:
    """Whether step `index` (from 0) of `total` lies in the span."""
    return not (index / total < span[0] or (index + 1) / total > span[1])


def scale_at(scale: Scale, index: int, total: int) -> float:
    """The scale at step `index` of `total`: progress runs from 0 (first step) to 1 (last step)."""
    if isinstance(scale, (int, float)):
        return float(scale)
    progress = index / max(total - 1, 1)
    if callable(scale):
        return float(scale(progress))
    if len(scale) == total:
        return float(scale[index])
    place = progress * (len(scale) - 1)
    low = min(int(place), len(scale) - 1)
    high = min(low + 1, len(scale) - 1)
    return float(scale[low] + (scale[high] - scale[low]) * (place - low))


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """What all conditions have: when (span, fractions of the run in [0, 1]) and how strongly (scale) they act."""

    span: Span = (0.0, 1.0)
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        start, end = self.span
        if not 0.0 <= start <= end <= 1.0:
            raise WrongRequest(f"A span must satisfy 0 <= start <= end <= 1, not {self.span}.")
        if isinstance(self.scale, Sequence) and not self.scale:
            raise WrongRequest("A strength curve needs at least one number.")

    def strength(self, index: int, total: int) -> float:
        """The scale at step `index` of `total`, 0 outside the span."""
        return scale_at(self.scale, index, total) if in_span(self.span, index, total) else 0.0

    @property
    def constant(self) -> bool:
        """True when the condition acts alike in every step."""
        return isinstance(self.scale, (int, float)) and self.span == (0.0, 1.0)


def _check_pair(name: str, value: Tensor, dimensions: int) -> None:
    if value.ndim != dimensions or value.shape[0] != 2:
        raise WrongRequest(
            f"{name} must be a pair [unconditional, conditional] with {dimensions} dimensions, (2, batch, …),"
            f" not {tuple(value.shape)}."
        )


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and (mask.ndim != 3 or mask.shape[0] != 1):
        raise WrongMask(f"A region mask must have the shape (1, height, width), not {tuple(mask.shape)}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class TextCondition(Condition):
    """The prompt. Of several TextConditions the last one whose span holds the step is used (prompts by stage or step).

    embeds: Pair (2, B, L, D); pooled: Pair (2, B, P), for SDXL; time_ids: Pair (2, B, 6), SDXL's [height, width, top,
    left, target height, target width], by default those of the picture that is made.
    at: the embeddings at the UNet's timesteps (1,) or (B,), for prompts that change with every step (PreciseControl);
        `embeds` is then only what it is at the start of a run.
    """

    embeds: Pair
    pooled: Pair | None = None
    time_ids: Pair | None = None
    at: Callable[[Tensor], Pair] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pair("TextCondition.embeds", self.embeds, 4)
        if self.pooled is not None:
            _check_pair("TextCondition.pooled", self.pooled, 3)
        if self.time_ids is not None:
            _check_pair("TextCondition.time_ids", self.time_ids, 3)
        if self.scale != 1.0:
            raise WrongRequest("A prompt has no strength of its own; use the guidance scale.")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenCondition(Condition):
    """One more cross-attention stream with its own weights (decoupled attention).

    tokens: Pair (2, B, N, D).
    layers: weights by layer, position in `list(unet.attn_processors)`; layers that are missing have no stream.
    mask: (1, H, W), where the stream acts; an all-zero mask leaves the whole condition out.
    resize: how the mask is brought to the layers' sizes: "bicubic" as diffusers does it, "nearest" as InstantID does.
    mix: "add" (IP-Adapter, InstantID): h + scale·attn(q, k, v) before the output projection, q the layer's own query;
        "gated" (W+ adapter): h + scale·attn(to_q(h), k, v) with h the text attention's output;
        "ahead" (FaceChain-FACT): a gated self-attention of the picture and the tokens ahead of the text attention; its
        layers are GatedSelf;
        "ortho", "ortho_v2" (PuLID): as "add", without what lies along the text attention's output, wholly or in part.
    lora: low-rank weights that belong to the stream (FaceID), by layer, self-attention layers too. They act at full
        strength, on both halves and everywhere in the picture, as long as the stream acts; the same mapping carried by
        several streams (several faces) is worn once.
    """

    tokens: Pair
    layers: Mapping[int, KV] | Mapping[int, GatedSelf]
    mask: Tensor | None = None
    resize: Resize = "bicubic"
    mix: Mix = "add"
    lora: Mapping[int, LayerLora] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pair("TokenCondition.tokens", self.tokens, 4)
        _check_mask(self.mask)
        if self.mix not in get_args(Mix):
            raise WrongRequest(f"TokenCondition.mix must be one of {', '.join(get_args(Mix))}, not {self.mix!r}.")
        if self.resize not in get_args(Resize):
            raise WrongRequest(f"TokenCondition.resize must be bicubic or nearest, not {self.resize!r}.")
        if any(isinstance(weights, GatedSelf) != (self.mix == "ahead") for weights in self.layers.values()):
            raise WrongRequest("A token stream with mix 'ahead' has GatedSelf weights at its layers, any other has KV.")
        if self.mix == "gated" and any(kv.to_q is None for kv in self.layers.values() if isinstance(kv, KV)):
            raise WrongRequest("A gated token stream needs query weights (to_q) at each of its layers.")


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceCondition(Condition):
    """Extra keys and values in self-attention: the picture may look at another one.

    states: by self-attention layer (even positions of `list(unet.attn_processors)`), Pair (2, B, N, C) of that layer's
        input as `Model.reference_states` records it; the layer's own key/value weights are applied to it.
    scale: how much a reference token weighs against one of the picture's own (log scale is added to its logit).
    mask: (1, H, W), the part of the made picture that may look at the reference.
    both: False: only the conditional half may look at it (Arc2Face's reference adapter).
    """

    states: Mapping[int, Pair]
    mask: Tensor | None = None
    both: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, state in self.states.items():
            _check_pair(f"ReferenceCondition.states[{index}]", state, 4)
        _check_mask(self.mask)


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlCondition(Condition):
    """Residuals of a ControlNet.

    controlnet: diffusers' ControlNetModel of the same base architecture.
    image: (B, 3, H, W) in [0, 1], H and W those of the picture; the same for both halves.
    embeds: Pair (2, B, L, D), the ControlNet's own context (InstantID's IdentityNet sees the identity tokens); None:
    the prompt.
    mask: (1, H, W), where its residuals act.
    both: whether it steers both halves of guidance; else the conditional one alone, at half the work.
    """

    controlnet: nn.Module
    image: Tensor
    embeds: Pair | None = None
    mask: Tensor | None = None
    both: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image.ndim != 4:
            raise WrongRequest(
                f"ControlCondition.image must be (batch, 3, height, width), not {tuple(self.image.shape)}."
            )
        if self.embeds is not None:
            _check_pair("ControlCondition.embeds", self.embeds, 4)
        _check_mask(self.mask)


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelsCondition(Condition):
    """Latents concatenated to the UNet's input, in the order of the list (inpainting UNets: mask, then masked picture).

    channels: Pair (2, B, C, h, w) in latent space. Outside the span zeros are concatenated.
    """

    channels: Pair

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pair("ChannelsCondition.channels", self.channels, 5)


@dataclass(frozen=True, eq=False, kw_only=True)
class KeepCondition(Condition):
    """Outside the mask the photo stays: after each step its latents, noised to the next step's level, are put there.

    latents: (B, 4, h, w), the photo as `Model.encode_image` gives it; noise: the same shape, the noise the run
    started with.
    mask: (B, 1, h, w) in latent space, or at any other size (then resized by nearest neighbour); 1 where the picture
    is made anew. A scale other than 0 keeps, 0 does not.
    """

    latents: Tensor
    mask: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.ndim != 4 or self.mask.shape[1] != 1:
            raise WrongMask(f"KeepCondition.mask must be (batch, 1, height, width), not {tuple(self.mask.shape)}.")
        if self.latents.shape[1:] != self.noise.shape[1:]:
            raise WrongRequest("KeepCondition.latents and .noise must have the same shape.")


@dataclass(frozen=True, eq=False)
class LowRankWeights:
    """One layer's low-rank addition: down (r, in[, kh, kw]), up (out, r[, 1, 1]), gain = alpha / r."""

    down: Tensor
    up: Tensor
    gain: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraCondition(Condition):
    """Low-rank weights that the UNet wears only for the length of a call.

    layers: by UNet module name ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q");
        `facegen.models.lora.load_lora` reads kohya, diffusers and peft files into this form.
    text_layers: the same for the text encoders, by "text_encoder.<module>" or "text_encoder_2.<module>"; hand the
        condition to `Model.encode_text(loras=…)`, for the prompt is encoded before the run.
    """

    layers: Mapping[str, LowRankWeights]
    text_layers: Mapping[str, LowRankWeights] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidanceCondition(Condition):
    """A loss on the predicted clean latents; each step moves the prediction against its gradient: x0 − scale·∂loss/∂x0.

    loss: (x0 (B, 4, h, w) float32, timestep) → a number or (B,); it may decode the latents. The UNet is not
    differentiated.
    """

    loss: Callable[[Tensor, Tensor], Tensor]


__all__ = [
    "KV",
    "ChannelsCondition",
    "Condition",
    "ControlCondition",
    "GatedSelf",
    "GuidanceCondition",
    "KeepCondition",
    "LayerLora",
    "LoraCondition",
    "LowRankWeights",
    "Mix",
    "Pair",
    "ReferenceCondition",
    "Resize",
    "Scale",
    "Span",
    "TextCondition",
    "TokenCondition",
    "in_span",
    "pair",
    "scale_at",
]
