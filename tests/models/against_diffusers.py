"""Runs of facegen and of diffusers' own pipelines on the same weights, for the parity tests.

Each task has two functions with the same inputs: `*_diffusers` runs the pipeline, `*_ours` the one loop. Both give
final latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor

from facegen.attention.weights import KV, LayerLora, LowRank
from facegen.conditions import (
    ChannelsCondition,
    Condition,
    ControlCondition,
    KeepCondition,
    TextCondition,
    TokenCondition,
    pair,
)
from facegen.denoise import Guidance, denoise
from facegen.models.base import Model
from facegen.schedulers import SCHEDULERS, build, start

PROMPT, NEGATIVE = "a photo of a woman", "blurry, text"
STEPS, SCALE, SIZE = 5, 6.0, 64
PREFIX = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}


def draw(seed: int, *shape: int) -> Tensor:
    """Unit-variance numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1) from a seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights everywhere: ControlNets and LoRAs begin with zeros, which would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 / fan**0.5)


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison: which model, which scheduler, how many pictures."""

    folder: Path
    family: str
    scheduler: str
    pictures: int = 1

    @property
    def noise(self) -> Tensor:
        """Starting noise, (B, 4, 8, 8)."""
        return draw(1, self.pictures, 4, SIZE // 8, SIZE // 8)

    @property
    def prompts(self) -> list[str]:
        """One prompt for each picture."""
        return [PROMPT] * self.pictures

    def pipeline(self, suffix: str = "Pipeline", *, fresh: bool = False, **parts: Any) -> Any:
        """diffusers' pipeline class with its components, and the case's scheduler; fresh: weights of its own."""
        kind = getattr(diffusers, PREFIX[self.family] + suffix)
        extra = {} if self.family == "sdxl" else {"requires_safety_checker": False}
        read = components.__wrapped__ if fresh else components
        pipe = kind(**read(self.folder, self.family), **parts, **extra)
        name, changes = SCHEDULERS[self.scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self) -> dict[str, Any]:
        """What every pipeline is called with."""
        return {
            "prompt": self.prompts,
            "negative_prompt": [NEGATIVE] * self.pictures,
            "num_inference_steps": STEPS,
            "guidance_scale": SCALE,
            "output_type": "latent",
        }

    def model(self) -> Model:
        """Our model of the folder."""
        return load(self.folder)

    def text(self, model: Model | None = None) -> TextCondition:
        """The prompt as our model encodes it."""
        return (model or self.model()).encode_text(self.prompts, [NEGATIVE] * self.pictures)

    def run(
        self,
        conditions: Sequence[Condition],
        *,
        noise: Tensor | None = None,
        model: Model | None = None,
        generator: Any = None,
        options: Options | None = None,
    ) -> Tensor:
        """Our loop."""
        model = model or self.model()
        options = options or Options()
        scheduler = build(self.scheduler, model.scheduler_config, STEPS, strength=options.strength)
        begin = start(scheduler, self.noise if noise is None else noise, options.photo)
        return denoise(model, begin, scheduler, conditions, Guidance(SCALE, options.rescale), generator)


@dataclass(frozen=True, eq=False)
class Options:
    """Where a run begins, and how guidance is rescaled."""

    strength: float = 1.0
    photo: Tensor | None = None
    rescale: float = 0.0
    names: tuple[str, ...] = field(default=())


@cache
def components(folder: Path, family: str) -> dict[str, Any]:
    """The folder's parts as diffusers loads them."""
    extra = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    return getattr(diffusers, PREFIX[family] + "Pipeline").from_pretrained(folder, **extra).components


@cache
def load(folder: Path) -> Model:
    """A model in float32 on the CPU."""
    return Model.from_pretrained(folder, dtype=torch.float32, device="cpu")


