"""Low-rank weights (LoRA) from files, and a network that wears them for the length of a `with`.

The network's parameters are never touched: each layer that has an addition gets a forward hook, and the hooks are
gone afterwards.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from facegen.checkpoints import SAFE, SUFFIXES, read
from facegen.conditions import LoraCondition, LowRankWeights, Scale
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongBaseModel
from facegen.models.lora_names import Names, part_of

if TYPE_CHECKING:
    from facegen.models.base import Model

# What a file may be instead of a plain LoRA, by marks in its keys.
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT"}
_STEMS = ("pytorch_lora_weights", "adapter_model")  # diffusers' and peft's names for the file in a folder
_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_METADATA = "lora_adapter_metadata"  # in the header of the files that diffusers writes


def load_lora(path: str | Path, model: Model, *, scale: Scale = 1.0) -> LoraCondition:
    """Read a LoRA for the model's UNet and text encoders: kohya's, LyCORIS' LoCon, diffusers' or peft's, LCM-LoRA too.

    path: the file, or a folder as diffusers (pytorch_lora_weights.safetensors) or peft write it (adapter_model beside
    adapter_config.json, for the UNet or in folders named after the networks). Alphas are those of the file, of its
    header or of the configuration beside it; without one a layer acts at its full strength.
    Raises WeightsMissing (no such file), CheckpointBroken (truncated, halves missing), WrongAdapter (no LoRA, or of a
    kind that is not supported), WrongBaseModel (made for another architecture).
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    declared: dict[str, Mapping[str, Any]] = {}
    for network, file in _files(path):
        prefix = f"{network}." if network else ""
        tensors |= {prefix + key.removeprefix("base_model.model."): value for key, value in read(file).items()}
        declared |= _declared(file, network)
    return _condition(tensors, model, path, declared, scale)


def lora_from_tensors(tensors: Mapping[str, Tensor], model: Model, path: Path, *, scale: Scale = 1.0) -> LoraCondition:
    """The same from tensors that were read from `path`, or from a part of it; raises as `load_lora`."""
    return _condition(tensors, model, path, {}, scale)


def _condition(
    tensors: Mapping[str, Tensor], model: Model, path: Path, declared: Mapping[str, Mapping[str, Any]], scale: Scale
) -> LoraCondition:
    for mark, kind in _OTHERS.items():
        if any(mark in key for key in tensors):
            raise WrongAdapter(f"{path} is a {kind} file; only plain LoRA is supported.")
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    foreign = []
    for key, value in tensors.items():
        part = part_of(key)
        if part is None:
            foreign.append(key)
        else:
            layers[part.layer][part.half] = value
    if not any(half != "alpha" for halves in layers.values() for half in halves):
        raise WrongAdapter(f"{path} holds no LoRA weights.")
    if foreign:
        raise WrongAdapter(f"{path} holds what is no LoRA weight: {_some(foreign)}; it cannot be worn whole.")
    names = Names.of(model)
    places = {layer: names.find(layer) for layer in layers}
    if lost := [layer for layer, place in places.items() if place is None]:
        raise WrongBaseModel(
            f"{path} was made for another base model: {len(lost)} of its {len(layers)} layers fit nothing in the"
            f" loaded one: {_some(lost)}."
        )
    found: dict[str, dict[str, LowRankWeights]] = {network: {} for network in names.spellings}
    for layer, halves in layers.items():
        network, module = places[layer] or ("", "")
        found[network][module] = _low_rank(layer, module, halves, declared.get(network, {}), path)
    for network, encoder in {"unet": model.unet, **model.text_encoders()}.items():
        fits(encoder, found[network], path.name)
    unet = found.pop("unet")
    text = {f"{network}.{module}": low for network, own in found.items() for module, low in own.items()}
    return LoraCondition(layers=unet, text_layers=text or None, scale=scale)


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _low_rank(
    layer: str, module: str, halves: Mapping[str, Tensor], declared: Mapping[str, Any], path: Path
) -> LowRankWeights:
    if "down" not in halves or "up" not in halves:
        raise CheckpointBroken(f"{path} lacks one half of the LoRA weights of {layer}.")
    down, up = halves["down"], halves["up"]
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise CheckpointBroken(f"{path} has halves of ranks {rank} and {up.shape[1]} for {layer}.")
    if (mid := halves.get("mid")) is not None:
        # LyCORIS' Tucker form of a convolution: 1×1 down, k×k among the ranks, 1×1 up; the first two are one.
        down = torch.einsum("sr...,ri->si...", mid.float(), down.float().flatten(1)).to(down.dtype)
    if "alpha" in halves:
        return LowRankWeights(down, up, float(halves["alpha"]) / rank)
    return LowRankWeights(down, up, _gain(module, rank, declared))


