"""AdamW that moves chosen matrices by Muon: along the orthogonal matrix nearest to their momentum.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the polynomials of the iteration are
those of Amsel et al. 2025, "The Polar Express"; the step is as long as AdamW's, after Liu et al. 2025, "Muon is
scalable for LLM training". PyTorch's own takes no convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_POLYNOMIALS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_LENGTH = 0.2  # root mean square of an ordinary AdamW step, in learning rates


def orthogonalised(gradient: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition of (rows, everything else), about; float32, the gradient's shape."""
    x = gradient.reshape(len(gradient), -1).bfloat16()
    upright = x.shape[0] > x.shape[1]
    x = x.mT if upright else x
    x = x / (1.01 * x.norm() + 1e-7)
    for a, b, c in _POLYNOMIALS:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if upright else x).reshape(gradient.shape).float()


class MuonAdamW(torch.optim.AdamW):
    """AdamW; groups with ``muon=True`` hold weights of two or more dimensions and take Muon's steps instead."""

    def __init__(self, params: Any, *, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure.")
        for group in self.param_groups:
            if group["muon"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._turn(weight, weight.grad, group)
                        weight.grad = None  # nothing left for AdamW
        return super().step()

    def _turn(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
            state["step"] = torch.tensor(0.0)  # AdamW looks for it when it is loaded
        state["average"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalised(gradient.lerp(state["average"], group["momentum"]))  # Nesterov
        longest = max(len(weight), weight[0].numel())
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * _LENGTH * longest**0.5)


def muon_groups(module: torch.nn.Module, outer: tuple[str, ...]) -> list[dict[str, Any]]:
    """A net's parameter groups: Muon moves its matrices and kernels, but for those whose names begin as in ``outer``.

    These, first layers and heads, AdamW moves; biases and gains too, without decay.
    """
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    return [
        {"params": [w for n, w in trained.items() if w.ndim > 1 and not n.startswith(outer)], "muon": True},
        {"params": [w for n, w in trained.items() if w.ndim > 1 and n.startswith(outer)]},
        {"params": [w for w in trained.values() if w.ndim <= 1], "weight_decay": 0.0},
    ]
