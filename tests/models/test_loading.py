"""Models from folders: the right class, what is missing or broken said in a sentence, size and text facts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongBaseModel, WrongRequest
from facegen.memory import MemoryPlan
from facegen.models.base import Model
from facegen.models.sd15 import SD15Model
from facegen.models.sdxl import SDXLModel


@pytest.fixture
def copy(tiny_sd15: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd15, tmp_path / "model"))


def load(folder: Path, kind: type[Model] = Model) -> Model:
    return kind.from_pretrained(folder, dtype=torch.float32, device="cpu")


def test_the_weights_choose_the_class(folders: dict[str, Path]) -> None:
    assert isinstance(load(folders["sd15"]), SD15Model)
    assert isinstance(load(folders["sdxl"]), SDXLModel)
    with pytest.raises(WrongBaseModel, match="SD15Model"):
        load(folders["sd15"], SDXLModel)


def test_a_model_says_its_sizes(folders: dict[str, Path]) -> None:
    model = load(folders["sd15"])
    assert model.vae_factor == 8
    assert model.default_size == (64, 64)
    assert model.latent_shape(128, 64) == (4, 16, 8)
    assert model.extra_channels == 0
    with pytest.raises(WrongRequest, match="multiples of 8"):
        model.latent_shape(100, 64)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_model_knows_where_it_came_from_and_takes_another_unet(folders: dict[str, Path]) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model = load(folders["sd15"])
    assert model.source == folders["sd15"]
    unet: Any = UNet2DConditionModel.from_config(model.unet.config)
    other = model.with_unet(unet)
    assert other.unet is unet
    assert other.vae is model.vae
    assert model.unet is not unet
    assert other.attention_layers[1].module is not model.attention_layers[1].module
    with pytest.raises(WrongBaseModel, match="prompts of 64"):
        model.with_unet(load(folders["sdxl"]).unet)


def test_everything_a_folder_lacks_is_listed(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / "config.json").unlink()
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(WeightsMissing) as error:
        load(copy)
    text = str(error.value)
    assert all(name in text for name in ("unet/diffusion_pytorch_model", "vae/config.json", "tokenizer/"))
    assert "text_encoder" not in text


def test_an_sdxl_folder_needs_its_second_text_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    shutil.rmtree(copy / "text_encoder_2")
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(WeightsMissing, match=r"text_encoder_2.*tokenizer_2"):
        load(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointBroken, match="unet"):
        load(copy)


def test_weights_without_all_keys_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if key.endswith("q_proj.weight")))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointBroken, match="q_proj"):
        load(copy)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_keys_that_do_not_fit_are_named(copy: Path, part: str, change: str) -> None:
    from safetensors.torch import load_file, save_file

    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    key = sorted(key for key in tensors if key.endswith("bias"))[0]
    if change == "missing":
        tensors.pop(key)
    elif change == "shape":
        tensors[key] = torch.ones(1)
    else:
        key = "strange.weight"
        tensors[key] = torch.ones(1)
    save_file(tensors, file, metadata={"format": "pt"})
    words = {"missing": "lacks", "unknown": "do not belong there", "shape": "do not fit one another"}
    with pytest.raises(CheckpointBroken, match=words[change]) as error:
        load(copy)
    assert key.removeprefix("text_model.") in str(error.value)
    assert str(copy / part) in str(error.value)


def test_old_names_of_the_autoencoder_are_read(copy: Path) -> None:
    """As Stable Diffusion 1.5 was published."""
    from safetensors.torch import load_file, save_file

    before = load(copy).vae.state_dict()
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for key, value in load_file(file).items():
        for new, name in old.items():
            key = key.replace(new, name)
        tensors[key] = value
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    after = load(copy).vae.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nan_weights_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointBroken, match=r"NaN.*decoder.conv_in.bias"):
        load(copy)


def test_broken_configurations_are_refused(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointBroken, match="JSON"):
        load(copy)


def test_half_precision_variants_are_found(copy: Path) -> None:
    for name in ("unet", "vae"):
        file = copy / name / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert isinstance(load(copy), SD15Model)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(WrongAdapter, match="LoRA"):
        load(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsMissing, match="lacks"):
        load(tmp_path / "empty")


def test_long_prompts_are_cut_and_negatives_spread(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = load(folders["sd15"])
    text = model.encode_text(["a" * 300, "b"], "blurry")
    assert text.embeds.shape == (2, 2, 77, 32)
    assert torch.equal(text.embeds[0, 0], text.embeds[0, 1])
    assert "longer" in caplog.text
    with pytest.raises(WrongRequest, match="negative"):
        model.encode_text(["a", "b", "c"], ["x", "y"])


def test_sdxl_without_a_negative_prompt_is_zero(folders: dict[str, Path]) -> None:
    model = load(folders["sdxl"])
    text = model.encode_text(["a face"])
    assert text.pooled is not None
    assert text.embeds[0].abs().sum() == 0
    assert text.pooled[0].abs().sum() == 0
    assert model.encode_text(["a face"], "").embeds[0].abs().sum() > 0


def test_pictures_to_latents_and_back(folders: dict[str, Path]) -> None:
    model = load(folders["sd15"])
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mode = model.encode_image(pictures)
    assert mode.shape == (2, 4, 8, 8)
    assert torch.equal(mode, model.encode_image(pictures))
    drawn = model.encode_image(pictures, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    second = model.encode_image(pictures[1:], torch.Generator().manual_seed(2))
    assert torch.allclose(drawn[1:], second, atol=1e-5)
    decoded = model.decode(mode)
    assert decoded.shape == (2, 3, 64, 64)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    with pytest.raises(WrongRequest, match="multiples"):
        model.encode_image(pictures[..., :60])


def test_memory_plans_are_checked() -> None:
    plan = MemoryPlan.choose("cpu")
    assert plan.dtype == torch.float32
    assert plan.waiting == torch.device("cpu")
    with pytest.raises(WrongRequest, match="device"):
        MemoryPlan.choose("abacus")
    with pytest.raises(WrongRequest, match="offload"):
        MemoryPlan.choose("cpu", offload="sometimes")  # pyright: ignore[reportArgumentType]


def test_parts_wait_elsewhere_and_come_back() -> None:
    plan = MemoryPlan(torch.device("meta"), torch.float32, offload="model")
    part = torch.nn.Linear(2, 2)
    assert plan.waiting == torch.device("cpu")
    # A device of its own is not there on every machine; what is checked is that nothing moves when both are the same.
    still = MemoryPlan(torch.device("cpu"), torch.float32, offload="model")
    with still.using(part):
        assert part.weight.device == torch.device("cpu")


def test_tiling_and_slicing_reach_the_vae(folders: dict[str, Path]) -> None:
    model = Model.from_pretrained(folders["sd15"], dtype=torch.float32, device="cpu", tiling=True, slicing=True)
    assert model.vae.use_tiling
    assert model.vae.use_slicing


def test_mini_is_a_model_like_any_other(mini: Path) -> None:
    model = Model.from_pretrained("mini", dtype=torch.float32, device="cpu")
    assert isinstance(model, SD15Model)
    index = json.loads((mini / "base" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
