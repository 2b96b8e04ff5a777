"""The published networks: their key names, and the numbers that the published code gives, on tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from facegen.errors import CheckpointBroken, WrongAdapter
from facegen.restoration import codeformer, dfdnet, gfpgan, restoreformer
from facegen.restoration.codeformer import CodeFormer
from facegen.restoration.dfdnet import DFDNet
from facegen.restoration.gfpgan import GFPGAN
from facegen.restoration.restoreformer import RestoreFormer
from tests.restoration.weights import REFERENCE, difference, digest, drawn, picture, weights

NEAR = 1e-5
TINY_FORMER: dict[str, Any] = {"first": 32, "widths": (32, 64, 64), "latent": 32, "codes": (32, 32), "looks": (2,)}
FORMERS = {
    "restoreformer": restoreformer.Sizes(asks=(2,), heads=8, **TINY_FORMER),
    "restoreformer++": restoreformer.Sizes(asks=(1, 2), heads=4, **TINY_FORMER),
}
TINY_GAN = gfpgan.Sizes(unet=(16, 16, 16, 16), generator=(32, 32, 32, 32), style=16, mapped=2)
BOXES = {
    "left_eye": (5, 10, 45, 50),
    "right_eye": (50, 8, 91, 49),
    "nose": (35, 30, 67, 62),
    "mouth": (20, 33, 82, 95),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def entries() -> dfdnet.Dictionary:
    """A dictionary of three entries a part."""
    return {
        part: {
            side: _plain(f"{part}_{side}", (3, width, pixels * side // 512, pixels * side // 512))
            for side, width in dfdnet.WIDTHS.items()
        }
        for part, (_, pixels) in dfdnet.PARTS.items()
    }


def _plain(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    import zlib

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("restoreformer", lambda: RestoreFormer(restoreformer.Sizes(asks=(5,), heads=8))),
        ("restoreformer++", RestoreFormer),
        ("codeformer", CodeFormer),
        ("gfpgan", GFPGAN),
        ("dfdnet", lambda: DFDNet({})),
    ],
)
def test_keys_and_shapes_are_the_published_ones(name: str, build: Callable[[], nn.Module]) -> None:
    assert digest(on_meta(build)) == REFERENCE[name]["full_digest"]


@pytest.mark.parametrize("name", FORMERS)
def test_restoreformer_gives_the_published_numbers(name: str) -> None:
    own = weights(on_meta(lambda: RestoreFormer(FORMERS[name])))
    net = RestoreFormer.of({**{f"state_dict.vqvae.{key}": value for key, value in own.items()}, "epoch": torch.ones(1)})
    assert net.sizes == FORMERS[name]
    assert net.title.lower() == name
    assert digest(net) == REFERENCE[name]["tiny_digest"]
    assert difference(net(picture(32)), name) < NEAR


def test_codeformer_gives_the_published_numbers() -> None:
    sizes = codeformer.Sizes(width=64, inner=128, layers=1, codes=32, tokens=4)
    own = weights(on_meta(lambda: CodeFormer(sizes)))
    net = CodeFormer.of({f"params_ema.{key}": value for key, value in own.items()})
    assert net.sizes == sizes
    assert difference(net(picture(64), 0.5), "codeformer") < NEAR
    assert difference(net(picture(64), 0.0, adapt=False), "codeformer", "plain") < NEAR


def test_gfpgan_gives_the_published_numbers() -> None:
    own = weights(on_meta(lambda: GFPGAN(TINY_GAN)))
    # Where a file holds two sets of weights, the averaged ones count.
    net = GFPGAN.of(
        {**{f"params_ema.{k}": v for k, v in own.items()}, **{f"params.{k}": 2 * v for k, v in own.items()}}
    )
    assert net.sizes == TINY_GAN
    assert net.sizes.side == 32
    assert difference(net(picture(32)), "gfpgan") < NEAR


def test_gfpgan_draws_noise_where_asked() -> None:
    net = GFPGAN.of(weights(on_meta(lambda: GFPGAN(TINY_GAN))))

    def made(seed: int) -> torch.Tensor:
        return net(picture(32), torch.Generator().manual_seed(seed))

    assert torch.equal(made(1), made(1))
    assert not torch.allclose(made(1), made(2))
    assert not torch.allclose(made(1), net(picture(32)))


def test_dfdnet_gives_the_published_numbers() -> None:
    own = weights(on_meta(lambda: DFDNet({})))
    own["to_rgb0.0.bias"] = own["VggExtract.model.classifier.0.bias"] = torch.ones(3)  # the file has these too
    net = DFDNet.of(own, entries())
    with torch.no_grad():
        assert difference(net(picture(96), BOXES), "dfdnet") < NEAR


def test_dfdnet_reads_the_other_copy_of_vgg() -> None:
    own = {
        key.replace("features.2.", "model.features.").replace("features.0.", "model.features."): value.expand(
            value.shape
        )
        for key, value in on_meta(lambda: DFDNet({})).state_dict().items()
    }
    real = {key: torch.zeros(1).expand(value.shape) for key, value in own.items()}
    assert "VggExtract.model.features.0.weight" in real
    assert "VggExtract.features.0.0.weight" in DFDNet.of(real, {}).state_dict()


def test_boxes_of_parts() -> None:
    points = torch.zeros(68, 2).numpy()
    points[36:42, 0] = [100, 110, 120, 130, 140, 150]
    points[17:22, 0] = 125
    points[48:68] = [(x, 300 + x % 2) for x in range(20)]
    boxes = dfdnet.boxes_of_landmarks(points)
    assert boxes["left_eye"] == (101, -24, 150, 25)  # half the width, 25, each side of the mean
    assert boxes["mouth"] == (-5, 285, 25, 316)  # never less than 16 each side
    five = dfdnet.boxes_of_points(restore_points())
    assert all(x1 - x0 == dfdnet.PARTS[part][1] for part, (x0, _, x1, _) in five.items())
    assert five["left_eye"][2] < five["right_eye"][0]


def restore_points() -> Any:
    from facegen.restoration.faces import FFHQ_POINTS

    return FFHQ_POINTS


@pytest.mark.parametrize(
    ("family", "build"),
    [(RestoreFormer, lambda: RestoreFormer(FORMERS["restoreformer"])), (GFPGAN, lambda: GFPGAN(TINY_GAN))],
)
def test_what_is_missing_unknown_or_of_another_shape_is_named(family: Any, build: Callable[[], nn.Module]) -> None:
    own = {key: drawn(key, tuple(value.shape)) for key, value in on_meta(build).state_dict().items()}
    last = [key for key in own if key.endswith("bias")][-1]
    with pytest.raises(CheckpointBroken, match=last):
        family.of({key: value for key, value in own.items() if key != last}, Path("net.pth"))
    with pytest.raises(CheckpointBroken, match=f"net.pth.*{last} \\[3\\] instead of"):
        family.of({**own, last: torch.zeros(3)} if own[last].shape != (3,) else _other(own, last), Path("net.pth"))
    unknown = next(key for key in own if key.endswith("weight")).replace("weight", "weird")
    with pytest.raises(CheckpointBroken, match=unknown):
        family.of({**own, unknown: torch.zeros(1)}, Path("net.pth"))


def _other(own: dict[str, torch.Tensor], last: str) -> dict[str, torch.Tensor]:
    return {**own, last: torch.zeros(4)}


def test_the_first_gfpgan_is_refused_by_name() -> None:
    with pytest.raises(WrongAdapter, match=r"conv_body_first\.0\.weight.*v1\.2"):
        GFPGAN.of({"params.conv_body_first.0.weight": torch.zeros(1)}, Path("GFPGANv1.pth"))
