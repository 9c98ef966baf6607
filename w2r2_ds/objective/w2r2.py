"""The total: L = sum over samples of weight * (l_align + push), with what a user wants to see beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from w2r2_ds.config import ObjectiveConfig
from w2r2_ds.data.collate import Batch
from w2r2_ds.data.slots import TokenTables
from w2r2_ds.objective.align import log_probs, mean_per_sample
from w2r2_ds.objective.push import PUSH_TERMS, PushInputs
from w2r2_ds.objective.similarity import grounding_similarity

STATS = ("loss", "align", "det", "push", "above_mu", "s_short", "s_fused")
"""Columns of the per-sample statistics."""


@dataclass(frozen=True)
class Shortcut:
    """What is kept of the 2D-only pass, detached.

    Attributes:
        log_p: ``[rows]`` float32 log-likelihood of the label.
        predicted: ``[rows]`` int64 most likely token.
    """

    log_p: torch.Tensor
    predicted: torch.Tensor


def read_shortcut(logits: torch.Tensor, labels: torch.Tensor) -> Shortcut:
    """``[rows, vocabulary]`` logits of the 2D-only pass -> what the objective needs of them."""
    logits = logits.detach()
    return Shortcut(log_probs(logits, labels), logits.argmax(-1))


def sample_weights(batch: Batch, reduction: str) -> torch.Tensor:
    """``[batch]`` float32: 1 per sample, or its number of answer tokens (VG-LLM's mean over tokens)."""
    rows = batch.answer_rows
    ones = torch.ones(len(batch.ids), device=rows.label.device)
    if reduction == "sample":
        return ones
    return torch.zeros_like(ones).index_add(0, rows.sample, torch.ones_like(rows.sample, dtype=ones.dtype))


def w2r2_loss(
    logits: torch.Tensor, shortcut: Shortcut, batch: Batch, config: ObjectiveConfig, tables: TokenTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of one micro-batch.

    Args:
        logits: ``[rows, vocabulary]`` of the fused pass.
        shortcut: of the 2D-only pass.

    Returns:
        The weighted *sum* over samples, to be divided by the global sum of weights, and ``[batch, len(STATS)]``
        float32 detached statistics per sample.
    """
    rows, size = batch.answer_rows, len(batch.ids)
    log_p = log_probs(logits, rows.label)
    align = mean_per_sample(-log_p, rows.sample, size, torch.ones_like(rows.where))
    s_short = grounding_similarity(shortcut.predicted, batch, tables).float()
    s_fused = grounding_similarity(logits.detach().argmax(-1), batch, tables).float()
    hinge = torch.clamp(s_short - config.mu, min=0)
    push = PUSH_TERMS[config.push](
        PushInputs(log_p, shortcut.log_p, rows.sample, rows.where, hinge, config.lam, config.margin)
    )
    loss = align + push
    stats = torch.stack([loss, align, hinge, push, (hinge > 0).float(), s_short, s_fused], dim=-1).detach()
    return (sample_weights(batch, config.reduction) * loss).sum(), stats
