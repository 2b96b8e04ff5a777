"""A LoRA with another strength in each block of the UNet.

Names: "text" (the text encoders), "down", "mid", "up", "down.1" (a block), "down.1.0" (a layer of it: its residual
and its attention block), "rest" (what lies outside the blocks). The longest name that holds a layer counts, and what
is not named keeps its full strength. Several numbers after a name are those of its parts, in order. "lbw" stands for
all of them as lists for kohya's files spell them: BASE (the text encoders and the rest), IN…, M00, OUT… of every
block, or of those with attention alone (SD 1.x: 26 or 17 numbers, SDXL: 20 or 12).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from facegen.conditions import LoraCondition, LowRankWeights
from facegen.errors import WrongRequest
from facegen.models.lora_names import sgm
from facegen.request import suggestion

if TYPE_CHECKING:
    from facegen.models.base import Model

Blocks: TypeAlias = Mapping[str, float | Sequence[float]]

LIST = "lbw"
_INSIDE = re.compile(r"(down|up)_blocks\.(\d+)(?:\.(?:resnets|attentions)\.(\d+))?")
_SGM = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)")


def in_blocks(lora: LoraCondition, blocks: Blocks, model: Model) -> LoraCondition:
    """The same LoRA at these strengths; layers at 0 are left out. Raises WrongRequest for what the UNet does not have.

    It shares its tensors with the one that was given.
    """
    strengths = _by_list(blocks, model.unet) if LIST in blocks else _by_name(blocks, model.unet)

    def layers(given: Mapping[str, LowRankWeights], text: bool) -> dict[str, LowRankWeights]:
        found = {name: (low, _strength(name, text, strengths, model.unet)) for name, low in given.items()}
        return {name: replace(low, gain=low.gain * one) for name, (low, one) in found.items() if one != 0.0}

    text_layers = None if lora.text_layers is None else layers(lora.text_layers, text=True)
    return replace(lora, layers=layers(lora.layers, text=False), text_layers=text_layers)


def _strength(name: str, text: bool, strengths: Mapping[str, float], unet: nn.Module) -> float:
    for place in ["text"] if text else _places(name, unet):
        if place in strengths:
            return strengths[place]
    return 1.0


def _places(name: str, unet: nn.Module) -> list[str]:
    """What holds a layer, from the smallest on: its place in kohya's lists, then its layer, block and side."""
    block = _SGM.match(sgm(unet, name))
    listed = [f"{LIST}.{block[1]}.{'' if block[1] == 'middle_block' else block[2]}"] if block else []
    if name.startswith("mid_block."):
        return [*listed, "mid"]
    found = _INSIDE.match(name)
    if not found:
        return [*listed, "rest"]
    side, number, layer = found.groups()
    return [*listed, *([f"{side}.{number}.{layer}"] if layer else []), f"{side}.{number}", side]


def _by_name(blocks: Blocks, unet: nn.Module) -> dict[str, float]:
    known = _parts(unet)
    found: dict[str, float] = {}
    for name, value in blocks.items():
        if name not in known:
            raise WrongRequest(f"The loaded model has no block '{name}'{suggestion(name, known)}.")
        if not isinstance(value, Sequence):
            found[name] = float(value)
        elif len(value) == 1:
            found[name] = float(value[0])
        elif len(value) == len(known[name]):
            found |= {part: float(one) for part, one in zip(known[name], value, strict=True)}
        else:
            raise WrongRequest(
                f"The block '{name}' takes one number, or {len(known[name])}, one for each of its parts, not"
                f" {len(value)}."
            )
    return found


def _parts(unet: nn.Module) -> dict[str, list[str]]:
    """Every name, and the names of its parts."""
    found: dict[str, list[str]] = {"text": [], "mid": [], "rest": []}
    for side in ("down", "up"):
        found[side] = []
        for number, block in unet.get_submodule(f"{side}_blocks").named_children():
            name = f"{side}.{number}"
            found[side].append(name)
            found[name] = [f"{name}.{layer}" for layer, _ in block.get_submodule("resnets").named_children()]
            found |= {layer: [] for layer in found[name]}
    return found


def _by_list(blocks: Blocks, unet: nn.Module) -> dict[str, float]:
    values = blocks[LIST]
    if len(blocks) > 1 or not isinstance(values, Sequence):
        raise WrongRequest(f"'{LIST}' is one list for all blocks; give nothing beside it.")
    whole, attending = _listed(unet)
    short = [place for place in whole if place in attending]
    if len(values) not in (len(whole) + 1, len(short) + 1):
        raise WrongRequest(
            f"'{LIST}' takes {len(whole) + 1} numbers for the loaded model (BASE and every block), or"
            f" {len(short) + 1} (BASE and the blocks with attention), not {len(values)}."
        )
    base, *rest = map(float, values)
    found = {"text": base, "rest": base}
    if len(rest) == len(whole):
        return found | dict(zip(whole, rest, strict=True))
    return found | dict.fromkeys(whole, 0.0) | dict(zip(short, rest, strict=True))


def _listed(unet: nn.Module) -> tuple[list[str], set[str]]:
    """The places of kohya's lists in their order, and those with attention."""
    order = {"input_blocks": 0, "middle_block": 1, "output_blocks": 2}
    numbers: set[tuple[int, int, str]] = set()
    attending: set[str] = set()
    for name, _ in unet.named_modules():
        if isinstance(unet.get_submodule(name), (nn.Linear, nn.Conv2d)) and (block := _SGM.match(sgm(unet, name))):
            place = f"{LIST}.{block[1]}.{'' if block[1] == 'middle_block' else block[2]}"
            numbers.add((order[block[1]], 0 if block[1] == "middle_block" else int(block[2]), place))
            if ".attentions." in name or block[1] == "middle_block":
                attending.add(place)
    return [place for _, _, place in sorted(numbers)], attending
