"""The readings of Eq. 6, each a small pure function of tensors; `PUSH_TERMS` is the registry.

Eq. 6 as printed, `max(0, s(o_short, y) - mu)`, has no gradient: o_short is detached and an IoU of text is not
differentiable. What the method pushes on is therefore a choice, and every choice has a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from w2r2_ds.objective.align import mean_per_sample


@dataclass(frozen=True)
class PushInputs:
    """What a push term may read.

    Attributes:
        log_p: ``[rows]`` float32, fused log-likelihood of the label (with gradient).
        log_p_short: ``[rows]`` float32, the shortcut's (detached).
        sample: ``[rows]`` int64, the row's sample.
        where: ``[rows]`` bool, digits of frame and box.
        hinge: ``[batch]`` h = max(0, s - mu), detached.
        lam: lambda.
        margin: m, in nats.
    """

    log_p: torch.Tensor
    log_p_short: torch.Tensor
    sample: torch.Tensor
    where: torch.Tensor
    hinge: torch.Tensor
    lam: float
    margin: float


def literal(inputs: PushInputs) -> torch.Tensor:
    """lambda * h, Eq. 6 as printed. Its gradient is zero everywhere. Returns ``[batch]``."""
    return inputs.lam * inputs.hinge


def margin(inputs: PushInputs) -> torch.Tensor:
    """lambda * 1[h > 0] * max(0, m - mean_W(log p(y) - log p_short(y))). Returns ``[batch]``.

    Reads "penalise the shortcut where it succeeds" as: while the 2D-only answer is already good, the fused pass must
    explain the *where* tokens better than the shortcut by m nats. The gradient raises log p(y) of the fused pass on
    where tokens until it does; the shortcut's side is constant. A sample without where tokens contributes 0.
    """
    batch = len(inputs.hinge)
    lead = mean_per_sample(inputs.log_p - inputs.log_p_short, inputs.sample, batch, inputs.where)
    has_where = mean_per_sample(torch.ones_like(lead)[inputs.sample], inputs.sample, batch, inputs.where)
    active = (inputs.hinge > 0).to(lead.dtype)
    return inputs.lam * active * has_where * torch.clamp(inputs.margin - lead, min=0)


def none(inputs: PushInputs) -> torch.Tensor:
    """0: plain fine-tuning, as VG-LLM does. Returns ``[batch]``."""
    return torch.zeros_like(inputs.hinge)


PUSH_TERMS: dict[str, Callable[[PushInputs], torch.Tensor]] = {"literal": literal, "margin": margin, "none": none}
