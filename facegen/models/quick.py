"""A UNet's and a ControlNet's forward on a CPU without the machinery around their layers.

A small UNet spends as much time between its layers as in some of them: module calls, hooks, checks, argument passing.
Here the same layers are walked by plain functions, in oneDNN's form (`facegen.models.packed`), and what both halves of
guidance have in common (all that lies ahead of the first look at the prompt) is computed once. The outcome equals
diffusers' forward up to float32 rounding. LoRAs' hooks on single layers are honoured; networks with other parts than
Stable Diffusion's are left to diffusers (`plan` gives None). Source: diffusers 0.42.1, unets/unet_2d_condition.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.attention.processor import NOTHING, AttentionContext, FacegenAttention, attended, split_heads
from facegen.attention.weights import add_low_rank
from facegen.models.packed import PackedConv2d, PackedLinear, is_packed


@dataclass(frozen=True, eq=False, slots=True)
class _Resnet:
    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    time: nn.Linear
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


@dataclass(frozen=True, eq=False, slots=True)
class _Attention:
    index: int
    heads: int
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    norm1: nn.LayerNorm
    own: _Attention
    norm2: nn.LayerNorm
    cross: _Attention
    norm3: nn.LayerNorm
    wide: nn.Linear
    narrow: nn.Linear


@dataclass(frozen=True, eq=False, slots=True)
class _Transformer:
    norm: nn.GroupNorm
    proj_in: nn.Module
    blocks: tuple[_Block, ...]
    proj_out: nn.Module


@dataclass(frozen=True, eq=False, slots=True)
class _Stage:
    """pairs: a residual block and the transformer behind it; sampler: the convolution that changes the resolution."""

    pairs: tuple[tuple[_Resnet, _Transformer | None], ...]
    sampler: nn.Conv2d | None


@dataclass(frozen=True, eq=False)
class Plan:
    """A network's layers in the order in which they run; up, norm_out and conv_out: a UNet's."""

    conv_in: nn.Conv2d
    down: tuple[_Stage, ...]
    first: _Resnet
    middle: tuple[tuple[_Transformer | None, _Resnet], ...]
    up: tuple[_Stage, ...]
    norm_out: nn.GroupNorm | None
    conv_out: nn.Conv2d | None


@dataclass(frozen=True, eq=False)
class Look:
    """What a walk sees: the time embedding (1 or R, E) after its activation, and the prompt (R, L, D).

    halves: of how many equal parts the rows consist until the first look at the prompt; only one of them is computed.
    """

    time: Tensor
    prompt: Tensor
    context: AttentionContext
    halves: int = 1


@dataclass(frozen=True, eq=False)
class Deep:
    """What enters the last up stage, (R, C, h, w), and what ControlNets added to the skips that meet it there."""

    state: Tensor
    residuals: tuple[Tensor, ...]


class _Unknown(Exception):
    """A part that is not Stable Diffusion's."""


_plans: WeakKeyDictionary[nn.Module, Plan | None] = WeakKeyDictionary()


def plan(network: Any) -> Plan | None:
    """The network's layers, None for a network that is left to diffusers: not packed, or of other parts."""
    if not is_packed(network):
        return None
    if network not in _plans:
        try:
            _plans[network] = _plan(network)
        except (_Unknown, AttributeError):
            _plans[network] = None
    return _plans[network]


def fits(network: Any, sample: Tensor, context: AttentionContext) -> Plan | None:
    """The plan where this call may take it: without gradients, and with nothing that needs hooks inside blocks."""
    if torch.is_grad_enabled() or sample.dtype != torch.float32 or sample.device.type != "cpu":
        return None
    if context.record is not None or context.states is not None or torch.is_autocast_enabled("cpu"):
        return None
    return plan(network)


def look(sample: Tensor, embedding: Tensor, prompt: Tensor, context: AttentionContext, guidance: bool) -> Look:
    """The look of a call; sample (R, C, h, w), embedding (1 or R, E), guidance: whether there are two halves."""
    halves = 1
    if guidance and len(embedding) == 1 and torch.equal(*sample.chunk(2)):
        halves = 2
    return Look(F.silu(embedding), prompt, context, halves)


