"""Push terms: differentiable interpretations of Eq. 6, each a small pure function of tensors.

Eq. 6 as printed, ``L_det = max(0, s(o_short, y) - mu)``, has no gradient: o_short is detached, and the IoU of a box
that is parsed from text is not differentiable (docs/concepts/objective.md). `objective.push_term` therefore selects one
of several terms. A term is added to the sample's cross-entropy l. It returns ``[batch]``, with 0 for a sample to which
it does not apply.

To write another one, subclass `PushTerm`, declare hyper-parameters as fields and required inputs as class attributes,
compute the ``[batch]`` term from `PushInputs` in `__call__`, and register the class:

    @register_push_term("focal")
    class Focal(PushTerm):
        gamma: NonNegativeFloat = 1.0

        def __call__(self, inputs: PushInputs) -> Tensor:
            ...

`examples/custom_push_term.py` is complete; docs/guides/add-a-push-term.md shows how to load and test it.

Notation (the paper is arXiv 2510.17034):

* p, p': next-token probabilities of the fused pass and of the shortcut under teacher forcing; all values of the
  shortcut are detached unless the term sets `stop_gradient` to False
* y, y': the label's token and the shortcut's most likely token
* q: next-token probabilities of the shortcut with the geometry of another scene in place of none, detached
* s: similarity of the shortcut's answer to the label; mu: threshold; h = max(0, s - mu): the hinge, detached
* W: the *where* tokens of an answer: digits of a box (and its frame), or every token of a caption or a short answer
* A: the *what* tokens: the description in the prompt
* z, z': last hidden states of the fused pass and of the shortcut
* E[b], E'[b]: expected boxes of the fused pass and of the shortcut (`objective/expected_box.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.objective.push_inputs import PushInputs
from w2r2_ds.objective.reductions import mean_per_sample, token_log_p
from w2r2_ds.utils.registry import Registry


class PushTerm(BaseModel):
    """Base class of push terms: a pydantic model with hyper-parameters as fields and requirements as class attributes.

    Subclass it, implement `__call__`, and register the subclass with `register_push_term`.

    Attributes:
        gated: the term is 0 where h = 0, which `__call__` must ensure; training warns if h stays 0.
        needs_distribution: needs the shortcut's whole next-token distribution, `PushInputs.log_p_short`.
        needs_states: needs the hidden states of both passes, `PushInputs.states`.
        needs_boxes: needs expected boxes, `PushInputs.overlaps`, and so a tokenizer with one token per digit.
        needs_other_geometry: the shortcut pass has the merged geometry of another scene of the micro-batch in place of
            none, for the samples in `PushInputs.has_other`.
        stop_gradient: no gradient flows through the shortcut pass, as in the paper.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gated: ClassVar[bool] = False
    needs_distribution: ClassVar[bool] = False
    needs_states: ClassVar[bool] = False
    needs_boxes: ClassVar[bool] = False
    needs_other_geometry: ClassVar[bool] = False
    stop_gradient: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        """The term of every sample, ``[batch]``, which is added to its cross-entropy."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__")


PUSH_TERMS: Registry[type[PushTerm]] = Registry("objective.push_term")
"""Registered push terms, keyed by their name in `objective.push_term.name`."""


def register_push_term(name: str) -> Callable[[type[PushTerm]], type[PushTerm]]:
    """Class decorator that registers a push term under a name; raises ValueError if another term has it."""
    return partial(PUSH_TERMS.register, name)


def build_push_term(options: Mapping[str, Any]) -> PushTerm:
    """The push term of `objective.push_term`.

    Args:
        options: name and hyper-parameters, for example `{"name": "margin", "margin": 1.0}`.

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


def check_push_term(config: RunConfig) -> PushTerm:
    """The push term of a run; checks it and the options that it depends on.

    Raises:
        ValueError: see `build_push_term`; or the term needs the geometry of another scene, and a micro-batch has one
            scene only.
    """
    term = build_push_term(config.objective.push_term)
    questions, micro_batch = config.data.questions_per_scene, config.train.micro_batch
    if term.needs_other_geometry and micro_batch < 2 * questions:
        raise ValueError(
            f"objective.push_term {config.objective.push_term['name']} needs the geometry of another scene of the "
            f"micro-batch, but train.micro_batch {micro_batch} with data.questions_per_scene {questions} has one "
            f"scene; set train.micro_batch to at least {2 * questions}."
        )
    return term


@register_push_term("none")
class NoPush(PushTerm):
    """0.

    Ordinary fine-tuning, as in VG-LLM (arXiv 2505.24625): the total loss is L_align.
    """

    def __call__(self, inputs: PushInputs) -> Tensor:
        return torch.zeros_like(inputs.hinge)


