"""Convolutions and linear layers through oneDNN, with weights laid out once for the picture's size.

PyTorch lays a convolution's weights out anew at every call, which at small feature maps takes longer than the
convolution itself, and multiplies float32 matrices with MKL, which leaves AVX-512 idle on AMD's processors. The
operators used here are those that torch.compile writes for a CPU. Only float32 on a CPU without gradients takes this
path; anything else takes PyTorch's own. A packed model computes the same up to float32 rounding, not to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _Packed(NamedTuple):
    """key: which weights, for which input; weight: opaque to everything but oneDNN."""

    key: tuple[int, int, torch.Size]
    weight: Tensor


# Beside the modules, not in them: a packed layer is saved, copied and compared like any other.
_packs: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def _fits(module: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    if torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad):
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32 == module.weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


class PackedLinear(nn.Linear):
    """``nn.Linear`` through oneDNN; its weights stay as they are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        if not _fits(self, input):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` through oneDNN, its weights laid out for the input's size (a second copy); output channels-last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not _fits(self, input):
            return super().forward(input)
        key = (self.weight.data_ptr(), self.weight._version, input.shape)
        pack = _packs.get(self)
        if pack is None or pack.key != key:
            laid = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, list(input.shape)
            )
            pack = _packs[self] = _Packed(key, laid)
        return torch.ops.mkldnn._convolution_pointwise(
            input, pack.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


_TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def available() -> bool:
    """Whether this PyTorch was built with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(*modules: nn.Module) -> None:
    """Let every plain linear layer and convolution in ``modules`` compute so, in place; names and weights stay."""
    if not available():
        return
    for module in modules:
        for part in module.modules():
            twin = _TWINS.get(type(part))
            if twin is not None:
                part.__class__ = twin


def unpack(*modules: nn.Module) -> None:
    """Undo ``pack``, to the last bit."""
    own = {twin: plain for plain, twin in _TWINS.items()}
    for module in modules:
        for part in module.modules():
            plain = own.get(type(part))
            if plain is not None:
                part.__class__ = plain
                _packs.pop(part, None)
