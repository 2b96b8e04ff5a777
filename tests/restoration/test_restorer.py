"""A network from its file, told by its keys; wrong files in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from facegen.checkpoints import read, unwrapped, write
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter
from facegen.restoration import gfpgan, restoreformer
from facegen.restoration.dfdnet import PARTS, WIDTHS, read_dictionary
from facegen.restoration.gfpgan import GFPGAN
from facegen.restoration.restoreformer import RestoreFormer
from facegen.restoration.restorer import Restorer, Wish
from tests.restoration.weights import weights


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GFPGAN as it is published."""
    sizes = gfpgan.Sizes(unet=(16, 16, 16, 16), generator=(32, 32, 32, 32), style=16, mapped=2)
    return write(tmp_path_factory.mktemp("gan") / "anything.pth", {"params_ema": weights(GFPGAN(sizes))})


def test_the_keys_tell_and_not_the_name(gan: Path, tmp_path: Path) -> None:
    for source in (gan, gan.parent):
        restorer = Restorer.from_pretrained(source)
        assert (restorer.title, restorer.side) == ("GFPGAN", 32)
    sizes = restoreformer.Sizes(
        first=32, widths=(32, 64, 64), latent=32, codes=(32, 32), looks=(2,), asks=(2,), heads=8
    )
    path = write(tmp_path / "GFPGANv1.4.pth", {"state_dict": {"vqvae": weights(RestoreFormer(sizes))}})
    assert Restorer.from_pretrained(path).title == "RestoreFormer"


def test_a_checkpoint_of_a_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RestoreFormer is published with what Lightning writes beside the weights; its classes are not needed."""
    home = "pytorch_lightning.callbacks.model_checkpoint"
    lightning = ModuleType(home)
    kind = type("ModelCheckpoint", (), {"__module__": home})
    lightning.ModelCheckpoint = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, ModuleType(parent))
        patch.setitem(sys.modules, home, lightning)
        whole = {
            "state_dict": {"vqvae.x": torch.ones(2)},
            "callbacks": {kind: {"best": 1.0}},
            "epoch": 3,
            "last": kind(),
        }
        torch.save(whole, tmp_path / "run.ckpt")
    assert list(unwrapped(read(tmp_path / "run.ckpt"))) == ["x"]


def test_a_face_goes_in_and_one_comes_out(gan: Path) -> None:
    restorer = Restorer.from_pretrained(gan)
    face = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2))
    made = restorer(face)
    assert made.shape == face.shape
    assert 0 <= float(made.min()) < float(made.max()) <= 1
    assert torch.equal(made, restorer(face))
    assert not torch.equal(made, restorer(face, Wish(generator=torch.Generator().manual_seed(0))))


def test_what_is_no_such_network(tmp_path: Path) -> None:
    path = write(tmp_path / "codeformer.pth", {"cp": {"conv_avg": {"conv": {"weight": torch.ones(1)}}}})
    with pytest.raises(WrongAdapter, match="is a BiSeNet face parsing network, not a restoration network"):
        Restorer.from_pretrained(path)
    with pytest.raises(WeightsMissing, match="holds no weights"):
        Restorer.from_pretrained(tmp_path)
    with pytest.raises(WeightsMissing, match="is not there"):
        Restorer.from_pretrained(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointBroken, match=r"cut\.pth"):
        Restorer.from_pretrained(tmp_path / "cut.pth")


def test_dfdnets_dictionary(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="left_eye_256"):
        read_dictionary(tmp_path)
    for part, (_, pixels) in PARTS.items():
        for side, width in WIDTHS.items():
            size = pixels * side // 512
            np.save(tmp_path / f"{part}_{side}_center.npy", np.zeros((2, width * size * size), np.float32))
    assert read_dictionary(tmp_path)["mouth"][32].shape == (2, 512, 6, 6)
    np.save(tmp_path / "nose_64_center.npy", np.zeros((2, 7), np.float32))
    with pytest.raises(CheckpointBroken, match="nose_64"):
        read_dictionary(tmp_path)
    np.save(tmp_path / "nose_64_center.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointBroken, match="Python objects"):
        read_dictionary(tmp_path)
