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
_ways: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def compile_networks(*networks: nn.Module, backend: Any = "inductor", mode: str | None = None) -> None:
    """Let these compute compiled from now on; names and weights stay. Packed ones have their own way and are left.

    mode: torch.compile's. "reduce-overhead" replays CUDA graphs, whose outputs live until the next step is marked
    (torch.compiler.cudagraph_mark_step_begin): that is the caller's to do, and features cannot be taken over then.
    """
    for network in networks:
        if is_packed(network) or network in _ways:
            continue
        _ways[network] = {"backend": backend, "mode": mode, "dynamic": False}
        network.compile(**_ways[network])


def form(network: nn.Module, walk: Callable[..., Any]) -> Callable[..., Any]:
    """The walk through this network: compiled where the network is."""
    if network not in _ways:
        return walk
    if network not in _walks:
        _walks[network] = torch.compile(walk, **_ways[network])
    return _walks[network]


def undo(*networks: nn.Module) -> None:
    """Let these compute as they did before."""
    for network in networks:
        if _ways.pop(network, None) is not None:
            _walks.pop(network, None)
            network._compiled_call_impl = None
