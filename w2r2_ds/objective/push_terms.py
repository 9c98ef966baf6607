"""The readings of Eq. 6, each a small pure function of tensors; `PUSH_TERMS` is the registry.

Eq. 6 as printed, ``L_det = max(0, s(o_short, y) - mu)``, has no gradient: o_short is detached and an IoU of text is not
differentiable (docs/concepts/objective.md). The push term is therefore a choice among several named ones. A term
is added to the sample's cross-entropy l; it returns ``[batch]`` and is 0 for a sample that it has nothing to say about.

Notation: p and p' the fused and the shortcut's next-token probabilities under teacher forcing (p' is detached), y the
label, y' the shortcut's most likely token, h = max(0, s - mu) (detached), W the *where* rows (digits of frame and box;
every token of a caption or a short answer), A the *what* positions (the description in the prompt), z and z' the last
hidden states. "The paper" is arXiv 2510.17034.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from w2r2_ds.objective.reductions import at, mean_per_sample


@dataclass(frozen=True)
class States:
    """Last hidden states of both passes at the *where* rows and the *what* positions.

    Attributes:
        fused: ``[positions, hidden]``, with gradient.
        short: ``[positions, hidden]``, detached.
        sample: ``[positions]`` int64.
        where: ``[positions]`` bool, the state from which a where token is predicted.
        what: ``[positions]`` bool, the state at a token of the description.
    """

    fused: Tensor
    short: Tensor
    sample: Tensor
    where: Tensor
    what: Tensor


@dataclass(frozen=True)
class Overlaps:
    """Overlap of expected boxes with the label's (`objective/expected_box.py`), ``[batch]`` float64.

    Attributes:
        giou: GIoU of the fused pass's expected box, with gradient.
        iou_short: IoU of the shortcut's expected box; with a graph for `unblocked` only.
        has_box: bool, the sample has a box at all.
    """

    giou: Tensor
    iou_short: Tensor
    has_box: Tensor


@dataclass(frozen=True)
class PushInputs:
    """What a term may read. Rows are answer rows; `states`, `overlaps`, `log_p_short` only where the reading asks.

    Attributes:
        log_p: ``[rows, vocabulary]`` log p, at least float32, with gradient.
        label: ``[rows]`` int64, y.
        guess: ``[rows]`` int64, y'.
        label_short: ``[rows]`` log p'(y).
        guess_short: ``[rows]`` log p'(y').
        sample: ``[rows]`` int64, the row's sample.
        where: ``[rows]`` bool, W.
        cross_entropy: ``[batch]`` l, with gradient.
        hinge: ``[batch]`` h.
        lambda_det: lambda.
        mu: similarity above which the shortcut counts as having solved the sample.
        margin: m of `margin`, nats.
        iou_margin: m of `soft_iou`.
        cosine: c of `representation`.
        log_p_short: ``[rows, vocabulary]`` log p'.
        states: hidden states.
        overlaps: overlaps of expected boxes.
    """

    log_p: Tensor
    label: Tensor
    guess: Tensor
    label_short: Tensor
    guess_short: Tensor
    sample: Tensor
    where: Tensor
    cross_entropy: Tensor
    hinge: Tensor
    lambda_det: float
    mu: float
    margin: float
    iou_margin: float
    cosine: float
    log_p_short: Tensor | None = None
    states: States | None = None
    overlaps: Overlaps | None = None

    @property
    def active(self) -> Tensor:
        """``[batch]`` 1[h > 0], in the dtype of the hinge."""
        return (self.hinge > 0).to(self.hinge.dtype)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[rows]`` values -> ``[batch]`` mean over each sample's rows in `mask`, 0 where it has none."""
        return mean_per_sample(values, self.sample, len(self.hinge), mask)

    def has(self, mask: Tensor) -> Tensor:
        """``[batch]`` 1 where a sample has a row in `mask`, else 0."""
        return self.mean(torch.ones_like(mask, dtype=self.hinge.dtype), mask)


