"""Tiny base models whose tokenizer knows the word `id`, freshly made adapters, and one UNet call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, find_adapters
from facegen.conditions import Condition, TextCondition
from facegen.models.base import Model
from facegen.models.clip import ClipView
from facegen.models.eva import EvaSizes, EvaTower
from facegen.models.id_tokens import TokenSizes
from facegen.models.projections import FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes

DIM = 18  # length of the embeddings here; W+ codes have 18 rows
CLIP, EVA = 24, EvaSizes(width=8, inner=8, output=6, depth=21, head=8, patch=14, image=28)


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
    """tiny_sd15 with the words that adapters replace as one token each."""
    return with_words(tiny_sd15, tmp_path_factory.mktemp("tiny_id") / "base")


def with_words(base: Path, folder: Path) -> Path:
    """A copy of a tiny base whose tokenizer knows `id`, `sks` and `face`."""
    from transformers import CLIPTokenizer

    shutil.copytree(base, folder)
    vocabulary = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    vocabulary["id</w>"] = vocabulary.pop("!</w>")
    for piece, old in zip(("sk", "sks</w>", "fa", "fac", "face</w>"), '"()+*', strict=True):
        vocabulary[piece] = vocabulary.pop(f"{old}</w>")
    source = folder.parent / "tokenizer_source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\ni d</w>\ns k\nsk s</w>\nf a\nfa c\nfac e</w>\n")
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


def shaken(module: nn.Module, seed: int, amount: float = 0.3) -> Any:
    """The module with random weights that were drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * amount
            parameter.copy_(drawn if parameter.ndim > 1 else drawn + 1)
    return module.requires_grad_(False).eval()


def write_weights(home: Path) -> None:
    """Tiny encoders of pictures under the names the hub knows, in the formats of the real ones."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from facegen.face.parsing_networks import ParseNet

    clip = CLIPVisionConfig(**VISION, projection_dim=8)
    shaken(CLIPVisionModelWithProjection(clip), 5).save_pretrained(home / "clip-vit-h")
    tower = {f"visual.{key}": value for key, value in shaken(EvaTower(EVA), 6).state_dict().items()}
    checkpoints.write(home / "eva02-clip-l-336/EVA02_CLIP_L_336_psz14_s6B.pt", tower)
    parser = shaken(ParseNet((4, 4, 4, 4, 4), (4, 4, 4, 4), 1), 7)
    checkpoints.write(home / "bisenet/parsing_bisenet.pth", parser.state_dict())


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of weights that takes the place of the user's; see `write_weights`."""
    home = tmp_path_factory.mktemp("weights")
    write_weights(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACEGEN_HOME", str(home))
        yield home


VISION: dict[str, Any] = {
    "hidden_size": CLIP,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 112,
    "patch_size": 56,
}


def small(name: str, model: Model, home: Path, dim: int) -> dict[str, Any]:
    """What makes an adapter of a family a small one."""
    from transformers import CLIPVisionConfig

    from facegen.adapters.storymaker import PeopleProjection
    from facegen.face.parsing_networks import Parser
    from facegen.models.clip import load_clip

    width = model.text_width
    if name == "instantid":
        return {"sizes": PerceiverSizes(dim, 24, width, depth=1, heads=1), "queries": 3}
    if name == "ip_adapter_faceid":
        return {"projector": FaceProjection(ProjectionSizes(dim, 8, 2, width)), "rank": 2}
    if name == "facechain_fact":
        return {"sizes": PerceiverSizes(dim, 24, width, depth=1, heads=1), "queries": 3}
    if name == "id_animator":
        return {"sizes": PerceiverSizes(dim, 24, width, depth=1, heads=1), "rank": 2}
    if name == "precisecontrol":
        return {"time_width": 8, "depth": 2}
    if name == "storymaker":
        read = PerceiverSizes(CLIP, width, width, depth=1, heads=1)
        projector = PeopleProjection(ProjectionSizes(dim, 8, 2, width), read, read, queries=3)
        return {"clip": ClipView(load_clip(home), bgr=False), "projector": projector, "rank": 2}
    if name == "photomaker":
        # As wide as the published one: the file does not say how many heads another has.
        wide = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
        return {"vision": CLIPVisionConfig(**VISION | wide), "rank": 2}
    if name == "pulid":
        tower = EvaTower.from_file(home / "eva02-clip-l-336/EVA02_CLIP_L_336_psz14_s6B.pt")
        sizes = TokenSizes(dim + EVA.output, EVA.width, (8, 8), (8, 8), 64, width, own=2, queries=3, depth=5)
        return {"eva": tower, "parser": Parser.from_file(home / "bisenet/parsing_bisenet.pth"), "sizes": sizes}
    return {}


def make(name: str, model: Model, home: Path, dim: int = DIM) -> Adapter:
    """A small adapter of a family, its weights moved away from the start at which it changes nothing."""
    kind: Any = find_adapters()[name]
    adapter: Adapter = kind.fresh(model, dim, **small(name, model, home, dim))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().eval()
    return adapter


@pytest.fixture
def fresh(model: Model, weights: Path) -> Callable[[str], Adapter]:
    """A small adapter by name."""
    return lambda name: make(name, model, weights)


@pytest.fixture
def tailored(weights: Path) -> Callable[[str, Model], Adapter]:
    """A small adapter by name, for a model of its own."""
    return lambda name, model: make(name, model, weights)


@pytest.fixture
def photos() -> Callable[[int], Photo]:
    """photos(seed): the face of a person."""
    return photo


def caller(model: Model) -> Callable[..., Tensor]:
    def run(
        conditions: Sequence[Condition], batch: int = 1, *, guidance: bool = True, text: TextCondition | None = None
    ) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        one = torch.randn(1, *model.latent_shape(64, 64), generator=generator)
        rows = batch * (2 if guidance else 1)
        with model.prepare([text or model.encode_text(["a face"]), *conditions], batch, guidance) as prepared:
            return model.predict(one.expand(rows, -1, -1, -1), 500, prepared.throughout())

    return run


@pytest.fixture(scope="session")
def calls() -> Callable[[Model], Callable[..., Tensor]]:
    """calls(model): UNet calls of that model, as `call` makes them of the small one."""
    return caller


@pytest.fixture(scope="session")
def call(model: Model) -> Callable[..., Tensor]:
    """One UNet call under these conditions: call(conditions, batch=1, guidance=True) -> (R, 4, 8, 8)."""
    return caller(model)
