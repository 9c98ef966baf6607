"""Push terms: differentiable interpretations of Eq. 6, each a small pure function of tensors.

Eq. 6 as printed, ``L_det = max(0, s(o_short, y) - mu)``, has no gradient: o_short is detached and an IoU of text is not
differentiable (docs/concepts/objective.md). `objective.push_term` therefore selects one of several terms. A term is
added to the sample's cross-entropy l; it returns ``[batch]`` and is 0 for a sample to which it does not apply.

To write another one, subclass `PushTerm`, declare hyper-parameters as fields and the inputs it needs as class
attributes, compute the ``[batch]`` term from `PushInputs` in `__call__`, and register the class:

    @register_push_term("focal")
    class Focal(PushTerm):
        gamma: NonNegativeFloat = 1.0

        def __call__(self, inputs: PushInputs) -> Tensor:
            ...

`examples/custom_push_term.py` is complete; docs/guides/add-a-push-term.md shows how to load and test it.

Notation: p and p' the fused and the shortcut's next-token probabilities under teacher forcing (p' is detached), y the
label, y' the shortcut's most likely token, h = max(0, s - mu) (detached), W the *where* rows (digits of frame and box;
every token of a caption or a short answer), A the *what* positions (the description in the prompt), z and z' the last
hidden states. The paper is arXiv 2510.17034.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from w2r2_ds.objective.reductions import at, mean_per_sample
from w2r2_ds.utils.registry import Registry


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class PushInputs:
    """Inputs of a push term; `states`, `overlaps` and `log_p_short` only if the term requests them.

    Rows are answer positions.

    Attributes:
        log_p: ``[rows, vocabulary]`` log p, at least float32, with gradient.
        label: ``[rows]`` int64, y.
        guess: ``[rows]`` int64, y'.
        label_log_p_short: ``[rows]`` log p'(y).
        guess_log_p_short: ``[rows]`` log p'(y').
        sample: ``[rows]`` int64, the row's sample.
        where: ``[rows]`` bool, W.
        cross_entropy: ``[batch]`` l, with gradient.
        det: ``[batch]`` h, the hinge of Eq. 6.
        lambda_det: lambda.
        mu: similarity above which the shortcut counts as having solved the sample.
        log_p_short: ``[rows, vocabulary]`` log p'.
        states: hidden states.
        overlaps: overlaps of expected boxes.
    """

    log_p: Tensor
    label: Tensor
    guess: Tensor
    label_log_p_short: Tensor
    guess_log_p_short: Tensor
    sample: Tensor
    where: Tensor
    cross_entropy: Tensor
    det: Tensor
    lambda_det: float
    mu: float
    log_p_short: Tensor | None = None
    states: States | None = None
    overlaps: Overlaps | None = None

    @property
    def active(self) -> Tensor:
        """``[batch]`` 1[h > 0], in the dtype of the hinge."""
        return (self.det > 0).to(self.det.dtype)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[rows]`` values -> ``[batch]`` mean over each sample's rows in `mask`, 0 where it has none."""
        return mean_per_sample(values, self.sample, len(self.det), mask)

    def has(self, mask: Tensor) -> Tensor:
        """``[batch]`` 1 where a sample has a row in `mask`, else 0."""
        return self.mean(torch.ones_like(mask, dtype=self.det.dtype), mask)


