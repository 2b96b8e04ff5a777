"""Person and prompt kept apart: the mask decides, place by place, which branch a prediction comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from facegen import schedulers
from facegen.conditions import LoraCondition, LowRankWeights, TextCondition
from facegen.denoise import Guidance, denoise, noise
from facegen.errors import WrongMask
from facegen.models.base import Model
from facegen.models.decoupled import Decoupled


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)


def run(model: Model | Decoupled, conditions: list[TextCondition | LoraCondition], count: int = 1) -> Tensor:
    own = model.model if isinstance(model, Decoupled) else model
    scheduler = schedulers.build("model", own.scheduler_config, 2, device=own.device)
    drawn = noise(own.latent_shape(64, 64), [torch.Generator().manual_seed(one) for one in range(count)])
    start = schedulers.start(scheduler, drawn)
    return denoise(model, start, scheduler, conditions, Guidance(3.0))  # type: ignore[arg-type]


def test_ones_are_the_person_alone_and_zeros_the_prompt(model: Model) -> None:
    plain, person = model.encode_text(["a"]), model.encode_text(["b c"])
    with_person, without = run(model, [plain, person]), run(model, [plain])
    assert not torch.equal(with_person, without)
    for mask, wanted in ((torch.ones(1, 1, 64, 64), with_person), (torch.zeros(1, 1, 64, 64), without)):
        assert torch.equal(run(Decoupled(model, mask, [person]), [plain]), wanted)


def test_each_picture_has_its_mask_and_each_place_its_branch(model: Model) -> None:
    plain, person = model.encode_text(["a"]), model.encode_text(["b c"])
    masks = torch.zeros(2, 1, 64, 64)
    masks[1, :, :, 32:] = 1
    now = torch.zeros(4, model.latent_channels, 8, 8).normal_(generator=torch.Generator().manual_seed(3))
    both = Decoupled(model, masks, [person])
    with both.prepare([plain], 2, True) as prepared, torch.no_grad():
        found = both.predict(now, torch.tensor(500), prepared.active(0, 2))
    with torch.no_grad():
        branches = [
            model.predict(now, torch.tensor(500), model.prepare(conditions, 2, True).active(0, 2))
            for conditions in ([plain], [plain, person])
        ]
    half = found.shape[-1] // 2
    for row in range(4):
        assert torch.equal(found[row, ..., :half], branches[0][row, ..., :half])
        assert torch.allclose(found[row, ..., half:], branches[row % 2][row, ..., half:], atol=1e-6)


def test_a_plain_branch_of_its_own_and_loras_for_both(model: Model) -> None:
    plain, person, instead = (model.encode_text([text]) for text in ("a", "b c", "d"))
    name, layer = next((name, one) for name, one in model.unet.named_modules() if name.endswith("attn1.to_q"))
    drawn = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=drawn) for shape in ((2, layer.in_features), (layer.out_features, 2)))
    lora = LoraCondition(layers={name: LowRankWeights(down, up)})
    for mask, branch in ((torch.ones(1, 1, 8, 8), person), (torch.zeros(1, 1, 8, 8), instead)):
        made = run(Decoupled(model, mask, [person], [instead]), [plain, lora])
        assert torch.equal(made, run(model, [plain, branch, lora]))
        assert not torch.equal(made, run(model, [plain, branch]))


def test_a_mask_of_another_shape_is_refused(model: Model) -> None:
    with pytest.raises(WrongMask, match="must be"):
        Decoupled(model, torch.ones(1, 64, 64), [])
