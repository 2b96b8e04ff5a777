"""Adapters of different families in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest
from facegen.attention.processor import install
from facegen.conditions import Condition, ControlCondition, LoraCondition, LowRankWeights, TokenCondition
from facegen.models.base import Model
from facegen.models.lora import load_lora

ASKED = AdapterRequest(height=64, width=64)
STREAMS = ("facechain_fact", "id_animator", "ip_adapter", "ip_adapter_faceid", "wplus")
Call = Callable[..., Tensor]
Made = Callable[..., list[Condition]]


@pytest.fixture
def made(fresh: Callable[[str], Adapter], photos: Callable[[int], Any], model: Model) -> Made:
    """made(name, seed, **request): the conditions of a person's adapter."""

    def conditions(name: str, seed: int = 1, **more: Any) -> list[Condition]:
        return fresh(name).conditions([photos(seed)], replace(ASKED, **more), model)

    return conditions


@pytest.mark.parametrize(("first", "second"), list(combinations(STREAMS, 2)))
def test_two_families_in_any_order(first: str, second: str, made: Made, call: Call) -> None:
    a, b = made(first, 1), made(second, 2)
    both = call([*a, *b])
    assert torch.allclose(both, call([*b, *a]), atol=1e-5)
    assert not torch.allclose(both, call(a), atol=1e-4)
    assert not torch.allclose(both, call(b), atol=1e-4)
    assert torch.equal(call([*a, *made(second, 2, scale=0.0)]), call(a)), "strength 0 is not there at all"


def test_prompt_controlnet_tokens_and_loras_together(made: Made, model: Model, call: Call) -> None:
    """The words of PreciseControl, InstantID with its drawing, FACT ahead of the text, and two style LoRAs."""
    layer = next(one for one in model.attention_layers if not one.cross)
    name = layer.name.removesuffix("processor") + "to_q"
    generator = torch.Generator().manual_seed(1)
    loras: list[Condition] = [
        LoraCondition(
            layers={
                name: LowRankWeights(
                    torch.randn(2, layer.width, generator=generator) * 0.3,
                    torch.randn(layer.width, 2, generator=generator) * 0.3,
                )
            }
        )
        for _ in range(2)
    ]
    parts = [
        made("precisecontrol", prompt="a photo of sks person"),
        made("instantid", 2),
        made("facechain_fact", 3),
        loras,
    ]
    whole = call([one for part in parts for one in part])
    for order in list(permutations(parts))[::7]:
        assert torch.allclose(call([one for part in order for one in part]), whole, atol=1e-5)
    for left_out in parts:
        rest = [one for part in parts if part is not left_out for one in part]
        assert not torch.allclose(call(rest), whole, atol=1e-5)