class PushTerm(BaseModel):
    """A push term: hyper-parameters are its fields, requirements are class attributes.

    Subclass it (a pydantic model), implement `__call__`, and register it with `register_push_term`.

    Attributes:
        gated: only acts where h > 0.
        distribution: needs the shortcut's whole next-token distribution, `PushInputs.log_p_short`.
        states: needs the hidden states of both passes, `PushInputs.states`.
        boxes: needs expected boxes, `PushInputs.overlaps`, hence a tokenizer that splits digits.
        blocked: the shortcut's gradient is stopped, as in the paper.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gated: ClassVar[bool] = False
    distribution: ClassVar[bool] = False
    states: ClassVar[bool] = False
    boxes: ClassVar[bool] = False
    blocked: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        """The term per sample, ``[batch]``, which is added to the cross-entropy."""
        raise TypeError(f"{type(self).__name__} must implement __call__")


PUSH_TERMS: Registry[type[PushTerm]] = Registry("objective.push_term")


def register_push_term(name: str) -> Callable[[type[PushTerm]], type[PushTerm]]:
    """Class decorator that registers a push term under a name; raises ValueError if another term has it."""
    return partial(PUSH_TERMS.register, name)


def build_push_term(options: Mapping[str, Any]) -> PushTerm:
    """The push term of `objective.push_term`.

    Args:
        options: its name and hyper-parameters, such as `{"name": "margin", "margin": 1.0}`.

    Raises:
        ValueError: the name is not registered, or a hyper-parameter is unknown or out of range.
    """
    name, values = options["name"], {key: value for key, value in options.items() if key != "name"}
    term = PUSH_TERMS.find(name)
    try:
        return term(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"objective.push_term.{field} of {name}: {first['msg']}, got {first['input']!r}.") from None


@register_push_term("none")
class NoPush(PushTerm):
    """0.

    Plain fine-tuning, as VG-LLM does it (arXiv 2505.24625): the total is L_align.
    """

    def __call__(self, inputs: PushInputs) -> Tensor:
        return torch.zeros_like(inputs.det)


@register_push_term("literal")
class Literal(PushTerm):
    """lambda * h.

    Eq. 6 as printed. Its gradient is zero everywhere, so training equals that with `none`; a baseline that shows so.
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return inputs.lambda_det * inputs.det


@register_push_term("reweight")
class Reweight(PushTerm):
    """lambda * h * l.

    Interprets Eq. 7, "L_align + lambda L_det", as a per-sample weight: samples that the shortcut solves are learned
    *more* strongly with geometry. The gradient is that of l times lambda * h; nothing flows through h.
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return inputs.lambda_det * inputs.det * inputs.cross_entropy


@register_push_term("downweight")
class Downweight(PushTerm):
    """-min(1, lambda * h) * l.

    The opposite sign of `reweight`, as in debiasing by sample weights (Clark et al., EMNLP 2019, "bias reweighting"):
    a sample that the shortcut solves needs no geometry and has a lower weight, down to 0. The gradient is that
    of l times -min(1, lambda * h).
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return -torch.clamp(inputs.lambda_det * inputs.det, max=1) * inputs.cross_entropy


@register_push_term("margin")
class Margin(PushTerm):
    """lambda * 1[h > 0] * max(0, m - mean_W(log p(y) - log p'(y))).

    Interprets the abstract, "penalizes overly effective 2D-dominant pseudo-outputs via a margin-based mechanism": while
    the shortcut's answer is good, the log-likelihood of the fused pass on the where tokens must exceed that of the
    shortcut by m nats. The gradient raises log p(y) on W up to that margin and is zero beyond it. A sample without
    where tokens contributes 0.

    Args:
        margin: log-likelihood in nats by which the fused pass must exceed the shortcut on where tokens (m).
    """

    margin: NonNegativeFloat = 1.0
    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        # Mean over W of the log-likelihood ratio, [batch], in nats.
        lead = inputs.mean(at(inputs.log_p, inputs.label) - inputs.label_log_p_short, inputs.where)
        return inputs.lambda_det * inputs.active * inputs.has(inputs.where) * torch.clamp(self.margin - lead, min=0)


@register_push_term("pseudo_label")
class PseudoLabel(PushTerm):
    """-lambda * mean over D of p'(y') * log(1 - p(y')), with D the rows of W where y' differs from y.

    Interprets the abstract, "Pseudo-Label Loss that penalizes overly effective 2D-dominant pseudo-outputs": wrong
    tokens of the shortcut are negative labels for the fused pass, weighted by the shortcut's confidence (unlikelihood,
    Welleck et al., ICLR 2020). The gradient moves probability from y' to all other tokens. y' is predicted under
    teacher forcing also where s is decoded greedily: p(y') is only defined after the label's prefix.
    """

    def __call__(self, inputs: PushInputs) -> Tensor:
        differs = inputs.where & (inputs.guess != inputs.label)
        # log(1 - p(y')) as the sum over all others: exact, and finite where p(y') rounds to 1.
        others = inputs.log_p.scatter(-1, inputs.guess[:, None], -torch.inf).logsumexp(-1)
        return -inputs.lambda_det * inputs.mean(inputs.guess_log_p_short.exp() * others, differs)


