"""Every adapter under every plan of memory: nothing but where its weights are while they work is different."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import facegen.lending
from facegen.adapter import Adapter, AdapterRequest, _held, find_adapters
from facegen.conditions import ControlCondition
from facegen.memory import Memory, MemoryPlan, Offload
from facegen.models.base import Model

ASKED = AdapterRequest(height=64, width=64, prompt="a photo of sks person")
SECOND = torch.device("cpu:0")  # the CPU by another name; see tests/models/test_memory.py


def planned(model: Model, offload: Offload) -> Model:
    """The model under a plan, with modules of its own."""
    other = copy.copy(model)
    other.memory = Memory(MemoryPlan(SECOND, torch.float32, offload))
    for name in ("unet", "vae", *model.text_parts):
        network = copy.deepcopy(getattr(model, name))
        other.memory.place(network)
        setattr(other, name, network)
    from facegen.attention.processor import install

    other.attention_layers = install(other.unet)
    return other


def load(adapter: Adapter, model: Model) -> Adapter:
    """As `from_pretrained` ends: frozen, and where the plan wants it."""
    for net in _held(vars(adapter)):
        model.memory.keep(net.requires_grad_(False).eval())
    return adapter


@pytest.mark.parametrize("name", sorted(find_adapters()))
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_the_same_picture_from_weights_that_wait(
    name: str,
    offload: Offload,
    model: Model,
    other_model: Model,
    tailored: Callable[[str, Model], Adapter],
    calls: Callable[[Model], Callable[..., Tensor]],
    photos: Callable[[int], Any],
    monkeypatch: pytest.MonkeyPatch,
    weights: Path,
) -> None:
    base = other_model if name == "photomaker" else model
    torch.manual_seed(0)  # of first weights that nobody else draws
    plain = tailored(name, base)
    expected = calls(base)(plain.conditions([photos(1)], ASKED, base))

    waiting = planned(base, offload)
    torch.manual_seed(0)
    adapter = load(tailored(name, waiting), waiting)
    for net in (one for one in vars(adapter).values() if hasattr(one, "controlnet_cond_embedding")):
        waiting.memory.place(net.requires_grad_(False))
    copies: list[int] = []
    copied = facegen.lending._copy

    def counted(value: Tensor, device: torch.device) -> Tensor:
        copies.append(id(value))
        return copied(value, device)

    monkeypatch.setattr(facegen.lending, "_copy", counted)
    conditions = adapter.conditions([photos(1)], ASKED, waiting)
    used = {id(value) for net in adapter.nets(waiting) for value in (*net.parameters(), *net.buffers())}
    assert used
    assert used <= set(copies) or offload == "sequential", "some net was not brought to the device"
    assert used & set(copies)
    before = {id(value) for net in adapter.nets(waiting) for value in net.parameters()}
    found = calls(waiting)(conditions)
    assert torch.equal(found, expected)
    assert {id(value) for net in adapter.nets(waiting) for value in net.parameters()} == before
    lent = set(copies)
    for condition in conditions:
        if isinstance(condition, ControlCondition):
            assert {id(value) for value in condition.controlnet.parameters()} & lent


def test_nets_are_those_that_make_conditions(model: Model, tailored: Callable[[str, Model], Adapter]) -> None:
    waiting = planned(model, "model")
    adapter = load(tailored("storymaker", waiting), waiting)
    assert {type(net).__name__ for net in adapter.nets(waiting)} == {
        "PeopleProjection",
        "CLIPVisionModelWithProjection",
    }
    assert all(isinstance(net, nn.Module) for net in adapter.nets(waiting))
