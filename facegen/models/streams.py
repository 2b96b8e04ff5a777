"""The weights that an adapter of the IP-Adapter family brings to the UNet's attention layers, and their names in files.

Files call them `{i}.to_k_ip.weight`, `{i}.to_v_ip.weight` and, where low-rank weights are worn,
`{i}.to_{q,k,v,out}_lora.{down,up}.weight`; i is the position in `list(unet.attn_processors)`. The W+ adapter writes
`wplus` for `ip` and adds `{i}.to_q_wplus.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from facegen.attention.weights import KV, LayerLora, LowRank
from facegen.checkpoints import Shapes, Tensors, base_name, check
from facegen.errors import CheckpointBroken, WrongBaseModel

if TYPE_CHECKING:
    from facegen.attention.processor import AttentionLayer
    from facegen.models.base import Model

PARTS = ("q", "k", "v", "out")
_KEY = re.compile(r"(\d+)\.to_(?:(q|k|v)_([a-z]+)|(q|k|v|out)_lora\.(down|up))\.weight")


class Streams(nn.Module):
    """Key/value (and query) weights of a token stream at the cross-attention layers, low-rank weights at any layer.

    layers and lora are the mappings a TokenCondition takes; `lora` is None without low-rank weights. They are the same
    objects at every call, by which the model sees that several faces wear one LoRA.
    """

    def __init__(self, layers: Mapping[int, KV], lora: Mapping[int, LayerLora] | None = None) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.lora = dict(lora) if lora else None
        self._layers = nn.ModuleDict({str(index): kv for index, kv in self.layers.items()})
        self._lora = nn.ModuleDict({str(index): one for index, one in (self.lora or {}).items()})

    @property
    def token_width(self) -> int:
        """Width of the tokens it takes."""
        return next(iter(self.layers.values())).to_k.in_features

    @property
    def rank(self) -> int:
        """Rank of the low-rank weights, 0 without."""
        found = (getattr(one, part) for one in (self.lora or {}).values() for part in PARTS)
        return next((low.down.out_features for low in found if low is not None), 0)

    @classmethod
    def from_tensors(cls, tensors: Tensors, model: Model, path: Path, *, word: str = "ip", section: str) -> Streams:
        """From a file's section, keys without its name; `word` as in to_k_ip.

        Raises CheckpointBroken (keys missing, unknown, sizes that do not fit one another) and WrongBaseModel.
        """
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        unknown = [key for key in shapes if not (m := _KEY.fullmatch(key)) or m[3] not in (None, word)]
        if unknown:
            raise CheckpointBroken(f"{path} holds keys that do not belong there: {section}.{unknown[0]}.")
        fits(shapes, model.attention_layers, model.text_width, path=path, word=word)
        layers, lora = {}, {}
        for layer in model.attention_layers:
            if layer.cross:
                own_query = f"{layer.index}.to_q_{word}.weight" in shapes
                layers[layer.index] = KV(model.text_width, layer.width, own_query=own_query)
            found = {part: _low_rank(shapes, layer, part, model.text_width) for part in PARTS}
            if any(found.values()):
                lora[layer.index] = LayerLora(**found)
        streams = cls(layers, lora)
        own = streams.tensors(word=word)
        check(own, tensors, path=path, prefix=f"{section}.")
        for key, value in own.items():
            value.copy_(tensors[key])
        return streams

    @classmethod
    def fresh(cls, model: Model, *, rank: int = 0, own_query: bool = False, generator: torch.Generator) -> Streams:
        """To be trained: keys and values start as copies of the text's, low-rank weights change nothing at first.

        The copy is IP-Adapter's own start (tutorial_train_faceid.py); an own query starts as the identity.
        """
        layers, lora = {}, {}
        for layer in model.attention_layers:
            if layer.cross:
                kv = KV(model.text_width, layer.width, own_query=own_query)
                with torch.no_grad():
                    kv.to_k.weight.copy_(layer.module.get_submodule("to_k").get_parameter("weight"))
                    kv.to_v.weight.copy_(layer.module.get_submodule("to_v").get_parameter("weight"))
                    if kv.to_q is not None:
                        nn.init.eye_(kv.to_q.weight)
                layers[layer.index] = kv
            if rank:
                low = {part: LowRank(_inputs(layer, part, model.text_width), layer.width, rank) for part in PARTS}
                for one in low.values():
                    nn.init.normal_(one.down.weight, std=1 / rank, generator=generator)
                lora[layer.index] = LayerLora(**low)
        return cls(layers, lora)

    def tensors(self, *, word: str = "ip") -> Tensors:
        """Under the names of the file, in the order of the layers; they share memory with the weights."""
        found: Tensors = {}
        lora = self.lora or {}
        for index in sorted(self.layers.keys() | lora.keys()):
            for part in PARTS:
                low: LowRank | None = getattr(lora.get(index), part, None)
                if low is not None:
                    found[f"{index}.to_{part}_lora.down.weight"] = low.down.weight.detach()
                    found[f"{index}.to_{part}_lora.up.weight"] = low.up.weight.detach()
            if index in self.layers:
                kv = self.layers[index]
                for part, linear in (("k", kv.to_k), ("v", kv.to_v), ("q", kv.to_q)):
                    if linear is not None:
                        found[f"{index}.to_{part}_{word}.weight"] = linear.weight.detach()
        return found


def fits(shapes: Shapes, layers: tuple[AttentionLayer, ...], text_width: int, *, path: Path, word: str) -> None:
    """WrongBaseModel unless the weights were made for attention layers like these; CheckpointBroken for gaps."""
    keys = {int(key.split(".")[0]): shape for key, shape in shapes.items() if key.endswith(f".to_k_{word}.weight")}
    if not keys:
        raise CheckpointBroken(f"{path} has no to_k_{word} weights; fetch the file again.")
    width = next(iter(keys.values()))[1]
    if width != text_width:
        raise WrongBaseModel(
            f"{path} was made for {base_name(width)} (tokens {width} wide), but the loaded base model is"
            f" {base_name(text_width)} (tokens {text_width} wide); load the base model it was made for."
        )
    here = {layer.index: layer.width for layer in layers if layer.cross}
    if keys.keys() - here.keys() or max(keys) < max(here):
        raise WrongBaseModel(
            f"{path} was made for a base model whose last cross-attention layer has number {max(keys)}, in the loaded"
            f" one it is {max(here)}; load the base model it was made for."
        )
    gaps = sorted(here.keys() - keys.keys())
    if gaps:
        raise CheckpointBroken(f"{path} lacks {gaps[0]}.to_k_{word}.weight; fetch the file again.")
    for index, width in here.items():
        if keys[index][0] != width:
            raise WrongBaseModel(
                f"{path} was made for a base model {keys[index][0]} channels wide at attention layer {index}, the"
                f" loaded one is {width} wide; load the base model it was made for."
            )


def _inputs(layer: AttentionLayer, part: str, text_width: int) -> int:
    return text_width if layer.cross and part in ("k", "v") else layer.width


def _low_rank(shapes: Shapes, layer: AttentionLayer, part: str, text_width: int) -> LowRank | None:
    down = shapes.get(f"{layer.index}.to_{part}_lora.down.weight")
    return None if down is None else LowRank(_inputs(layer, part, text_width), layer.width, down[0])


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's own start for linear layers and convolutions, drawn from `generator` instead of the global one."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            bound = part.weight[0].numel() ** -0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)


def dtype_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module is and in which precision, by its first parameter."""
    first: Tensor = next(module.parameters())
    return first.device, first.dtype
