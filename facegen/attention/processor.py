"""The one attention processor: text attention, any number of token streams, extra self-attention keys.

It is set on a UNet once, when the model is loaded, and holds nothing but its layer's index. What acts in a call comes
with the call, as an `AttentionContext` in diffusers' `cross_attention_kwargs`; a UNet called without one behaves as
with diffusers' own processor.

Layer index = position in `list(unet.attn_processors)`: down blocks, up blocks, mid block LAST; inside a transformer
block self-attention (even), then cross-attention (odd). Every official adapter file counts so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.attention.backends import Backend, fused_kernel, sdpa, triton
from facegen.attention.segments import Segments, fusable, side_by_side
from facegen.attention.weights import GatedSelf, add_low_rank, layer_widths
from facegen.errors import WrongBaseModel

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

KeyValue = tuple[Tensor, Tensor]
"""Keys and values split into heads, (R, H, N, d) each; R rows: [uncond, cond] × pictures, or pictures alone."""


class StreamGroup(NamedTuple):
    """G token streams of one layer with the same number of tokens, stacked so that one attention call serves them all.

    key, value: (G·R, H, N, d); scales: (G,), a tensor so that changing a strength recompiles nothing; masks: G times
    (1, L, 1) or None;
    to_q: (C, C) query weights of a gated stream (then G = 1), None where the layer's own query is used;
    ortho: whether what lies along the text attention's output is taken out of the stream's (then G = 1): "ortho"
    wholly, "ortho_v2" the less, the more a place of the picture looks at the stream's first tokens.
    """

    key: Tensor
    value: Tensor
    scales: Tensor
    masks: tuple[Tensor | None, ...]
    to_q: Tensor | None = None
    ortho: Literal["ortho", "ortho_v2"] | None = None


class Ahead(NamedTuple):
    """A stream that acts ahead of the text attention: weights, its tokens' keys and values (R, H, N, d), scale, mask.

    mask: (1, L, 1) or None.
    """

    weights: GatedSelf
    key: Tensor
    value: Tensor
    scale: Tensor
    mask: Tensor | None = None


class LowRankPairs(NamedTuple):
    """(down, up) pairs that are added to the layer's query, key, value and output projections."""

    q: tuple[KeyValue, ...] = ()
    k: tuple[KeyValue, ...] = ()
    v: tuple[KeyValue, ...] = ()
    out: tuple[KeyValue, ...] = ()


class LayerContext(NamedTuple):
    """What acts at one layer.

    text: keys and values of the prompt when they were computed beforehand, else None: the layer computes them.
    reference: extra self-attention keys and values; reference_bias: their additive bias, (R or 1, 1, L or 1, N), None
    for none.
    ahead: streams that change the block's state before its text attention; norm: the LayerNorm that follows them.
    segments: text and streams side by side, where the fused kernel will read them.
    """

    text: KeyValue | None = None
    streams: tuple[StreamGroup, ...] = ()
    lora: LowRankPairs = LowRankPairs()
    reference: KeyValue | None = None
    reference_bias: Tensor | None = None
    ahead: tuple[Ahead, ...] = ()
    norm: nn.Module | None = None
    segments: Segments | None = None


class AttentionContext(NamedTuple):
    """What acts in one UNet call, by layer index; `record` collects each self-attention layer's input (R, L, C).

    states: of the layers with streams that act ahead, the block's state (R, L, C) before its norm, put there by a hook.
    """

    layers: dict[int, LayerContext]
    backend: Backend = sdpa
    record: dict[int, Tensor] | None = None
    states: dict[int, Tensor] | None = None


NOTHING = LayerContext()
LEADING = 5  # PuLID's tokens of the embedding, which come first


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(R, L, H·d) → (R, H, L, d)."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(R, H, L, d) → (R, L, H·d)."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


def mix(
    query: Tensor,
    text: KeyValue,
    streams: Sequence[StreamGroup],
    backend: Backend,
    segments: Segments | None = None,
) -> Tensor:
    """Text attention plus every stream: h + Σ scale·mask·attn(q, k, v), before the output projection.

    query (R, H, L, d) → (R, L, C). segments: text and streams as the fused kernel wants them, where they were laid side
    by side beforehand.
    """
    if backend is triton and fusable(streams):
        return fused_kernel(query)(query, segments or side_by_side(text, streams, query.dtype))
    out = hidden = merge_heads(backend(query, *text, None)).to(query.dtype)
    for group in streams:
        own = query
        if group.to_q is not None:
            own = split_heads(F.linear(hidden, group.to_q.to(hidden.dtype)), query.shape[1])
        count = len(group.masks)
        stacked = own if count == 1 else torch.cat([own] * count)
        found = merge_heads(backend(stacked, group.key.to(own.dtype), group.value.to(own.dtype), None)).to(out.dtype)
        if group.ortho is not None:
            kept = leading_share(query, group.key) if group.ortho == "ortho_v2" else 0.0
            found = beside(found, hidden, kept)
        for place, (part, mask) in enumerate(zip(found.chunk(count), group.masks, strict=True)):
            out = out + group.scales[place] * (part if mask is None else part * mask)
    return out


def beside(found: Tensor, hidden: Tensor, kept: Tensor | float) -> Tensor:
    """`found` (R, L, C) without (1 - kept) of its projection on `hidden` (R, L, C), in float32.

    kept: (R, L, 1) or a number. The projection is one of each channel's values over the picture, as PuLID has it; on
    nothing (SDXL's empty prompt is zeros) it is nothing.
    """
    one, other = found.float(), hidden.float()
    power = (other * other).sum(dim=-2, keepdim=True)
    along = (other * one).sum(dim=-2, keepdim=True) / power.where(power > 0, 1.0) * other
    return (one + (kept - 1) * along).to(found.dtype)


