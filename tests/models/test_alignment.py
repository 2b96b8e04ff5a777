"""The aligner of damaged faces' latents: untrained it changes nothing, it keeps shapes, and it is written and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facegen.errors import CheckpointBroken, WeightsMissing, WrongBaseModel
from facegen.models.alignment import Aligner, AlignerNet, AlignerSizes
from facegen.models.base import Model

SIZES = AlignerSizes(channels=4, dim=6, width=16, deep=16, codes=8, code=4)


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)


def given(model: Model, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (2, C, h, w) and a picture of their size."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *model.latent_shape(side, side), generator=generator)
    return latents, torch.rand(2, 3, side, side, generator=generator)


def woken(aligner: Aligner) -> Aligner:
    """With weights in which nothing is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in aligner.net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return aligner


@pytest.mark.parametrize("side", [64, 96])
def test_it_keeps_the_shape_and_changes_nothing_before_it_learns(model: Model, side: int) -> None:
    latents, picture = given(model, side)
    aligner = Aligner.fresh(model, 6, width=16, deep=16)
    assert torch.equal(aligner(latents, picture), latents)
    moved = woken(aligner)(latents, picture)
    assert moved.shape == latents.shape
    assert not torch.allclose(moved, latents)


def test_a_known_person_steers_it_and_nobody_is_zero(model: Model) -> None:
    latents, picture = given(model)
    aligner = woken(Aligner.fresh(model, 6, width=16, deep=16))
    who = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    nobody = aligner(latents, picture)
    assert torch.equal(nobody, aligner(latents, picture, torch.zeros(2, 6)))
    steered = aligner(latents, picture, who)
    assert not torch.allclose(steered, nobody)
    assert torch.allclose(steered, aligner(latents, picture, 3 * who), atol=1e-5)  # only its direction says who it is


def test_a_place_takes_its_nearest_code_and_the_gradient_passes() -> None:
    net = AlignerNet(SIZES)
    x = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
    found, loss = net.codebook(x)
    own = torch.nn.functional.normalize(net.codebook.into(x), dim=1)
    codes = torch.nn.functional.normalize(net.codebook.codes, dim=1)
    best = (own.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    assert torch.equal(net.codebook.nearest(own), best)
    (found.sum() + loss).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert net.codebook.codes.grad is not None
    assert net.codebook.codes.grad.abs().sum() > 0


def test_written_and_read(model: Model, tmp_path: Path) -> None:
    latents, picture = given(model)
    aligner = woken(Aligner.fresh(model, 6, width=16, deep=16))
    again = Aligner.from_pretrained(aligner.save(tmp_path / "restore"), model)
    assert torch.allclose(again(latents, picture), aligner(latents, picture), atol=2e-2)
    assert not any(weight.requires_grad for weight in again.net.parameters())


def test_what_cannot_be_read_is_said(model: Model, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="--stages restore"):
        Aligner.from_pretrained(tmp_path, model)
    other = AlignerNet(AlignerSizes(channels=9, dim=6, width=16, deep=16))
    Aligner(other).save(tmp_path / "other")
    with pytest.raises(WrongBaseModel, match="9 channels"):
        Aligner.from_pretrained(tmp_path / "other", model)
    (tmp_path / "other" / "aligner.json").write_text('{"codes": 3}')
    with pytest.raises(CheckpointBroken, match="does not hold the net"):
        Aligner.from_pretrained(tmp_path / "other", model)
