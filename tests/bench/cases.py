"""Models, weights and inputs of the benchmarks: the same for facegen and for diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALL, SMALL_XL, SD15, SDXL = "random", "random-xl", "random-sd15", "random-sdxl"
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}
UNETS: dict[str, dict[str, Any]] = {
    SMALL: {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 96,
        "attention_head_dim": (1, 2, 3),
    },
    SMALL_XL: {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    SD15: {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    SDXL: {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CASES = ("text", "face", "instantid", "regions", "people4")


def draw(seed: int, *shape: int) -> Tensor:
    """Unit-variance numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep activations of ordinary size, drawn on the device: true sizes take seconds there."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.data.normal_(std=fan**-0.5, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


@dataclass(frozen=True, eq=False)
class Person:
    """One identity: key/value weights by the official keys, a projector, its input (2, 1, …, D) and a region."""

    weights: dict[str, Tensor]
    projector: nn.Module
    embeds: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """Everything both sides need; `text` None: the prompt is encoded by the model's own text encoder, in each call.

    text, pooled: (2, B, 77, D) and (2, B, P), [unconditional, conditional].
    """

    unet: Any
    vae: Any
    latents: Tensor
    side: int
    text: Tensor | None
    pooled: Tensor | None = None
    text_encoder: Any = None
    tokenizer: Any = None
    schedule: dict[str, Any] = field(default_factory=lambda: dict(SCHEDULE))
    people: tuple[Person, ...] = ()
    net: Any = None
    image: Tensor | None = None
    references: int = 0

    @property
    def xl(self) -> bool:
        """Whether it is of the SDXL family."""
        return self.pooled is not None


def load(model: str, name: str, pictures: int, size: int | None, where: tuple[str, torch.dtype]) -> Case:
    """A case by the model's folder, or one of the random models, and by its name in CASES; where: device and dtype."""
    device, dtype = where
    if model in UNETS:
        case = _random(model, pictures, size, device, dtype)
    else:
        case = _folder(Path(model), pictures, size, device, dtype)
    width = int(case.unet.config["cross_attention_dim"])
    people: list[Person] = []
    if name in ("face", "regions", "people4"):
        count = {"face": 1, "regions": 2, "people4": 4}[name]
        for place in range(count):
            head = fill(_face_head(width).to(device), 10 + place).to(dtype)
            mask = None
            if name == "regions":
                mask = torch.zeros(1, case.side, case.side)
                half = case.side // 2
                mask[..., place * half : (place + 1) * half] = 1
            embeds = torch.stack([torch.zeros(1, 512), draw(place, 1, 512)]).to(device, dtype)
            people.append(Person(_weights(case.unet, 100 * place), head, embeds, mask))
    net = image = None
    if name == "instantid":
        folder = Path(model).parent / "adapters" / "instantid"
        if folder.is_dir():
            person, net = _embedded(folder, device, dtype)
            people.append(person)
        else:
            people.append(_instantid(case.unet, device, dtype))
            net = _control_net(case.unet).to(device, dtype)
        image = draw(2, pictures, 3, case.side, case.side).sigmoid().to(device, dtype)
    return Case(**{**vars(case), "people": tuple(people), "net": net, "image": image})


def crowd(
    model: str, growth: tuple[int, int, int], pictures: int, size: int | None, where: tuple[str, torch.dtype]
) -> Case:
    """A case of so many people of so many tokens each, and so many references."""
    people, tokens, references = growth
    device, dtype = where
    case = load(model, "text", pictures, size, where)
    width = int(case.unet.config["cross_attention_dim"])
    found = []
    for place in range(people):
        head = fill(_face_head(width, tokens).to(device), 10 + place).to(dtype)
        embeds = torch.stack([torch.zeros(1, 512), draw(place, 1, 512)]).to(device, dtype)
        found.append(Person(_weights(case.unet, 100 * place), head, embeds))
    return Case(**{**vars(case), "people": tuple(found), "references": references})


