"""InstantID against the numbers of its reference code (../shared/golden/instantid)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from facegen import schedulers
from facegen.adapter import AdapterRequest
from facegen.adapters.instantid import InstantID, draw
from facegen.conditions import ControlCondition
from facegen.denoise import Guidance, denoise
from facegen.models.base import Model

SINGLE, RUN = 1e-5, 2e-5


def rel(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden/instantid/instantid_golden.safetensors")


@pytest.fixture(scope="module")
def model(shared: Path) -> Model:
    return Model.from_pretrained(shared / "golden/instantid/base", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(shared: Path, model: Model) -> InstantID:
    return InstantID.from_pretrained(shared / "golden/instantid/checkpoints", model)


@pytest.mark.parametrize(("name", "factor", "size"), [("64x80", 1.0, (64, 80)), ("128x128", 1.9, (128, 128))])
def test_keypoint_drawing_is_equal(golden: dict[str, Tensor], name: str, factor: float, size: tuple[int, int]) -> None:
    assert np.array_equal(draw(golden["kps"].numpy() * factor, size), golden[f"kps_image_{name}"].numpy())


def test_tokens(golden: dict[str, Tensor], adapter: InstantID) -> None:
    got = adapter.tokens(golden["raw_embedding"][None])[:, 0]
    assert rel(got, golden["tokens_uncond_cond"]) <= SINGLE


def test_text(golden: dict[str, Tensor], model: Model) -> None:
    text = model.encode_text(["a photo of a man"], ["lowres"])
    assert rel(text.embeds[:, 0], torch.cat([golden["negative_prompt_embeds"], golden["prompt_embeds"]])) <= SINGLE


def test_one_call(golden: dict[str, Tensor], model: Model, adapter: InstantID) -> None:
    text = model.encode_text(["a photo of a man"], ["lowres"])
    asked = AdapterRequest(scale=0.5, height=128, width=128)
    conditions = adapter.conditions_from_embeddings(golden["raw_embedding"][None], model, asked)
    with torch.no_grad(), model.prepare([text, *conditions], 1, True) as prepared:
        got = model.predict(golden["unet_x"], 300, prepared.throughout())
    assert rel(got, golden["unet_eps_t300_scale05"]) <= SINGLE


@pytest.mark.parametrize(("start", "end"), [("latents_in", "latents_out"), ("latents2_in", "latents_out_n2")])
def test_run(golden: dict[str, Tensor], model: Model, adapter: InstantID, start: str, end: str) -> None:
    control = golden["kps_image_128x128"].permute(2, 0, 1)[None].float() / 255
    asked = AdapterRequest(height=128, width=128, control=control)
    conditions = [
        model.encode_text(["a photo of a man"], ["lowres"]),
        *adapter.conditions_from_embeddings(golden["raw_embedding"][None], model, asked),
    ]
    assert isinstance(conditions[-1], ControlCondition), "IdentityNet takes part"
    assert conditions[-1].embeds is conditions[1].tokens, "IdentityNet sees the identity tokens, not the prompt"  # type: ignore[attr-defined]
    scheduler = schedulers.build("model", model.scheduler_config, 3)
    latents = golden[start] * scheduler.init_noise_sigma
    got = denoise(model, latents, scheduler, conditions, Guidance(5.0))
    assert rel(got, golden[end]) <= RUN
