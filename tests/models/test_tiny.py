"""A tiny decoder is read from both layouts and decodes as diffusers' AutoencoderTiny; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from facegen import hub
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongBaseModel
from facegen.models.base import Model
from facegen.models.tiny import load_tiny
from facegen.pipelines.generate import GeneratePipeline


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def make(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """A tiny autoencoder of diffusers with random weights, and its folder."""

    def made(channels: int = 4, stages: int | None = None) -> tuple[Any, Path]:
        from diffusers import AutoencoderTiny

        blocks = (*(2,) * ((stages or model.vae_factor.bit_length()) - 1), 1)
        torch.manual_seed(3)
        net: Any = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8,) * len(blocks),
            decoder_block_out_channels=(8,) * len(blocks),
            num_encoder_blocks=blocks[::-1],
            num_decoder_blocks=blocks,
        )
        folder = tmp_path_factory.mktemp("tiny")
        net.save_pretrained(folder)
        return net.eval(), folder

    return made


def _original(folder: Path) -> dict[str, Tensor]:
    """The decoder as the original's file has it: the clamp is a layer of its own."""
    start = "decoder.layers."
    kept = load_file(folder / "diffusion_pytorch_model.safetensors")
    found = {}
    for key, value in kept.items():
        if key.startswith(start):
            place, _, rest = key.removeprefix(start).partition(".")
            found[f"{int(place) + 1}.{rest}"] = value
    return found


@torch.no_grad()
def test_both_layouts_decode_as_diffusers_does(make: Callable[..., tuple[Any, Path]], model: Model) -> None:
    net, folder = make()
    latents = torch.randn(2, *model.latent_shape(*model.default_size))
    wanted = (net.decode(latents / net.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    tensors = _original(folder)
    save_file(tensors, folder / "taesd_decoder.safetensors")
    torch.save(tensors, folder / "decoder.pth")
    torch.save({f"decoder.{key}": value for key, value in tensors.items()}, folder / "whole.pth")
    for source in (folder, folder / "taesd_decoder.safetensors", folder / "decoder.pth", folder / "whole.pth"):
        model.tiny = load_tiny(source, model)
        assert torch.equal(model.decode(latents), wanted), source
    model.tiny = None
    assert not torch.equal(model.decode(latents), wanted)


def test_a_pipeline_takes_it(make: Callable[..., tuple[Any, Path]], tiny_sd15: Path) -> None:
    folder = make()[1]
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "prompt": "a face"}
    pictures = [
        GeneratePipeline.from_pretrained(tiny_sd15, device="cpu", dtype="float32", **options)(**asked).images[0]
        for options in ({}, {"tiny_vae": str(folder)}, {"tiny_vae": str(folder), "packed": True})
    ]
    assert pictures[0].size == pictures[1].size
    assert pictures[0].tobytes() != pictures[1].tobytes()
    plain, packed = (torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int() for one in pictures[1:])
    assert int((plain - packed).abs().max()) <= 1


@pytest.mark.parametrize("difference", [{"channels": 16}, {"stages": 5}])
def test_another_model_s_decoder_is_refused(
    make: Callable[..., tuple[Any, Path]], model: Model, difference: dict[str, int]
) -> None:
    with pytest.raises(WrongBaseModel, match="Choose the decoder that was made for it"):
        load_tiny(make(**difference)[1], model)


def test_broken_and_missing_files(make: Callable[..., tuple[Any, Path]], model: Model, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="holds no tiny decoder"):
        load_tiny(tmp_path, model)
    tensors = _original(make()[1])
    del tensors["3.conv.2.bias"]
    save_file(tensors, tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(CheckpointBroken, match="lacks"):
        load_tiny(tmp_path, model)
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FacegenError, match="not a tiny decoder"):
        load_tiny(tmp_path / "other.safetensors", model)


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
def test_it_is_known_by_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Model) -> None:
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub.named(name)[0].kind == "decoder"
    with pytest.raises(WeightsMissing, match=f"madebyollin/{name}"):
        load_tiny(name, model)