@cache
def controlnet(folder: Path, seed: int = 5) -> ControlNetModel:
    """A ControlNet for the folder's UNet with random weights everywhere."""
    net = ControlNetModel.from_unet(load(folder).unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    fill(net, seed)
    return net.eval().requires_grad_(False)


# --- tasks ----------------------------------------------------------------------------------------------------------


def text_diffusers(case: Case, rescale: float = 0.0, generator: Any = None) -> Tensor:
    """Text to image."""
    pipe = case.pipeline()
    return pipe(**case.arguments(), latents=case.noise, guidance_rescale=rescale, generator=generator).images


def text_ours(case: Case, rescale: float = 0.0, generator: Any = None) -> Tensor:
    """Text to image."""
    return case.run([case.text()], options=Options(rescale=rescale), generator=generator)


def control_diffusers(case: Case) -> Tensor:
    """A ControlNet that acts in the middle of the run."""
    pipe = case.pipeline("ControlNetPipeline", controlnet=controlnet(case.folder))
    return pipe(
        **case.arguments(),
        latents=case.noise,
        image=uniform(2, case.pictures, 3, SIZE, SIZE),
        controlnet_conditioning_scale=0.7,
        control_guidance_start=0.2,
        control_guidance_end=0.8,
    ).images


def control_ours(case: Case) -> Tensor:
    """A ControlNet that acts in the middle of the run."""
    image = uniform(2, case.pictures, 3, SIZE, SIZE)
    net = controlnet(case.folder)
    return case.run([case.text(), ControlCondition(controlnet=net, image=image, scale=0.7, span=(0.2, 0.8))])


def two_controls_diffusers(case: Case) -> Tensor:
    """Two ControlNets with different spans."""
    pipe = case.pipeline("ControlNetPipeline", controlnet=[controlnet(case.folder), controlnet(case.folder, 6)])
    return pipe(
        **case.arguments(),
        latents=case.noise,
        image=[uniform(2, case.pictures, 3, SIZE, SIZE), uniform(3, case.pictures, 3, SIZE, SIZE)],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.6, 1.0],
    ).images


def two_controls_ours(case: Case) -> Tensor:
    """Two ControlNets with different spans."""
    shape = (case.pictures, 3, SIZE, SIZE)
    first = ControlCondition(controlnet=controlnet(case.folder), image=uniform(2, *shape), scale=0.7, span=(0.0, 0.6))
    other = ControlCondition(
        controlnet=controlnet(case.folder, 6), image=uniform(3, *shape), scale=0.4, span=(0.4, 1.0)
    )
    return case.run([case.text(), first, other])


def _photo_and_mask(case: Case) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(case.pictures, 1, SIZE, SIZE)
    mask[..., 16:48, 24:56] = 1
    return uniform(4, case.pictures, 3, SIZE, SIZE), mask


def inpaint_diffusers(case: Case, strength: float = 1.0) -> Tensor:
    """Inpainting with a UNet of 4 channels, or 9."""
    pipe = case.pipeline("InpaintPipeline")
    photo, mask = _photo_and_mask(case)
    generator = torch.Generator().manual_seed(9)
    return pipe(
        **case.arguments(),
        image=photo,
        mask_image=mask,
        height=SIZE,
        width=SIZE,
        strength=strength,
        generator=generator,
    ).images


