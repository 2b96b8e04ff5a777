"""A ControlNet's residuals, with the embedding of its hint picture computed once for a whole run.

diffusers' `ControlNetModel.forward` embeds the hint anew in every step; `residuals` is that forward from the hint's
embedding on, on the model's own modules. Source: diffusers 0.42.1, models/controlnets/controlnet.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.attention.processor import AttentionContext, AttentionLayer, install
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongBaseModel
from facegen.models import compiled, quick

if TYPE_CHECKING:
    from diffusers import ControlNetModel

_GAIN = 1.7  # what SiLU takes away from the deviation of its input


def awaken(embedding: nn.Module, generator: torch.Generator) -> None:
    """Weights from which on a control picture is still to be seen after eight convolutions, in place.

    With PyTorch's own, embeddings of different drawings differ by 1e-5, about a thousandth of what they have in common:
    nothing was learnt in 700 steps. The last layer need not be zero, for the zero convolutions come after it.
    """
    for part in embedding.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=_GAIN * part.weight[0].numel() ** -0.5, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check(controlnet: nn.Module) -> None:
    """Refuse what is not a plain ControlNetModel (union and multi nets, T2I adapters); raises WrongAdapter."""
    wanted = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block", "time_embedding")
    if (
        not all(hasattr(controlnet, name) for name in wanted)
        or getattr(controlnet, "class_embedding", None) is not None
    ):
        raise WrongAdapter(
            f"{type(controlnet).__name__} is not a plain ControlNet; pass a diffusers ControlNetModel,"
            " one ControlCondition for each."
        )


def controlnets(module: nn.Module) -> list[nn.Module]:
    """The ControlNets inside a module."""
    return [part for part in module.modules() if hasattr(part, "controlnet_cond_embedding")]


def hint(controlnet: Any, image: Tensor) -> Tensor:
    """The hint picture (B, 3, H, W) in [0, 1] → its embedding (B, C, H/8, W/8)."""
    if controlnet.config.controlnet_conditioning_channel_order == "bgr":
        image = image.flip(1)
    return controlnet.controlnet_cond_embedding(image)


_installed: WeakKeyDictionary[nn.Module, tuple[AttentionLayer, ...]] = WeakKeyDictionary()


def layers(controlnet: Any) -> tuple[AttentionLayer, ...]:
    """The net's attention layers; the first call sets our processor on them, which without a context is diffusers'."""
    if controlnet not in _installed:
        _installed[controlnet] = install(controlnet)
    return _installed[controlnet]


def residuals(
    controlnet: Any,
    sample: Tensor,
    timestep: Tensor,
    prompt: tuple[Tensor, AttentionContext],
    hint_embedding: Tensor,
    added: Mapping[str, Tensor],
    *,
    guidance: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """(residuals of the down blocks, residual of the mid block), unscaled.

    sample (R, 4, h, w), timestep () or (R,), prompt: tokens (R, L, D) and what acts at the attention layers,
    hint_embedding (R, C, h, w), added: SDXL's text_embeds and time_ids, guidance: whether the rows are two halves.
    """
    embeds, context = prompt
    route = quick.fits(controlnet, sample, context)
    steps = timestep.to(sample.device).reshape(-1)
    if route is None:
        steps = steps.expand(len(sample))  # to the last bit as diffusers does it
    emb = _embedding(controlnet, sample, steps, embeds, added)
    if route is not None:
        found, x = quick.control(route, sample, quick.look(sample, emb, embeds, context, guidance), hint_embedding)
    else:
        found, x = compiled.form(controlnet, walk)(controlnet, sample, emb, prompt, hint_embedding)
    down = [layer(state) for state, layer in zip(found, controlnet.controlnet_down_blocks, strict=True)]
    mid = controlnet.controlnet_mid_block(x)
    if controlnet.config.global_pool_conditions:
        down = [state.mean(dim=(2, 3), keepdim=True) for state in down]
        mid = mid.mean(dim=(2, 3), keepdim=True)
    return down, mid


def _embedding(controlnet: Any, sample: Tensor, steps: Tensor, context: Tensor, added: Mapping[str, Tensor]) -> Tensor:
    """(1 or R, E) for timesteps (1,) or (R,); R where more than the step tells the rows apart."""
    config = controlnet.config
    # The projection has no weights and is always float32; the embedding after it may run in half precision.
    emb = controlnet.time_embedding(controlnet.time_proj(steps).to(sample.dtype))
    if config.addition_embed_type == "text":
        emb = emb + controlnet.add_embedding(context)
    elif config.addition_embed_type == "text_time":
        pooled = added["text_embeds"]
        sizes = controlnet.add_time_proj(added["time_ids"].flatten()).reshape(pooled.shape[0], -1)
        emb = emb + controlnet.add_embedding(torch.cat([pooled, sizes], dim=-1).to(emb.dtype))
    return emb


def walk(
    controlnet: Any, sample: Tensor, emb: Tensor, prompt: tuple[Tensor, AttentionContext], hint_embedding: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """diffusers' forward from the hint's embedding on: the skips' states and the middle's."""
    more = {"encoder_hidden_states": prompt[0], "cross_attention_kwargs": {"context": prompt[1]}}
    x = controlnet.conv_in(sample) + hint_embedding
    found: tuple[Tensor, ...] = (x,)
    for block in controlnet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            x, states = block(hidden_states=x, temb=emb, **more)
        else:
            x, states = block(hidden_states=x, temb=emb)
        found += states
    if controlnet.mid_block is not None:
        seen = more if getattr(controlnet.mid_block, "has_cross_attention", False) else {}
        x = controlnet.mid_block(x, emb, **seen)
    return found, x


def load_controlnet(folder: Path, unet: Any) -> ControlNetModel:
    """A ControlNet in diffusers' folder format, for a UNet of this architecture.

    Raises WeightsMissing, CheckpointBroken, WrongBaseModel.
    """
    from diffusers import ControlNetModel

    config = folder / "config.json"
    files = [path for path in sorted(folder.glob("*")) if path.suffix in checkpoints.SUFFIXES]
    if not config.is_file() or not files:
        raise WeightsMissing(f"{folder} lacks config.json or diffusion_pytorch_model.safetensors; fetch it again.")
    try:
        controlnet = ControlNetModel.from_config(ControlNetModel.load_config(str(config)))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointBroken(f"{config} is damaged ({error}); fetch the file again.") from error
    for key in ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type"):
        here, there = _plain(controlnet.config[key]), _plain(unet.config[key])
        if here != there:
            raise WrongBaseModel(
                f"{folder} was made for a base model with {key} {here}, the loaded one has {there}; load the base"
                " model it was made for."
            )
    checkpoints.load_into(controlnet, checkpoints.read(files[0]), path=files[0])
    return cast("ControlNetModel", controlnet)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
