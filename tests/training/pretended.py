"""A pretended second device, for machines without a GPU: what is mixed with tensors of the CPU is refused.

Tensors are the CPU's own, marked by their memory. So everything is truly computed, gradients included, and what a GPU
would stumble over (a table left on the CPU, a net that nobody moved) fails here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
# Those that PyTorch lets mix: indices may lie on the CPU; some only look, or copy between devices.
_FREE = {
    "torch.Tensor.__getitem__", "torch.Tensor.__setitem__", "torch.Tensor.to", "torch.Tensor.copy_", "torch.Tensor.cpu",
    "torch.Tensor.type_as", "torch.Tensor.expand_as", "torch.Tensor.view_as", "torch.Tensor.reshape_as",
    "torch.Tensor.data.__set__", "torch.Tensor.grad.__set__",
}  # fmt: skip
_TO_CPU = {"torch.Tensor.cpu", "torch.Tensor.tolist", "torch.Tensor.numpy", "torch.Tensor.item"}


class Generator(torch.Generator):
    """One of the CPU's that says to be the pretended device's."""

    @property
    def device(self) -> torch.device:
        return GPU


class PretendedGPU(TorchFunctionMode):
    """Inside, `cuda` is there to compute on; RuntimeError for what mixes tensors of both devices."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[int, StorageWeakRef] = {}

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """From now on these are the device's."""
        for one in tensors:
            reference = StorageWeakRef(one.untyped_storage())
            self._marked[reference.cdata] = reference

    def has(self, tensor: Tensor) -> bool:
        """Whether it is the device's."""
        found = self._marked.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or str(func)
        kwargs = dict(kwargs or {})
        if func is torch.device or "_parse_to" in name or "_shallow_copy_type" in name:
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        ours = [one for one in given if self.has(one)]
        if name.endswith("device.__get__"):
            return GPU if ours else _CPU
        if name.endswith("is_cuda.__get__"):
            return bool(ours)
        if name == "torch.Tensor.numpy" and ours:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        foreign = [one for one in given if one.ndim and not self.has(one)]
        if ours and foreign and name not in _FREE:
            raise RuntimeError(f"{name} mixes tensors of cuda:0 and cpu: {[tuple(one.shape) for one in foreign]}")
        if name == "torch.Tensor.__getitem__" and foreign and not self.has(args[0]) and ours:
            raise RuntimeError(f"{name} looks up a tensor of cpu by indices of cuda:0")
        there, args, kwargs = self._wanted(name, args, kwargs, bool(ours))
        out = func(*args, **kwargs)
        if name in ("torch.Tensor.to", "torch.Tensor.cpu"):
            source = args[0]
            if there != self.has(source) and out.untyped_storage()._cdata == source.untyped_storage()._cdata:
                out = out.clone(memory_format=torch.preserve_format)
        if there:
            self.mark(_tensors(out))
        return out

    def _wanted(self, name: str, args: Any, kwargs: dict[str, Any], ours: bool) -> tuple[bool, Any, dict[str, Any]]:
        """Whether the answer is the device's, and the call as the CPU understands it."""
        places = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device)]
        places += [torch.device(one) for one in (kwargs.get("device"), *args) if one in ("cpu", "cuda", "cuda:0")]
        if name == "torch.Tensor.to" and any(isinstance(one, Tensor) for one in args[1:]):
            return self.has(next(one for one in args[1:] if isinstance(one, Tensor))), args, kwargs
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != bool(places and places[0] == GPU):
            raise RuntimeError(f"{name}: the generator is of another device than what it is to draw")
        args = tuple(_CPU if isinstance(one, torch.device) or one in ("cuda", "cuda:0") else one for one in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        if places:
            return places[0].type == "cuda", args, kwargs
        return ours and name not in _TO_CPU, args, kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Inside, tensors can be moved to `GPU`."""
    with PretendedGPU() as gpu:
        yield gpu
