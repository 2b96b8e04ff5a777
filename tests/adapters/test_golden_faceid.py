"""IP-Adapter-FaceID and FaceID-Plus against the numbers of their reference code (../shared/golden/ipadapter)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from facegen import schedulers
from facegen.adapter import AdapterRequest
from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
from facegen.denoise import Guidance, denoise
from facegen.models.base import Model

SINGLE, RUN = 1e-5, 2e-5


def rel(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@dataclass(frozen=True)
class Case:
    variant: str
    golden: dict[str, Tensor]
    adapter: IPAdapterFaceID

    @property
    def request(self) -> AdapterRequest:
        clip = None
        if self.adapter.clip is not None:
            # The golden crop is stored as the reference code got it: BGR already.
            clip = self.adapter.clip.pixels(self.golden["face_image"].flip(-1).numpy())
        return AdapterRequest(scale=0.7, clip=clip)


@pytest.fixture(scope="module")
def model(shared: Path) -> Model:
    return Model.from_pretrained(shared / "golden/ipadapter/base_sd15", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module", params=["faceid", "plus"])
def case(request: pytest.FixtureRequest, shared: Path, model: Model) -> Case:
    folder = shared / "golden/ipadapter"
    plus = request.param == "plus"
    golden = load_file(folder / f"ipadapter_faceid{'_plus' if plus else ''}_golden.safetensors")
    file = folder / f"ip-adapter-faceid{'-plus' if plus else ''}_sd15.bin"
    return Case(request.param, golden, IPAdapterFaceID.from_pretrained(file, model))


def test_variant_comes_from_the_file(case: Case) -> None:
    assert case.adapter.variant == case.variant


def test_tokens(case: Case) -> None:
    with torch.no_grad():
        uncond, cond = case.adapter.tokens(case.golden["faceid_embeds"], case.request)
    assert rel(uncond, case.golden["tokens_uncond"]) <= SINGLE
    assert rel(cond, case.golden["tokens_cond"]) <= SINGLE


def test_raw_embeddings_are_normalised(case: Case) -> None:
    """The file's embedding has length 1; any length must give the same tokens."""
    with torch.no_grad():
        cond = case.adapter.tokens(case.golden["faceid_embeds"] * 22, case.request)[1]
    assert rel(cond, case.golden["tokens_cond"]) <= SINGLE


def test_one_call(case: Case, model: Model) -> None:
    text = model.encode_text(["a photo of a man"], ["lowres"])
    with torch.no_grad():
        conditions = case.adapter.conditions_from_embeddings(case.golden["faceid_embeds"], model, case.request)
        with model.prepare([text, *conditions], 1, True) as prepared:
            got = model.predict(case.golden["unet_x"], 300, prepared.throughout())
    assert rel(got, case.golden["unet_eps_t300"]) <= SINGLE


def test_run(case: Case, model: Model) -> None:
    conditions = [
        model.encode_text(["a photo of a man"], ["lowres"]),
        *case.adapter.conditions_from_embeddings(case.golden["faceid_embeds"], model, case.request),
    ]
    scheduler = schedulers.build("model", model.scheduler_config, 3)
    latents = case.golden["latents_in"] * scheduler.init_noise_sigma
    got = denoise(model, latents, scheduler, conditions, Guidance(7.5))
    assert rel(got, case.golden["latents_out"]) <= RUN