def leading_share(query: Tensor, key: Tensor) -> Tensor:
    """How much each place looks at the first LEADING tokens, (R, L, 1), the mean over the heads.

    query (R, H, L, d), key (R, H, N, d). Their products are not scaled by √d here: PuLID was published so.
    """
    share = (query @ key.to(query.dtype).transpose(-1, -2)).softmax(dim=-1)
    return share.mean(dim=1)[:, :, :LEADING].sum(dim=-1, keepdim=True)


def lead(state: Tensor, streams: Sequence[Ahead], backend: Backend) -> Tensor:
    """A block's state (R, L, C) after the streams that act ahead of its text attention.

    Several streams see the same state and their changes are summed, so their order does not matter.
    """
    for part in (_attended, _fed):
        changes = [part(state.to(one.weights.linear.weight.dtype), one, backend).to(state.dtype) for one in streams]
        for one, change in zip(streams, changes, strict=True):
            weighed = one.scale.to(change.dtype) * change
            state = state + (weighed if one.mask is None else weighed * one.mask)
    return state


def _attended(state: Tensor, one: Ahead, backend: Backend) -> Tensor:
    weights, heads = one.weights, one.key.shape[1]
    inside = weights.norm1(state)
    key = torch.cat([split_heads(weights.attn.to_k(inside), heads), one.key.to(inside.dtype)], dim=2)
    value = torch.cat([split_heads(weights.attn.to_v(inside), heads), one.value.to(inside.dtype)], dim=2)
    found = merge_heads(backend(split_heads(weights.attn.to_q(inside), heads), key, value, None))
    return torch.tanh(weights.alpha_attn) * weights.attn.to_out(found)


def _fed(state: Tensor, one: Ahead, backend: Backend) -> Tensor:
    return torch.tanh(one.weights.alpha_dense) * one.weights.ff(one.weights.norm2(state))


def attended(query: Tensor, own: KeyValue, layer: LayerContext, backend: Backend) -> Tensor:
    """What a layer attends to: its own keys and values, those of references, and its streams.

    query (R, H, L, d) → (R, L, C), before the output projection.
    """
    if layer.reference is None:
        return mix(query, own, layer.streams, backend, layer.segments)
    key, value = own
    bias = None
    if layer.reference_bias is not None:
        none = layer.reference_bias.new_zeros(*layer.reference_bias.shape[:-1], key.shape[2])
        bias = torch.cat([none, layer.reference_bias], dim=-1).to(query.dtype)  # (R or 1, 1, L or 1, own + N)
        bias = bias.expand(-1, -1, query.shape[2], -1)
    key = torch.cat([key, layer.reference[0].to(key.dtype)], dim=2)
    value = torch.cat([value, layer.reference[1].to(value.dtype)], dim=2)
    return merge_heads(backend(query, key, value, bias)).to(query.dtype)


class FacegenAttention:
    """diffusers' attention processor for one layer; see the module's text."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """hidden_states (R, L, C), encoder_hidden_states (R, N, D) for cross-attention → (R, L, C)."""
        assert attention_mask is None, "SD UNets attend without masks"
        layer = NOTHING if context is None else context.layers.get(self.index, NOTHING)
        backend = sdpa if context is None else context.backend
        lora = layer.lora
        if context is not None and context.record is not None and encoder_hidden_states is None:
            context.record[self.index] = hidden_states
        before, moved = None, hidden_states
        if layer.ahead:
            assert context is not None
            assert context.states is not None
            assert layer.norm is not None
            before = context.states.pop(self.index)
            moved = lead(before, layer.ahead, backend)
            hidden_states = layer.norm(moved)
            context.states.pop(self.index, None)  # the hook on the block's own norm saw that call, too

        query = split_heads(add_low_rank(hidden_states, attn.to_q(hidden_states), lora.q), attn.heads)
        if layer.text is not None:
            key, value = layer.text
        else:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key = split_heads(add_low_rank(source, attn.to_k(source), lora.k), attn.heads)
            value = split_heads(add_low_rank(source, attn.to_v(source), lora.v), attn.heads)

        out = attended(query, (key, value), layer, backend)
        out = attn.to_out[1](add_low_rank(out, attn.to_out[0](out), lora.out))
        if attn.residual_connection:
            out = out + hidden_states
        if before is not None:
            out = out + moved - before  # the block adds `before` again
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer of a UNet.

    index: its number (see the module's text); level: how often the picture was halved there; width: its channels;
    cross: whether it looks at the prompt.
    """

    index: int
    name: str
    module: Attention
    level: int
    width: int
    cross: bool


def install(unet: UNet2DConditionModel) -> tuple[AttentionLayer, ...]:
    """Set our processor on every attention layer of the UNet, once and for all, and list the layers."""
    names = [name for name in unet.attn_processors if "motion_modules" not in name]
    channels = tuple(unet.config["block_out_channels"])
    widths = layer_widths(names, channels)
    layers = []
    for index, (name, width) in enumerate(zip(names, widths, strict=True)):
        module: Attention = unet.get_submodule(name.removesuffix(".processor"))  # pyright: ignore[reportAssignmentType]
        extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
        if any(getattr(module, extra, None) is not None for extra in extras):
            raise WrongBaseModel(f"The UNet's layer {name} has normalisations no Stable Diffusion 1.x or XL model has.")
        module.set_processor(FacegenAttention(index))  # pyright: ignore[reportArgumentType]
        block = name.split(".")
        level = len(channels) - 1
        if block[0] == "down_blocks":
            level = int(block[1])
        elif block[0] == "up_blocks":
            level = len(channels) - 1 - int(block[1])
        layers.append(AttentionLayer(index, name, module, level, width, cross=".attn2." in name))
    return tuple(layers)
