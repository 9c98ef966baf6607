"""The total loss, L = sum over samples of weight * (cross-entropy + push term), and per-sample statistics for logging.

Eq. 7 of the paper (arXiv 2510.17034): L_align is the cross-entropy of the fused pass; a push term replaces
lambda * L_det (Eq. 6), which has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.objective.expected_box import expected_overlap
from w2r2_ds.objective.push_inputs import Overlaps, PushInputs, States
from w2r2_ds.objective.push_terms import PushTerm
from w2r2_ds.objective.reductions import mean_per_sample, token_log_p
from w2r2_ds.objective.scorer import Score, Scorer
from w2r2_ds.types.batch import Batch

STATS = (
    "loss",
    "align",
    "det",
    "push",
    "push_active",
    "unpaired",
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
class PassOutputs:
    """Outputs of one pass of the language model.

    Attributes:
        logits: ``[answer tokens, vocabulary]``.
        states: ``[answer tokens + *what* tokens, hidden]`` last hidden states; None if the push term does not need
            them.
    """

    logits: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class ShortcutOutputs:
    """Results of the shortcut pass (2D only); detached unless the push term differentiates through them.

    Attributes:
        prediction: ``[answer tokens]`` int64, most likely token.
        label_log_p: ``[answer tokens]`` float32, log-likelihood of the label.
        prediction_log_p: ``[answer tokens]`` float32, log-likelihood of the most likely token.
        score: score of the answer from which the hinge is computed (`objective.shortcut_decode`): teacher-forced,
            decoded greedily, or the box at the attention anchor.
        teacher_forced: score of the teacher-forced answer, for comparison with the fused pass.
        log_p: ``[answer tokens, vocabulary]`` float32, if the push term needs the whole distribution.
        states: see `PassOutputs`.
        iou: ``[batch]`` float64, IoU of the expected box, if the push term needs boxes.
    """

    prediction: Tensor
    label_log_p: Tensor
    prediction_log_p: Tensor
    score: Score
    teacher_forced: Score
    log_p: Tensor | None = None
    states: Tensor | None = None
    iou: Tensor | None = None


def score_shortcut(
    outputs: PassOutputs,
    batch: Batch,
    push_term: PushTerm,
    scorer: Scorer,
    answers: list[str] | None = None,
    attention: Tensor | None = None,
) -> ShortcutOutputs:
    """Score the shortcut's answers, and keep those of its outputs that the objective uses.

    Args:
        outputs: outputs of the shortcut pass.
        batch: labels.
        push_term: determines which outputs are kept.
        scorer: similarity of answers to labels.
        answers: greedily decoded answer of every sample; None without decoding.
        attention: ``[batch, visual tokens]`` attention of the *where* tokens in the shortcut pass, if the answer is the
            box at the attention anchor; else None. Without either, the teacher-forced predictions are the answer.
    """
    assert answers is None or attention is None, "one answer"
    logits, states = outputs.logits, outputs.states
    if push_term.stop_gradient:
        logits, states = logits.detach(), None if states is None else states.detach()
    log_p = torch.log_softmax(logits.float(), dim=-1)
    prediction = logits.argmax(-1)
    score = teacher_forced = scorer.teacher_forced(prediction, batch)
    if answers is not None:
        score = scorer.decoded(answers, batch)
    elif attention is not None:
        score = scorer.anchored(attention, prediction, batch)
    # Two numbers per token are enough for most push terms: the distribution, ``[answer tokens, vocabulary]``, is freed
    # unless the term needs it.
    return ShortcutOutputs(
        prediction=prediction,
        label_log_p=token_log_p(log_p, batch.answer_positions.label),
        prediction_log_p=token_log_p(log_p, prediction),
        score=score,
        teacher_forced=teacher_forced,
        log_p=log_p if push_term.needs_distribution else None,
        states=states,
        iou=expected_overlap(log_p, batch, scorer.tables)[0] if push_term.needs_boxes else None,
    )


def w2r2_loss(
    outputs: PassOutputs,
    shortcut: ShortcutOutputs,
    batch: Batch,
    config: ObjectiveConfig,
    push_term: PushTerm,
    scorer: Scorer,
    geometry_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective of one micro-batch.

    Args:
        outputs: outputs of the fused pass.
        shortcut: result of `score_shortcut`.
        batch: labels.
        config: lambda, mu and the reduction.
        push_term: the term that is added to the cross-entropy.
        scorer: similarity of answers to labels.
        geometry_norm: ``[batch]`` column of the statistics, see `training/step.py`; zeros by default.

    Returns:
        The weighted *sum* over samples, to be divided by the global sum of weights; and ``[batch, len(STATS)]`` float32
        statistics per sample, detached.
    """
    positions, size = batch.answer_positions, len(batch.ids)
    log_p = torch.log_softmax(outputs.logits.float(), dim=-1)
    # Cross-entropy per sample, a mean over its answer tokens; then the hinge h of Eq. 6, which has no gradient.
    all_tokens = torch.ones_like(positions.where)
    align = mean_per_sample(-token_log_p(log_p, positions.label), positions.sample, size, all_tokens)
    s_short = shortcut.score.s.float()
    hinge = torch.clamp(s_short - config.mu, min=0)
    has_other = None
    if push_term.needs_other_geometry:
        assert batch.other_geometry is not None, "a training batch has it"
        has_other = batch.other_geometry.exists
    inputs = push_inputs(
        log_p, outputs, shortcut, batch, config, scorer, cross_entropy=align, hinge=hinge, has_other=has_other
    )
    push = push_term(inputs)
    loss = align + push
    fused_score = scorer.teacher_forced(outputs.logits.detach().argmax(-1), batch)
    columns = {
        "loss": loss,
        "align": align,
        "det": hinge,
        "push": push,
        "push_active": push != 0,
        "unpaired": torch.zeros_like(align) if has_other is None else ~has_other,
        "above_mu": hinge > 0,
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
    outputs: PassOutputs,
    shortcut: ShortcutOutputs,
    batch: Batch,
    config: ObjectiveConfig,
    scorer: Scorer,
    *,
    cross_entropy: Tensor,
    hinge: Tensor,
    has_other: Tensor | None,
) -> PushInputs:
    """Inputs of the push term; see `PushInputs` for `log_p`, `cross_entropy`, `hinge` and `has_other`."""
    positions = batch.answer_positions
    overlaps = None
    if shortcut.iou is not None:
        _, giou, has_box = expected_overlap(log_p, batch, scorer.tables)
        overlaps = Overlaps(giou, shortcut.iou, has_box)
    return PushInputs(
        log_p=log_p,
        label=positions.label,
        prediction_short=shortcut.prediction,
        label_log_p_short=shortcut.label_log_p,
        prediction_log_p_short=shortcut.prediction_log_p,
        sample=positions.sample,
        where=positions.where,
        cross_entropy=cross_entropy,
        hinge=hinge,
        lambda_det=config.lambda_det,
        mu=config.mu,
        log_p_short=shortcut.log_p,
        states=pair_states(outputs.states, shortcut.states, batch),
        overlaps=overlaps,
        has_other=has_other,
    )


def pair_states(fused: Tensor | None, short: Tensor | None, batch: Batch) -> States | None:
    """Hidden states of both passes, of the answer tokens and then of the *what* tokens; None if they were not kept."""
    if fused is None or short is None:
        return None
    answer, what = batch.answer_positions, batch.description_positions
    is_what = torch.cat([torch.zeros_like(answer.where), torch.ones_like(what.sample, dtype=torch.bool)])
    is_where = torch.cat([answer.where, torch.zeros_like(what.sample, dtype=torch.bool)])
    return States(fused, short, torch.cat([answer.sample, what.sample]), is_where, is_what)


def sample_weights(batch: Batch, reduction: str) -> Tensor:
    """``[batch]`` float32 weights: 1 with reduction ``sample``, the number of answer tokens with ``token``.

    With ``token`` the cross-entropy is a mean over tokens, as in VG-LLM.
    """
    positions = batch.answer_positions
    ones = torch.ones(len(batch.ids), device=positions.label.device)
    if reduction == "sample":
        return ones
    return torch.zeros_like(ones).index_add(0, positions.sample, torch.ones_like(positions.sample, dtype=ones.dtype))