# --- reading a network ------------------------------------------------------------------------------------------------


def _plan(network: Any) -> Plan:
    config = network.config
    for name, wanted in (("act_fn", "silu"), ("center_input_sample", False), ("time_embedding_act_fn", None)):
        _must(config.get(name, wanted) == wanted)
    up = getattr(network, "up_blocks", ())
    middle = network.mid_block
    _must(type(middle).__name__ == "UNetMidBlock2DCrossAttn")
    _must(getattr(network, "encoder_hid_proj", None) is None and getattr(network, "class_embedding", None) is None)
    behind = zip(middle.attentions, middle.resnets[1:], strict=True)
    norm_out = getattr(network, "conv_norm_out", None)
    _must(not up or (isinstance(norm_out, nn.GroupNorm) and isinstance(network.conv_act, nn.SiLU)))
    return Plan(
        network.conv_in,
        tuple(_stage(block, "downsamplers") for block in network.down_blocks),
        _resnet(middle.resnets[0]),
        tuple((_transformer(attention), _resnet(resnet)) for attention, resnet in behind),
        tuple(_stage(block, "upsamplers") for block in up),
        norm_out,
        getattr(network, "conv_out", None),
    )


def _must(condition: bool) -> None:
    if not condition:
        raise _Unknown


def _stage(block: Any, samplers: str) -> _Stage:
    known = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    _must(type(block).__name__ in known)
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = [
        (_resnet(resnet), None if attention is None else _transformer(attention))
        for resnet, attention in zip(block.resnets, attentions, strict=True)
    ]
    found = getattr(block, samplers) or []
    _must(len(found) <= 1)
    for sampler in found:
        _must(sampler.use_conv and sampler.norm is None and isinstance(sampler.conv, nn.Conv2d))
        _must(samplers == "upsamplers" or sampler.padding == 1)
        _must(samplers == "downsamplers" or (sampler.interpolate and not sampler.use_conv_transpose))
    return _Stage(tuple(pairs), found[0].conv if found else None)


def _resnet(part: Any) -> _Resnet:
    _must(type(part).__name__ == "ResnetBlock2D" and part.time_embedding_norm == "default")
    _must(part.upsample is None and part.downsample is None and part.output_scale_factor == 1.0)
    _must(isinstance(part.nonlinearity, nn.SiLU) and not part.skip_time_act and part.time_emb_proj is not None)
    return _Resnet(part.norm1, part.conv1, part.time_emb_proj, part.norm2, part.conv2, part.conv_shortcut)


def _transformer(part: Any) -> _Transformer:
    _must(type(part).__name__ == "Transformer2DModel" and part.is_input_continuous)
    return _Transformer(part.norm, part.proj_in, tuple(map(_block, part.transformer_blocks)), part.proj_out)


def _block(part: Any) -> _Block:
    _must(type(part).__name__ == "BasicTransformerBlock" and part.norm_type == "layer_norm")
    _must(part.pos_embed is None and part.attn2 is not None and not part.only_cross_attention)
    _must(type(part.ff.net[0]).__name__ == "GEGLU" and len(part.ff.net) == 3)
    own, cross = _attention(part.attn1), _attention(part.attn2)
    return _Block(part.norm1, own, part.norm2, cross, part.norm3, part.ff.net[0].proj, part.ff.net[2])


def _attention(part: Any) -> _Attention:
    _must(type(part.processor) is FacegenAttention)
    _must(not part.residual_connection and part.rescale_output_factor == 1.0)
    return _Attention(part.processor.index, part.heads, part.to_q, part.to_k, part.to_v, part.to_out[0])


# --- walking it -------------------------------------------------------------------------------------------------------


