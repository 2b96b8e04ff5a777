"""Schedulers by name: diffusers' own, built fresh for each call from the model's scheduler configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from facegen.errors import WrongRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# name → (diffusers class, what differs from the model's own configuration)
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++ karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    # As distilled models (Lightning, Hyper-SD) were made: the first step begins at pure noise.
    "euler trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
}
OWN = "model"
"""The name that means: the scheduler the model was published with."""

NAMES = (OWN, *SCHEDULERS)


def build(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    *,
    strength: float = 1.0,
    device: torch.device | str = "cpu",
) -> Any:
    """A scheduler set to `steps` steps.

    name: one of NAMES; config: `Model.scheduler_config`; strength in (0, 1]: the last part of the run only, as
    image-to-image needs it (diffusers' rule: int(steps · strength) steps). Raises WrongRequest.
    """
    import diffusers

    if name not in NAMES:
        raise WrongRequest(f"There is no scheduler {name!r}; choose one of: {', '.join(NAMES)}.")
    if steps < 1:
        raise WrongRequest(f"The number of steps must be at least 1, not {steps}.")
    if not 0.0 < strength <= 1.0:
        raise WrongRequest(f"strength must lie in (0, 1], not {strength}.")
    own = str(config.get("_class_name", "DDIMScheduler"))
    kind, changes = (own, {}) if name == OWN else SCHEDULERS[name]
    scheduler_class = getattr(diffusers, kind, None)
    if scheduler_class is None:
        raise WrongRequest(f"diffusers has no scheduler {kind!r}; choose one of: {', '.join(NAMES)}.")
    scheduler = scheduler_class.from_config(dict(config), **changes)
    # LCM and TCD distil a fixed grid of teacher steps; more steps than that grid cannot be taken.
    most = getattr(scheduler.config, "original_inference_steps", None)
    if most is not None and steps > most:
        raise WrongRequest(f"The scheduler {name!r} takes at most {most} steps, not {steps}.")
    scheduler.set_timesteps(steps, device=device)
    if strength < 1.0:
        begin = max(steps - min(int(steps * strength), steps), 0)
        if begin >= steps:
            raise WrongRequest(f"strength {strength} of {steps} steps leaves no step; raise one of them.")
        order = scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * order)
        else:
            scheduler.timesteps = scheduler.timesteps[begin * order :]
    return scheduler


def begin_index(scheduler: Any) -> int:
    """Where in `scheduler.timesteps` the run begins (not 0 for image-to-image)."""
    return getattr(scheduler, "begin_index", None) or 0


def walk(scheduler: Any) -> Tensor:
    """The timesteps of the run, in order."""
    return scheduler.timesteps[begin_index(scheduler) :]


def start(scheduler: Any, noise: Tensor, photo: Tensor | None = None) -> Tensor:
    """Latents to begin with: unit-variance `noise` (B, 4, h, w) at the first timestep's level, over the photo's
    latents if given.
    """
    if photo is None:
        return noise * scheduler.init_noise_sigma
    first = walk(scheduler)[:1]
    return scheduler.add_noise(photo.to(noise), noise, first.repeat(noise.shape[0]))


def levels(scheduler: Any, index: int, timestep: Tensor) -> tuple[float, float, float]:
    """(signal a, noise s, stretch c) at step `index` of the run: latents·c = a·x0 + s·ε with a² + s² = 1.

    c is 1 for schedulers whose latents have constant variance (DDIM, DPM++, …) and a for those that let it grow
    (Euler, Heun, LMS).
    """
    if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "final_alpha_cumprod"):
        sigma = float(scheduler.sigmas[begin_index(scheduler) + index])
        signal = (1.0 + sigma * sigma) ** -0.5
        constant = hasattr(scheduler, "_sigma_to_alpha_sigma_t")
        return signal, sigma * signal, 1.0 if constant else signal
    kept = float(scheduler.alphas_cumprod[int(timestep)])
    return kept**0.5, (1.0 - kept) ** 0.5, 1.0


def to_clean(scheduler: Any, output: Tensor, latents: Tensor, level: tuple[float, float, float]) -> Tensor:
    """The clean latents x0 that a model output at these latents stands for."""
    a, s, c = level
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    x = latents * c
    return a * x - s * output if kind == "v_prediction" else (x - s * output) / a


def from_clean(scheduler: Any, clean: Tensor, latents: Tensor, level: tuple[float, float, float]) -> Tensor:
    """The model output that stands for the clean latents x0: the inverse of `to_clean`."""
    a, s, c = level
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return clean
    x = latents * c
    return (a * x - clean) / s if kind == "v_prediction" else (x - a * clean) / s
