"""Tiny random base models, and writing a diffusers folder as one file in the original layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789,.;:!?'\"()-+*/ ")


def tiny(folder: Path, family: str, *, channels: int = 4, seed: int = 0, velocity: bool = False) -> Path:
    """A random model of the family v1, v2 or xl in diffusers' folder format, with the family's own proportions.

    Widths are multiples of 32, for the number of groups of a norm is in no file; heads are as published.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder / "tokenizer_source")
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=1024 if family == "xl" else 512,
        scaling_factor=0.13025 if family == "xl" else 0.18215, force_upcast=family == "xl",
    )  # fmt: skip
    cross = 192 if family == "xl" else 64
    sizes: dict[str, Any] = {
        "sample_size": 128 if family == "xl" else 96 if velocity else 64, "in_channels": channels,
        "layers_per_block": 1, "cross_attention_dim": cross,
    }  # fmt: skip
    if family == "v1":
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64), attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **sizes,
        )  # fmt: skip
    elif family == "v2":
        unet = UNet2DConditionModel(
            block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), upcast_attention=velocity,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **sizes,
        )  # fmt: skip
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 128), attention_head_dim=(1, 1, 2), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8, **sizes,
        )  # fmt: skip
    _stir(unet)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    first = CLIPTextModel(clip_config(tokenizer, 64, 2, "gelu" if family == "v2" else "quick_gelu"))
    if family == "xl":
        pipe: Any = StableDiffusionXLPipeline(
            vae=vae, unet=unet, text_encoder=first, tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 128, 3, "gelu", 48)),
            tokenizer_2=clip_tokenizer(folder / "tokenizer_source", pad_token="!"),
            scheduler=EulerDiscreteScheduler(**schedule, timestep_spacing="leading"), add_watermarker=False,
        )  # fmt: skip
    else:
        kind = "v_prediction" if velocity else "epsilon"
        pipe = StableDiffusionPipeline(
            vae=vae, unet=unet, text_encoder=first,
            tokenizer=clip_tokenizer(folder / "tokenizer_source", **({"pad_token": "!"} if family == "v2" else {})),
            scheduler=DDIMScheduler(**schedule, set_alpha_to_one=False, clip_sample=False, prediction_type=kind),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import CLIPTokenizer

    pieces = LETTERS + [f"{letter}</w>" for letter in LETTERS] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **options)


def clip_config(tokenizer: Any, width: int, layers: int, act: str, projection: int = 32) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, hidden_act=act, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _stir(unet: torch.nn.Module) -> None:
    """Norms that are not the identity, so that one taken for another shows."""
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.02)


def write(folder: Path, path: Path, family: str, dtype: torch.dtype = torch.float32, **more: Tensor) -> Path:
    """The folder's weights as one file in the original layout; more: further tensors of the file."""
    tensors = original(folder, family)
    save_file({key: value.to(dtype).contiguous() for key, value in tensors.items()} | more, path)
    return path


def original(folder: Path, family: str) -> dict[str, Tensor]:
    """The folder's weights under the names of the original code."""

    def read(part: str, stem: str) -> dict[str, Tensor]:
        return load_file(folder / part / f"{stem}.safetensors")

    unet = read("unet", "diffusion_pytorch_model")
    vae = read("vae", "diffusion_pytorch_model")
    tensors = {f"model.diffusion_model.{original_unet(key, unet)}": value for key, value in unet.items()}
    for key, value in vae.items():
        tensors[f"first_stage_model.{original_vae(key, vae)}"] = (
            value[..., None, None] if ".attentions." in key and "group_norm" not in key and value.ndim == 2 else value
        )
    first = {key.removeprefix("text_model."): value for key, value in read("text_encoder", "model").items()}
    if family == "v1":
        tensors |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in first.items()}
    elif family == "v2":
        opened = original_open_clip(first)
        last = 1 + max(int(key.split(".")[2]) for key in opened if "resblocks" in key)
        for key in [key for key in opened if f"resblocks.{last - 1}." in key]:  # the layer that is never run
            opened[key.replace(f"resblocks.{last - 1}.", f"resblocks.{last}.")] = torch.zeros_like(opened[key])
        opened["text_projection"], opened["logit_scale"] = torch.zeros(64, 64), torch.zeros(())
        tensors |= {f"cond_stage_model.model.{key}": value for key, value in opened.items()}
    else:
        second = {key.removeprefix("text_model."): value for key, value in read("text_encoder_2", "model").items()}
        tensors |= {f"conditioner.embedders.0.transformer.text_model.{key}": value for key, value in first.items()}
        opened = original_open_clip(second) | {"logit_scale": torch.zeros(())}
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in opened.items()}
    return tensors


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_unet(key: str, keys: Any) -> str:
    """The original name of a key of diffusers' UNet."""
    for new, old in ENDS.items():
        if key.startswith(f"{new}."):
            return old + key.removeprefix(new)
    layers = 1 + max(int(found[1]) for one in keys if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)", one)))
    side, rest = key.split(".", 1)
    if side == "mid_block":
        kind, place, rest = rest.split(".", 2)
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        name, leaf = rest.rsplit(".", 1)
        return f"middle_block.{2 * int(place)}.{RESNET[name]}.{leaf}"
    block, kind, place, rest = rest.split(".", 3)
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attentive = any(one.startswith(f"up_blocks.{block}.attentions.") for one in keys)
        return f"output_blocks.{(int(block) + 1) * (layers + 1) - 1}.{2 if attentive else 1}.{rest}"
    at = int(block) * (layers + 1) + int(place) + (side == "down_blocks")
    where = f"{'input_blocks' if side == 'down_blocks' else 'output_blocks'}.{at}"
    if kind == "attentions":
        return f"{where}.1.{rest}"
    name, leaf = rest.rsplit(".", 1)
    return f"{where}.0.{RESNET[name]}.{leaf}"


def original_vae(key: str, keys: Any) -> str:
    """The original name of a key of diffusers' autoencoder."""
    levels = 1 + max(int(found[1]) for one in keys if (found := re.match(r"decoder\.up_blocks\.(\d+)", one)))
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace("to_out.0", "proj_out")
    key = re.sub(r"mid_block\.attentions\.0\.(?:to_)?", "mid.attn_1.", key)
    key = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", key)
    return key.replace("resnets.", "block.").replace("samplers.0", "sample")


def original_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder under OpenCLIP's names."""
    found: dict[str, Tensor] = {}
    renames = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    for key, value in tensors.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            block = f"transformer.resblocks.{match[1]}"
            if match[2] in renames:
                found[f"{block}.{renames[match[2]]}.{match[3]}"] = value
            elif match[2] == "self_attn.q_proj":
                stem = f"encoder.layers.{match[1]}.self_attn"
                parts = [tensors[f"{stem}.{name}_proj.{match[3]}"] for name in "qkv"]
                found[f"{block}.attn.in_proj_{match[3]}"] = torch.cat(parts)
        elif key == "text_projection.weight":
            found["text_projection"] = value.T
        elif key.startswith("final_layer_norm"):
            found[key.replace("final_layer_norm", "ln_final")] = value
        else:
            name = {"token_embedding": "token_embedding.weight", "position_embedding": "positional_embedding"}
            found[name[key.split(".")[1]]] = value
    return found
