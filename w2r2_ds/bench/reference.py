"""Reference implementation of W2R2: two stock passes with logits at all positions. Slow; ours must give the same."""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.bench.hf_trainer import BaselineModel, stock, stock_inputs
from w2r2_ds.bench.model import Subject
from w2r2_ds.models.build import trainable
from w2r2_ds.objective.loss import Outputs, read_shortcut, w2r2_loss
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch


def plain_loss(step: W2R2Step, batch: Batch) -> Tensor:
    """The objective of `step` from two plain passes over one sample, both with a graph.

    Whether a gradient goes through the shortcut too is the reading's matter: `unblocked` lets it.
    """
    field = BaselineModel(step.model)
    inputs = stock_inputs(batch)
    del inputs["labels"]
    outputs = [
        field(**(inputs | {"geometry_images": images})).logits[0, batch.answer_positions.position]
        for images in (inputs["geometry_images"][:0], inputs["geometry_images"])
    ]
    shortcut = read_shortcut(Outputs(outputs[0]), batch, step.push_term, step.scorer)
    loss, _ = w2r2_loss(Outputs(outputs[1]), shortcut, batch, step.objective, step.push_term, step.scorer)
    return loss


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Name -> gradient of every trained parameter; clears the model's gradients."""
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative difference of a parameter's gradients, in their norm."""
    assert ours.keys() == theirs.keys() and all(gradient.norm() > 0 for gradient in theirs.values()), "all train"
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def check_equal(subject: Subject, batch: Batch) -> dict[str, float]:
    """Gradients of our steps against plain ones: of push `none` against the field's loss, of W2R2 against two passes.

    `poe` pushes on every row; most others wait for a shortcut that answers well, which random weights do not.
    """
    model = subject.model
    none, poe = subject.step("none"), subject.step("poe")
    ours = gradients(model, none(batch)[0]), gradients(model, poe(batch)[0])
    with stock(model):
        field = difference(ours[0], gradients(model, BaselineModel(model)(**stock_inputs(batch)).loss))
        passes = difference(ours[1], gradients(model, plain_loss(poe, batch)))
    return {"none against the field": field, "poe against two plain passes": passes}