def none(inputs: PushInputs) -> Tensor:
    """0.

    Plain fine-tuning, as VG-LLM does it (arXiv 2505.24625): the total is L_align.
    """
    return torch.zeros_like(inputs.hinge)


def literal(inputs: PushInputs) -> Tensor:
    """lambda * h.

    Reads Eq. 6 as printed. Its gradient is zero everywhere, so it trains as `none` does; it is there to be logged and
    to prove the point.
    """
    return inputs.lambda_det * inputs.hinge


def reweight(inputs: PushInputs) -> Tensor:
    """lambda * h * l.

    Reads Eq. 7's "L_align + lambda L_det" as a per-sample weight: what the shortcut solves is learned *more* strongly
    with geometry. The gradient is that of l times lambda * h; nothing flows through h.
    """
    return inputs.lambda_det * inputs.hinge * inputs.cross_entropy


def downweight(inputs: PushInputs) -> Tensor:
    """-min(1, lambda * h) * l.

    The opposite sign of `reweight`, as in debiasing by sample weights (Clark et al., EMNLP 2019, "bias reweighting"):
    what 2D alone solves teaches nothing about geometry and counts less, at the least not at all. The gradient is that
    of l times -min(1, lambda * h).
    """
    return -torch.clamp(inputs.lambda_det * inputs.hinge, max=1) * inputs.cross_entropy


def margin(inputs: PushInputs) -> Tensor:
    """lambda * 1[h > 0] * max(0, m - mean_W(log p(y) - log p'(y))).

    Reads the abstract's "penalizes overly effective 2D-dominant pseudo-outputs via a margin-based mechanism" as: while
    the 2D-only answer is already good, the fused pass must explain the where tokens better than it by m nats. The
    gradient raises log p(y) on W until it does, and is zero from there on. A sample without where tokens contributes 0.
    """
    lead = inputs.mean(at(inputs.log_p, inputs.label) - inputs.label_short, inputs.where)
    return inputs.lambda_det * inputs.active * inputs.has(inputs.where) * torch.clamp(inputs.margin - lead, min=0)


def pseudo_label(inputs: PushInputs) -> Tensor:
    """-lambda * mean over D of p'(y') * log(1 - p(y')), with D the rows of W where y' differs from y.

    Reads the abstract's "Pseudo-Label Loss that penalizes overly effective 2D-dominant pseudo-outputs": the shortcut's
    own tokens, where they are wrong, are negative labels for the fused pass, as sure as the shortcut is of them
    (unlikelihood, Welleck et al., ICLR 2020). The gradient takes probability from y' and gives it to all other tokens.
    y' is read under teacher forcing also where s is decoded greedily: p(y') is only defined after the label's prefix.
    """
    differs = inputs.where & (inputs.guess != inputs.label)
    # log(1 - p(y')) as the sum over all others: exact, and finite where p(y') rounds to 1.
    others = inputs.log_p.scatter(-1, inputs.guess[:, None], -torch.inf).logsumexp(-1)
    return -inputs.lambda_det * inputs.mean(inputs.guess_short.exp() * others, differs)


def soft_iou(inputs: PushInputs) -> Tensor:
    """lambda * 1[h > 0] * max(0, min(1, IoU(b') + m) - GIoU(E_p[b])).

    Reads Eq. 6's s = IoU3D with both sides made comparable: the fused pass's expected box must overlap the label's
    better than the shortcut's expected box b' (same estimator, detached) by m. GIoU on the side with gradient, since
    IoU has none where boxes are apart. The gradient moves digit probabilities of the fused pass towards the box.
    """
    overlaps = inputs.overlaps
    assert overlaps is not None, "asked for by the registry"
    wanted = torch.clamp(overlaps.iou_short + inputs.iou_margin, max=1)
    lack = torch.where(overlaps.has_box, torch.clamp(wanted - overlaps.giou, min=0), 0.0)
    return inputs.lambda_det * inputs.active * lack.to(inputs.hinge.dtype)


