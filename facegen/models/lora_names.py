"""How LoRA files call a model's layers, and what the models themselves call them.

Every spelling that trainers have used for a layer is a module's name, dotted or with underscores, behind the name of
the network. The networks are asked for their layers, so a name is either one of theirs or fits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from facegen.models.base import Model

# …lora_down.weight (kohya, LyCORIS), …to_q_lora.down.weight (diffusers until 0.20), …lora.down.weight and
# …lora_linear_layer.down.weight (since), …lora_A.weight and …lora_A.<adapter>.weight (peft).
_WEIGHT = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<half>down|up|mid|A|B)(?:\.[^.]+)??\.weight")
_ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.alpha")
_HALVES = {"A": "down", "B": "up"}
_PREFIXES = (
    ("base_model_model_", None),
    ("model_diffusion_model_", "unet"),
    ("diffusion_model_", "unet"),
    ("lora_unet_", "unet"),
    ("unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("text_encoder_2_", "text_encoder_2"),
    ("text_encoder_", "text_encoder"),
)
_TEXT_LEVEL = "text_model_"
# The projections of CLIP's attention under the names that diffusers gave them until 0.20.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_EDGES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class Part(NamedTuple):
    """One tensor of a file: the layer as the file calls it, and "down", "up", "mid" or "alpha"."""

    layer: str
    half: str


def part_of(key: str) -> Part | None:
    """What a key says; None where it is none of a plain LoRA."""
    if found := _WEIGHT.fullmatch(key):
        return Part(found["layer"], _HALVES.get(found["half"], found["half"]))
    if found := _ALPHA.fullmatch(key):
        return Part(found["layer"], "alpha")
    return None


@dataclass(frozen=True)
class Names:
    """The layers of a model by network ("unet", "text_encoder", "text_encoder_2") and spelling."""

    spellings: dict[str, dict[str, str]]

    @classmethod
    def of(cls, model: Model) -> Names:
        """Every linear layer and convolution of the model's networks."""
        spellings = {"unet": _unet(model.unet)}
        for name, encoder in model.text_encoders().items():
            spellings[name] = _text(encoder)
        return cls(spellings)

    def find(self, layer: str) -> tuple[str, str] | None:
        """(network, module) of a layer as a file calls it; None where it fits nothing."""
        flat = layer.replace(".", "_").replace("_processor_", "_")
        wanted: str | None = None
        for prefix, network in _PREFIXES:
            if flat.startswith(prefix):
                flat, wanted = flat.removeprefix(prefix), network
                if network is not None:
                    break
        for network, known in self.spellings.items():
            if wanted in (None, network) and flat in known:
                return network, known[flat]
        return None


def _layers(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield name


def _unet(unet: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _layers(unet):
        for spelling in (name, sgm(unet, name)):
            flat = spelling.replace(".", "_")
            found[flat] = name
            if flat.endswith("_to_out_0"):
                found[flat.removesuffix("_0")] = name
    return found


def _text(encoder: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _layers(encoder):
        flat = name.replace(".", "_").removeprefix(_TEXT_LEVEL)
        head, _, tail = flat.rpartition("self_attn_")
        for spelling in (flat, f"{head}self_attn_{_OLD_TEXT[tail]}" if tail in _OLD_TEXT else flat):
            # transformers' CLIPTextModel lost the level `text_model`, files keep it.
            found[spelling] = found[_TEXT_LEVEL + spelling] = name
    return found


def sgm(unet: nn.Module, name: str) -> str:
    """A UNet layer's name in Stability's own code, which kohya's SDXL files use; the name itself where it is alike.

    Source: github Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py.
    """
    if name in _SGM_EDGES:
        return _SGM_EDGES[name]
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, index, tail = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(tail)}"
    if side not in ("down_blocks", "up_blocks"):
        return name
    number, kind, index, tail = rest.split(".", 3)
    block = unet.get_submodule(f"{side}.{number}")
    layers = len(list(unet.get_submodule(f"{side}.0.resnets").children()))
    if side == "down_blocks":
        first = 1 + int(number) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        return f"input_blocks.{first + int(index)}.{int(kind == 'attentions')}.{_inner(tail)}"
    first = int(number) * layers
    if kind == "upsamplers":
        return f"output_blocks.{first + layers - 1}.{2 if hasattr(block, 'attentions') else 1}.{tail}"
    return f"output_blocks.{first + int(index)}.{int(kind == 'attentions')}.{_inner(tail)}"


def _inner(tail: str) -> str:
    return _SGM_RESNET.get(tail, tail)