@register_push_term("soft_iou")
class SoftIoU(PushTerm):
    """lambda * 1[h > 0] * max(0, min(1, IoU(b') + m) - GIoU(E_p[b])).

    Eq. 6 with s = IoU3D of expected boxes: the overlap of the fused pass's expected box with the label must exceed that
    of the shortcut's expected box b' (same estimator, detached) by m. The fused side is a GIoU, since an IoU has no
    gradient for disjoint boxes. The gradient moves digit probabilities of the fused pass towards the box.

    Args:
        iou_margin: IoU by which the fused pass's expected box must exceed the shortcut's (m).
    """

    iou_margin: NonNegativeFloat = 0.1
    gated: ClassVar[bool] = True
    boxes: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        overlaps = inputs.overlaps
        assert overlaps is not None, "requested by the class attributes"
        # No box can overlap by more than 1, so the target is capped: without the cap the term could never reach 0.
        wanted = torch.clamp(overlaps.iou_short + self.iou_margin, max=1)
        lack = torch.where(overlaps.has_box, torch.clamp(wanted - overlaps.giou, min=0), 0.0)
        return inputs.lambda_det * inputs.active * lack.to(inputs.det.dtype)


@register_push_term("representation")
class Representation(PushTerm):
    """lambda * 1[h > 0] * (mean_A(1 - cos(z, z')) + mean_W max(0, cos(z, z') - c)).

    Interprets "reshapes the model's internal space by designating 2D features as semantic beacons for What
    identification and 3D features as spatial anchors for Where localization": at *what* positions the fused states stay
    close to the shortcut's, at *where* positions they move away until the cosine is c. z' is detached. The term
    separates states; it does not make the where answer correct.

    Args:
        cosine: cosine of fused and shortcut states below which where tokens are far enough apart (c).
    """

    cosine: Annotated[float, Field(ge=-1, le=1)] = 0.5
    gated: ClassVar[bool] = True
    states: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        states = inputs.states
        assert states is not None, "requested by the class attributes"
        cosine = cosine_similarity(states.fused.to(inputs.log_p.dtype), states.short.to(inputs.log_p.dtype), dim=-1)
        batch = len(inputs.det)
        close = mean_per_sample(1 - cosine, states.sample, batch, states.what)
        apart = mean_per_sample(torch.clamp(cosine - self.cosine, min=0), states.sample, batch, states.where)
        return inputs.lambda_det * inputs.active * (close + apart)


@register_push_term("poe")
class ProductOfExperts(PushTerm):
    """lambda * mean_W of -log softmax(log p + log p')[y].

    Product of experts, the classic debiasing loss (Hinton 2002; Clark et al., EMNLP 2019; Mahabadi et al., ACL 2020):
    the product of fused and frozen shortcut distribution is trained, so the fused pass learns what the shortcut lacks.
    The gradient at a position is that of cross-entropy with the product's probabilities: it vanishes where the shortcut
    is confident and correct. Not gated by h.
    """

    distribution: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        assert inputs.log_p_short is not None, "requested by the class attributes"
        product = torch.log_softmax(inputs.log_p + inputs.log_p_short, dim=-1)
        return inputs.lambda_det * inputs.mean(-at(product, inputs.label), inputs.where)


@register_push_term("unblocked")
class Unblocked(PushTerm):
    """lambda * max(0, IoU(E_short[b]) - mu), with the graph of the shortcut kept.

    Eq. 6 without its stop-gradient and with a differentiable s: the degenerate case, kept as an ablation. The gradient
    makes the shortcut's answer *worse* through weights that the fused pass shares, which the paper's stop-gradient is
    there to prevent. Costs the memory of a second graph.
    """

    boxes: ClassVar[bool] = True
    blocked: ClassVar[bool] = False

    def __call__(self, inputs: PushInputs) -> Tensor:
        overlaps = inputs.overlaps
        assert overlaps is not None, "requested by the class attributes"
        excess = torch.clamp(overlaps.iou_short - inputs.mu, min=0)
        return inputs.lambda_det * torch.where(overlaps.has_box, excess, 0.0).to(inputs.det.dtype)
