"""LoRAs inside a packed network's weights for the length of a `with`, where they act alike in every step.

A hook on a layer costs a small UNet more than the low-rank products do, and keeps the layer off its fused forms. Here
the layer computes with W + Σ strength·gain·up·down instead, up to float32 rounding the same. The weights themselves are
set aside, not changed, and put back to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from facegen.conditions import LoraCondition, LowRankWeights
from facegen.models.packed import PackedConv2d, PackedLinear

LARGEST = 64 << 20  # bytes of weights that may lie twice; a larger network's steps make light of hooks


@contextmanager
def folded(network: nn.Module, loras: Sequence[LoraCondition]) -> Iterator[Sequence[Mapping[str, LowRankWeights]]]:
    """Inside the `with` the network wears what can be folded; gives what is left of each LoRA for hooks.

    Left are LoRAs with a span or a curve of strengths, layers that are not packed, all of it with gradients on or where
    the weights to fold are larger than LARGEST.
    """
    left = [dict(lora.layers) for lora in loras]
    additions: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for place, lora in enumerate(loras):
        if isinstance(lora.scale, (int, float)) and lora.constant:
            for name in lora.layers:
                additions[name].append((place, float(lora.scale)))
    layers = {name: layer for name in additions if (layer := _packed(network.get_submodule(name))) is not None}
    if torch.is_grad_enabled() or sum(map(_bytes, layers.values())) > LARGEST:
        layers = {}
    with ExitStack() as stack:
        with torch.no_grad():  # not longer: what runs inside may want gradients of the LoRAs that are left
            for name, layer in layers.items():
                weight = layer.copied()
                rows = weight.view(len(weight), -1)
                for place, strength in additions[name]:
                    low = left[place].pop(name)
                    rows.addmm_(low.up.to(rows).flatten(1), low.down.to(rows).flatten(1), alpha=low.gain * strength)
                stack.callback(layer.hold, layer.held())
                layer.take(weight)
        yield left


def _packed(layer: nn.Module) -> PackedLinear | PackedConv2d | None:
    """The layer, if weights can be added to those it computes with."""
    if type(layer) is PackedConv2d:
        fits = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    elif type(layer) is PackedLinear:
        fits = True
    else:
        return None
    plain = layer.held().plain
    fits = fits and (plain is None or (plain.dtype == torch.float32 and plain.device.type == "cpu"))
    return layer if fits else None


def _bytes(layer: PackedLinear | PackedConv2d) -> int:
    if isinstance(layer, nn.Linear):
        return 4 * layer.in_features * layer.out_features
    height, width = layer.kernel_size
    return 4 * layer.in_channels * layer.out_channels * height * width
