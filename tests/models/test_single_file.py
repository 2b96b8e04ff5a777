"""Base models in one file of the original layout load offline and compute what their diffusers folder computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from facegen import hub
from facegen.conditions import ChannelsCondition
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongAdapter, WrongBaseModel
from facegen.models import ldm_keys, single_file
from facegen.models.base import Model
from facegen.models.sd15 import SD15Model
from facegen.models.sdxl import SDXLModel
from tests.models import ldm

FAMILIES = {"v1": {}, "v2": {}, "xl": {}, "inpainting": {"channels": 9}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: ldm.tiny(tmp_path_factory.mktemp(name), "v1" if name == "inpainting" else name, **options)
        for name, options in FAMILIES.items()
    }


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of the machine's own, and a home that is empty."""
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def single(folder: Path, place: Path, family: str, **options: Any) -> Path:
    """The folder's model as one file, with its tokenizer beside it."""
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, place / name, dirs_exist_ok=True)
    return ldm.write(folder, place / "model.safetensors", "v1" if family == "inpainting" else family, **options)


def load(path: Path, dtype: torch.dtype = torch.float32) -> Model:
    return Model.from_pretrained(path, dtype=dtype, device="cpu")


def outputs(model: Model) -> dict[str, Tensor]:
    """What a prompt, a UNet call and the autoencoder give."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, model.latent_channels, 8, 8, generator=generator)
    picture = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        text = model.encode_text(["a red face"], "blurry")
        conditions: list[Any] = [text]
        if model.extra_channels:
            conditions.append(ChannelsCondition(channels=torch.ones(2, 1, model.extra_channels, 8, 8)))
        now = model.prepare(conditions, 1, guidance=True).throughout()
        found = {
            "embeds": text.embeds,
            "noise": model.predict(latents, 500, now),
            "seen": model.encode_image(picture),
            "made": model.decode(latents[:1]),
        }
    return found if text.pooled is None else found | {"pooled": text.pooled}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def states(model: Model) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, **model.text_encoders()}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_numbers_of_its_folder(
    folders: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder, file = load(folders[family], dtype), load(single(folders[family], tmp_path, family), dtype)
    assert type(file) is type(folder) is (SDXLModel if family == "xl" else SD15Model)
    assert same(states(folder), states(file))
    assert {value.dtype for value in states(file).values()} == {dtype}
    assert file.extra_channels == (5 if family == "inpainting" else 0)
    assert file.default_size == folder.default_size
    if dtype != torch.float16:  # slow on a CPU; its weights were compared
        assert same(outputs(folder), outputs(file))


@pytest.mark.parametrize("family", ["v1", "v2", "xl"])
def test_the_configuration_is_what_the_folder_says(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    file = load(single(folders[family], tmp_path, family))
    for part, net in (("unet", file.unet), ("vae", file.vae)):
        told: dict[str, Any] = json.loads((folders[family] / part / "config.json").read_text())
        own = json.loads(json.dumps(dict(net.config)))
        blocks = len(own["block_out_channels"])

        def spread(name: str, value: Any, blocks: int = blocks) -> Any:
            per_block = name in ("attention_head_dim", "transformer_layers_per_block", "layers_per_block")
            return [value] * blocks if per_block and isinstance(value, int) else value

        differing = {
            name
            for name in told.keys() & own.keys()
            if not name.startswith("_") and spread(name, told[name]) != spread(name, own[name])
        }
        assert not differing
    for name, encoder in file.text_encoders().items():
        told = json.loads((folders[family] / name / "config.json").read_text())
        for key in ("hidden_act", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            assert getattr(encoder.config, key) == told[key]


@pytest.mark.parametrize("family", ["v1", "v2", "xl"])
def test_diffusers_reads_the_same_file_alike(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """diffusers' own converter, given the configurations that it would download, agrees with ours."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    path = single(folders[family], tmp_path, family)
    kind: Any = StableDiffusionXLPipeline if family == "xl" else StableDiffusionPipeline
    pipe = kind.from_single_file(str(path), config=str(folders[family]), local_files_only=True)
    ours = load(path)
    for theirs, own in ((pipe.unet, ours.unet), (pipe.vae, ours.vae)):
        assert same(theirs.state_dict(), own.state_dict())


