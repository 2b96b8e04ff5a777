"""Conditions made ready for a run: what is constant over the steps is computed here, once.

Rows. With guidance on a UNet call has R = 2·B rows, [u1 … uB, c1 … cB]; with it off R = B, the conditional ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.attention.backends import Backend, sdpa, triton
from facegen.attention.processor import (
    Ahead,
    AttentionContext,
    AttentionLayer,
    KeyValue,
    LayerContext,
    LowRankPairs,
    StreamGroup,
    split_heads,
)
from facegen.attention.segments import Segments, fusable, side_by_side
from facegen.attention.weights import KV, GatedSelf, LayerLora, LowRank, add_low_rank
from facegen.conditions import (
    ChannelsCondition,
    Condition,
    ControlCondition,
    GuidanceCondition,
    KeepCondition,
    LoraCondition,
    Pair,
    ReferenceCondition,
    Resize,
    TextCondition,
    TokenCondition,
    scale_at,
)
from facegen.errors import WrongBaseModel, WrongRequest
from facegen.models import control
from facegen.models.folded import folded
from facegen.models.lora import Worn, fits, wearing
from facegen.models.packed import is_packed

if TYPE_CHECKING:
    from facegen.models.base import Model

Kind = TypeVar("Kind", bound=Condition)
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Now:
    """What acts in one step: the prepared conditions and the strength of each (0: left out).

    written: the prompt at the step's timestep, where it is another at every step; see `at`.
    """

    prepared: Prepared
    index: int
    total: int
    strengths: tuple[float, ...]
    written: TextCondition | None = None

    def of(self, kind: type[Kind]) -> list[tuple[Kind, float]]:
        """The acting conditions of one kind, with their strengths."""
        pairs = zip(self.prepared.conditions, self.strengths, strict=True)
        return [(condition, s) for condition, s in pairs if s != 0.0 and isinstance(condition, kind)]

    @property
    def text(self) -> TextCondition:
        """The prompt of this step; raises WrongRequest when there is none."""
        if self.written is not None:
            return self.written
        found = self.of(TextCondition)
        if not found:
            raise WrongRequest("There is no prompt for this step; add a TextCondition (Model.encode_text gives one).")
        return found[-1][0]

    def at(self, timestep: Tensor | int) -> Now:
        """The same with the prompt as it is at the timestep(s) () or (R,)."""
        text = self.text
        if text.at is None:
            return self
        steps = torch.as_tensor(timestep).reshape(-1)[-self.prepared.batch :]  # both halves are at the same level
        return replace(self, written=self.prepared.written(text, steps))

    def blend(self, latents: Tensor, scheduler: Any, timesteps: Tensor) -> Tensor:
        """Put the photo back outside the KeepConditions' masks; latents (B, 4, h, w) after this step."""
        for keep, _ in self.of(KeepCondition):
            photo, mask, noise = self.prepared.kept(keep, latents)
            if self.index < self.total - 1:
                photo = scheduler.add_noise(photo, noise, timesteps[self.index + 1].reshape(1))
            latents = (1 - mask) * photo + mask * latents
        return latents


