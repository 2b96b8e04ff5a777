"""The denoising objective of mini: predict the velocity, each noise level weighed by what it can teach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class VelocityObjective:
    """v-prediction (Salimans & Ho 2022, appendix D) with the min-SNR weight (Hang et al. 2023, gamma 5)."""

    def __init__(self, scheduler_config: Mapping[str, Any], gamma: float = 5.0) -> None:
        from diffusers import DDPMScheduler

        kept = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
        self.cumulative: Tensor = DDPMScheduler.from_config(kept).alphas_cumprod  # (T,)
        ratio = self.cumulative / (1 - self.cumulative)
        self.weight = ratio.clamp(max=gamma) / (ratio + 1)  # (T,)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the picture and of the noise there is, (B, 1, 1, 1) each."""
        cumulative = self.cumulative.to(like)[timesteps].view(-1, 1, 1, 1)
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C, h, w) at timesteps (B,)."""
        picture, rest = self._levels(timesteps, latents)
        return picture * latents + rest * noise

    def loss(self, found: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss, and the plain mean squared error to look at."""
        picture, rest = self._levels(timesteps, latents)
        error = (found.float() - (picture * noise - rest * latents)).square().mean((1, 2, 3))  # (B,)
        return (self.weight.to(error)[timesteps] * error).mean(), error.mean().detach()