@register_push_term("literal")
class PrintedHinge(PushTerm):
    """lambda * h.

    Eq. 6 as printed. Its gradient is zero everywhere, so training equals training with `none`. A baseline to show this.
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return inputs.lambda_det * inputs.hinge


@register_push_term("reweight")
class Reweight(PushTerm):
    """lambda * h * l.

    Interprets Eq. 7, "L_align + lambda L_det", as a per-sample weight: samples that the shortcut solves are trained
    *more* strongly with geometry. The gradient is that of l times lambda * h; h is a constant.
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return inputs.lambda_det * inputs.hinge * inputs.cross_entropy


@register_push_term("downweight")
class Downweight(PushTerm):
    """-min(1, lambda * h) * l.

    The opposite sign of `reweight`, as in debiasing by sample weights (Clark et al., EMNLP 2019, "bias reweighting"):
    a sample that the shortcut solves needs no geometry and has a lower weight, down to 0. The gradient is that of l
    times -min(1, lambda * h); its maximum of 1 keeps the total weight of a sample from becoming negative.
    """

    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        return -torch.clamp(inputs.lambda_det * inputs.hinge, max=1) * inputs.cross_entropy


@register_push_term("margin")
class Margin(PushTerm):
    """lambda * 1[h > 0] * max(0, m - mean_W(log p(y) - log p'(y))).

    Interprets the abstract, "penalizes overly effective 2D-dominant pseudo-outputs via a margin-based mechanism": while
    the shortcut's answer is good, the log-likelihood of the fused pass on W must exceed that of the shortcut by m nats.
    The gradient raises log p(y) on W up to that margin and is zero beyond it. 0 for a sample without *where* tokens.

    Args:
        margin: m, log-likelihood in nats by which the fused pass must exceed the shortcut on *where* tokens.
    """

    margin: NonNegativeFloat = 1.0
    gated: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        # [batch] mean over W of the log-likelihood ratio of fused pass and shortcut, in nats.
        ratio = inputs.mean(token_log_p(inputs.log_p, inputs.label) - inputs.label_log_p_short, inputs.where)
        # The mean over an empty W is 0, which would be a shortfall of m: `has` makes it 0.
        return inputs.lambda_det * inputs.active * inputs.has(inputs.where) * torch.clamp(self.margin - ratio, min=0)


@register_push_term("pseudo_label")
class PseudoLabel(PushTerm):
    """-lambda * mean over D of p'(y') * log(1 - p(y')), with D the tokens of W where y' differs from y.

    Interprets the abstract, "Pseudo-Label Loss that penalizes overly effective 2D-dominant pseudo-outputs": wrong
    tokens of the shortcut are negative labels for the fused pass, weighted by the shortcut's confidence (unlikelihood,
    Welleck et al., ICLR 2020). The gradient moves probability from y' to all other tokens. y' is teacher-forced,
    also with `shortcut_decode: greedy`: p(y') is only defined after the label's tokens before it.
    """

    def __call__(self, inputs: PushInputs) -> Tensor:
        differs = inputs.where & (inputs.prediction_short != inputs.label)
        # log(1 - p(y')) as the log of the sum over all other tokens: exact, and finite if p(y') rounds to 1.
        others = inputs.log_p.scatter(-1, inputs.prediction_short[:, None], -torch.inf).logsumexp(-1)
        return -inputs.lambda_det * inputs.mean(inputs.prediction_log_p_short.exp() * others, differs)


@register_push_term("soft_iou")
class SoftIoU(PushTerm):
    """lambda * 1[h > 0] * max(0, min(1, IoU(E'[b]) + m) - GIoU(E[b])).

    Eq. 6 with s as IoU3D of expected boxes (`objective/expected_box.py`): the overlap of the fused pass's expected box
    E[b] with the label must exceed that of the shortcut's expected box E'[b] (detached) by m. The fused side is a GIoU,
    since an IoU has no gradient for disjoint boxes. The gradient moves digit probabilities of the fused pass towards
    the label's box.

    Args:
        iou_margin: m, overlap by which the fused pass's expected box must exceed the shortcut's.
    """

    iou_margin: NonNegativeFloat = 0.1
    gated: ClassVar[bool] = True
    needs_boxes: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        overlaps = inputs.overlaps
        assert overlaps is not None, "required by needs_boxes"
        # An overlap is at most 1. Without this cap the term could not reach 0 for a good shortcut.
        target = torch.clamp(overlaps.iou_short + self.iou_margin, max=1)
        shortfall = torch.where(overlaps.has_box, torch.clamp(target - overlaps.giou, min=0), 0.0)
        return inputs.lambda_det * inputs.active * shortfall.to(inputs.hinge.dtype)


