r"""A custom push term, in one file outside the package.

    python launchers/train.py --plugin examples/custom_push_term.py --config RECIPE.yaml \
        --objective.push_term.name focal ...

`focal` adds ``lambda * h * (1 - p)^gamma * l`` to the cross-entropy l of a sample: the built-in term `reweight`, with a
lower weight for confident predictions (Lin et al., "Focal loss", ICCV 2017).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from w2r2_ds.objective.push_inputs import PushInputs
from w2r2_ds.objective.push_terms import PushTerm, register_push_term


@register_push_term("focal")
class Focal(PushTerm):
    """lambda * h * (1 - p)^gamma * l, with p the geometric mean of the probabilities of the sample's answer tokens.

    Args:
        gamma: exponent; 0 gives `reweight`.
    """

    gated: ClassVar[bool] = True  # zero unless h > 0; the trainer warns if h stays zero
    gamma: NonNegativeFloat = 2.0

    def __call__(self, inputs: PushInputs) -> Tensor:
        """The term of every sample, ``[batch]``; (1 - p)^gamma is detached, so it only scales the gradient of l."""
        confidence = torch.exp(-inputs.cross_entropy.detach())
        return inputs.lambda_det * inputs.hinge * (1 - confidence) ** self.gamma * inputs.cross_entropy