def representation(inputs: PushInputs) -> Tensor:
    """lambda * 1[h > 0] * (mean_A(1 - cos(z, z')) + mean_W max(0, cos(z, z') - c)).

    Reads "reshapes the model's internal space by designating 2D features as semantic beacons for What identification
    and 3D features as spatial anchors for Where localization": at *what* positions the fused states stay close to the
    2D-only ones, at *where* positions they move away from them until the cosine is c. z' is detached. It separates
    states, it does not by itself make the where answer right.
    """
    states = inputs.states
    assert states is not None, "asked for by the registry"
    cosine = cosine_similarity(states.fused.to(inputs.log_p.dtype), states.short.to(inputs.log_p.dtype), dim=-1)
    batch = len(inputs.hinge)
    close = mean_per_sample(1 - cosine, states.sample, batch, states.what)
    apart = mean_per_sample(torch.clamp(cosine - inputs.cosine, min=0), states.sample, batch, states.where)
    return inputs.lambda_det * inputs.active * (close + apart)


def poe(inputs: PushInputs) -> Tensor:
    """lambda * mean_W of -log softmax(log p + log p')[y].

    Product of experts, the classic debiasing loss (Hinton 2002; Clark et al., EMNLP 2019; Mahabadi et al., ACL 2020):
    the fused pass is trained to be right *together with* the frozen shortcut, so it learns what the shortcut lacks. The
    gradient on a row is that of cross-entropy with the product's probabilities: it vanishes where the shortcut alone is
    sure and right. Not gated by h.
    """
    assert inputs.log_p_short is not None, "asked for by the registry"
    product = torch.log_softmax(inputs.log_p + inputs.log_p_short, dim=-1)
    return inputs.lambda_det * inputs.mean(-at(product, inputs.label), inputs.where)


def unblocked(inputs: PushInputs) -> Tensor:
    """lambda * max(0, IoU(E_short[b]) - mu), with the graph of the shortcut kept.

    Eq. 6 without its stop-gradient and with a differentiable s: the degenerate case, kept as an ablation. The gradient
    makes the 2D-only answer *worse* through weights that the fused pass shares, which the paper's stop-gradient is
    there to prevent. Costs the memory of a second graph.
    """
    overlaps = inputs.overlaps
    assert overlaps is not None, "asked for by the registry"
    excess = torch.clamp(overlaps.iou_short - inputs.mu, min=0)
    return inputs.lambda_det * torch.where(overlaps.has_box, excess, 0.0).to(inputs.hinge.dtype)


@dataclass(frozen=True)
class PushTerm:
    """A term and what it needs beyond the label's likelihoods.

    Attributes:
        term: the pure function.
        gated: whether it needs h > 0 to do anything.
        distribution: the shortcut's whole distribution.
        states: hidden states of both passes.
        boxes: expected boxes, hence a tokenizer that splits digits.
        blocked: whether the shortcut's gradient is stopped, as the paper has it.
    """

    term: Callable[[PushInputs], Tensor]
    gated: bool = False
    distribution: bool = False
    states: bool = False
    boxes: bool = False
    blocked: bool = True


PUSH_TERMS: dict[str, PushTerm] = {
    "none": PushTerm(none),
    "literal": PushTerm(literal, gated=True),
    "reweight": PushTerm(reweight, gated=True),
    "downweight": PushTerm(downweight, gated=True),
    "margin": PushTerm(margin, gated=True),
    "pseudo_label": PushTerm(pseudo_label),
    "soft_iou": PushTerm(soft_iou, gated=True, boxes=True),
    "representation": PushTerm(representation, gated=True, states=True),
    "poe": PushTerm(poe, distribution=True),
    "unblocked": PushTerm(unblocked, boxes=True, blocked=False),
}


def find_push_term(name: str) -> PushTerm:
    """The reading of `objective.push`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PUSH_TERMS:
        raise ValueError(f"objective.push is {name!r}; it must be one of {', '.join(PUSH_TERMS)}.")
    return PUSH_TERMS[name]
