"""Reductions over answer positions: log-probabilities of tokens and means per sample."""

from __future__ import annotations

import torch


def at(log_p: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``[rows, vocabulary]`` log-probabilities and ``[rows]`` tokens -> ``[rows]`` log-probability of each token."""
    return log_p.gather(-1, token[:, None]).squeeze(-1)


def mean_per_sample(values: torch.Tensor, sample: torch.Tensor, batch: int, mask: torch.Tensor) -> torch.Tensor:
    """Mean per sample, ``[batch]``, over the positions in `mask`; 0 for a sample without any.

    Args:
        values: ``[positions]`` floating point.
        sample: ``[positions]`` int64, the sample of every position.
        batch: number of samples.
        mask: ``[positions]`` bool.
    """
    weight = mask.to(values.dtype)
    total = values.new_zeros(batch).index_add(0, sample, values * weight)
    count = weight.new_zeros(batch).index_add(0, sample, weight)
    return total / count.clamp(min=1)
