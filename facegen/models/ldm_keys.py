"""Single-file checkpoints: the key names of the original Stable Diffusion code and those of diffusers' modules.

Facts of the layout, from github CompVis/latent-diffusion and Stability-AI/generative-models: `input_blocks`,
`middle_block` and `output_blocks` count the UNet's layers through, the autoencoder's decoder counts its levels from the
finest, and OpenCLIP keeps query, key and value in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from facegen.checkpoints import Shapes, count, section

UNET, VAE = "model.diffusion_model", "first_stage_model"

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_HALVES = {"down": "down_blocks", "up": "up_blocks"}
_OPEN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


@dataclass(frozen=True)
class Taken:
    """Where a module's tensor comes from: the file's key, and what is done to it (None: nothing)."""

    key: str
    change: Callable[[Tensor], Tensor] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.change is None else self.change(tensor)


Names = dict[str, Taken]
"""A module's key to where its tensor comes from."""


def layers_per_block(shapes: Shapes) -> int:
    """Of a UNet's shapes without their prefix: ResNets of one level on the way down."""
    first = next((int(found[1]) for key in shapes if (found := _DOWN.match(key))), count(shapes, "input_blocks"))
    return first - 1


_DOWN = re.compile(r"input_blocks\.(\d+)\.0\.op\.")


def unet_names(shapes: Shapes) -> Names:
    """Of a UNet's shapes without their prefix; a key that no UNet has is left out."""
    layers = layers_per_block(shapes)
    return {new: Taken(key) for key in shapes if (new := _unet_name(key, shapes, layers)) is not None}


def _unet_name(key: str, shapes: Shapes, layers: int) -> str | None:
    for old, new in _UNET_ENDS.items():
        if key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    found = re.match(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", key)
    if found is None:
        middle = re.match(r"middle_block\.(\d+)\.(.+)", key)
        if middle is None:
            return None
        part, rest = int(middle[1]), middle[2]
        # ResNet, attention, ResNet; without attention two ResNets
        if f"middle_block.{part}.in_layers.0.weight" in shapes:
            return f"mid_block.resnets.{min(part, 1)}.{_resnet(rest)}"
        return f"mid_block.attentions.0.{rest}"
    side, place, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    if side == "input_blocks":
        block, layer = divmod(place - 1, layers + 1)
        down = f"down_blocks.{block}"
        if rest.startswith("op."):
            return f"{down}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        return f"{down}.resnets.{layer}.{_resnet(rest)}" if part == 0 else f"{down}.attentions.{layer}.{rest}"
    block, layer = divmod(place, layers + 1)
    up = f"up_blocks.{block}"
    if rest.startswith("conv."):
        return f"{up}.upsamplers.0.{rest}"
    return f"{up}.resnets.{layer}.{_resnet(rest)}" if part == 0 else f"{up}.attentions.{layer}.{rest}"


def _resnet(rest: str) -> str:
    for old, new in _RESNET.items():
        if rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    return rest


def vae_names(shapes: Shapes) -> Names:
    """Of an autoencoder's shapes without their prefix."""
    levels = count(shapes, "decoder.up")
    return {_vae_name(key, levels): Taken(key, _flat if _pointwise(key, shapes) else None) for key in shapes}


def _vae_name(key: str, levels: int) -> str:
    key = key.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
    if found := re.match(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.+)", key):
        if found[2] == "block":
            return f"{found[1]}.mid_block.resnets.{int(found[3]) - 1}.{found[4]}"
        layer, _, leaf = found[4].rpartition(".")
        return f"{found[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(layer, layer)}.{leaf}"
    if found := re.match(r"(encoder|decoder)\.(down|up)\.(\d+)\.(?:block\.(\d+)|(downsample|upsample))\.(.+)", key):
        level = int(found[3]) if found[2] == "down" else levels - 1 - int(found[3])
        part = f"resnets.{found[4]}" if found[4] is not None else f"{found[5]}rs.0"
        return f"{found[1]}.{_VAE_HALVES[found[2]]}.{level}.{part}.{found[6]}"
    return key


def _pointwise(key: str, shapes: Shapes) -> bool:
    """The attention's 1x1 convolutions are linear layers in diffusers."""
    return ".mid.attn_1." in key and len(shapes[key]) == 4


def _flat(weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0]


def clip_names(shapes: Shapes) -> Names:
    """Of a text encoder in transformers' layout: it keeps its names, without `text_model.` before them."""
    return {key.removeprefix("text_model."): Taken(key) for key in shapes if not key.endswith("position_ids")}


def open_clip_names(shapes: Shapes, layers: int) -> Names:
    """Of an OpenCLIP text encoder's shapes without their prefix, of which the first `layers` layers are wanted."""
    found: Names = {}
    for key in shapes:
        if key in _OPEN_ENDS:
            found[_OPEN_ENDS[key]] = Taken(key)
        elif key == "text_projection":
            found["text_projection.weight"] = Taken(key, _transposed)
        elif (match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", key)) and int(match[1]) < layers:
            found |= dict(_open_layer(f"encoder.layers.{match[1]}", match[2], key))
        elif not match and key != "logit_scale" and not key.endswith("attn_mask"):
            found[key] = Taken(key)
    return found


def _open_layer(layer: str, rest: str, key: str) -> Iterator[tuple[str, Taken]]:
    if rest.startswith("attn.in_proj_"):
        leaf = rest.removeprefix("attn.in_proj_")
        for place, name in enumerate("qkv"):
            yield f"{layer}.self_attn.{name}_proj.{leaf}", Taken(key, _third(place))
        return
    name, _, leaf = rest.rpartition(".")
    yield f"{layer}.{_OPEN_LAYER.get(name, name)}.{leaf}", Taken(key)


def _third(place: int) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole.chunk(3)[place]


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Shapes]:
    """What a single file holds, by section, each without its prefix; those it lacks are empty."""
    prefixes = (
        UNET,
        VAE,
        "cond_stage_model.transformer",
        "cond_stage_model.model",
        "conditioner.embedders.0.transformer",
        "conditioner.embedders.0.model",
        "conditioner.embedders.1.model",
    )
    return {prefix: section(shapes, prefix) for prefix in prefixes}
