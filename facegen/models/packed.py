"""Convolutions and linear layers through oneDNN, with convolutions' weights laid out once.

PyTorch lays a convolution's weights out anew at every call, which at small feature maps takes longer than the
convolution itself, and multiplies float32 matrices with MKL, which leaves AVX-512 idle on AMD's processors. The
operators used here are those that torch.compile writes for a CPU. Only float32 on a CPU without gradients takes this
path; anything else takes PyTorch's own. A packed model computes the same up to float32 rounding, not to the last bit.

A frozen convolution keeps its weights in oneDNN's layout alone, so that packing takes no memory. Whoever asks for them
(`conv.weight`, `state_dict()`, a copy, another dtype) gets the plain ones back, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from facegen.allocator import give_back

Operator = Callable[..., Tensor]


class Laid(NamedTuple):
    """weight: opaque to everything but oneDNN; place: padding, stride, dilation, groups; version: of the plain weights
    it was made of, None where they were given up for it.
    """

    weight: Tensor
    bias: Tensor | None
    place: tuple[Any, ...]
    version: tuple[int, int] | None


class Held(NamedTuple):
    """What a packed layer computes with: plain weights, laid ones, or both."""

    plain: nn.Parameter | None
    laid: Laid | None = None


def fits(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer may take oneDNN's path for this input."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


class PackedLinear(nn.Linear):
    """``nn.Linear`` through oneDNN; its weights stay as they are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        if not fits(self, input) or self.weight.dtype != torch.float32:
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")

    def held(self) -> Held:
        """What it computes with now, for `hold`."""
        return Held(self._parameters["weight"])

    def hold(self, held: Held) -> None:
        """Compute with this from now on."""
        self._parameters["weight"] = held.plain

    def copied(self) -> Tensor:
        """A copy of its weights, (out, in)."""
        return self.weight.detach().clone(memory_format=torch.contiguous_format)

    def take(self, weight: Tensor) -> None:
        """Compute with these frozen weights from now on."""
        self.weight = nn.Parameter(weight, requires_grad=False)


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` through oneDNN, its weights laid out for the first input's size; output channels-last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        laid = self.laid(input)
        if laid is None:
            return super().forward(input)
        return torch.ops.mkldnn._convolution_pointwise(input, laid.weight, laid.bias, *laid.place, "none", [], "")

    def laid(self, x: Tensor) -> Laid | None:
        """The weights in oneDNN's layout, which serves inputs of any size; None where this path does not fit."""
        if not fits(self, x):
            return None
        weight, known = self.held()
        if weight is None:
            return known
        if known is not None and known.version == _version(weight):
            return known
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or weight.dtype != torch.float32:
            return None
        self.__dict__["_size"] = list(x.shape)
        held = self._lay(weight, list(x.shape))
        self.hold(held)
        if held.plain is None:
            _given_up(weight.nbytes)
        return held.laid

    def _lay(self, weight: nn.Parameter, size: list[int]) -> Held:
        """Weights in oneDNN's layout for an input of this size, alone where the plain ones can be had back from it."""
        place = (self.padding, self.stride, self.dilation, self.groups)
        ordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *place, size)
        if weight.requires_grad or not (ordered.is_mkldnn and ordered.shape == weight.shape):
            return Held(weight, Laid(ordered, self.bias, place, _version(weight)))
        return Held(None, Laid(ordered, self.bias, place, None))

    def release(self) -> None:
        """Take the plain weights back."""
        laid: Laid | None = self.__dict__.pop("_laid", None)
        if laid is not None and laid.version is None:
            self.hold(Held(nn.Parameter(laid.weight.to_dense(), requires_grad=False)))

    def held(self) -> Held:
        """What it computes with now, for `hold`."""
        return Held(self._parameters.get("weight"), self.__dict__.get("_laid"))

    def hold(self, held: Held) -> None:
        """Compute with this from now on."""
        self.__dict__.pop("_laid", None)
        self._parameters.pop("weight", None)
        bias = self._parameters.pop("bias", None)
        if held.plain is not None:
            self._parameters["weight"] = held.plain
        self._parameters["bias"] = bias  # behind the weights, as it was
        if held.laid is not None:
            self.__dict__["_laid"] = held.laid

    def copied(self) -> Tensor:
        """A copy of its plain weights, (out, in, h, w)."""
        plain, laid = self.held()
        if plain is not None:
            return plain.detach().clone(memory_format=torch.contiguous_format)
        assert laid is not None
        return laid.weight.to_dense()

    def take(self, weight: Tensor) -> None:
        """Compute with these frozen weights from now on, laid out at once where the input's size is known."""
        plain = nn.Parameter(weight, requires_grad=False)
        size: list[int] | None = self.__dict__.get("_size")
        self.hold(Held(plain) if size is None else self._lay(plain, size))

    # --- whoever wants the plain weights ------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_laid" in self.__dict__:
            self.release()
            return self._parameters["weight"]
        return super().__getattr__(name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.release()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return self.__dict__.copy()


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


_freed = [0]  # bytes of weights given up since the allocator last returned what is free


def _given_up(count: int) -> None:
    """oneDNN's blocks begin at pages, so they do not fit into the holes that plain weights leave."""
    _freed[0] += count
    if _freed[0] > 2 << 20:
        _freed[0] = 0
        give_back()


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


def is_packed(network: nn.Module) -> bool:
    """Whether a UNet or a ControlNet was packed."""
    return type(getattr(network, "conv_in", None)) is PackedConv2d


def unpack(*modules: nn.Module) -> None:
    """Undo ``pack``, to the last bit."""
    own = {twin: plain for plain, twin in _TWINS.items()}
    for module in modules:
        for part in module.modules():
            plain = own.get(type(part))
            if plain is not None:
                if isinstance(part, PackedConv2d):
                    part.release()
                part.__class__ = plain
