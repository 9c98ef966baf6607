"""Learning-rate schedule of the stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def warm_up_and_decay(step: int, steps: int, warm_up: int, decay: float) -> float:
    """Factor on the learning rates: linear from 0 over `warm_up` steps, 1, and linear to 0 over the share `decay`.

    Args:
        step: number of the step, from 0.
        steps: number of steps.
        warm_up: steps of the warm-up.
        decay: share of the steps at the end.
    """
    return min(1.0, (step + 1) / warm_up) * min(1.0, (1 - step / steps) / decay)


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[float], factor: float) -> None:
    """Set each optimizer's learning rate to its peak times `factor`."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = factor * rate
