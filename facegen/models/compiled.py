"""UNets and ControlNets compiled by torch.compile, in place and once for a size of picture and number of rows.

What changes between calls (the steps, strengths, whose tokens they are) reaches the networks as tensors, so nothing
of it compiles anew; another resolution, another number of rows or of streams does. On a CPU `facegen.models.packed`
is faster than what comes out of it (mini with InstantID, one core: 0.66 s a picture against 0.71 s packed and 1.05 s of
diffusers before the quick walk, after two minutes of compiling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from facegen.models.packed import is_packed

_walks: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()
_backends: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def compile_networks(*networks: nn.Module, backend: Any = "inductor") -> None:
    """Let these compute compiled from now on; names and weights stay. Packed ones have their own way and are left."""
    for network in networks:
        if is_packed(network) or network in _backends:
            continue
        _backends[network] = backend
        network.compile(backend=backend, dynamic=False)


def form(network: nn.Module, walk: Callable[..., Any]) -> Callable[..., Any]:
    """The walk through this network: compiled where the network is."""
    if network not in _backends:
        return walk
    if network not in _walks:
        _walks[network] = torch.compile(walk, backend=_backends[network], dynamic=False)
    return _walks[network]


def undo(*networks: nn.Module) -> None:
    """Let these compute as they did before."""
    for network in networks:
        if _backends.pop(network, None) is not None:
            _walks.pop(network, None)
            network._compiled_call_impl = None
