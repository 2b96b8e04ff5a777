"""Weights that are on another device only while they are used, as a whole or layer by layer.

The tensors themselves stay where they wait; what works is a copy that takes their place in the module for that long.
So nothing has to be copied back, and a module is to the last bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the `with` every parameter and buffer of the module is on the device; those that are there stay."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    try:
        for part in module.modules():
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for name, value in store.items():
                    if value is None or value.device == device:
                        continue
                    kept.append((store, name, value))
                    if id(value) not in copies:
                        copies[id(value)] = _copy(value, device)
                    store[name] = copies[id(value)]
        yield
    finally:
        for store, name, value in kept:
            store[name] = value


def _copy(value: Tensor, device: torch.device) -> Tensor:
    moved = value.detach().to(device)
    return nn.Parameter(moved, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else moved


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that hold weights of their own: a layer, or a module that mixes its own with its layers'."""
    if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        yield module
        return
    for child in module.children():
        yield from units(child)


def by_layer(module: nn.Module, device: torch.device) -> list[RemovableHandle]:
    """Lend each unit for the length of its call, and hand it what it is called with on that device."""
    handles = []
    for unit in units(module):
        loans: list[AbstractContextManager[None]] = []  # a stack: a layer may call itself

        def lend(
            part: nn.Module, args: Any, kwargs: Any, loans: list[AbstractContextManager[None]] = loans
        ) -> tuple[Any, Any]:
            loan = lent(part, device)
            loan.__enter__()
            loans.append(loan)
            return moved(args, device), moved(kwargs, device)

        def take_back(
            part: nn.Module, args: Any, output: Any, loans: list[AbstractContextManager[None]] = loans
        ) -> None:
            if loans:
                loans.pop().__exit__(None, None, None)

        handles.append(unit.register_forward_pre_hook(lend, with_kwargs=True))
        handles.append(unit.register_forward_hook(take_back, always_call=True))
    return handles


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on the device, in dicts, lists, tuples and dataclasses too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: moved(getattr(value, one.name), device) for one in fields(value)})
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(one, device) for one in value)
    return value
