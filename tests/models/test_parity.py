"""facegen's one loop against diffusers' own pipelines: same weights, same noise, final latents compared.

Tiny real components (two-level UNets, 64 px, float32, CPU), 5 steps, guidance 6. Measured with torch 2.13, diffusers
0.42.1:

| task | models | schedulers | max abs difference |
|---|---|---|---|
| text to image | SD 1.x, SDXL | DDIM, Euler, DPM++ 2M; also Euler a, LCM, UniPC, DPM++ SDE, with one generator | 0.0 |
| text to image, two pictures | both | DDIM, Euler, DPM++ 2M | 0.0 |
| text to image, guidance rescaled by 0.5 | both | DDIM, Euler, DPM++ 2M | 0.0 |
| ControlNet, span 0.2 to 0.8, one picture and two | both | DDIM, Euler, DPM++ 2M | 0.0 |
| two ControlNets with different spans | both | DDIM, Euler, DPM++ 2M | 0.0 |
| inpainting, UNet of 4 channels, strength 1 and 0.7 | both | DDIM, Euler, DPM++ 2M | 0.0 |
| inpainting, UNet of 9 channels, strength 1 | both | DDIM, Euler, DPM++ 2M | 0.0 |
| image to image, strength 0.65 | both | DDIM, Euler, DPM++ 2M | 0.0 |
| IP-Adapter, one picture and two | both | DDIM, Euler, DPM++ 2M | 0.0 |
| IP-Adapter with LoRA on every layer (FaceID) | both | DDIM, Euler, DPM++ 2M | 0.0 |
| two IP-Adapters, with region masks or without (one batched attention call) | both | DDIM, Euler, DPM++ 2M | 0.0 |

All of it is the same arithmetic in the same order on the same shapes, so the limit is zero. What it took: keys,
values and control hints are computed once per run, but on all rows of the call (one picture's rows alone give other
bits: a CPU matrix product or convolution blocks its sums by shape, 1e-6 relative).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from against_diffusers import (
    Case,
    control_diffusers,
    control_ours,
    face_masks,
    image_diffusers,
    image_ours,
    inpaint_diffusers,
    inpaint_ours,
    ip_adapter,
    ip_diffusers,
    ip_ours,
    text_diffusers,
    text_ours,
    two_controls_diffusers,
    two_controls_ours,
)
from torch import Tensor

FAMILIES = ("sd15", "sdxl")
MAIN = ("ddim", "euler", "dpm++")
Run = Callable[[Case], Tensor]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_scheduler = pytest.mark.parametrize("scheduler", MAIN)


def same(ours: Tensor, theirs: Tensor) -> None:
    """Not one bit differs, and something was made."""
    assert theirs.isfinite().all()
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max().item() == 0.0


@every_family
@every_scheduler
@pytest.mark.parametrize("pictures", [1, 2])
def test_text_to_image(folders: dict[str, Path], family: str, scheduler: str, pictures: int) -> None:
    case = Case(folders[family], family, scheduler, pictures)
    same(text_ours(case), text_diffusers(case))


@every_family
@pytest.mark.parametrize("scheduler", ["euler_a", "lcm", "unipc", "dpm++ sde", "dpm++ karras", "heun"])
def test_other_schedulers_and_their_noise(folders: dict[str, Path], family: str, scheduler: str) -> None:
    case = Case(folders[family], family, scheduler, 2)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    same(text_ours(case, generator=generators()), text_diffusers(case, generator=generators()))


@every_family
@every_scheduler
def test_rescaled_guidance(folders: dict[str, Path], family: str, scheduler: str) -> None:
    case = Case(folders[family], family, scheduler)
    same(text_ours(case, rescale=0.5), text_diffusers(case, rescale=0.5))


@every_family
@every_scheduler
@pytest.mark.parametrize("pictures", [1, 2])
def test_controlnet_with_a_span(folders: dict[str, Path], family: str, scheduler: str, pictures: int) -> None:
    case = Case(folders[family], family, scheduler, pictures)
    same(control_ours(case), control_diffusers(case))


@every_family
@every_scheduler
def test_two_controlnets(folders: dict[str, Path], family: str, scheduler: str) -> None:
    case = Case(folders[family], family, scheduler)
    same(two_controls_ours(case), two_controls_diffusers(case))


@every_family
@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_with_a_plain_unet(folders: dict[str, Path], family: str, scheduler: str, strength: float) -> None:
    case = Case(folders[family], family, scheduler)
    same(inpaint_ours(case, strength), inpaint_diffusers(case, strength))


@every_family
@every_scheduler
def test_inpainting_with_an_inpainting_unet(inpainting: dict[str, Path], family: str, scheduler: str) -> None:
    case = Case(inpainting[family], family, scheduler)
    same(inpaint_ours(case), inpaint_diffusers(case))


@every_family
@every_scheduler
def test_image_to_image(folders: dict[str, Path], family: str, scheduler: str) -> None:
    case = Case(folders[family], family, scheduler)
    same(image_ours(case), image_diffusers(case))


@every_family
@every_scheduler
@pytest.mark.parametrize("lora", [False, True], ids=["ip_adapter", "faceid"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_ip_adapter(folders: dict[str, Path], family: str, scheduler: str, lora: bool, pictures: int) -> None:
    case = Case(folders[family], family, scheduler, pictures)
    adapter = ip_adapter(case.model(), 1, lora=lora)
    same(ip_ours(case, [adapter]), ip_diffusers(case, [adapter]))


@every_family
@every_scheduler
@pytest.mark.parametrize("masked", [False, True])
def test_two_ip_adapters(folders: dict[str, Path], family: str, scheduler: str, masked: bool) -> None:
    case = Case(folders[family], family, scheduler)
    adapters = [ip_adapter(case.model(), seed, lora=False) for seed in (1, 2)]
    masks = face_masks() if masked else None
    same(ip_ours(case, adapters, masks), ip_diffusers(case, adapters, masks))
