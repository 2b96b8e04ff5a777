"""Whole runs of the adapters against the numbers of their official code, on weights drawn from key names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen import schedulers
from facegen.adapter import AdapterRequest
from facegen.adapters.instantid import InstantID
from facegen.adapters.pulid import MANNERS
from facegen.conditions import Condition, ControlCondition
from facegen.denoise import Guidance, denoise
from facegen.models.base import Model
from tests.adapters.published import ARC_FACE, FACE, STEPS, adapter, base, difference, filled, noise
from tests.adapters.published import arc2face as arc2face_of

NEAR = 2e-5
SIZE = AdapterRequest(height=64, width=64)
START = noise(1, 4, 8, 8, seed=1)
FACES, VIEWS, BODIES = noise(2, FACE, seed=11) * 5, noise(2, 3, 28, 28, seed=12), noise(2, 3, 28, 28, seed=13)
PROMPT, NEGATIVE = "a man in rain", "low"
Make = Callable[..., Any]


def run(model: Model, conditions: Sequence[Condition], scheduler: str = "model", guidance: float = 5.0) -> Tensor:
    steps = schedulers.build(scheduler, model.scheduler_config, STEPS)
    return denoise(model, schedulers.start(steps, START), steps, conditions, Guidance(guidance))


def storymaker(make: Make, sdxl: Model) -> Tensor:
    """Two people."""
    one = make("storymaker", sdxl)
    asked = replace(SIZE, clip=VIEWS, body=BODIES)
    return run(sdxl, [text(sdxl), *one.conditions_from_embeddings(FACES[None], sdxl, asked)], "unipc")


def text(model: Model) -> Condition:
    return model.encode_text([PROMPT], [NEGATIVE])


def photomaker(version: str) -> Callable[[Make, Model], Tensor]:
    """Two photos; the first two steps of three follow the prompt alone (start_merge_step 1)."""

    def case(make: Make, model: Model) -> Tensor:
        one = make("photomaker", model, version=version)
        asked = replace(SIZE, prompt="a man img in rain", negative_prompt=NEGATIVE, clip=VIEWS, span=(2 / STEPS, 1.0))
        return run(model, one.conditions_from_embeddings(FACES[None], model, asked))

    return case


def pulid(version: str, manner: str) -> Callable[[Make, Model], Tensor]:
    """Two photos, from what EVA-CLIP gives on."""

    def case(make: Make, model: Model) -> Tensor:
        one = make("pulid", model, version=version)
        one.manner = MANNERS[one.version][manner]
        vectors, views = noise(1, 2, 1280, seed=21), [noise(1, 2, 5, 64, seed=22 + place) for place in range(5)]
        return run(model, [text(model), *one.conditions_from_tokens(one.tokens(vectors, views))], guidance=1.2)

    return case


def facechain_fact(make: Make, model: Model) -> Tensor:
    """Two photos' patch tokens."""
    one = make("facechain_fact", model)
    return run(model, [text(model), *one.conditions_from_embeddings(noise(1, 2, 9, 48, seed=31), model, SIZE)])


def id_animator(make: Make, model: Model) -> Tensor:
    """Two photos, as CLIP pixels."""
    one = make("id_animator", model)
    seen = one.sight.features(VIEWS)[None]
    return run(model, [text(model), *one.conditions_from_embeddings(seen, model, SIZE)])


def faceid(variant: str) -> Callable[[Make, Model], Tensor]:
    def case(make: Make, model: Model) -> Tensor:
        one = make("ip_adapter_faceid", model, variant=variant)
        faces = FACES[None] if variant == "portrait" else FACES[:1]
        asked = replace(SIZE, clip=VIEWS[:1], structure=0.7, scale=0.8)
        return run(model, [text(model), *one.conditions_from_embeddings(faces, model, asked)])

    return case


def arc2face(make: Make, model: Model) -> Tensor:
    """With pose, expression and reference; on its own UNet."""
    one = make("arc2face", model)
    pose = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(44))
    strengths = {"pose": 0.7, "expression": 0.9}
    asked = replace(SIZE, normals=pose, expression=noise(1, 55, seed=43), parts=strengths)
    (words, *rest) = one.conditions_from_embeddings(noise(1, ARC_FACE, seed=41), model, asked)
    look = one.referring(noise(1, 4, 8, 8, seed=42), words, model)
    worn = replace(one.parts.reference, scale=0.8)
    return run(one.host(model), [words, *rest, *look, worn])