def inpaint_ours(case: Case, strength: float = 1.0) -> Tensor:
    """Inpainting with a UNet of 4 channels, or 9."""
    model = case.model()
    photo, mask = _photo_and_mask(case)
    small = torch.nn.functional.interpolate(mask, size=(SIZE // 8, SIZE // 8))
    generator = torch.Generator().manual_seed(9)
    conditions: list[Condition] = [case.text()]
    latents = None
    # diffusers draws in this order from its one generator: the photo's latents where it needs them, the noise, the
    # masked photo's.
    if model.extra_channels == 0 or strength < 1.0:
        latents = model.encode_image(photo, generator)
    noise = torch.randn(case.noise.shape, generator=generator)
    if model.extra_channels:
        # diffusers blanks the photo after scaling it to [-1, 1], so the hole is mid-grey.
        hole = model.encode_image(torch.where(mask < 0.5, photo, 0.5), generator)
        extra = torch.cat([small, hole], dim=1)
        conditions.append(ChannelsCondition(channels=pair(extra, extra)))
    else:
        assert latents is not None
        conditions.append(KeepCondition(latents=latents, mask=mask, noise=noise))
    options = Options(strength=strength, photo=latents if strength < 1.0 else None)
    return case.run(conditions, noise=noise, options=options)


def image_diffusers(case: Case) -> Tensor:
    """Image to image."""
    pipe = case.pipeline("Img2ImgPipeline")
    generator = torch.Generator().manual_seed(9)
    arguments = case.arguments()
    photo = _photo_and_mask(case)[0]
    return pipe(**arguments, image=photo, strength=0.65, generator=generator).images


def image_ours(case: Case) -> Tensor:
    """Image to image."""
    generator = torch.Generator().manual_seed(9)
    latents = case.model().encode_image(_photo_and_mask(case)[0], generator)
    noise = torch.randn(case.noise.shape, generator=generator)
    return case.run([case.text()], noise=noise, options=Options(strength=0.65, photo=latents))


# --- adapters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """Random IP-Adapter weights in the official key format, and the face vectors they are shown."""

    state: dict[str, dict[str, Tensor]]
    embeds: Tensor  # (2, 1, D): [zeros, face]
    lora: bool


def ip_adapter(model: Model, seed: int, *, lora: bool) -> IPAdapter:
    """A plain IP-Adapter, or (lora) one of the FaceID kind with low-rank weights on every layer."""
    width, face, generator = model.text_width, 24, torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state: dict[str, Tensor] = {}
    for layer in model.attention_layers:
        if lora:
            for part in ("q", "k", "v", "out"):
                into = width if layer.cross and part in "kv" else layer.width
                state[f"{layer.index}.to_{part}_lora.down.weight"] = weight(4, into)
                state[f"{layer.index}.to_{part}_lora.up.weight"] = weight(layer.width, 4) * 0.3
        if layer.cross:
            state[f"{layer.index}.to_k_ip.weight"] = weight(layer.width, width)
            state[f"{layer.index}.to_v_ip.weight"] = weight(layer.width, width)
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    if lora:
        head = {
            "proj.0.weight": weight(2 * face, face),
            "proj.0.bias": weight(2 * face),
            "proj.2.weight": weight(4 * width, 2 * face),
            "proj.2.bias": weight(4 * width),
        }
    else:
        head = {"proj.weight": weight(4 * width, face), "proj.bias": weight(4 * width)}
    embeds = torch.stack([torch.zeros(1, face), torch.randn(1, face, generator=generator)])
    return IPAdapter({"image_proj": {**head, **norm}, "ip_adapter": state}, embeds, lora)


def tokens(adapter: IPAdapter, width: int, pictures: int) -> Tensor:
    """The adapter's tokens as a Pair (2, B, 4, width), projected on all rows at once as diffusers does."""
    embeds = adapter.embeds.expand(2, pictures, -1).flatten(0, 1)  # (2·B, D)
    head = adapter.state["image_proj"]
    linear = torch.nn.functional.linear
    if adapter.lora:
        hidden = torch.nn.functional.gelu(linear(embeds, head["proj.0.weight"], head["proj.0.bias"]))
        flat = linear(hidden, head["proj.2.weight"], head["proj.2.bias"])
    else:
        flat = linear(embeds, head["proj.weight"], head["proj.bias"])
    rows = flat.reshape(2 * pictures, 4, width)
    normed = torch.nn.functional.layer_norm(rows, (width,), head["norm.weight"], head["norm.bias"])
    return normed.unflatten(0, (2, pictures))


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def token_condition(adapter: IPAdapter, model: Model, pictures: int = 1, **more: Any) -> TokenCondition:
    """The adapter as a stream of tokens."""
    state = adapter.state["ip_adapter"]
    layers, loras = {}, {}
    for layer in model.attention_layers:
        if layer.cross:
            kv = KV(1, 1)
            kv.to_k = _linear(state[f"{layer.index}.to_k_ip.weight"])
            kv.to_v = _linear(state[f"{layer.index}.to_v_ip.weight"])
            layers[layer.index] = kv
        if adapter.lora:
            parts = {}
            for part in ("q", "k", "v", "out"):
                parts[part] = LowRank(1, 1, 1)
                parts[part].down = _linear(state[f"{layer.index}.to_{part}_lora.down.weight"])
                parts[part].up = _linear(state[f"{layer.index}.to_{part}_lora.up.weight"])
            loras[layer.index] = LayerLora(**parts)
    pair_of_tokens = tokens(adapter, model.text_width, pictures)
    return TokenCondition(tokens=pair_of_tokens, layers=layers, lora=loras or None, **more)


def face_masks() -> list[Tensor]:
    """Left and right part of the picture, (1, H, W) each."""
    left, right = torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE)
    left[..., :30], right[..., 34:] = 1, 1
    return [left, right]


def ip_diffusers(case: Case, adapters: Sequence[IPAdapter], masks: Sequence[Tensor] | None = None) -> Tensor:
    """IP-Adapters, with region masks or without."""
    pipe = case.pipeline(fresh=True)  # load_ip_adapter changes the UNet
    count = len(adapters)
    pipe.load_ip_adapter(
        [adapter.state for adapter in adapters],
        subfolder=[""] * count,
        weight_name=[""] * count,
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale([0.6] * count)
    # diffusers wants (2 halves, images, …) and repeats it for each picture itself.
    embeds = [adapter.embeds for adapter in adapters]
    more = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": [m[None] for m in masks]}}
    return pipe(**case.arguments(), latents=case.noise, ip_adapter_image_embeds=embeds, **more).images


def ip_ours(case: Case, adapters: Sequence[IPAdapter], masks: Sequence[Tensor] | None = None) -> Tensor:
    """IP-Adapters, with region masks or without."""
    model = case.model()
    regions = masks or [None] * len(adapters)
    streams = [
        token_condition(a, model, case.pictures, scale=0.6, mask=m) for a, m in zip(adapters, regions, strict=True)
    ]
    return case.run([case.text(), *streams])
