"""A tiny base model with its adapters beside it, a tiny face pack, and photos in which that pack finds a face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.adapter import find_adapters
from facegen.loading import Loaded
from facegen.models.base import Model
from facegen.models.projections import FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes
from facegen.pipelines.generate import GeneratePipeline

DIM = 16  # length of the tiny pack's embeddings


@pytest.fixture(scope="session")
def tiny(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_sd15 whose tokenizer knows the word `id`, in base/, and one adapter of each family in adapters/."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny_whole")
    base = folder / "base"
    shutil.copytree(tiny_sd15, base)
    vocabulary = CLIPTokenizer.from_pretrained(base / "tokenizer").get_vocab()
    vocabulary["id</w>"] = vocabulary.pop("!</w>")
    source = folder / "words"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\ni d</w>\n")
    shutil.rmtree(base / "tokenizer")
    CLIPTokenizer.from_pretrained(source, model_max_length=77).save_pretrained(base / "tokenizer")
    model = Model.from_pretrained(base, device="cpu", dtype=torch.float32)
    small: dict[str, dict[str, Any]] = {
        "instantid": {"sizes": PerceiverSizes(DIM, 24, model.text_width, depth=1, heads=1), "queries": 3},
        "ip_adapter_faceid": {
            "projector": FaceProjection(ProjectionSizes(DIM, 8, 2, model.text_width)), "rank": 2,
        },
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name in ("arc2face", "instantid", "ip_adapter_faceid"):
        kind: Any = find_adapters()[name]
        adapter = kind.fresh(model, DIM, **small.get(name, {}))
        with torch.no_grad():
            for parameter in adapter.modules().parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        adapter.save(folder / "adapters" / name)
    return folder


@pytest.fixture(scope="session")
def loaded(tiny: Path, tiny_pack: Path) -> Loaded:
    """What is costly to load, once; the tests must leave the model as they found it."""
    pipe = GeneratePipeline.from_pretrained(tiny / "base", pack=str(tiny_pack), device="cpu", dtype="float32")
    pipe.analyzer(str(tiny_pack))
    return pipe.loaded


@pytest.fixture
def pipe(loaded: Loaded) -> GeneratePipeline:
    """A pipeline without adapters."""
    return GeneratePipeline(Loaded(loaded.model, loaded.loading, loaded.sha256, analyzers=loaded.analyzers))


def draw(seed: int, side: int = 160) -> Image.Image:
    """Gray noise with a red patch in the middle: where the tiny detector sees a face."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(90, 130, (side, side, 3), dtype=np.uint8)
    middle = slice(side // 2 - 24, side // 2 + 24)
    pixels[middle, middle] = generator.integers(0, 60, (48, 48, 3), dtype=np.uint8) + np.array([190, 0, 0], np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def me(tmp_path: Path) -> Path:
    """A photo on disk."""
    draw(1).save(tmp_path / "me.png")
    return tmp_path / "me.png"


@pytest.fixture
def drawn() -> Callable[[int], Image.Image]:
    """drawn(seed): a photo in memory."""
    return draw
