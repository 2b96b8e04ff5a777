"""Low-rank weights (LoRA) from files, and a network that wears them for the length of a `with`.

The network's parameters are never touched: each layer that has an addition gets a forward hook, and the hooks are
gone afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from facegen.checkpoints import read
from facegen.conditions import LoraCondition, LowRankWeights, Scale
from facegen.errors import CheckpointBroken, WrongAdapter, WrongBaseModel

if TYPE_CHECKING:
    from facegen.models.base import Model

TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.")


def load_lora(path: str | Path, model: Model, *, scale: Scale = 1.0) -> LoraCondition:
    """Read a kohya, diffusers or peft LoRA file for the model's UNet and text encoders.

    Raises WeightsMissing (no such file), CheckpointBroken (truncated, halves missing), WrongAdapter (no LoRA, or of a
    kind that is not supported), WrongBaseModel (made for another architecture).
    """
    path = Path(path)
    return lora_from_tensors(read(path), model, path, scale=scale)


def lora_from_tensors(tensors: Mapping[str, Tensor], model: Model, path: Path, *, scale: Scale = 1.0) -> LoraCondition:
    """The same from tensors that were read from `path`, or from a part of it; raises as `load_lora`."""
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    if not any("lora" in key for key in tensors):
        raise WrongAdapter(f"{path.name} holds no LoRA weights.")
    if any(mark in key for key in tensors for mark in ("dora_scale", "hada_w", "lokr_w")):
        raise WrongAdapter(f"{path.name} is a DoRA, LoHa or LoKr file; only plain LoRA is supported.")
    plain, alphas = _to_diffusers(tensors, model)
    groups = _pair_up(plain, alphas, path)
    unet = {name.removeprefix("unet."): low for name, low in groups.items() if not name.startswith(TEXT_PREFIXES)}
    text = {name: low for name, low in groups.items() if name.startswith(TEXT_PREFIXES)}
    fits(model.unet, unet, path.name)
    for prefix, encoder in model.text_encoders().items():
        own = {name.removeprefix(prefix + "."): low for name, low in text.items() if name.startswith(prefix + ".")}
        fits(encoder, {text_module(name, encoder): low for name, low in own.items()}, path.name)
    return LoraCondition(layers=unet, text_layers=text or None, scale=scale)


def _to_diffusers(tensors: Mapping[str, Tensor], model: Model) -> tuple[dict[str, Tensor], dict[str, float]]:
    """kohya's flat names → diffusers' dotted ones; alphas apart."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    plain = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    if not all(key.startswith(("lora_te", "lora_unet_")) for key in tensors):
        own = {key[: -len(".alpha")]: float(value) for key, value in tensors.items() if key.endswith(".alpha")}
        return plain, own
    try:
        read_kohya: Any = StableDiffusionXLPipeline.lora_state_dict
        converted, alphas = read_kohya(dict(tensors), unet_config=model.unet.config)
    except (ValueError, KeyError, IndexError) as error:
        raise WrongBaseModel(f"The LoRA's layers are not those of the loaded base model: {error}") from error
    return dict(converted), {key[: -len(".alpha")]: float(value) for key, value in (alphas or {}).items()}


def _pair_up(plain: Mapping[str, Tensor], alphas: Mapping[str, float], path: Path) -> dict[str, LowRankWeights]:
    """Module name → its down and up weights, from every spelling diffusers and peft have used."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in _peft_names(plain).items():
        for half in ("lora_A", "lora_B"):
            mark = f".{half}."
            if mark in key:
                halves.setdefault(key[: key.index(mark)], {})[half] = value
    if not halves:
        raise WrongAdapter(f"{path.name} is no LoRA of a known spelling.")
    # diffusers names the alphas of kohya's text layers after the whole key of the weights.
    spelt = _peft_names({name: name for name in alphas})
    gains = {name.split(".lora_A.")[0]: alphas[old] for name, old in spelt.items()}
    groups: dict[str, LowRankWeights] = {}
    for name, found in halves.items():
        if len(found) != 2:
            raise CheckpointBroken(f"{path.name} lacks one half of the LoRA weights of {name}.")
        down, up = found["lora_A"], found["lora_B"]
        rank = down.shape[0]
        groups[name] = LowRankWeights(down, up, gains.get(name, float(rank)) / rank)
    return groups


def _peft_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """The keys in peft's spelling, `<module>.lora_A.weight` and `lora_B`."""
    from diffusers.utils import state_dict_utils as names

    text = {key: value for key, value in named.items() if key.startswith(TEXT_PREFIXES)}
    unet = {key: value for key, value in named.items() if key not in text}
    for table in (names.DIFFUSERS_OLD_TO_PEFT, names.DIFFUSERS_TO_PEFT):
        text = names.convert_state_dict(text, table)
    unet = names.convert_unet_state_dict_to_peft(unet)
    unet = {key.replace(".processor.", "."): value for key, value in unet.items()}
    return {**text, **unet}


def text_module(name: str, encoder: nn.Module) -> str:
    """A text-encoder layer's name in this version of transformers, whose CLIPTextModel lost the level `text_model`."""
    return name if hasattr(encoder, "text_model") else name.removeprefix("text_model.")


def fits(network: nn.Module, layers: Mapping[str, LowRankWeights], what: str) -> None:
    """Raise WrongBaseModel when a layer is missing in the network or has another shape."""
    for name, low in layers.items():
        try:
            weight = getattr(network.get_submodule(name), "weight", None)
        except AttributeError:
            weight = None
        if weight is None:
            raise WrongBaseModel(f"{what} changes the layer {name}, which the loaded base model does not have.")
        if weight.shape[0] != low.up.shape[0] or weight.shape[1] != low.down.shape[1]:
            raise WrongBaseModel(
                f"{what} was made for another base model: its layer {name} maps {low.down.shape[1]} to"
                f" {low.up.shape[0]} channels, the loaded model's {weight.shape[1]} to {weight.shape[0]}."
            )


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
