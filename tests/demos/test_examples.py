"""Every example runs as it stands, on tiny random weights in the official file layout."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.models.base import Model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "demos" / "examples").glob("[!_]*.py"))
DIM = 16  # length of the tiny pack's embeddings
# Of what other adapters read: codes of 18 rows, CLIP's patch tokens, CLIP's pooled embedding.
DIMS = {"wplus": 36, "precisecontrol": 36, "id_animator": 24, "ip_adapter": 8}
LINES = 20  # "a dozen", with its frame


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny() -> Any:
    """How the tests of the adapters make small ones."""
    return load(ROOT / "tests" / "adapters" / "conftest.py")


@pytest.fixture(scope="module")
def bases(tiny: Any, tiny_sd15: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Small models under the names of the real ones."""
    known = tiny.with_words(tiny_sd15, tmp_path_factory.mktemp("known") / "base")
    first, second = (Model.from_pretrained(path, device="cpu", dtype=torch.float32) for path in (known, tiny_sdxl))
    return {"sd15": first, "sd21": first, "sdxl": second}


@pytest.fixture(scope="module")
def home(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of weights in the place of the user's."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_weights(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACEGEN_HOME", str(folder))
        yield folder


@pytest.fixture
def me(tmp_path: Path) -> Path:
    """Gray noise with a red patch in the middle, where the tiny detector sees a face."""
    generator = np.random.default_rng(1)
    pixels = generator.integers(90, 130, (160, 160, 3), dtype=np.uint8)
    red = np.array([190, 0, 0], np.uint8)
    pixels[56:104, 56:104] = generator.integers(0, 60, (48, 48, 3), dtype=np.uint8) + red  # no two places alike
    Image.fromarray(pixels).save(tmp_path / "me.png")
    return tmp_path / "me.png"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A face's code in StyleGAN, and beside the adapters the directions in which the examples edit it."""
    torch.save(torch.randn(1, 18, 2, generator=torch.Generator().manual_seed(2)), tmp_path / "code.pth")
    folder = tmp_path / "weights/w_direction/interfacegan_directions"
    folder.mkdir(parents=True)
    torch.save(torch.ones(1, 2), folder / "smile.pt")
    (tmp_path / "weights/all_delta_w_dict.json").write_text(json.dumps({"beard": [[0.1, 0.2]] * 18}))
    return tmp_path / "code.pth"


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_it_runs(
    path: Path,
    tiny: Any,
    bases: dict[str, Model],
    home: Path,
    me: Path,
    code: Path,
    tiny_pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = load(path)
    defaults = {name: one.default for name, one in inspect.signature(example.main).parameters.items()}
    model = bases[defaults["model"]]
    name = defaults["adapter"]
    saved = tiny.make(name, model, home, DIMS.get(name, DIM)).save(tmp_path / "weights")
    given = code if "codes" in defaults else me
    monkeypatch.chdir(tmp_path)
    example.main([str(given)], str(model.source), str(saved), pack=str(tiny_pack), device="cpu", dtype="float32")
    made = sorted(tmp_path.glob(f"{path.stem}-*.png"))
    assert made
    picture = np.asarray(Image.open(made[0]), dtype=np.float32)
    assert picture.std() > 1


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_it_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES
