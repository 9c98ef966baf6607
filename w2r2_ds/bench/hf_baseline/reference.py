"""Reference gradients of W2R2: two passes of the stock model, both with a graph and logits at all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.bench.hf_baseline.hf_trainer import BaselineModel, stock_forwards, stock_inputs
from w2r2_ds.bench.model import Subject
from w2r2_ds.models.build import trainable
from w2r2_ds.objective.loss import PassOutputs, score_shortcut, w2r2_loss
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch


def reference_loss(step: W2R2Step, batch: Batch) -> Tensor:
    """The loss of `step`, computed from two stock passes over a batch of one sample.

    Both passes have a graph. The push term decides whether gradients flow into the shortcut: only `unblocked` does not
    detach its outputs.
    """
    stock = BaselineModel(step.model)
    inputs = stock_inputs(batch)
    del inputs["labels"]
    no_images = inputs["geometry_images"][:0]
    shortcut_logits, fused_logits = (
        stock(**(inputs | {"geometry_images": images})).logits[0, batch.answer_positions.position]
        for images in (no_images, inputs["geometry_images"])
    )
    shortcut = score_shortcut(PassOutputs(shortcut_logits), batch, step.push_term, step.scorer)
    loss, _ = w2r2_loss(PassOutputs(fused_logits), shortcut, batch, step.objective, step.push_term, step.scorer)
    return loss


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Name -> gradient of every trained parameter; clears the gradients of the model."""
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ``|found - expected| / |expected|`` over the parameters, with the L2 norm of a parameter's gradient."""
    assert found.keys() == expected.keys() and all(gradient.norm() > 0 for gradient in expected.values()), (
        "all have gradients"
    )
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def compare_gradients(subject: Subject, batch: Batch) -> dict[str, float]:
    """Largest relative difference between the gradients of `W2R2Step` and those of stock code.

    Push term `none` is compared with the HF Trainer baseline's loss, `poe` with `reference_loss`. Not another term,
    because most push only where the shortcut answers well, and with random weights it never does.
    """
    model = subject.model
    none, poe = subject.step("none"), subject.step("poe")
    single_pass, two_passes = gradients(model, none(batch)[0]), gradients(model, poe(batch)[0])
    with stock_forwards(model):
        baseline = gradients(model, BaselineModel(model)(**stock_inputs(batch)).loss)
        reference = gradients(model, reference_loss(poe, batch))
    return {
        "push none and the HF Trainer baseline": largest_difference(single_pass, baseline),
        "push poe and two stock passes": largest_difference(two_passes, reference),
    }
