"""Linear layers and convolutions that keep their weights in eight bits and make them whole for the length of a call.

Each output channel has a scale of its own, its largest weight. int8 divides that into 127 steps; fp8 (e4m3: four bits
of exponent, three of mantissa) is finer for small weights and coarser for large ones. Both are bounded approximations:
int8's weights are off by at most 1/254 of their channel's largest, fp8's by 1/16 of their own size. What enters and
leaves a network (`conv_in`, `conv_out`) stays whole; so do biases, norms and embeddings, which are small.

Method: absolute-maximum quantisation by row, https://arxiv.org/abs/2208.07339, section 2.1; of weights alone.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from facegen.allocator import give_back
from facegen.errors import WrongRequest

Weights = Literal["whole", "int8", "fp8"]

_TOP = {
    torch.int8: 127.0,
    torch.uint8: 448.0,
}  # the largest number; fp8 lies in bytes, which no cast of a module widens
_WHOLE = ("conv_in", "conv_out")


class _Eight(nn.Module):
    """eights: (O, …) the weights' bytes; peaks: (O, 1, …) each channel's largest, in the precision of the layer."""

    eights: Tensor
    peaks: Tensor

    def whole(self) -> Tensor:
        """The weights (O, …), as near as eight bits come to them."""
        numbers = self.eights.view(torch.float8_e4m3fn) if self.eights.dtype == torch.uint8 else self.eights
        return numbers.float().mul_(self.peaks.float() / _TOP[self.eights.dtype]).to(self.peaks.dtype)


class EightBitLinear(_Eight, nn.Linear):
    """``nn.Linear``, but there is no `weight`; see the module's text."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return nn.functional.linear(input, self.whole(), self.bias)


class EightBitConv2d(_Eight, nn.Conv2d):
    """``nn.Conv2d``, but there is no `weight`; see the module's text."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return self._conv_forward(input, self.whole(), self.bias)


_TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: EightBitLinear, nn.Conv2d: EightBitConv2d}


def check(weights: str, device: torch.device) -> None:
    """Raises WrongRequest for a form of weights that there is not, or not on this device."""
    if weights not in get_args(Weights):
        raise WrongRequest(f"weights must be one of {', '.join(get_args(Weights))}, not {weights!r}.")
    if weights == "fp8" and device.type == "mps":
        raise WrongRequest("Apple's GPUs know no fp8 numbers; use weights='int8'.")


@torch.no_grad()
def shrink(network: nn.Module, weights: Weights) -> None:
    """Keep a network's weights so, in place, layer by layer; what is in eight bits already stays as it is.

    The network is for inference only from then on. A VAE, a small part of a model that shows in every pixel, is left.
    """
    if weights == "whole" or hasattr(getattr(network, "config", None), "latent_channels"):
        return
    for name, part in network.named_modules():
        twin = _TWINS.get(type(part))
        if twin is not None and name.rpartition(".")[2] not in _WHOLE:
            _shrink(part, weights)
            part.__class__ = twin
    give_back()


def _shrink(layer: Any, weights: Weights) -> None:
    plain: Tensor = layer._parameters.pop("weight").detach()
    kind = torch.int8 if weights == "int8" else torch.uint8
    peaks = plain.flatten(1).abs().amax(1).view(-1, *[1] * (plain.ndim - 1))
    # A channel of zeros, as in fresh ControlNets, has a scale as well.
    peaks = peaks.clamp_(min=torch.finfo(plain.dtype).tiny)
    numbers = (plain.float() / peaks.float() * _TOP[kind]).clamp_(-_TOP[kind], _TOP[kind])
    eights = numbers.round_().to(kind) if kind == torch.int8 else numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    layer.register_buffer("eights", eights)
    layer.register_buffer("peaks", peaks)
