"""The denoising objective of mini: predict the velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class VelocityObjective:
    """v-prediction (Salimans & Ho 2022, appendix D), every noise level with the same weight.

    The min-SNR weight (Hang et al. 2023) goes to zero where there is nearly only noise, and there prompt and face
    decide most: with it neither was learnt in 1,400 steps.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        kept = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
        self.cumulative: Tensor = DDPMScheduler.from_config(kept).alphas_cumprod  # (T,)

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the picture and of the noise there is, (B, 1, 1, 1) each."""
        cumulative = self.cumulative.to(like)[timesteps].view(-1, 1, 1, 1)
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C, h, w) at timesteps (B,)."""
        picture, rest = self.levels(timesteps, latents)
        return picture * latents + rest * noise

    def errors(self, found: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The squared error of each place, mean over the channels, (B, h, w)."""
        picture, rest = self.levels(timesteps, latents)
        return (found.float() - (picture * noise - rest * latents)).square().mean(1)

    def clean(self, found: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that a velocity implies, (B, C, h, w), and how much of the picture there was to see, (B,)."""
        picture, rest = self.levels(timesteps, noisy)
        return picture * noisy - rest * found.float(), picture.flatten()
