"""BiSeNet and ParseNet: key names, published numbers, and two tables that are never mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.checkpoints import write
from facegen.errors import CheckpointBroken, WrongAdapter
from facegen.face.parsing_networks import BISENET, PARSENET, BiSeNet, ParseNet, Parser
from tests.restoration.weights import REFERENCE, difference, digest, picture, weights

NEAR = 1e-5
SMALL: dict[str, Any] = {"encoder": (32, 64, 128), "decoder": (64, 32), "depth": 2}


def small(kind: type[BiSeNet | ParseNet]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        net = kind() if kind is BiSeNet else ParseNet(**SMALL)
    return weights(net)


def test_keys_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert digest(BiSeNet()) == REFERENCE["bisenet"]["full_digest"]
        assert digest(ParseNet()) == REFERENCE["parsenet"]["full_digest"]


@pytest.mark.parametrize(("name", "kind"), [("bisenet", BiSeNet), ("parsenet", ParseNet)])
def test_the_published_numbers(name: str, kind: type[BiSeNet | ParseNet]) -> None:
    net = kind.of(small(kind), Path("weights.pth"))
    assert digest(net) == REFERENCE[name]["tiny_digest"]
    assert difference(net(picture(64))[0], name) < NEAR


def test_a_file_brings_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facegen.face.parsing_networks.SIDE", 64)  # quicker than the side they were trained on
    path = write(tmp_path / "any.pth", {"module": {**small(BiSeNet), "cp.resnet.fc.weight": torch.ones(2)}})
    parser = Parser.from_file(path)
    assert parser.labels == BISENET
    assert parser.view.mean == (0.485, 0.456, 0.406)
    parsenet = Parser.from_file(write(tmp_path / "bisenet.pth", small(ParseNet)))
    assert parsenet.labels == PARSENET
    assert parsenet.view.mean == (0.5, 0.5, 0.5)
    assert set(PARSENET) == set(BISENET)
    assert PARSENET != BISENET

    photo = (picture(96) + 1) / 2
    classes = parsenet.parse(photo)
    assert classes.shape == (1, 96, 96)
    mask = parsenet.mask(photo, ["hair", "skin"])
    assert torch.equal(mask[:, 0] > 0, (classes == PARSENET.index("hair")) | (classes == PARSENET.index("skin")))


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    whole = small(ParseNet)
    with pytest.raises(CheckpointBroken, match=r"body\.1\.conv2\.norm\.norm\.bias"):
        Parser.from_file(
            write(tmp_path / "a.pth", {k: v for k, v in whole.items() if k != "body.1.conv2.norm.norm.bias"})
        )
    with pytest.raises(WrongAdapter, match="not a face parsing network"):
        Parser.from_file(write(tmp_path / "b.pth", {"encoder.x": torch.ones(1)}))