# --- SD 1.5 and SDXL alike ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A tiny base model of either topology, and what is put onto it."""

    model: Model
    calls: Callable[[Model], Call]
    tailored: Callable[[str, Model], Adapter]
    photos: Callable[[int], Any]

    @property
    def call(self) -> Call:
        """A UNet call."""
        return self.calls(self.model)

    def person(self, name: str, seed: int, **more: Any) -> list[Condition]:
        """The conditions of a person's adapter; every adapter of a family has the same weights."""
        return self.tailored(name, self.model).conditions([self.photos(seed)], replace(ASKED, **more), self.model)

    def pose(self, scale: float = 1.0) -> list[Condition]:
        """A ControlNet that is no adapter's."""
        from diffusers.models.controlnets.controlnet import ControlNetModel

        net: Any = ControlNetModel.from_unet(self.model.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
        generator = torch.Generator().manual_seed(11)
        for parameter in net.requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(12))
        return [ControlCondition(controlnet=net, image=image, scale=scale)]

    def style(self, folder: Path, seed: int, scale: float = 1.0) -> list[Condition]:
        """A LoRA from a file, on every attention of the UNet."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in self.model.unet.named_modules():
            if name.endswith(("to_q", "to_k", "to_out.0")):
                width, height = module.get_parameter("weight").shape
                tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, height, generator=generator) * 0.2
                tensors[f"unet.{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator) * 0.2
        file = folder / f"style{seed}.safetensors"
        checkpoints.write(file, tensors)
        return [load_lora(file, self.model, scale=scale)]


@pytest.fixture(params=["sd15", "sdxl"])
def stage(
    request: pytest.FixtureRequest,
    model: Model,
    other_model: Model,
    calls: Callable[[Model], Call],
    tailored: Callable[[str, Model], Adapter],
    photos: Callable[[int], Any],
) -> Stage:
    return Stage(model if request.param == "sd15" else other_model, calls, tailored, photos)


def flat(parts: Iterable[Sequence[Condition]]) -> list[Condition]:
    return [one for part in parts for one in part]


def check(call: Call, parts: Sequence[list[Condition]], silent: Sequence[list[Condition]]) -> None:
    """The parts in any order make one picture, each of them counts, and at strength 0 it is as if it were not there.

    silent: the parts again, each at strength 0.
    """
    whole = call(flat(parts))
    for order in permutations(parts):
        assert torch.allclose(call(flat(order)), whole, atol=1e-5)
    for place, off in enumerate(silent):
        rest = [part for other, part in enumerate(parts) if other != place]
        assert torch.equal(call(flat([*parts[:place], off, *parts[place + 1 :]])), call(flat(rest)))
        assert not torch.allclose(call(flat(rest)), whole, atol=1e-4)


def digest(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.unet.state_dict().items()}


def test_two_identity_adapters(stage: Stage) -> None:
    names = ("ip_adapter_faceid", "instantid")
    before = digest(stage.model)
    check(
        stage.call,
        [stage.person(name, seed) for seed, name in enumerate(names)],
        [stage.person(name, seed, scale=0.0, control_scale=0.0) for seed, name in enumerate(names)],
    )
    assert all(torch.equal(value, before[name]) for name, value in stage.model.unet.state_dict().items())


def test_an_identity_a_pose_and_two_styles(stage: Stage, tmp_path: Path) -> None:
    before = digest(stage.model)
    check(
        stage.call,
        [
            stage.person("ip_adapter_faceid", 1),
            [*stage.pose(), *stage.style(tmp_path, 1, 0.7)],
            stage.style(tmp_path, 2, -0.4),
        ],
        [
            stage.person("ip_adapter_faceid", 1, scale=0.0),
            [*stage.pose(0.0), *stage.style(tmp_path, 1, 0.0)],
            stage.style(tmp_path, 2, 0.0),
        ],
    )
    assert all(torch.equal(value, before[name]) for name, value in stage.model.unet.state_dict().items())
    assert not any(module._forward_hooks for module in stage.model.unet.modules())


def test_two_people_in_two_regions(stage: Stage) -> None:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    masks, names = (left, 1 - left), ("ip_adapter_faceid", "instantid")
    people = [stage.person(name, place, mask=masks[place]) for place, name in enumerate(names)]
    check(
        stage.call,
        people,
        [
            stage.person(name, place, mask=masks[place], scale=0.0, control_scale=0.0)
            for place, name in enumerate(names)
        ],
    )
    nowhere = stage.person(names[1], 1, mask=torch.zeros(1, 64, 64))
    # FaceID's LoRA has no place: it acts everywhere as long as a face does.
    assert torch.equal(stage.call([*people[0], *nowhere]), stage.call(people[0]))
    swapped = [stage.person(name, place, mask=masks[1 - place]) for place, name in enumerate(names)]
    assert not torch.allclose(stage.call(flat(swapped)), stage.call(flat(people)), atol=1e-4)
    twice = [stage.person("ip_adapter_faceid", place, mask=masks[place]) for place in (0, 1)]
    assert torch.allclose(stage.call(flat(twice)), stage.call(flat(twice[::-1])), atol=1e-5)


def test_faceids_lora_and_the_users_own(stage: Stage, tmp_path: Path) -> None:
    """Both act at one layer, W x + theirs + own, and neither is changed by the other: as if the user's were written
    into the weights.
    """
    face, style = stage.person("ip_adapter_faceid", 1), stage.style(tmp_path, 3, 0.8)
    assert isinstance(face[0], TokenCondition)
    assert face[0].lora
    both = stage.call([*face, *style])
    off = stage.person("ip_adapter_faceid", 1, scale=0.0)
    assert torch.equal(stage.call([*off, *style]), stage.call(style))
    assert torch.equal(stage.call([*face, *stage.style(tmp_path, 3, 0.0)]), stage.call(face))
    (lora,) = style
    assert isinstance(lora, LoraCondition)
    written = copy.copy(stage.model)
    written.unet = copy.deepcopy(stage.model.unet)
    written.attention_layers = install(written.unet)
    for name, low in lora.layers.items():
        weight = written.unet.get_submodule(name).get_parameter("weight")
        weight.data += 0.8 * low.gain * low.up @ low.down
    found = stage.calls(written)(face)
    assert (found - both).abs().max() <= 1e-5 * both.abs().max()
    assert not torch.allclose(both, stage.call(face), atol=1e-4)
