"""The total loss, L = sum over samples of weight * (l_align + push term), and per-sample statistics for logging.

Eq. 7 of the paper (arXiv 2510.17034): L_align is the cross-entropy of the fused pass, and the push term stands for
lambda * L_det (Eq. 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.objective.expected_box import expected_overlap
from w2r2_ds.objective.push_terms import Overlaps, PushInputs, PushTerm, States
from w2r2_ds.objective.reductions import at, mean_per_sample
from w2r2_ds.objective.scorer import Score, Scorer
from w2r2_ds.types.batch import Batch

STATS = (
    "loss",
    "align",
    "det",
    "push",
    "above_mu",
    "s_short",
    "s_fused",
    "s_gain",
    "invalid_short",
    "invalid_fused",
    "geometry_norm",
)
"""Columns of the per-sample statistics (explained in docs/concepts/objective.md)."""

LOSS_PARTS = ("loss", "align", "push")
"""Columns that `objective.reduction` weights; the others are means over samples."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of one pass.

    Attributes:
        logits: ``[answer tokens, vocabulary]``.
        states: ``[answer tokens + *what* positions, hidden]`` last hidden states; None if the push term does
            not use them.
    """

    logits: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class Shortcut:
    """Outputs of the shortcut pass (2D only); detached unless the push term differentiates through them.

    Attributes:
        guess: ``[answer tokens]`` int64 most likely token.
        label_log_p: ``[answer tokens]`` float32 log-likelihood of the label.
        guess_log_p: ``[answer tokens]`` float32 log-likelihood of the most likely token.
        score: score of the shortcut's decoded answer if decoded answers are given, else of the teacher-forced one.
        teacher_forced: score of its teacher-forced answer, to compare with the fused pass.
        log_p: ``[answer tokens, vocabulary]`` float32, if the push term needs the whole distribution.
        states: as in `Outputs`.
        iou: ``[batch]`` float64 IoU of the expected box, if the push term needs boxes.
    """

    guess: Tensor
    label_log_p: Tensor
    guess_log_p: Tensor
    score: Score
    teacher_forced: Score
    log_p: Tensor | None = None
    states: Tensor | None = None
    iou: Tensor | None = None


def read_shortcut(
    outputs: Outputs, batch: Batch, push_term: PushTerm, scorer: Scorer, answers: list[str] | None = None
) -> Shortcut:
    """Keep the outputs of the shortcut pass that the objective uses.

    Args:
        outputs: outputs of the shortcut pass.
        answers: greedily decoded answers per sample; None to use the teacher-forced predictions.
    """
    logits, states = outputs.logits, outputs.states
    if push_term.blocked:
        logits, states = logits.detach(), None if states is None else states.detach()
    log_p = torch.log_softmax(logits.float(), dim=-1)
    guess = logits.argmax(-1)
    teacher_forced = scorer.teacher(guess, batch)
    return Shortcut(
        guess=guess,
        label_log_p=at(log_p, batch.answer_positions.label),
        guess_log_p=at(log_p, guess),
        score=teacher_forced if answers is None else scorer.decoded(answers, batch),
        teacher_forced=teacher_forced,
        log_p=log_p if push_term.distribution else None,
        states=states,
        iou=expected_overlap(log_p, batch, scorer.tables)[0] if push_term.boxes else None,
    )


def w2r2_loss(
    outputs: Outputs,
    shortcut: Shortcut,
    batch: Batch,
    config: ObjectiveConfig,
    push_term: PushTerm,
    scorer: Scorer,
    geometry_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective of one micro-batch.

    Args:
        outputs: outputs of the fused pass.
        shortcut: result of `read_shortcut`.
        geometry_norm: ``[batch]`` for the statistics, see `W2R2Step`.

    Returns:
        The weighted *sum* over samples, to be divided by the global sum of weights, and ``[batch, len(STATS)]``
        float32 detached statistics per sample.
    """
    rows, size = batch.answer_positions, len(batch.ids)
    log_p = torch.log_softmax(outputs.logits.float(), dim=-1)
    align = mean_per_sample(-at(log_p, rows.label), rows.sample, size, torch.ones_like(rows.where))
    fused_score = scorer.teacher(outputs.logits.detach().argmax(-1), batch)
    s_short = shortcut.score.s.float()
    det = torch.clamp(s_short - config.mu, min=0)
    push = push_term(push_inputs(log_p, outputs, align, det, shortcut, batch, config, scorer))
    loss = align + push
    columns = {
        "loss": loss,
        "align": align,
        "det": det,
        "push": push,
        "above_mu": det > 0,
        "s_short": s_short,
        "s_fused": fused_score.s,
        "s_gain": fused_score.s - shortcut.teacher_forced.s,
        "invalid_short": ~shortcut.score.valid,
        "invalid_fused": ~fused_score.valid,
        "geometry_norm": torch.zeros_like(align) if geometry_norm is None else geometry_norm,
    }
    stats = torch.stack([columns[name].detach().float() for name in STATS], dim=-1)
    return (sample_weights(batch, config.reduction) * loss).sum(), stats


def push_inputs(
    log_p: Tensor,
    outputs: Outputs,
    align: Tensor,
    det: Tensor,
    shortcut: Shortcut,
    batch: Batch,
    config: ObjectiveConfig,
    scorer: Scorer,
) -> PushInputs:
    """Inputs of the configured push term."""
    rows = batch.answer_positions
    overlaps = None
    if shortcut.iou is not None:
        _, giou, has_box = expected_overlap(log_p, batch, scorer.tables)
        overlaps = Overlaps(giou, shortcut.iou, has_box)
    return PushInputs(
        log_p=log_p,
        label=rows.label,
        guess=shortcut.guess,
        label_log_p_short=shortcut.label_log_p,
        guess_log_p_short=shortcut.guess_log_p,
        sample=rows.sample,
        where=rows.where,
        cross_entropy=align,
        det=det,
        lambda_det=config.lambda_det,
        mu=config.mu,
        log_p_short=shortcut.log_p,
        states=pair_states(outputs.states, shortcut.states, batch),
        overlaps=overlaps,
    )


def pair_states(fused: Tensor | None, short: Tensor | None, batch: Batch) -> States | None:
    """Hidden states of both passes at the answer tokens, then at the *what* positions; None if they were not kept."""
    if fused is None or short is None:
        return None
    rows, what = batch.answer_positions, batch.description_positions
    is_what = torch.cat([torch.zeros_like(rows.where), torch.ones_like(what.sample, dtype=torch.bool)])
    where = torch.cat([rows.where, torch.zeros_like(what.sample, dtype=torch.bool)])
    return States(fused, short, torch.cat([rows.sample, what.sample]), where, is_what)


def sample_weights(batch: Batch, reduction: str) -> Tensor:
    """``[batch]`` float32: 1 per sample, or its number of answer tokens (VG-LLM's mean over tokens)."""
    rows = batch.answer_positions
    ones = torch.ones(len(batch.ids), device=rows.label.device)
    if reduction == "sample":
        return ones
    return torch.zeros_like(ones).index_add(0, rows.sample, torch.ones_like(rows.sample, dtype=ones.dtype))