def _gain(module: str, rank: int, declared: Mapping[str, Any]) -> float:
    """alpha / rank by peft's configuration, 1 without one."""
    alpha = declared.get("lora_alpha")
    for pattern, value in (declared.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft matches
            alpha = value
            break
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if declared.get("use_rslora") else rank)


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files of a LoRA and the networks they are for ("": their keys say it)."""
    if not path.is_dir():
        return [("", path)]
    found: dict[str, Path] = {}
    for network in ("", *_NETWORKS):
        for name in (f"{stem}{suffix}" for stem in _STEMS for suffix in SUFFIXES):
            if (path / network / name).is_file():
                found.setdefault(network, path / network / name)
    if not found:
        raise WeightsMissing(f"{path} holds no LoRA: neither {_STEMS[0]}{SAFE} nor {_STEMS[1]}{SAFE} is in it.")
    return [("", found[""])] if "" in found else list(found.items())


def _declared(file: Path, network: str) -> dict[str, Mapping[str, Any]]:
    """peft's configuration for each network: from the header that diffusers writes, or from the file beside peft's."""
    beside = file.with_name("adapter_config.json")
    try:
        if file.stem == "adapter_model" and beside.is_file():
            config = json.loads(beside.read_text("utf-8"))
            return dict.fromkeys([network] if network else _NETWORKS, config)
        told: dict[str, Any] = json.loads(_header(file).get(_METADATA, "{}")) if file.suffix == SAFE else {}
    except ValueError as error:
        raise CheckpointBroken(f"The configuration of {file} is damaged ({error}); fetch the file again.") from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in told.items():
        name, _, field = key.partition(".")
        found.setdefault(name, {})[field] = value
    return dict(found)


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def text_module(name: str, encoder: nn.Module) -> str:
    """A text-encoder layer's name in this version of transformers, whose CLIPTextModel lost the level `text_model`."""
    return name if hasattr(encoder, "text_model") else name.removeprefix("text_model.")


def fits(network: nn.Module, layers: Mapping[str, LowRankWeights], what: str) -> None:
    """Raise WrongBaseModel when a layer is missing in the network or has another shape."""
    for name, low in layers.items():
        try:
            shape = _shape(network.get_submodule(name))
        except AttributeError:
            shape = None
        if shape is None:
            raise WrongBaseModel(f"{what} changes the layer {name}, which the loaded base model does not have.")
        if shape[0] != low.up.shape[0] or shape[1] != low.down.shape[1]:
            raise WrongBaseModel(
                f"{what} was made for another base model: its layer {name} maps {low.down.shape[1]} to"
                f" {low.up.shape[0]} channels, the loaded model's {shape[1]} to {shape[0]}."
            )
        kernel, own = tuple(low.down.shape[2:]), tuple(shape[2:])
        if (kernel or (1, 1)) != (own or (1, 1)):
            raise WrongBaseModel(f"{what} has a kernel of {kernel} for the layer {name}, the loaded model's is {own}.")


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """Of its weight, which is not asked for itself: a packed convolution would have to lay it out anew."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


class Worn:
    """The strengths of the LoRAs that a network wears now; 0 switches one off."""

    def __init__(self, count: int) -> None:
        self.strengths = [0.0] * count


@contextmanager
def wearing(network: nn.Module, sets: Sequence[Mapping[str, LowRankWeights]]) -> Iterator[Worn]:
    """Inside the `with` the network computes W x + Σ strength·gain·up(down(x)) at each named layer."""
    worn = Worn(len(sets))
    handles = []
    try:
        for place, layers in enumerate(sets):
            for name, low in layers.items():
                handles.append(network.get_submodule(name).register_forward_hook(_hook(low, worn, place)))
        yield worn
    finally:
        for handle in handles:
            handle.remove()


def _hook(low: LowRankWeights, worn: Worn, place: int) -> Any:
    moved: dict[tuple[Any, Any], tuple[Tensor, Tensor]] = {}

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        strength = worn.strengths[place]
        if strength == 0.0:
            return output
        x = args[0]
        key = (x.device, x.dtype)
        if key not in moved:
            moved[key] = (low.down.to(x), low.up.to(x))
        down, up = moved[key]
        if isinstance(module, nn.Conv2d):
            down = down if down.ndim == 4 else down[..., None, None]
            up = up if up.ndim == 4 else up[..., None, None]
            inner = F.conv2d(x, down, None, module.stride, module.padding, module.dilation)  # pyright: ignore
            return output + F.conv2d(inner, up) * (low.gain * strength)
        # A file may hold a linear layer's weights as a 1×1 convolution.
        return output + F.linear(F.linear(x, down.flatten(1)), up.flatten(1)) * (low.gain * strength)

    return add
