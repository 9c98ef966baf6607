"""Inputs of push terms: tensors of both passes. The notation is that of `push_terms.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.objective.reductions import mean_per_sample


@dataclass(frozen=True)
class States:
    """Last hidden states of both passes: those that predict the answer tokens, then those at *what* tokens.

    The first part is of all answer tokens; the mask `where` selects from it.

    Attributes:
        fused: ``[positions, hidden]``, with gradient.
        short: ``[positions, hidden]``, detached unless the term sets `stop_gradient` to False.
        sample: ``[positions]`` int64, index of the position's sample.
        where: ``[positions]`` bool, the state predicts a *where* token.
        what: ``[positions]`` bool, the state is at a *what* token.
    """

    fused: Tensor
    short: Tensor
    sample: Tensor
    where: Tensor
    what: Tensor


@dataclass(frozen=True)
class Overlaps:
    """Overlap of expected boxes with the label's box (`objective/expected_box.py`).

    Attributes:
        giou: ``[batch]`` float64, GIoU of the fused pass's expected box, with gradient.
        iou_short: ``[batch]`` float64, IoU of the shortcut's expected box; detached unless the term sets
            `stop_gradient` to False.
        has_box: ``[batch]`` bool, the sample has a box.
    """

    giou: Tensor
    iou_short: Tensor
    has_box: Tensor


@dataclass(frozen=True)
class PushInputs:
    """Inputs of a push term; `states`, `overlaps`, `log_p_short` and `has_other` only if the term requires them.

    ``answer tokens`` are those of all samples of the batch, one sample after another.

    Attributes:
        log_p: ``[answer tokens, vocabulary]`` log p, at least float32, with gradient.
        label: ``[answer tokens]`` int64, y.
        prediction_short: ``[answer tokens]`` int64, y'.
        label_log_p_short: ``[answer tokens]`` log p'(y).
        prediction_log_p_short: ``[answer tokens]`` log p'(y').
        sample: ``[answer tokens]`` int64, index of the token's sample.
        where: ``[answer tokens]`` bool, the token is in W.
        cross_entropy: ``[batch]`` l, with gradient.
        hinge: ``[batch]`` h, the hinge of Eq. 6.
        lambda_det: lambda.
        mu: similarity above which the shortcut counts as having solved the sample.
        log_p_short: ``[answer tokens, vocabulary]`` log p'.
        states: hidden states of both passes.
        overlaps: overlaps of expected boxes.
        has_other: ``[batch]`` bool, the shortcut pass has the geometry of another scene.
    """

    log_p: Tensor
    label: Tensor
    prediction_short: Tensor
    label_log_p_short: Tensor
    prediction_log_p_short: Tensor
    sample: Tensor
    where: Tensor
    cross_entropy: Tensor
    hinge: Tensor
    lambda_det: float
    mu: float
    log_p_short: Tensor | None = None
    states: States | None = None
    overlaps: Overlaps | None = None
    has_other: Tensor | None = None

    @property
    def active(self) -> Tensor:
        """``[batch]`` 1[h > 0], in the dtype of h."""
        return (self.hinge > 0).to(self.hinge.dtype)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[answer tokens]`` values -> ``[batch]`` mean over a sample's tokens in `mask`; 0 if it has none."""
        return mean_per_sample(values, self.sample, len(self.hinge), mask)

    def has(self, mask: Tensor) -> Tensor:
        """``[batch]`` 1 if a sample has a token in `mask`, else 0."""
        return self.mean(torch.ones_like(mask, dtype=self.hinge.dtype), mask)