def test_full_size_layouts() -> None:
    """The shapes of the published models give their published configurations."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    published: dict[str, dict[str, Any]] = {
        "v1": {
            "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2,
        },
        "v2": {
            "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024, "use_linear_projection": True,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2,
        },
        "xl": {
            "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "use_linear_projection": True,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
    }  # fmt: skip
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **sizes
        ).state_dict()
    halves = {ldm.original_vae(key, vae): tuple(value.shape) for key, value in vae.items()}
    found = single_file.vae_config(Path("x"), halves, single_file.FACTS["v1"], 512)
    assert {name: found[name] for name in sizes} == sizes
    assert ldm_keys.vae_names(halves).keys() == vae.keys()
    for family, told in published.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**told).state_dict()
        shapes = {ldm.original_unet(key, unet): tuple(value.shape) for key, value in unet.items()}
        assert len(shapes) == len(unet)
        read = single_file.unet_config(Path("x"), shapes, family, 64, 1280)  # type: ignore[arg-type]
        assert {name: read[name] for name in told} == told
        assert ldm_keys.unet_names(shapes).keys() == unet.keys()
        assert "output_blocks.11.1.transformer_blocks.0.norm1.bias" in shapes or family == "xl"


# --- what a file says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["key", "metadata", "yaml", "spread"])
def test_velocity(tmp_path: Path, how: str) -> None:
    folder = ldm.tiny(tmp_path / "folder", "v2", velocity=True)
    (tmp_path / "one").mkdir()
    path = single(folder, tmp_path / "one", "v2")
    tensors, metadata = load_file(path), {}
    last = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"
    assert float(tensors[last].std()) < single_file.VELOCITY_SPREAD
    assert load(path).scheduler_config["prediction_type"] == "epsilon"
    if how == "key":
        tensors["v_pred"] = tensors["ztsnr"] = torch.tensor([])
    elif how == "metadata":
        metadata = {"modelspec.prediction_type": "v"}
    elif how == "yaml":
        path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.1\n')
    else:
        tensors[last] = tensors[last] * 10
    save_file(tensors, path, metadata)
    model = load(path)
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.scheduler_config["_class_name"] == "DDIMScheduler"
    assert model.scheduler_config.get("rescale_betas_zero_snr", False) == (how == "key")
    assert model.default_size == (768, 768)


@pytest.mark.parametrize(("family", "own"), [("v1", "PNDM"), ("v2", "PNDM"), ("xl", "EulerDiscrete")])
def test_schedulers_are_those_of_the_published_models(
    folders: dict[str, Path], tmp_path: Path, family: str, own: str
) -> None:
    from facegen import schedulers

    config = load(single(folders[family], tmp_path, family)).scheduler_config
    assert type(schedulers.build("model", config, 4)).__name__ == f"{own}Scheduler"
    other = schedulers.build("ddim", config, 4)
    assert not other.config.clip_sample
    assert not other.config.set_alpha_to_one
    assert float(other.alphas_cumprod[-1]) == pytest.approx(0.0047, rel=0.02)


def test_a_run_from_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline

    path = single(folders["v1"], tmp_path, "v1")
    pipe = GeneratePipeline.from_pretrained(path, device="cpu", dtype=torch.float32)
    out = pipe(prompt="a face", height=64, width=64, num_inference_steps=2, seed=3)
    assert out.images[0].size == (64, 64)


def test_a_checkpoint_of_a_whole_training_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """A .ckpt with averaged weights, the schedule's tables and the loss's own network beside the model."""
    path = single(folders["v1"], tmp_path, "v1")
    state = dict(load_file(path))
    state |= {"model_ema.decay": torch.tensor(0.9), "betas": torch.ones(10), "sqrt_alphas_cumprod": torch.ones(10)}
    state["first_stage_model.loss.logvar"] = torch.tensor(0.0)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "whole.ckpt")
    assert same(states(load(folders["v1"])), states(load(tmp_path / "whole.ckpt")))
    only = tmp_path / "set"
    only.mkdir()
    shutil.copytree(tmp_path / "tokenizer", only / "tokenizer")
    shutil.copy(tmp_path / "whole.ckpt", only)
    assert load(only).source == only / "whole.ckpt", "a folder stands for the one file in it"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_found_or_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    path = ldm.write(folders["xl"], tmp_path / "bare" / "a.safetensors", "xl")
    with pytest.raises(WeightsMissing, match="facegen weights fetch clip-tokenizer, or put CLIP's"):
        load(path)
    place = hub.home() / "clip-tokenizer"
    shutil.copytree(folders["xl"] / "tokenizer", place)
    ldm.clip_tokenizer(place)  # as published: vocab.json and merges.txt
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (place / name).exists():
            (place / name).write_text("{}")
    model = load(path)
    assert isinstance(model, SDXLModel)
    assert model.tokenizer_2.pad_token == "!"
    assert model.tokenizer.pad_token == "<|endoftext|>"
    assert same(outputs(load(folders["xl"])), outputs(model))


BROKEN: dict[str, tuple[Any, type[FacegenError], str]] = {
    "a UNet's weight is missing": (
        lambda all_: all_.pop("model.diffusion_model.middle_block.1.proj_in.weight"), CheckpointBroken,
        r"lacks, below model\.diffusion_model\., what diffusers calls mid_block\.attentions\.0\.proj_in\.weight;",
    ),
    "a key too many": (
        lambda all_: all_.update({"model.diffusion_model.middle_block.9.x": torch.ones(1)}), CheckpointBroken,
        r"keys that do not belong there: model\.diffusion_model\.middle_block\.9\.x\.$",
    ),
    "a wrong shape": (
        lambda all_: all_.update({"first_stage_model.quant_conv.bias": torch.ones(3)}), CheckpointBroken,
        r"do not fit one another: first_stage_model\.quant_conv\.bias \[3\] instead of \[8\]",
    ),
    "no autoencoder": (
        lambda all_: [all_.pop(key) for key in list(all_) if key.startswith("first_stage")], CheckpointBroken,
        r"lacks first_stage_model\.\* of Stable Diffusion 1\.x; give the whole model",
    ),
    "no text encoder": (
        lambda all_: [all_.pop(key) for key in list(all_) if key.startswith("cond_stage")], CheckpointBroken,
        r"lacks a text encoder \(cond_stage_model\.",
    ),
    "a refiner": (
        lambda all_: all_.update({"conditioner.embedders.0.model.ln_final.bias": torch.ones(1)}), WrongBaseModel,
        "SDXL refiner",
    ),
    "a newer model": (
        lambda all_: ([all_.pop(key) for key in list(all_)],
                      all_.update({"model.diffusion_model.double_blocks.0.x": torch.ones(1)})), WrongBaseModel,
        "newer model than Stable Diffusion XL",
    ),
    "a LoRA": (
        lambda all_: ([all_.pop(key) for key in list(all_)],
                      all_.update({"lora_unet_x.lora_down.weight": torch.ones(1, 1)})), WrongAdapter,
        "is a LoRA, not a Stable Diffusion model",
    ),
    "numbers that are none": (
        lambda all_: all_.update({"model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))}),
        CheckpointBroken, "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_a_sentence(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, kind, words = BROKEN[case]
    path = single(folders["v1"], tmp_path, "v1")
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(kind, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.999])
def test_a_truncated_file(folders: dict[str, Path], tmp_path: Path, part: float) -> None:
    path = single(folders["v1"], tmp_path, "v1")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointBroken, match="truncated or damaged"):
        load(path)


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time
import torch
from facegen.models.base import Model

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

small, *large = sys.argv[1:]
Model.from_pretrained(small, dtype=torch.float16, device="cpu")  # all imports and caches
for source in large:
    for dtype in (torch.float32, torch.float16):
        before, peak, done = anonymous(), [0], []
        def watch():
            while not done:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch)
        thread.start()
        model = Model.from_pretrained(source, dtype=dtype, device="cpu")
        done.append(True)
        thread.join()
        parts = [model.unet, model.vae, *model.text_encoders().values()]
        size = sum(one.numel() * one.element_size() for part in parts for one in part.state_dict().values())
        del model, parts
        sys.stdout.write(f"{size} {(peak[0] - before) / size}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_weights_are_held_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """The most memory of its own that a process has while loading, over the size of the weights that stay."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(folders["v1"], tmp_path / "large"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config | {"block_out_channels": [192, 384]})
    unet = unet.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.01)
    unet.save_pretrained(folder / "unet")
    (tmp_path / "one").mkdir()
    file = single(folder, tmp_path / "one", "v1")
    command = [sys.executable, "-c", PEAK, str(folders["v1"]), str(file), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = [tuple(map(float, line.split())) for line in run.stdout.splitlines()]
    assert len(measured) == 4
    for size, share in measured:
        assert size > 40e6
        assert share < 1.3, f"the peak was {share:.2f} times the weights"