def unet(
    plan: Plan, sample: Tensor, look: Look, residuals: Sequence[Tensor], mid: Tensor | None
) -> tuple[Tensor, Deep]:
    """The UNet's output (R, C, h, w), and what a short step may take over.

    sample (R, C', h, w); residuals and mid: what ControlNets add to the skips and to the middle; () and None for none.
    """
    assert plan.norm_out is not None
    assert plan.conv_out is not None
    x, skips = _descend(plan, plan.down, sample, look, None)
    x = _middle(plan, x, look)
    if mid is not None:
        x = x + mid
    if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
    state = x
    for place, stage in enumerate(plan.up):
        state = x
        x = _ascend(stage, x, skips, look, last=place == len(plan.up) - 1)
    found = _conv(plan.conv_out, F.silu(_norm(plan.norm_out, x), inplace=True))
    return found, Deep(state, tuple(residuals[: len(plan.up[-1].pairs)]))


def shallow(plan: Plan, sample: Tensor, look: Look, deep: Deep) -> Tensor:
    """The UNet's output with what lies deeper than the outermost stages taken over from an earlier step."""
    assert plan.norm_out is not None
    assert plan.conv_out is not None
    stage = _Stage(plan.down[0].pairs, None)
    _, skips = _descend(plan, (stage,), sample, look, None)
    if deep.residuals:
        skips = [skip + residual for skip, residual in zip(skips, deep.residuals, strict=True)]
    x = _ascend(plan.up[-1], deep.state, skips, look, last=True)
    return _conv(plan.conv_out, F.silu(_norm(plan.norm_out, x), inplace=True))


def control(plan: Plan, sample: Tensor, look: Look, hint: Tensor) -> tuple[list[Tensor], Tensor]:
    """A ControlNet's states, ahead of the convolutions that make residuals of them: of the skips, of the middle.

    hint: the picture's embedding, (R, C, h, w).
    """
    x, skips = _descend(plan, plan.down, sample, look, hint)
    return skips, _middle(plan, x, look)


