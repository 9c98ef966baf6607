"""Muon, an optimizer of matrices: momentum, orthogonalised by a Newton-Schulz iteration.

K. Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024),
https://kellerjordan.github.io/posts/muon. torch.optim.Muon computes in bfloat16, which is slow on many CPUs; this one
computes in float32, and matrices of one shape together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration ``X <- a X + b (X X') X + c (X X')^2 X``, from the source above."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices ``[..., rows, columns]`` with the same singular vectors, and singular values between about 0.7 and 1.2.

    Args:
        matrices: float32.
        steps: iterations.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # The smaller Gram matrix is cheaper.
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Steps of ``lr * sqrt(max(1, rows / columns))`` along the orthogonalised Nesterov momentum.

    Args:
        params: matrices.
        lr: learning rate; the RMS of a step of a square matrix is ``lr / sqrt(columns)``.
        momentum: decay of the momentum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        assert closure is None, "not supported"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack([self._momentum(each, group["momentum"]) for each in parameters])
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, orthogonalise(momenta), strict=True):
                    parameter.add_(direction, alpha=-size)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """Nesterov momentum after this step's gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - decay)
        return parameter.grad.lerp(state["momentum"], decay)
