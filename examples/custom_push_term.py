r"""A custom push term, in one file outside the package.

    python launchers/train.py --plugin examples/custom_push_term.py --config RECIPE.yaml \
        --objective.push_term.name focal ...

`focal` adds ``lambda * h * (1 - p)^gamma * l``: like the built-in term `reweight`, but confident samples count less.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from w2r2_ds.objective.push_terms import PushInputs, PushTerm, register_push_term


@register_push_term("focal")
class Focal(PushTerm):
    """lambda * h * (1 - p)^gamma * l, with p the geometric mean probability of the sample's answer tokens.

    Args:
        gamma: exponent; 0 is `reweight`.
    """

    gated: ClassVar[bool] = True  # zero unless h > 0; the trainer warns if h stays zero
    gamma: NonNegativeFloat = 2.0

    def __call__(self, inputs: PushInputs) -> Tensor:
        """``[batch]``. The factor is detached: it weighs the gradient of l and has none of its own."""
        confidence = torch.exp(-inputs.cross_entropy.detach())
        return inputs.lambda_det * inputs.det * (1 - confidence) ** self.gamma * inputs.cross_entropy
