"""Where a model's parts live, in which precision, and how little memory they may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from facegen.errors import PackageMissing, WrongRequest

Offload = Literal["none", "model", "sequential"]


@dataclass(frozen=True)
class MemoryPlan:
    """device and dtype of the work; what waits outside the device.

    offload: "none": all parts stay on the device; "model": a part is on the device only while it works; "sequential":
    layer by layer (slow, least memory; needs accelerate).
    tiling: decode and encode pictures in tiles (large pictures); slicing: one picture of a batch after the other.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    offload: Offload = "none"
    tiling: bool = False
    slicing: bool = False

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        offload: Offload = "none",
        tiling: bool = False,
        slicing: bool = False,
    ) -> MemoryPlan:
        """Fill in what is not given: the GPU where there is one, half precision on CUDA, float32 elsewhere."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise WrongRequest(f"There is no device {device!r}; use 'cpu', 'cuda', 'cuda:0' or 'mps'.") from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise WrongRequest("No CUDA device is usable here; use device='cpu'.")
        if offload not in ("none", "model", "sequential"):
            raise WrongRequest(f"offload must be 'none', 'model' or 'sequential', not {offload!r}.")
        if dtype is None:
            dtype = torch.float16 if place.type == "cuda" else torch.float32
        return cls(place, dtype, offload, tiling, slicing)

    @property
    def waiting(self) -> torch.device:
        """Where idle parts stay."""
        return self.device if self.offload == "none" else torch.device("cpu")

    def place(self, module: nn.Module) -> None:
        """Bring a freshly loaded part to where it waits."""
        if self.offload == "sequential" and self.device.type != "cpu":
            try:
                from accelerate import cpu_offload
            except ImportError as error:
                raise PackageMissing("offload='sequential' needs the package accelerate.") from error
            cpu_offload(module, execution_device=self.device)
            return
        module.to(self.waiting)

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """The parts are on the device inside the `with`, and wait again afterwards."""
        moving = self.offload == "model" and self.device != self.waiting
        try:
            if moving:
                for module in modules:
                    module.to(self.device)
            yield
        finally:
            if moving:
                for module in modules:
                    module.to(self.waiting)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
