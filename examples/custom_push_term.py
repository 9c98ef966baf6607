"""A push term of your own, in one file outside the package.

    python launchers/train.py --plugin examples/custom_push_term.py --objective.push_term.name focal ...

`focal` adds ``lambda * h * (1 - p)^2 * l``: like the built-in term `reweight`, but confident samples count less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.objective.push_terms import PUSH_TERMS, PushInputs, PushTerm


def focal(inputs: PushInputs) -> Tensor:
    """``[batch]``: zero where the shortcut's similarity is below mu, because h is zero there.

    `cross_entropy` is l, the mean over a sample's answer tokens, so ``exp(-l)`` is their geometric mean probability.
    The factor is detached: it weighs the gradient of l and has none of its own.
    """
    confidence = torch.exp(-inputs.cross_entropy.detach())
    return inputs.lambda_det * inputs.hinge * (1 - confidence) ** 2 * inputs.cross_entropy


# `gated` declares that the term is zero unless h > 0; the trainer warns if h stays zero.
PUSH_TERMS["focal"] = PushTerm(focal, gated=True)
