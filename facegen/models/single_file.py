"""A base model from one file in the original layout, offline: what diffusers would download is read off the shapes.

Shapes tell widths, depths, attention layers and channels. What they cannot tell is a handful of facts of the published
families (heads, noise schedule, scaling of the latents), which stand here. The tokenizer, CLIP's for all of them, is in
no such file: it is looked for beside it and among the weights on this machine.

Source of the facts: the configurations beside CompVis/stable-diffusion v1, Stability-AI/stablediffusion v2 and
Stability-AI/generative-models SDXL.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from facegen import checkpoints, hub
from facegen.checkpoints import Shapes, count
from facegen.errors import CheckpointBroken, WeightsMissing, WrongBaseModel
from facegen.models import ldm_keys
from facegen.models.ldm_keys import UNET, VAE, Names

logger = logging.getLogger(__name__)

Family = Literal["v1", "v2", "xl"]
Reader = Callable[[str], Tensor]

HEAD_WIDTH = 64  # of every text encoder, and of the UNets since v2
V1_HEADS = 8
TIME_IDS = 6  # numbers that SDXL is told beside the pooled prompt
VELOCITY_SPREAD = 0.09  # of a bias in the last attention: v2 models that predict velocity lie above (as ComfyUI tells)
TOKENIZER = "clip-tokenizer"
# What training leaves in a file beside the model.
LEFT = (
    "model_ema.",
    "first_stage_model.loss.",
    "loss.",
    "denoiser.",
    "betas",
    "alphas_",
    "sqrt_",
    "log_",
    "posterior_",
)


@dataclass(frozen=True)
class Facts:
    """What the files of a family do not say.

    sections: where its text encoders are; scaling: of the latents; side: latents at the size it was trained at.
    """

    title: str
    sections: tuple[str, ...]
    scaling: float
    side: int
    scheduler: Mapping[str, Any]
    upcast: bool = False


_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,  # for whoever asks for another scheduler than the model's own
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_PNDM = {"_class_name": "PNDMScheduler", **_SCHEDULE}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "leading"}
FACTS: Mapping[Family, Facts] = {
    "v1": Facts("Stable Diffusion 1.x", ("cond_stage_model.transformer",), 0.18215, 64, _PNDM),
    "v2": Facts("Stable Diffusion 2.x", ("cond_stage_model.model",), 0.18215, 64, _PNDM),
    "xl": Facts(
        "Stable Diffusion XL",
        ("conditioner.embedders.0.transformer", "conditioner.embedders.1.model"),
        0.13025,
        128,
        _EULER,
        upcast=True,
    ),
}


def load(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A model's parts by diffusers' component name, and "scheduler_config", in this precision.

    Modules are built without memory and take each tensor as it is read: the weights are never there twice. Raises
    WrongAdapter (a file of another kind), WrongBaseModel (a family that facegen does not know), CheckpointBroken (names
    the keys), WeightsMissing (no tokenizer).
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with opened(path) as (shapes, read, metadata):
        family = family_of(path, shapes)
        facts, held = FACTS[family], ldm_keys.parts(shapes)
        _check_sections(path, shapes, facts)
        tokenizers = _tokenizers(path, family)
        velocity = predicts_velocity(path, family, shapes, read, metadata)
        side = _side(family, velocity, facts)
        encoders: dict[str, nn.Module] = {}
        for place, name in enumerate(facts.sections):
            encoder = _text_encoder(path, name, held[name], read, dtype, family, tokenizers[0])
            encoders["text_encoder_2" if place else "text_encoder"] = encoder
        last: Any = list(encoders.values())[-1]
        pooled = int(last.config.projection_dim) if family == "xl" else 0
        with torch.device("meta"):
            unet = UNet2DConditionModel(**unet_config(path, held[UNET], family, side, pooled))
            vae = AutoencoderKL(**vae_config(path, held[VAE], facts, side * 8))
        fill(unet, ldm_keys.unet_names(held[UNET]), f"{UNET}.", held[UNET], read, dtype, path)
        fill(vae, ldm_keys.vae_names(held[VAE]), f"{VAE}.", held[VAE], read, dtype, path)
    scheduler = {**facts.scheduler, "prediction_type": "v_prediction" if velocity else "epsilon"}
    if family == "v2" and velocity:
        scheduler["_class_name"] = "DDIMScheduler"
    if "ztsnr" in shapes:
        scheduler["rescale_betas_zero_snr"] = True
    named = dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False))
    return {"unet": unet, "vae": vae, **encoders, **named, "scheduler_config": scheduler}


# --- what it is -----------------------------------------------------------------------------------------------------


def family_of(path: Path, shapes: Shapes) -> Family:
    """The family of a single file; WrongAdapter or WrongBaseModel where it is none that facegen knows."""
    held = ldm_keys.parts(shapes)
    if not held[UNET]:
        raise checkpoints.refuse(path, shapes, "a Stable Diffusion model")
    if held["conditioner.embedders.0.model"]:
        raise WrongBaseModel(f"{path} is an SDXL refiner, which follows no face; give the base model.")
    if held["conditioner.embedders.1.model"] or held["conditioner.embedders.0.transformer"]:
        return "xl"
    if held["cond_stage_model.model"]:
        return "v2"
    if held["cond_stage_model.transformer"]:
        return "v1"
    if any(key.startswith(("double_blocks.", "joint_blocks.")) for key in held[UNET]):
        raise WrongBaseModel(f"{path} is a newer model than Stable Diffusion XL; give SD 1.x, 2.x or SDXL.")
    lacking = "cond_stage_model. or conditioner."
    raise CheckpointBroken(f"{path} lacks a text encoder ({lacking}); give the whole model or a diffusers folder.")


def predicts_velocity(path: Path, family: Family, shapes: Shapes, read: Reader, metadata: Mapping[str, str]) -> bool:
    """Whether it predicts velocity rather than noise.

    Said by the file's own marks (`v_pred`, modelspec's metadata, the .yaml beside it); for a v2 model without any
    it is told from the spread of one bias.
    """
    if "v_pred" in shapes:
        return True
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said:
        return said.startswith("v")
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        return re.search(r"""parameterization:\s*["']?v["']?\s*$""", beside.read_text("utf-8"), re.M) is not None
    if family != "v2":
        return False
    attention = re.compile(rf"{re.escape(UNET)}\.output_blocks\.\d+\.1\.transformer_blocks\.0\.norm1\.bias")
    last = [key for key in shapes if attention.fullmatch(key)]
    if not last:
        return False
    key = max(last, key=lambda one: int(one.removeprefix(f"{UNET}.output_blocks.").split(".")[0]))
    velocity = float(read(key).float().std(correction=0)) > VELOCITY_SPREAD
    logger.info("%s says nothing of its prediction; taken for %s.", path, "velocity" if velocity else "noise")
    return velocity


def _side(family: Family, velocity: bool, facts: Facts) -> int:
    """SD 2.x that predicts velocity was trained at 768 pixels, the others at 512."""
    return 96 if family == "v2" and velocity else facts.side


def _check_sections(path: Path, shapes: Shapes, facts: Facts) -> None:
    wanted = (UNET, VAE, *facts.sections)
    lacking = [f"{name}.*" for name in wanted if not any(key.startswith(f"{name}.") for key in shapes)]
    if lacking:
        raise CheckpointBroken(
            f"{path} lacks {', '.join(lacking)} of {facts.title}; give the whole model, not a part of it."
        )


# --- sizes ----------------------------------------------------------------------------------------------------------


def unet_config(path: Path, shapes: Shapes, family: Family, side: int, pooled: int) -> dict[str, Any]:
    """diffusers' configuration of a UNet with these shapes (without their prefix).

    side: of the latents; pooled: width of the pooled prompt, for SDXL. Raises CheckpointBroken.
    """
    checkpoints.require(_prefixed(shapes, UNET), f"{UNET}.input_blocks.0.0.weight", f"{UNET}.out.2.weight", path=path)
    layers = ldm_keys.layers_per_block(shapes)
    levels = count(shapes, "input_blocks") // (layers + 1)
    firsts = [f"input_blocks.{level * (layers + 1) + 1}" for level in range(levels)]
    checkpoints.require(
        _prefixed(shapes, UNET), *(f"{UNET}.{first}.0.out_layers.3.weight" for first in firsts), path=path
    )
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    depths = [count(shapes, f"{first}.1.transformer_blocks") for first in firsts]
    contexts = {shapes[key][1] for key in shapes if key.endswith("attn2.to_k.weight")}
    if len(contexts) != 1:
        raise CheckpointBroken(f"{path} lacks {UNET}.…attn2.to_k.weight, or its widths differ; fetch the file again.")
    inner = [shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")]
    cross = [depth > 0 for depth in depths]
    config: dict[str, Any] = {
        "sample_size": side,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(cross)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": contexts.pop(),
        "attention_head_dim": V1_HEADS if family == "v1" else [max(width // HEAD_WIDTH, 1) for width in widths],
        "use_linear_projection": bool(inner) and len(inner[0]) == 2,
        "upcast_attention": family == "v2" and side != FACTS["v2"].side,
    }
    if "label_emb.0.0.weight" in shapes:
        told = shapes["label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (told - pooled) // TIME_IDS,
            "projection_class_embeddings_input_dim": told,
        }
    return config


def vae_config(path: Path, shapes: Shapes, facts: Facts, side: int) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder with these shapes (without their prefix); side: of its pictures."""
    levels = count(shapes, "encoder.down")
    lasts = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
    keys = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", *lasts)
    checkpoints.require(_prefixed(shapes, VAE), *(f"{VAE}.{key}" for key in keys), path=path)
    return {
        "sample_size": side,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": count(shapes, "encoder.down.0.block"),
        "block_out_channels": [shapes[key][0] for key in lasts],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": facts.scaling,
        "force_upcast": facts.upcast,
    }


def _text_encoder(
    path: Path, name: str, shapes: Shapes, read: Reader, dtype: torch.dtype, family: Family, tokenizer: Any
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    opened_clip = name.endswith(".model")
    depth = count(shapes, "transformer.resblocks" if opened_clip else "text_model.encoder.layers")
    # v2 was trained on the last layer but one of OpenCLIP, followed by its final norm: the last is never run.
    layers = depth - 1 if family == "v2" else depth
    names = ldm_keys.open_clip_names(shapes, layers) if opened_clip else ldm_keys.clip_names(shapes)
    needed = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    needed += ["encoder.layers.0.mlp.fc1.weight"]
    needed += ["text_projection.weight"] if opened_clip and family == "xl" else []
    if lacking := [key for key in needed if key not in names]:
        raise CheckpointBroken(f"{path} lacks {name}'s {', '.join(lacking)}; fetch the file again.")
    sizes = {key: shapes[names[key].key] for key in needed}
    words, width = sizes["embeddings.token_embedding.weight"]
    if len(tokenizer) > words:
        raise CheckpointBroken(
            f"{path} knows {words} words, the tokenizer beside it {len(tokenizer)}; put the right tokenizer/ there."
        )
    projected = "text_projection.weight" in sizes
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=sizes["encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=sizes["text_projection.weight"][1] if projected else width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=sizes["embeddings.position_embedding.weight"][0],
        hidden_act="gelu" if opened_clip else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        encoder: nn.Module = CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
    if not projected:
        names.pop("text_projection.weight", None)
    own = encoder.state_dict()
    named = {key if key in own else f"text_model.{key}": taken for key, taken in names.items()}
    fill(encoder, named, f"{name}.", shapes, read, dtype, path)
    return encoder


# --- tensors --------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Reader, Mapping[str, str]]]:
    """The shapes of a file, a reader of one tensor by its key, and its metadata; no numbers are read before that.

    What training leaves in a file beside the model is left out. Raises CheckpointBroken.
    """
    if not checkpoints.is_safe(path):
        tensors = checkpoints.unwrapped(checkpoints.mapped(path))
        yield {key: tuple(value.shape) for key, value in tensors.items() if _wanted(key)}, tensors.__getitem__, {}
        return
    shapes = {key: shape for key, shape in checkpoints.shapes(path).items() if _wanted(key)}
    try:
        with safe_open(path, framework="pt") as file:
            yield shapes, file.get_tensor, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointBroken(f"{path} is truncated or damaged ({error}); fetch the file again.") from error


def fill(
    module: nn.Module, names: Names, prefix: str, shapes: Shapes, read: Reader, dtype: torch.dtype, path: Path
) -> None:
    """Give a module that was built without memory its tensors, one by one; CheckpointBroken names the file's keys."""
    own = module.state_dict()
    buffers = {key for key in own if key.endswith("position_ids")}
    missing = sorted(own.keys() - names.keys() - buffers)
    if missing:
        raise CheckpointBroken(
            f"{path} lacks, below {prefix}, what diffusers calls {_told(missing)}; fetch the file again."
        )
    unknown = sorted(prefix + names[key].key for key in names.keys() - own.keys())
    unknown += sorted(
        prefix + key for key in shapes.keys() - {taken.key for taken in names.values()} if not _silent(key)
    )
    if unknown:
        raise CheckpointBroken(f"{path} holds keys that do not belong there: {_told(unknown)}.")
    tensors = {}
    for key in own.keys() - buffers:
        taken = names[key]
        tensor = taken.of(read(prefix + taken.key))
        if tensor.shape != own[key].shape:
            raise CheckpointBroken(
                f"{path} holds weights of sizes that do not fit one another: {prefix}{taken.key} {list(tensor.shape)}"
                f" instead of {list(own[key].shape)}."
            )
        tensors[key] = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
    module.load_state_dict(tensors, strict=False, assign=True)
    for part in module.modules():  # small tables that are in no file
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)


def _wanted(key: str) -> bool:
    return not key.startswith(LEFT)


def _silent(key: str) -> bool:
    """What every such file holds and no module needs."""
    layer = key.startswith("transformer.resblocks.")  # of OpenCLIP the last layer may stay unused
    useless = ("position_ids", "logit_scale", "attn_mask", "text_projection", "text_projection.weight")
    return layer or key.endswith(useless)


def _told(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _prefixed(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


# --- tokenizers -----------------------------------------------------------------------------------------------------


def _tokenizers(path: Path, family: Family) -> list[Any]:
    """CLIP's tokenizer, from beside the file or from this machine's weights; SDXL's and v2's second pads with "!"."""
    from transformers import CLIPTokenizer

    def read(folder: Path, **options: Any) -> Any:
        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointBroken(f"The tokenizer in {folder} cannot be read: {error}") from error

    folder = _tokenizer_folder(path)
    longest = {"model_max_length": 77}
    if family == "v2":
        own = (path.parent / "tokenizer").is_dir()
        return [read(folder, **longest) if own else read(folder, pad_token="!", **longest)]
    first = read(folder, **longest)
    if family == "v1":
        return [first]
    second = path.parent / "tokenizer_2"
    return [first, read(second, **longest) if second.is_dir() else read(folder, pad_token="!", **longest)]


def _tokenizer_folder(path: Path) -> Path:
    if (path.parent / "tokenizer").is_dir():
        return path.parent / "tokenizer"
    for name in (TOKENIZER, "sd15", "sdxl", "sd21"):
        try:
            folder = hub.where(name)
        except WeightsMissing:
            continue
        place = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file():
            return place
    raise WeightsMissing(
        f"{path.name} holds no tokenizer, as all such files: run facegen weights fetch {TOKENIZER}, or put CLIP's"
        f" vocab.json and merges.txt into {path.parent / 'tokenizer'}."
    )
