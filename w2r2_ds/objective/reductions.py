"""Reductions over answer tokens: log-probabilities of given tokens, and means per sample."""

from __future__ import annotations

import torch


def token_log_p(log_p: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token per position: ``[positions, vocabulary]`` and ``[positions]`` -> ``[positions]``."""
    return log_p.gather(-1, token[:, None]).squeeze(-1)


def mean_per_sample(values: torch.Tensor, sample: torch.Tensor, batch: int, mask: torch.Tensor) -> torch.Tensor:
    """Mean per sample, ``[batch]``, over the positions in `mask`; 0 for a sample without any.

    Args:
        values: ``[positions]`` floating point.
        sample: ``[positions]`` int64, index of the position's sample.
        batch: number of samples.
        mask: ``[positions]`` bool.
    """
    weight = mask.to(values.dtype)
    total = values.new_zeros(batch).index_add(0, sample, values * weight)
    count = weight.new_zeros(batch).index_add(0, sample, weight)
    return total / count.clamp(min=1)
