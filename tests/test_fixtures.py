"""The tiny models of conftest.py are what they promise to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def test_tiny_sd15_draws(tiny_sd15: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a person, 30", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_tiny_sdxl_draws(tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a person", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_tiny_pack_finds_the_red_spot(tiny_pack: Path) -> None:
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name="tiny", root=str(tiny_pack.parent.parent), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    photo = np.full((640, 640, 3), 90, np.uint8)  # BGR
    assert app.get(photo) == []
    photo[320:352, 192:224] = (40, 60, 220)
    (face,) = app.get(photo)
    np.testing.assert_allclose(face.bbox, (160, 288, 224, 352), atol=1)
    assert face.kps.shape == (5, 2)
    assert face.embedding.shape == (16,)
