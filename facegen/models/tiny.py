"""A tiny decoder in the VAE's place: a bounded approximation, off unless it is asked for.

It reads latents as the UNet makes them, not divided by the VAE's factor.
Source: github madebyollin/taesd (MIT); diffusers' AutoencoderTiny. Read are the decoder of a file in diffusers' layout
(diffusion_pytorch_model.safetensors) and the original's taesd_decoder.safetensors or .pth, whose layers count from the
clamp at the begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen import checkpoints
from facegen.errors import CheckpointBroken, WeightsMissing, WrongBaseModel

if TYPE_CHECKING:
    from facegen.models.base import Model

_STEMS = ("diffusion_pytorch_model", "taesd_decoder", "taesdxl_decoder")


def load_tiny(source: str | Path, model: Model) -> Any:
    """The decoder by name ("taesd", "taesdxl"), folder or file: scaled latents (B, C, h, w) → pixels in [-1, 1].

    In the model's precision, where its networks wait. Raises WeightsMissing, CheckpointBroken, and WrongBaseModel where
    it reads other latents than the model makes.
    """
    path = _file(source)
    tensors = _decoder(checkpoints.read(path), path)
    convolutions = sorted(int(key.split(".")[0]) for key in tensors if key.count(".") == 1 and key.endswith(".weight"))
    blocks = {int(key.split(".")[0]) for key in tensors if ".conv." in key}
    between = list(pairwise(convolutions))
    if not between or not blocks:
        raise CheckpointBroken(f"{path} holds no tiny decoder's layers; fetch the file again.")
    channels = tensors[f"{convolutions[0]}.weight"].shape[1]
    factor = 2 ** (len(between) - 1)
    if channels != model.latent_channels or factor != model.vae_factor:
        raise WrongBaseModel(
            f"{path} reads latents of {channels} channels, 1/{factor} of the picture's size; the loaded model's have"
            f" {model.latent_channels} and 1/{model.vae_factor}. Choose the decoder that was made for it."
        )
    from diffusers.models.autoencoders.vae import DecoderTiny

    with torch.device("meta"):
        decoder = DecoderTiny(
            in_channels=channels,
            out_channels=tensors[f"{convolutions[-1]}.weight"].shape[0],
            num_blocks=tuple(sum(a < block < b for block in blocks) for a, b in between),
            block_out_channels=tuple(tensors[f"{place}.weight"].shape[1] for place in convolutions[1:]),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
    checkpoints.fill(decoder, {f"layers.{key}": value for key, value in tensors.items()}, path)
    return model.memory.keep(decoder, model.dtype)


def _file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        from facegen.hub import resolve

        path = resolve(str(source))
    if path.is_file():
        return path
    found = [path / f"{stem}{suffix}" for stem in _STEMS for suffix in (".safetensors", ".pth")]
    there = next((one for one in found if one.is_file()), None)
    if there is None:
        raise WeightsMissing(f"{path} holds no tiny decoder; put {found[0].name} or {found[2].name} there.")
    return there


def _decoder(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The decoder's tensors by the place of their layer in diffusers' order."""
    own = checkpoints.section(tensors, "decoder.layers")
    if own:
        return own
    plain = checkpoints.section(tensors, "decoder") or dict(tensors)
    try:
        places = {key: int(key.split(".")[0]) - 1 for key in plain}
    except ValueError:
        raise checkpoints.refuse(path, tensors, "a tiny decoder") from None
    return {f"{places[key]}.{key.partition('.')[2]}": value for key, value in plain.items()}
