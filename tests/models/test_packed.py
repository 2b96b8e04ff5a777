"""Packed layers give what PyTorch's own do, up to rounding, and step aside wherever they do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from facegen.models import packed
from facegen.models.base import Model
from facegen.models.norms import quicken
from facegen.models.packed import PackedConv2d, PackedLinear, pack, unpack

pytestmark = pytest.mark.skipif(not packed.available(), reason="this PyTorch has no oneDNN")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")


def close(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 10, 3, padding=1),
        nn.Conv2d(6, 10, 3, 2, 1),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.Conv2d(6, 6, 3, groups=3),
    ],
)
def test_convolutions_of_any_size_and_layout(layer: nn.Conv2d) -> None:
    quick = copy.deepcopy(layer)
    pack(quick)
    assert type(quick) is PackedConv2d
    with torch.no_grad():
        for place, size in enumerate([(2, 6, 8, 8), (2, 6, 8, 8), (1, 6, 5, 9), (2, 6, 8, 8)]):
            x = draw(place, *size)
            assert close(quick(x), layer(x))
            assert close(quick(x.contiguous(memory_format=torch.channels_last)), layer(x))
            assert close(quick(x[:, :, 1:, ::2]), layer(x[:, :, 1:, ::2]))
        quick.weight.mul_(2)  # weights that were changed in place are laid out anew
        assert close(quick(x), 2 * layer(x) - (0 if layer.bias is None else layer.bias[:, None, None]))


def test_linear_layers_of_any_shape() -> None:
    layer = nn.Linear(7, 5)
    quick = copy.deepcopy(layer)
    pack(quick)
    assert type(quick) is PackedLinear
    with torch.no_grad():
        for x in (draw(1, 7), draw(1, 3, 7), draw(1, 2, 3, 7), draw(1, 7, 4).t(), draw(1, 2, 6, 7)[:, ::2]):
            assert close(quick(x), layer(x))


def test_gradients_other_precisions_and_autocast_take_the_usual_way() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quick = copy.deepcopy(layer)
    pack(quick)
    x = draw(1, 3, 4)
    assert torch.equal(quick(x), layer(x))
    quick(x).sum().backward()
    assert quick[0].weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert quick(x).dtype == torch.bfloat16
    assert quick.double()(x.double()).dtype == torch.float64
    frozen = copy.deepcopy(layer).requires_grad_(False)
    pack(frozen)
    given = draw(1, 3, 4).requires_grad_()
    frozen(given).sum().backward()
    assert given.grad is not None


def test_a_packed_model_gives_the_same_and_is_saved_as_before(model: Model) -> None:
    text = model.encode_text(["a face"], ["blurry"])
    x, latents = draw(1, 2, 4, 8, 8), draw(2, 1, 4, 8, 8)

    def outcome() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), model.prepare([text], 1, True) as prepared:
            return model.predict(x, torch.tensor(400), prepared.throughout()), model.decode(latents)

    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    plain = outcome()
    pack(model.unet, model.vae)
    try:
        assert any(isinstance(part, PackedConv2d) for part in model.vae.modules())
        for found, exact in zip(outcome(), plain, strict=True):
            assert close(found, exact)
        after = copy.deepcopy(model.unet).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
    finally:
        unpack(model.unet, model.vae)
    for found, exact in zip(outcome(), plain, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize(("channels", "side"), [(32, 7), (64, 4)])
def test_channels_last_norms_give_the_same(channels: int, side: int) -> None:
    norm = nn.GroupNorm(32, channels)
    norm.weight.data, norm.bias.data = draw(1, channels), draw(2, channels)
    quick = nn.Sequential(copy.deepcopy(norm))
    quicken(quick)
    x = (draw(3, 2, channels, side, side) * 3 + 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert close(quick(x), norm(x))