def _random(model: str, pictures: int, size: int | None, device: str, dtype: torch.dtype) -> Case:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[model])
        blocks = (32, 64) if model in (SMALL, SMALL_XL) else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=blocks,
            down_block_types=("DownEncoderBlock2D",) * len(blocks),
            up_block_types=("UpDecoderBlock2D",) * len(blocks),
            latent_channels=4,
            layers_per_block=2,
        )
    fill(unet, 1).to(dtype).eval().requires_grad_(False)
    fill(vae, 2).to(dtype).eval().requires_grad_(False)
    factor = 2 ** (len(blocks) - 1)
    side = size or unet.config["sample_size"] * factor
    text = draw(3, 2, 1, 77, unet.config["cross_attention_dim"]).expand(-1, pictures, -1, -1)
    pooled = None
    if unet.config["addition_embed_type"] == "text_time":
        width = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        pooled = draw(4, 2, 1, width).expand(-1, pictures, -1)
    return Case(
        unet=unet,
        vae=vae,
        latents=draw(1, pictures, 4, side // factor, side // factor).to(device, dtype),
        side=side,
        text=text.to(device, dtype),
        pooled=None if pooled is None else pooled.to(device, dtype),
    )


def _folder(folder: Path, pictures: int, size: int | None, device: str, dtype: torch.dtype) -> Case:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def part(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name, dtype=dtype).to(device).eval().requires_grad_(False)

    unet, vae = part(UNet2DConditionModel, "unet"), part(AutoencoderKL, "vae")
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    side = size or unet.config["sample_size"] * factor
    return Case(
        unet=unet,
        vae=vae,
        latents=draw(1, pictures, vae.config["latent_channels"], side // factor, side // factor).to(device, dtype),
        side=side,
        text=None,
        text_encoder=part(CLIPTextModel, "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        schedule=json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8")),
    )


def _face_head(width: int, tokens: int = 4) -> Any:
    from diffusers.models.embeddings import ImageProjection

    return ImageProjection(cross_attention_dim=width, image_embed_dim=512, num_image_text_embeds=tokens)


def _weights(unet: Any, seed: int) -> dict[str, Tensor]:
    """Random key and value weights by IP-Adapter's keys."""
    from facegen.attention.weights import layer_widths

    width = int(unet.config["cross_attention_dim"])
    names = list(unet.attn_processors)
    widths = layer_widths(names, tuple(unet.config["block_out_channels"]))
    return {
        f"{index}.to_{part}_ip.weight": (draw(seed + index, widths[index], width) / width**0.5).to(unet.dtype)
        for index, name in enumerate(names)
        if ".attn2." in name
        for part in "kv"
    }


def _instantid(unet: Any, device: str, dtype: torch.dtype) -> Person:
    """InstantID's sizes: a resampler of depth 4 from one embedding to 16 tokens."""
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    width = int(unet.config["cross_attention_dim"])
    projector = IPAdapterPlusImageProjection(
        embed_dims=512, output_dims=width, hidden_dims=1280, depth=4, heads=20, num_queries=16
    )
    embeds = torch.stack([torch.zeros(1, 1, 512), draw(5, 1, 1, 512)])
    return Person(_weights(unet, 500), fill(projector.to(device), 6).to(dtype), embeds.to(device, dtype))


def _control_net(unet: Any) -> Any:
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_hint_channels(unet))
    for place, (name, parameter) in enumerate(net.named_parameters()):
        if name.startswith("controlnet_"):
            parameter.data = (draw(place, *parameter.shape) * 0.02).to(parameter)
    return net.eval().requires_grad_(False)


def _hint_channels(unet: Any) -> tuple[int, ...]:
    """Eightfold smaller, or twofold for the small model's VAE."""
    return (16, 32) if unet.config["sample_size"] == UNETS[SMALL]["sample_size"] else (16, 32, 96, 256)


def _embedded(folder: Path, device: str, dtype: torch.dtype) -> tuple[Person, Any]:
    """The embedded InstantID: its file in diffusers' terms, and its ControlNet."""
    from diffusers import ControlNetModel
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    saved = torch.load(folder / "ip-adapter.bin", weights_only=True)
    head = {name: value.to(device, dtype) for name, value in saved["image_proj"].items()}
    hidden, inputs = head["proj_in.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in head if name.startswith("layers."))
    projector: Any = IPAdapterPlusImageProjection(
        embed_dims=inputs,
        output_dims=head["proj_out.weight"].shape[0],
        hidden_dims=hidden,
        depth=depth,
        heads=head["layers.0.0.to_q.weight"].shape[0] // 64,
        num_queries=head["latents"].shape[1],
    )
    renamed: dict[str, Tensor] = {}
    for name, value in head.items():
        if not name.startswith("layers."):
            renamed[name] = value
            continue
        _, layer, part, rest = name.split(".", 3)
        place = f"layers.{layer}"
        if part == "1":
            renamed[f"{place}.ff." + {"0": "0", "1": "1.net.0.proj", "3": "1.net.2"}[rest[0]] + rest[1:]] = value
        elif rest.startswith("norm"):
            renamed[f"{place}.ln{int(rest[4]) - 1}{rest[5:]}"] = value
        elif rest == "to_kv.weight":
            renamed[f"{place}.attn.to_k.weight"], renamed[f"{place}.attn.to_v.weight"] = value.chunk(2)
        else:
            renamed[f"{place}.attn." + rest.replace("to_out.", "to_out.0.")] = value
    projector.load_state_dict(renamed)
    embeds = torch.stack([torch.zeros(1, 1, inputs), draw(5, 1, 1, inputs)]).to(device, dtype)
    weights = {name: value.to(dtype) for name, value in saved["ip_adapter"].items()}
    net = ControlNetModel.from_pretrained(folder / "ControlNetModel").to(device, dtype).eval().requires_grad_(False)
    return Person(weights, projector.to(device, dtype).eval(), embeds), net