def precisecontrol(make: Make, model: Model) -> Tensor:
    """The mapper is the official one; around it its loop, written down again."""
    one = make("precisecontrol", model)
    asked = replace(SIZE, prompt="a photo of sks person")
    return run(model, one.conditions_from_embeddings(noise(1, 18, 512, seed=51), model, asked), "ddim")


def ip_adapter(variant: str) -> Callable[[Make, Model], Tensor]:
    def case(make: Make, model: Model) -> Tensor:
        one = make("ip_adapter", model, variant=variant)
        seen = one.sight.features(VIEWS[:1])
        return run(model, [text(model), *one.conditions_from_embeddings(seen, model, replace(SIZE, scale=0.6))])

    return case


WEIGHTED = ("a (photo:1.3) of ((man)) [face], best", "(lowres), bad")


def instantid(name: str, model: Model, folder: Path) -> Tensor:
    from diffusers import ControlNetModel
    from safetensors.torch import load_file

    golden = load_file(folder / "instantid_golden.safetensors")
    one = InstantID.from_pretrained(folder / "checkpoints", model)
    drawing = golden["kps_image_128x128"].permute(2, 0, 1)[None].float() / 255
    asked = AdapterRequest(height=128, width=128, control=drawing)
    further: list[Condition] = []
    if name == "instantid full":
        asked = replace(asked, mask=region())
        net = filled(ControlNetModel.from_config(one.controlnet.config))
        further = [ControlCondition(controlnet=net, image=picture(seed), scale=seed / 10) for seed in (5, 3)]
        words = model.encode_text(["a photo of a man"], ["lowres"])
    else:
        words = model.encode_text([WEIGHTED[0]], [WEIGHTED[1]], weighted=True)
    steps = schedulers.build("model", model.scheduler_config, STEPS)
    person = one.conditions_from_embeddings(golden["raw_embedding"][None], model, asked)
    return denoise(model, schedulers.start(steps, golden["latents_in"]), steps, [words, *person, *further], Guidance(5))


def region() -> Tensor:
    """A box that lies on no grid of the layers, (1, 128, 128)."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 21:97, 33:90] = 1
    return mask


def picture(seed: int) -> Tensor:
    """What a further ControlNet follows, (1, 3, 128, 128) in levels of 1/255."""
    return (torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


CASES: dict[str, tuple[Callable[[Make, Model], Tensor], str]] = {
    "storymaker": (storymaker, "sdxl"),
    "photomaker v1": (photomaker("v1"), "sdxl"),
    "photomaker v2": (photomaker("v2"), "sdxl"),
    "pulid v1 fidelity": (pulid("v1", "fidelity"), "sdxl"),
    "pulid v1 style": (pulid("v1", "style"), "sdxl"),
    "pulid v1.1": (pulid("v1.1", "fidelity"), "sdxl"),
    "facechain_fact": (facechain_fact, "sd15"),
    "id_animator": (id_animator, "sd15"),
    "faceid plusv2": (faceid("plusv2"), "sd15"),
    "faceid portrait": (faceid("portrait"), "sd15"),
    "arc2face": (arc2face, "sd15"),
    "precisecontrol": (precisecontrol, "sd15"),
    "ip_adapter plain": (ip_adapter("plain"), "sd15"),
    "ip_adapter plus": (ip_adapter("plus"), "sd15"),
    "ip_adapter full-face": (ip_adapter("full-face"), "sd15"),
}


@pytest.fixture(scope="module")
def bases(tiny_folder: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    templates = {"sd15": tiny_folder, "sdxl": tiny_sdxl}
    return {
        kind: Model.from_pretrained(
            base(kind, template, tmp_path_factory.mktemp("published") / kind), device="cpu", dtype=torch.float32
        )
        for kind, template in templates.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str, bases: dict[str, Model], tmp_path: Path) -> None:
    case, kind = CASES[name]

    def make(family: str, model: Model, **more: Any) -> Any:
        return arc2face_of(model, tmp_path) if family == "arc2face" else adapter(family, model, tmp_path, **more)

    assert difference(case(make, bases[kind]), name) < NEAR


@pytest.fixture(scope="module")
def instantid_base(shared: Path) -> Model:
    return Model.from_pretrained(shared / "golden/instantid/base", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", ["instantid full", "instantid weighted prompt"])
def test_published_numbers_of_instantid(name: str, instantid_base: Model, shared: Path) -> None:
    """Its full pipeline: a region mask, a further ControlNet twice; a prompt with weights."""
    assert difference(instantid(name, instantid_base, shared / "golden/instantid"), name) < NEAR
