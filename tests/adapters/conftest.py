"""Tiny base models whose tokenizer knows the word `id`, freshly made adapters, and one UNet call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from facegen.adapter import Adapter, find_adapters
from facegen.conditions import Condition, TextCondition
from facegen.models.base import Model
from facegen.models.projections import FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes

DIM = 18  # length of the embeddings here; W+ codes have 18 rows


@dataclass(frozen=True)
class Photo:
    """A face as the adapters see it."""

    embedding: np.ndarray
    points: np.ndarray
    image: Image.Image


def photo(seed: int, size: tuple[int, int] = (96, 128)) -> Photo:
    """Noise with a face said to be in it."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    points = np.array([[30, 50], [60, 50], [45, 65], [33, 80], [57, 80]], np.float32)
    return Photo(generator.standard_normal(DIM).astype(np.float32) * 5, points, Image.fromarray(pixels))


@pytest.fixture(scope="session")
def tiny_folder(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_sd15 with `id` as one token."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny_id") / "base"
    shutil.copytree(tiny_sd15, folder)
    vocabulary = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    vocabulary["id</w>"] = vocabulary.pop("!</w>")
    source = folder.parent / "tokenizer_source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\ni d</w>\n")
    shutil.rmtree(folder / "tokenizer")
    CLIPTokenizer.from_pretrained(source, model_max_length=77).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Model:
    return Model.from_pretrained(tiny_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def other_model(tiny_sdxl: Path) -> Model:
    """Another base model, with wider tokens."""
    return Model.from_pretrained(tiny_sdxl, device="cpu", dtype=torch.float32)


def make(name: str, model: Model) -> Adapter:
    """A small adapter of a family, its weights moved away from the start at which it changes nothing."""
    width = model.text_width
    small: dict[str, dict[str, Any]] = {
        "instantid": {"sizes": PerceiverSizes(DIM, 24, width, depth=1, heads=1), "queries": 3},
        "ip_adapter_faceid": {"projector": FaceProjection(ProjectionSizes(DIM, 8, 2, width)), "rank": 2},
    }
    kind: Any = find_adapters()[name]
    adapter: Adapter = kind.fresh(model, DIM, **small.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().eval()
    return adapter


@pytest.fixture(params=sorted(find_adapters()))
def adapter(request: pytest.FixtureRequest, model: Model) -> Adapter:
    return make(request.param, model)


@pytest.fixture
def fresh(model: Model) -> Callable[[str], Adapter]:
    """A small adapter by name."""
    return lambda name: make(name, model)


@pytest.fixture
def photos() -> Callable[[int], Photo]:
    """photos(seed): the face of a person."""
    return photo


@pytest.fixture(scope="session")
def call(model: Model) -> Callable[..., Tensor]:
    """One UNet call under these conditions: call(conditions, batch=1, guidance=True) -> (R, 4, 8, 8)."""

    def run(
        conditions: Sequence[Condition], batch: int = 1, *, guidance: bool = True, text: TextCondition | None = None
    ) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        one = torch.randn(1, *model.latent_shape(64, 64), generator=generator)
        rows = batch * (2 if guidance else 1)
        with model.prepare([text or model.encode_text(["a face"]), *conditions], batch, guidance) as prepared:
            return model.predict(one.expand(rows, -1, -1, -1), 500, prepared.throughout())

    return run