class Prepared:
    """The conditions of one call, ready to run; use it in a `with` so that LoRAs are taken off again.

    conditions: as given, without those that can never act (strength 0 throughout, empty mask).
    """

    def __init__(
        self, model: Model, conditions: Sequence[Condition], batch: int, *, guidance: bool, backend: Backend = sdpa
    ) -> None:
        self.model = model
        self.batch = batch
        self.guidance = guidance
        self.backend = backend
        self.conditions = tuple(condition for condition in conditions if not _never(condition))
        self._stack = ExitStack()
        self._worn: Worn | None = None
        self._keys: dict[int, dict[int, KeyValue]] = {}
        self._hints: dict[int, Tensor] = {}
        self._read: dict[int, tuple[Tensor, AttentionContext]] = {}
        self._masks: dict[tuple[int, Size, Resize], Tensor] = {}
        self._small: dict[tuple[int, Size, torch.dtype], Tensor] = {}
        self._states: dict[int, Tensor] | None = None
        self._layers: tuple[Any, dict[int, LayerContext]] | None = None
        self._text: tuple[Any, dict[int, KeyValue]] | None = None
        self._written: tuple[Any, TextCondition] | None = None
        self._stacks: dict[Any, KeyValue] = {}
        self._segments: dict[int, tuple[Any, Segments]] = {}
        self._scales: dict[tuple[float, ...], Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._constant = {id(pair) for condition in self.conditions for pair in vars(condition).values()}
        for condition in self.conditions:
            if isinstance(condition, TokenCondition):
                self._keys[id(condition)] = self._stream_keys(condition)
            elif isinstance(condition, ControlCondition):
                control.check(condition.controlnet)
                self._hints[id(condition)] = self._hint(condition)
            elif isinstance(condition, LoraCondition):
                fits(model.unet, condition.layers, "The LoRA")

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Prepared:
        self._stack.enter_context(self.model.memory.using(*self._acting()))
        loras = [condition for condition in self.conditions if isinstance(condition, LoraCondition)]
        if loras:
            left = self._stack.enter_context(folded(self.model.unet, loras))
            self._worn = self._stack.enter_context(wearing(self.model.unet, left))
        ahead = [one.layers for one in self.conditions if isinstance(one, TokenCondition) and one.mix == "ahead"]
        if ahead:
            self._states = {}
            for layer in self.model.attention_layers:
                if any(layer.index in layers for layers in ahead):
                    keep = _keeper(self._states, layer.index)
                    self._stack.callback(_norm(self.model, layer).register_forward_pre_hook(keep).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worn = None
        self._states = None
        self._stack.close()

    def _acting(self) -> list[nn.Module]:
        """The adapters' weights that act inside the UNet, in every step."""
        found: list[nn.Module] = []
        for condition in self.conditions:
            if isinstance(condition, TokenCondition):
                found += (condition.lora or {}).values()
                found += condition.layers.values() if condition.mix == "ahead" else ()
        return found

    def active(self, index: int, total: int) -> Now:
        """What acts in step `index` (from 0) of `total`."""
        return self._now(index, total, tuple(condition.strength(index, total) for condition in self.conditions))

    def throughout(self) -> Now:
        """Every condition acts, whatever its span: for single UNet calls and training."""
        return self._now(0, 1, tuple(scale_at(condition.scale, 0, 1) for condition in self.conditions))

    def _now(self, index: int, total: int, strengths: tuple[float, ...]) -> Now:
        now = Now(self, index, total, strengths)
        loras = [s for c, s in zip(self.conditions, strengths, strict=True) if isinstance(c, LoraCondition)]
        if loras:
            assert self._worn is not None, "conditions with LoRAs need `with model.prepare(…) as prepared`"
            self._worn.strengths[:] = loras
        return now

    def written(self, text: TextCondition, steps: Tensor) -> TextCondition:
        """A prompt that changes with the steps, as it is at timesteps (1,) or (B,)."""
        assert text.at is not None
        key = (id(text), *steps.tolist())
        if self._written is None or self._written[0] != key or torch.is_grad_enabled():
            self._written = key, replace(text, embeds=text.at(steps), at=None)
        return self._written[1]

    # --- rows ---------------------------------------------------------------------------------------------------

    def rows(self, pair: Pair) -> Tensor:
        """(2, 1 or B, …) → (R, …) on the model's device, in its dtype; raises WrongRequest for another batch."""
        if pair.shape[1] not in (1, self.batch):
            raise WrongRequest(
                f"A condition is for {pair.shape[1]} pictures, but {self.batch} are made; give it 1 or {self.batch}."
            )
        if id(pair) in self._rows and not torch.is_grad_enabled():
            return self._rows[id(pair)]
        halves = pair if self.guidance else pair[1:]
        halves = halves.to(self.model.device, self.model.dtype)
        rows = halves.expand(halves.shape[0], self.batch, *halves.shape[2:]).flatten(0, 1)
        if id(pair) in self._constant and not torch.is_grad_enabled():
            self._rows[id(pair)] = rows
        return rows

    # --- attention ----------------------------------------------------------------------------------------------

    def attention(self, now: Now, size: Size) -> AttentionContext:
        """What the UNet's attention layers get in this step; size: the latents' (h, w)."""
        streams = now.of(TokenCondition)
        references = now.of(ReferenceCondition)
        text_keys = self._text_keys(now, streams)
        acting = tuple((id(condition), strength) for condition, strength in (*streams, *references))
        key = (acting, size, id(text_keys))
        if self._layers is None or self._layers[0] != key or torch.is_grad_enabled():
            layers = {
                layer.index: self._layer(layer, streams, references, text_keys, size)
                for layer in self.model.attention_layers
            }
            self._layers = key, {index: layer for index, layer in layers.items() if layer is not None}
        return AttentionContext(self._layers[1], self.backend, states=self._states)

    def _layer(
        self,
        layer: AttentionLayer,
        streams: Sequence[tuple[TokenCondition, float]],
        references: Sequence[tuple[ReferenceCondition, float]],
        text_keys: Mapping[int, KeyValue],
        size: Size,
    ) -> LayerContext | None:
        lora = _pairs([condition for condition, _ in streams], layer.index)
        if layer.cross:
            here = [(c, s) for c, s in streams if layer.index in c.layers]
            text = text_keys.get(layer.index)
            if not here and lora is None and text is None:
                return None
            beside = [(c, s) for c, s in here if c.mix != "ahead"]
            ahead = self._ahead([(c, s) for c, s in here if c.mix == "ahead"], layer, size)
            norm = (ahead[0].weights.ln or _norm(self.model, layer)) if ahead else None
            groups = self._groups(beside, layer, size)
            segments = self._side_by_side(beside, text, groups, layer, size)
            return LayerContext(text, groups, lora or LowRankPairs(), ahead=ahead, norm=norm, segments=segments)
        reference, bias = self._reference(references, layer, size)
        if lora is None and reference is None:
            return None
        return LayerContext(None, (), lora or LowRankPairs(), reference, bias)

    def _groups(
        self, streams: Sequence[tuple[TokenCondition, float]], layer: AttentionLayer, size: Size
    ) -> tuple[StreamGroup, ...]:
        """Streams with the same number of tokens side by side in the list share one attention call."""
        bundles: list[list[tuple[TokenCondition, float]]] = []
        for condition, strength in streams:
            last = bundles[-1][0][0] if bundles else None
            alike = last is not None and last.mix == "add" == condition.mix
            if alike and last is not None and last.tokens.shape[2] == condition.tokens.shape[2]:
                bundles[-1].append((condition, strength))
            else:
                bundles.append([(condition, strength)])
        groups = []
        for bundle in bundles:
            first = bundle[0][0]
            weights = first.layers[layer.index]
            gate = weights.to_q if first.mix == "gated" and isinstance(weights, KV) else None
            groups.append(
                StreamGroup(
                    *self._stacked([condition for condition, _ in bundle], layer),
                    self._scale(tuple(strength for _, strength in bundle)),
                    tuple(self._where(condition, layer.level, size) for condition, _ in bundle),
                    None if gate is None else gate.weight.to(self.model.device),
                    first.mix if first.mix == "ortho" or first.mix == "ortho_v2" else None,
                )
            )
        return tuple(groups)

    def _stacked(self, conditions: Sequence[TokenCondition], layer: AttentionLayer) -> KeyValue:
        """Keys and values of streams that share a call, (G·R, H, N, d), stacked once whatever their strengths do."""
        keys = [self._keys[id(condition)][layer.index] for condition in conditions]
        if len(keys) == 1:
            return keys[0]
        key = (layer.index, *map(id, conditions))
        if key not in self._stacks or torch.is_grad_enabled():
            self._stacks[key] = torch.cat([k for k, _ in keys]), torch.cat([v for _, v in keys])
        return self._stacks[key]

    def _scale(self, strengths: tuple[float, ...]) -> Tensor:
        """(G,), brought to the device once for all layers and steps that share them."""
        if strengths not in self._scales:
            self._scales[strengths] = torch.tensor(strengths, device=self.model.device, dtype=torch.float32)
        return self._scales[strengths]

    def _side_by_side(
        self,
        streams: Sequence[tuple[TokenCondition, float]],
        text: KeyValue | None,
        groups: Sequence[StreamGroup],
        layer: AttentionLayer,
        size: Size,
    ) -> Segments | None:
        """For the fused kernel, in inference; where only strengths changed since, the rest is taken over."""
        if self.backend is not triton or text is None or not fusable(groups):
            return None
        # The tensor itself, not its id: the keys of a prompt that changes with the steps come and go.
        key = (size, text[0], *(condition for condition, _ in streams))
        known = self._segments.get(layer.index)
        if (
            known is None
            or len(known[0]) != len(key)
            or known[0][0] != size
            or any(a is not b for a, b in zip(known[0][1:], key[1:], strict=True))
        ):
            known = self._segments[layer.index] = key, side_by_side(text, groups, self.model.dtype)
        return replace(known[1], scales=torch.cat([known[1].scales[:1], *(group.scales for group in groups)]))

    def _ahead(
        self, streams: Sequence[tuple[TokenCondition, float]], layer: AttentionLayer, size: Size
    ) -> tuple[Ahead, ...]:
        assert not streams or self._states is not None, "such conditions need `with model.prepare(…) as prepared`"
        found = []
        for condition, strength in streams:
            weights = condition.layers[layer.index]
            assert isinstance(weights, GatedSelf)
            mask = self._where(condition, layer.level, size)
            scale = torch.tensor(strength, device=self.model.device, dtype=torch.float32)
            found.append(Ahead(weights, *self._keys[id(condition)][layer.index], scale, mask))
        return tuple(found)

    def _where(self, stream: TokenCondition, level: int, size: Size) -> Tensor | None:
        return None if stream.mask is None else self.mask(stream.mask, level, size, stream.resize)

    def mask(self, mask: Tensor, level: int, size: Size, resize: Resize = "bicubic") -> Tensor:
        """(1, H, W) → (1, L, 1) at a UNet level, once per resolution."""
        for _ in range(level):
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        key = (id(mask), size, resize)
        if key not in self._masks:
            small = F.interpolate(mask[None].float(), size=size, mode=resize)
            self._masks[key] = small.reshape(1, -1, 1).to(self.model.device, self.model.dtype)
        return self._masks[key]

    def _stream_keys(self, condition: TokenCondition) -> dict[int, KeyValue]:
        """Keys and values of a token stream at each of its layers, (R, H, N, d)."""
        rows = self.rows(condition.tokens)  # (R, N, D)
        known = {layer.index: layer for layer in self.model.attention_layers if layer.cross}
        found: dict[int, KeyValue] = {}
        for index, kv in condition.layers.items():
            layer = known.get(index)
            if layer is None:
                raise WrongBaseModel(
                    f"The adapter has weights for attention layer {index}; the loaded base model has no such"
                    " cross-attention layer. It was made for another base model (Stable Diffusion 1.5 or XL)."
                )
            if kv.sizes != (rows.shape[-1], layer.width):
                raise WrongBaseModel(
                    f"The adapter's weights at attention layer {index} map {kv.sizes[0]} to {kv.sizes[1]}"
                    f" channels, the tokens have {rows.shape[-1]} and the loaded base model's layer {layer.width}."
                )
            with self.model.memory.using(kv):
                key, value = kv.project(rows.to(next(kv.parameters())))
            found[index] = self._split(key, layer), self._split(value, layer)
        return found

    def _split(self, x: Tensor, layer: AttentionLayer) -> Tensor:
        """(R, N, C) → (R, H, N, d)."""
        return split_heads(x.to(self.model.device), layer.module.heads)

    def _text_keys(self, now: Now, streams: Sequence[tuple[TokenCondition, float]]) -> Mapping[int, KeyValue]:
        """The prompt's keys and values at each cross-attention layer.

        In training they are left to the UNet: they are used once, and inside its forward they can be compiled and
        checkpointed.
        """
        if torch.is_grad_enabled():
            return {}
        text = now.text
        loras = tuple(s for _, s in now.of(LoraCondition))
        key = (id(text), tuple(id(c.lora) for c, _ in streams if c.lora is not None), loras)
        if self._text is None or self._text[0] != key:
            rows = self.rows(text.embeds)  # (R, L, D)
            found: dict[int, KeyValue] = {}
            for layer in self.model.attention_layers:
                if layer.cross:
                    low = _pairs([condition for condition, _ in streams], layer.index) or LowRankPairs()
                    k = add_low_rank(rows, _linear(layer.module.to_k)(rows), low.k)
                    v = add_low_rank(rows, _linear(layer.module.to_v)(rows), low.v)
                    found[layer.index] = self._split(k, layer), self._split(v, layer)
            self._text = key, found
        return self._text[1]

    def _reference(
        self, references: Sequence[tuple[ReferenceCondition, float]], layer: AttentionLayer, size: Size
    ) -> tuple[KeyValue | None, Tensor | None]:
        """Keys, values (R, H, N, d) and bias (R or 1, 1, L or 1, N) of all references at a self-attention layer."""
        keys, values, biases = [], [], []
        for condition, strength in references:
            if layer.index not in condition.states:
                continue
            states = self.rows(condition.states[layer.index])
            keys.append(self._split(_linear(layer.module.to_k)(states), layer))
            values.append(self._split(_linear(layer.module.to_v)(states), layer))
            weight = torch.tensor(strength, device=self.model.device)
            if condition.mask is not None:
                weight = weight * self.mask(condition.mask, layer.level, size)[0].float().clamp(0, 1)  # (L, 1)
            bias = torch.log(weight).reshape(1, 1, -1, 1).expand(-1, -1, -1, keys[-1].shape[2])
            if self.guidance and not condition.both:
                bias = torch.cat([torch.full_like(bias, -torch.inf), bias]).repeat_interleave(self.batch, dim=0)
            biases.append(bias)
        if not keys:
            return None, None
        rows, length = (max(bias.shape[axis] for bias in biases) for axis in (0, 2))
        bias = torch.cat([bias.expand(rows, -1, length, -1) for bias in biases], dim=-1)
        plain = all(
            strength == 1.0 and condition.mask is None and (condition.both or not self.guidance)
            for condition, strength in references
        )
        return (torch.cat(keys, dim=2), torch.cat(values, dim=2)), None if plain else bias

    # --- the rest -----------------------------------------------------------------------------------------------

    def _hint(self, condition: ControlCondition) -> Tensor:
        """A control picture's embedding, (R, C, h, w)."""
        net = condition.controlnet
        image = condition.image
        if image.shape[0] not in (1, self.batch):
            raise WrongRequest(
                f"A control picture is for {image.shape[0]} pictures, but {self.batch} are made;"
                f" give it 1 or {self.batch}."
            )
        halves = 2 if self.guidance and condition.both else 1
        with self.model.memory.using(net):
            rows = image.to(next(net.parameters())).expand(self.batch, -1, -1, -1)
            if is_packed(net):
                return control.hint(net, rows).repeat(halves, 1, 1, 1)
            return control.hint(net, rows.repeat(halves, 1, 1, 1))  # to the last bit as diffusers does it

    def idle(self, condition: ControlCondition) -> int:
        """How many rows, from the first, a ControlNet does not steer."""
        return 0 if condition.both or not self.guidance else self.batch

    def prompt(self, condition: ControlCondition, text: Pair) -> tuple[Tensor, AttentionContext]:
        """What a ControlNet reads: tokens (R, L, D), and the keys and values that its layers make of them, once.

        R: the rows that it steers, [u1 … uB, c1 … cB] or the conditional ones.

        In training they are left to the net, as the UNet's are; see `_text_keys`.
        """
        net, pair = condition.controlnet, condition.embeds if condition.embeds is not None else text
        backend = sdpa if self.backend is triton else self.backend
        rows = self.rows(pair)[self.idle(condition) :]
        layers = control.layers(net)
        if torch.is_grad_enabled():
            return rows.to(next(net.parameters())), AttentionContext({}, backend)
        known = self._read.get(id(condition))
        if known is None or known[0] is not pair:
            like = rows.to(next(net.parameters()))
            read = {
                layer.index: LayerContext(
                    (
                        split_heads(_linear(layer.module.to_k)(like), layer.module.heads),
                        split_heads(_linear(layer.module.to_v)(like), layer.module.heads),
                    )
                )
                for layer in layers
                if layer.cross
            }
            known = self._read[id(condition)] = pair, AttentionContext(read, backend)
        return rows.to(next(net.parameters())), known[1]

    def hint(self, condition: ControlCondition) -> Tensor:
        """The embedding of a control picture, computed when the conditions were prepared."""
        return self._hints[id(condition)]

    def confined(self, residual: Tensor, mask: Tensor | None) -> Tensor:
        """A ControlNet's residual (R, C, h, w) inside the mask (1, H, W) only: bilinear, as InstantID's full pipeline
        resizes it, once per resolution.
        """
        if mask is None:
            return residual
        size = (residual.shape[-2], residual.shape[-1])
        key = (id(mask), size, residual.dtype)
        if key not in self._small:
            self._small[key] = F.interpolate(mask[None].to(residual), size=size, mode="bilinear")
        return residual * self._small[key]

    def kept(self, keep: KeepCondition, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(photo latents, mask at the latents' size, noise) in the latents' dtype and place."""
        mask = keep.mask.to(latents)
        if mask.shape[-2:] != latents.shape[-2:]:
            mask = F.interpolate(mask, size=latents.shape[-2:])
        return keep.latents.to(latents), mask, keep.noise.to(latents)

    def guides(self, now: Now) -> list[tuple[GuidanceCondition, float]]:
        """The losses that steer this step."""
        return now.of(GuidanceCondition)

    def channels(self, now: Now, sample: Tensor) -> Tensor:
        """The UNet's input: sample (R, 4, h, w) with the ChannelsConditions' latents behind it."""
        parts = [sample]
        for condition, strength in zip(self.conditions, now.strengths, strict=True):
            if isinstance(condition, ChannelsCondition):
                extra = self.rows(condition.channels).to(sample.dtype)
                parts.append(extra if strength == 1.0 else extra * strength)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _never(condition: Condition) -> bool:
    """Whether the condition can be left out altogether: strength 0 throughout, an empty span or an empty mask."""
    if isinstance(condition, (ChannelsCondition, TextCondition, KeepCondition)):
        return False
    if condition.span[0] == condition.span[1]:
        return True
    if not callable(condition.scale) and not any(
        condition.scale if isinstance(condition.scale, Sequence) else (condition.scale,)
    ):
        return True
    mask = getattr(condition, "mask", None)
    return mask is not None and not bool(mask.any())


def _pairs(streams: Sequence[TokenCondition], index: int) -> LowRankPairs | None:
    """The streams' own LoRAs at a layer; a LoRA that several streams carry is worn once."""
    layers: dict[int, LayerLora] = {}
    for condition in streams:
        if condition.lora is not None and index in condition.lora:
            layers[id(condition.lora)] = condition.lora[index]
    if not layers:
        return None

    def of(part: str) -> tuple[KeyValue, ...]:
        found: list[LowRank | None] = [getattr(layer, part) for layer in layers.values()]
        return tuple(low.pair() for low in found if low is not None)

    return LowRankPairs(of("q"), of("k"), of("v"), of("out"))


def _norm(model: Model, layer: AttentionLayer) -> nn.Module:
    """The LayerNorm before a layer's text attention."""
    return model.unet.get_submodule(layer.name.removesuffix("attn2.processor") + "norm2")


def _keeper(states: dict[int, Tensor], index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps what goes into a norm."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states[index] = inputs[0]

    return keep


def _linear(module: nn.Module | None) -> nn.Module:
    """The projection, which every SD attention layer has."""
    assert module is not None
    return module