def _descend(
    plan: Plan, stages: Sequence[_Stage], sample: Tensor, look: Look, hint: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The state behind the stages, and all skips."""
    rows = len(sample)
    count = rows // look.halves
    x = _conv(plan.conv_in, sample[:count].contiguous(memory_format=torch.channels_last))
    if hint is not None:
        x = x + hint[:count]
    skips = [_whole(x, rows)]
    for stage in stages:
        for resnet, transformer in stage.pairs:
            x = _residual(resnet, x, look)
            if transformer is not None:
                x = _attend(transformer, x, look, rows)
            skips.append(_whole(x, rows))
        if stage.sampler is not None:
            x = _conv(stage.sampler, x)
            skips.append(_whole(x, rows))
    return _whole(x, rows), skips


def _middle(plan: Plan, x: Tensor, look: Look) -> Tensor:
    x = _residual(plan.first, x, look)
    for transformer, resnet in plan.middle:
        if transformer is not None:
            x = _attend(transformer, x, look, len(x))
        x = _residual(resnet, x, look)
    return x


def _ascend(stage: _Stage, x: Tensor, skips: list[Tensor], look: Look, *, last: bool) -> Tensor:
    for resnet, transformer in stage.pairs:
        x = _residual(resnet, torch.cat([x, skips.pop()], dim=1), look)
        if transformer is not None:
            x = _attend(transformer, x, look, len(x))
    if stage.sampler is None:
        return x
    if last:
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
    else:  # the next skip's size: twice this one, less where that was odd
        larger = F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest")
    return _conv(stage.sampler, larger)


def _residual(part: _Resnet, x: Tensor, look: Look) -> Tensor:
    inner = F.silu(_norm(part.norm1, x), inplace=True)
    inner = _conv(part.conv1, inner, time=_linear(part.time, look.time))
    inner = F.silu(_norm(part.norm2, inner), inplace=True)
    return _conv(part.conv2, inner, more=x if part.shortcut is None else _conv(part.shortcut, x))


def _attend(part: _Transformer, x: Tensor, look: Look, rows: int) -> Tensor:
    """x (B or R, C, h, w) → (R, C, h, w)."""
    height, width = x.shape[-2:]
    inner = _norm(part.norm, x)
    if isinstance(part.proj_in, nn.Conv2d):
        inner = _rows(_conv(part.proj_in, inner))
    else:
        inner = _linear(part.proj_in, _rows(inner))  # (B, h·w, C)
    for block in part.blocks:
        inner = _changed(block, inner, look, rows)
    x = _whole(x, rows)
    if isinstance(part.proj_out, nn.Conv2d):
        return _conv(part.proj_out, _picture(inner, height, width), more=x)
    return _picture(_linear(part.proj_out, inner), height, width) + x


def _changed(part: _Block, x: Tensor, look: Look, rows: int) -> Tensor:
    layers, backend = look.context.layers, look.context.backend
    here = layers.get(part.own.index, NOTHING)
    if here.reference is not None:
        x = _whole(x, rows)  # references are the conditional half's alone
    inside = _layer_norm(part.norm1, x)
    x = _attention_of(part.own, inside, inside, here, backend).add_(x)
    x = _whole(x, rows)
    here = layers.get(part.cross.index, NOTHING)
    x = _attention_of(part.cross, _layer_norm(part.norm2, x), look.prompt, here, backend).add_(x)
    return _linear(part.narrow, _gated(part.wide, _layer_norm(part.norm3, x))).add_(x)


def _attention_of(part: _Attention, x: Tensor, source: Tensor, layer: Any, backend: Any) -> Tensor:
    """(R, L, C) → (R, L, C), a tensor of its own."""
    low = layer.lora
    query = split_heads(add_low_rank(x, _linear(part.q, x), low.q), part.heads)
    if layer.text is not None:
        own = layer.text
    else:
        key = add_low_rank(source, _linear(part.k, source), low.k)
        value = add_low_rank(source, _linear(part.v, source), low.v)
        own = split_heads(key, part.heads), split_heads(value, part.heads)
    found = attended(query, own, layer, backend)
    return add_low_rank(found, _linear(part.out, found), low.out)


def _gated(part: nn.Linear, x: Tensor) -> Tensor:
    """value·gelu(gate), both from one layer."""
    if type(part) is not PackedLinear or part._forward_hooks:
        value, gate = _linear(part, x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
    half = part.out_features // 2
    bias = (None, None) if part.bias is None else (part.bias[:half], part.bias[half:])
    gate = torch.ops.mkldnn._linear_pointwise(x, part.weight[half:], bias[1], "gelu", [], "none")
    return torch.ops.mkldnn._linear_pointwise(x, part.weight[:half], bias[0], "none", [], "").mul_(gate)


def _conv(part: nn.Module, x: Tensor, *, time: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """The convolution; time (1 or R, C): added to each place, more (R, C, h, w): added as it is."""
    laid = part.laid(x) if type(part) is PackedConv2d and not part._forward_hooks else None
    if laid is None:
        found = part(x)
        if time is not None:
            found = found + time[:, :, None, None]
        return found if more is None else found + more
    weight, bias, place, _ = laid
    if time is not None and len(time) == 1:
        bias, time = time[0] if bias is None else time[0] + bias, None
    if more is not None and time is None:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, more, weight, bias, *place, "add", None, None, [], None
        )
    found = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *place, "none", [], "")
    if time is not None:
        found = found.add_(time[:, :, None, None])
    return found if more is None else found.add_(more)


def _linear(part: nn.Module, x: Tensor) -> Tensor:
    if type(part) is not PackedLinear or part._forward_hooks:
        return part(x)
    return torch.ops.mkldnn._linear_pointwise(x, part.weight, part.bias, "none", [], "")


def _norm(part: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, part.num_groups, part.weight, part.bias, part.eps)


def _layer_norm(part: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, part.normalized_shape, part.weight, part.bias, part.eps)


def _rows(x: Tensor) -> Tensor:
    """(R, C, h, w) → (R, h·w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _picture(x: Tensor, height: int, width: int) -> Tensor:
    """(R, h·w, C) → (R, C, h, w), channels last in memory."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _whole(x: Tensor, rows: int) -> Tensor:
    """All rows, where one half was computed for both."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))
