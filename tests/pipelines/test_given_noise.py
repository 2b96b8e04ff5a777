"""Noise given instead of a seed: the same picture to the bit, in every task; written down; wrong noise is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from facegen import metadata
from facegen.adapter import AdapterRequest, load_adapter
from facegen.cli import main
from facegen.denoise import noise
from facegen.errors import WrongRequest
from facegen.images import to_pil
from facegen.pipeline import Pipeline, Watch, rebuild, task
from facegen.pipelines.generate import GeneratePipeline, GenerateRequest

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def drawn(pipe: Pipeline[Any], *seeds: int) -> torch.Tensor:
    """What these seeds draw at the model's own size, which is that of every task's canvas too."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return noise(pipe.model.latent_shape(*pipe.model.default_size), generators)


def pixels(out: Any) -> list[np.ndarray]:
    return [np.asarray(image) for image in out.images]


@pytest.mark.parametrize("scheduler", ["model", "euler_a"])
def test_the_noise_of_the_seed_makes_its_picture(pipe: GeneratePipeline, scheduler: str) -> None:
    """To the bit, also where steps add noise of their own; and in any batch."""
    asked: dict[str, Any] = {"seed": 5, "num_images_per_prompt": 2, "scheduler": scheduler, **QUICK}
    plain, given = pipe(**asked), pipe(**asked, latents=drawn(pipe, 5, 6))
    other = pipe(**asked, latents=drawn(pipe, 6, 5))
    for one, same, swapped in zip(pixels(plain), pixels(given), pixels(other), strict=True):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, swapped)


@pytest.mark.parametrize("name", ["inpaint", "restore", "swap"])
def test_every_task_starts_from_it(name: str, pipe: GeneratePipeline, me: Path, tiny: Path) -> None:
    hole = Image.new("L", Image.open(me).size)
    hole.paste(255, (60, 60, 100, 100))
    own: dict[str, Any] = {
        "inpaint": {"image": me, "mask": hole},
        "restore": {"image": me, "fidelity": 0.2},
        "swap": {"source": me, "target": me, "method": "adapters"},
    }[name]
    pipe.load_adapter(tiny / "adapters" / "ip_adapter_faceid")
    other = task(name).from_pipe(pipe)
    request = other.resolve(other.request(None, {**own, "seed": 5, **QUICK}))

    def painted(*seeds: int) -> torch.Tensor:
        asked = other.request(request, {}, drawn(pipe, *seeds) if seeds else None)
        (one,) = other.paint(asked, (), Watch(), None)
        return one.pixels

    assert torch.equal(painted(), painted(5))
    assert not torch.equal(painted(), painted(6))


def test_it_is_written_down_and_not_replayed(
    pipe: GeneratePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = pipe(seed=5, latents=drawn(pipe, 7), **QUICK)
    (path,) = out.save(tmp_path)
    record = metadata.read(path)
    assert record.noise.startswith("given noise (1, 4, 8, 8), SHA-256 ")
    assert rebuild(record)[1].seed == 5
    assert main(["read", str(path)]) == 0
    assert "given noise" in capsys.readouterr().out
    assert main(["read", str(path), "--run"]) != 0
    assert "cannot be made again from its seed alone" in capsys.readouterr().err
    assert np.array_equal(pixels(pipe(out.request))[0], pixels(out)[0]), "the request itself still has it"
    assert metadata.Record.from_text(pipe(seed=5, **QUICK).images[0].record.chunks()[metadata.CHUNK]).noise == ""  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("latents", "told"),
    [
        (torch.zeros(4, 8, 8), r"\(N, C, h, w\), not \(4, 8, 8\)"),
        (np.zeros((1, 4, 8, 8)), "not ndarray"),
        (torch.zeros(2, 4, 8, 8), "noise of 2 pictures, but 1 are asked for"),
        (torch.full((1, 4, 8, 8), float("nan")), "not finite"),
        (torch.zeros(1, 4, 8, 9), r"noise of \(4, 8, 9\) for each picture, .* starts from \(4, 8, 8\)"),
    ],
)
def test_wrong_noise_is_one_sentence(pipe: GeneratePipeline, latents: Any, told: str) -> None:
    with pytest.raises(WrongRequest, match=told):
        pipe(seed=1, latents=latents, **QUICK)


def test_a_request_holds_it_too(pipe: GeneratePipeline) -> None:
    request = GenerateRequest(seed=1, latents=drawn(pipe, 9), **QUICK)
    assert np.array_equal(pixels(pipe(request))[0], pixels(pipe(seed=9, **QUICK))[0])


def test_instantid_through_the_public_call(shared: Path) -> None:
    """The reference's noise in, its latents out, as pictures."""
    folder = shared / "golden" / "instantid"
    golden = load_file(folder / "instantid_golden.safetensors")
    pipe = GeneratePipeline.from_pretrained(folder / "base", device="cpu", dtype="float32", pack="mini")
    control = golden["kps_image_128x128"].permute(2, 0, 1)[None].float() / 255
    asked = AdapterRequest(height=128, width=128, control=control)
    adapter = load_adapter(folder / "checkpoints", pipe.model)
    conditions = adapter.conditions_from_embeddings(golden["raw_embedding"][None], pipe.model, asked)
    out = pipe(
        prompt="a photo of a man", negative_prompt="lowres", height=128, width=128, num_inference_steps=3,
        guidance_scale=5.0, conditions=conditions, latents=golden["latents_in"],
    )  # fmt: skip
    wanted = np.asarray(to_pil(pipe.model.decode(golden["latents_out"])[0]), dtype=np.int16)
    assert np.abs(pixels(out)[0] - wanted).max() <= 1