@register_push_term("representation")
class Representation(PushTerm):
    """lambda * 1[h > 0] * (mean_A(1 - cos(z, z')) + mean_W max(0, cos(z, z') - c)).

    Interprets the abstract, "reshapes the model's internal space by designating 2D features as semantic beacons for
    What identification and 3D features as spatial anchors for Where localization": at *what* tokens the fused states
    stay close to the shortcut's; at *where* tokens they move away until the cosine is c. z' is detached. The term
    separates states; it does not by itself make the answer correct.

    Args:
        cosine: c, cosine of fused and shortcut states at *where* tokens at or below which the term is 0.
    """

    cosine: Annotated[float, Field(ge=-1, le=1)] = 0.5
    gated: ClassVar[bool] = True
    needs_states: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        states = inputs.states
        assert states is not None, "required by needs_states"
        cosine = cosine_similarity(states.fused.to(inputs.log_p.dtype), states.short.to(inputs.log_p.dtype), dim=-1)
        batch = len(inputs.hinge)
        close = mean_per_sample(1 - cosine, states.sample, batch, states.what)
        apart = mean_per_sample(torch.clamp(cosine - self.cosine, min=0), states.sample, batch, states.where)
        return inputs.lambda_det * inputs.active * (close + apart)


@register_push_term("poe")
class ProductOfExperts(PushTerm):
    """lambda * mean_W of -log softmax(log p + log p')[y].

    Product of experts, a common debiasing loss (Hinton 2002; Clark et al., EMNLP 2019; Mahabadi et al., ACL 2020): the
    normalised product of p and the detached p' is trained, so p is trained most where p' is wrong or uncertain. The
    gradient is that of the cross-entropy of the product: it vanishes where the shortcut is confident and correct. Not
    gated by h.
    """

    needs_distribution: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        assert inputs.log_p_short is not None, "required by needs_distribution"
        product = torch.log_softmax(inputs.log_p + inputs.log_p_short, dim=-1)
        return inputs.lambda_det * inputs.mean(-token_log_p(product, inputs.label), inputs.where)


@register_push_term("contrast")
class Contrast(PushTerm):
    """lambda * max(0, m - mean_W(log p(y) - log q(y))) for a sample with another scene's geometry, else 0.

    The label must be likelier with the sample's own geometry than with another scene's, by m nats per token: a hinge on
    the difference of log-likelihoods, as in contrastive learning with one negative. q is that of the shortcut pass with
    Phi(F2D, G), where G is the merged geometry of another scene of the micro-batch. q is detached, as the shortcut of
    the other terms: the gradient raises log p(y) on W up to the margin, and does not lower log q(y). The mean over W
    has the scale of `margin`; it does not depend on the length of the answer, or on tokens that geometry cannot change.
    Not gated by h.

    Args:
        margin: m, log-likelihood in nats by which the label must be likelier with the own geometry on *where* tokens.
    """

    margin: NonNegativeFloat = 1.0
    needs_other_geometry: ClassVar[bool] = True

    def __call__(self, inputs: PushInputs) -> Tensor:
        assert inputs.has_other is not None, "required by needs_other_geometry"
        ratio = inputs.mean(token_log_p(inputs.log_p, inputs.label) - inputs.label_log_p_short, inputs.where)
        applies = inputs.has_other * inputs.has(inputs.where)
        return inputs.lambda_det * applies * torch.clamp(self.margin - ratio, min=0)


@register_push_term("unblocked")
class Unblocked(PushTerm):
    """lambda * max(0, IoU(E'[b]) - mu), with the autograd graph of the shortcut kept.

    Eq. 6 without its stop-gradient and with a differentiable s, an ablation. The gradient makes the shortcut's answer
    *worse* through weights that the fused pass shares; the paper's stop-gradient prevents this. Costs the memory of a
    second graph.
    """

    needs_boxes: ClassVar[bool] = True
    stop_gradient: ClassVar[bool] = False

    def __call__(self, inputs: PushInputs) -> Tensor:
        overlaps = inputs.overlaps
        assert overlaps is not None, "required by needs_boxes"
        excess = torch.clamp(overlaps.iou_short - inputs.mu, min=0)
        return inputs.lambda_det * torch.where(overlaps.has_box, excess, 0.0).to(inputs.hinge.dtype)
