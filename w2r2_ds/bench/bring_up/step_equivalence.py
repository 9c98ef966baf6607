"""Loss and gradients of a training step with kernels and with PyTorch, in every configuration that selects other code.

The product of `model.zero_geometry`, `model.fusion`, `objective.visual_mask_ratio` and `train.pass_order`. Without a
GPU the Triton kernels cannot run; the kernels that consist of PyTorch operations are compared with PEFT.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.hf_baseline.reference import gradients
from w2r2_ds.bench.model import SEED, build
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import TINY
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS, Kernels
from w2r2_ds.models.fusion import FUSIONS
from w2r2_ds.training.two_pass import build_pass_order
from w2r2_ds.types.batch import Batch

ZERO_GEOMETRY = ("merged", "features")
MASK_RATIOS = (0.0, 0.5)
PASS_ORDERS = ("sequential", "lockstep")
TOLERANCE = 1e-4
"""Maximum difference of the loss and of each gradient, relative to its norm: float32 sums in another order."""
PUSH = "poe"
"""Has a gradient wherever the shortcut's probabilities are not uniform; most other terms need right answers."""


def run(settings: Settings) -> BenchReport:
    """Largest differences for every configuration; on the shape `tiny` in float32, so that rounding hides nothing."""
    device, cuda = settings.device, settings.device.type == "cuda"
    compared = (TORCH_KERNELS, ALL_KERNELS) if cuda else (frozenset[str](), TORCH_KERNELS)
    # The kernels draw the same dropout masks as the LoRA projection in PyTorch, but not as PEFT.
    dropout = 0.05 if cuda else 0.0
    names = "Triton and PyTorch" if cuda else "the LoRA projection and PEFT"
    report = BenchReport("step_equivalence", f"differences between steps with {names}, shape tiny, float32", [])
    for fusion, zero_geometry in itertools.product(FUSIONS, ZERO_GEOMETRY):
        both = [Steps(device, kernels, fusion, zero_geometry, dropout) for kernels in compared]
        for ratio, order in itertools.product(MASK_RATIOS, PASS_ORDERS):
            expected, found = (steps.run(ratio, order) for steps in both)
            errors = {name: difference(found.get(name), expected.get(name)) for name in expected | found}
            worst = max(errors, key=lambda name: errors[name])
            report.rows.append(
                {
                    "fusion": fusion,
                    "zero_geometry": zero_geometry,
                    "visual_mask_ratio": ratio,
                    "pass_order": order,
                    "loss": float(found["loss"]),
                    "difference of the loss": errors["loss"],
                    "largest difference": errors[worst],
                    "parameter": worst,
                }
            )
    largest = max(row["largest difference"] for row in report.rows)
    report.criteria.append(Criterion("largest difference of a loss or gradient", largest, TOLERANCE))
    if cuda:
        report.notes.append(
            "Triton multiplies with the dropout mask in bfloat16 only. In float32 PyTorch does it for both; the part "
            "gpu_tests compares this kernel."
        )
    return report


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    """``|found - expected|`` relative to the larger of both norms; None is 0.

    1, the largest error, if a value is not finite: NaN would be lost in a maximum.
    """
    if found is None or expected is None:
        return 1.0
    error = float((found - expected).norm() / torch.maximum(found.norm(), expected.norm()))
    return error if math.isfinite(error) else 1.0


class Steps:
    """Training steps of one model, with seeded dropout and masks.

    Args:
        device: device of the model.
        kernels: enabled kernels.
        fusion, zero_geometry: options of the model.
        dropout: LoRA dropout.
    """

    def __init__(self, device: torch.device, kernels: Kernels, fusion: str, zero_geometry: str, dropout: float) -> None:
        self.subject = build(TINY, device, kernels, fusion=fusion, zero_geometry=zero_geometry, lora_dropout=dropout)
        self.batch: Batch = self.subject.batch(2)

    def run(self, ratio: float, order: Any) -> dict[str, Tensor]:
        """Loss and gradients of a step with this `objective.visual_mask_ratio` and `train.pass_order`."""
        step = self.subject.step(PUSH, visual_mask_ratio=ratio)
        step.run_passes = build_pass_order(self.subject.model, order, step.push_term.stop_gradient, zero3=False)
        torch.manual_seed(SEED)
        loss, _ = step(self.batch)
        value = loss.detach().clone()
        # Without the gradients of 0, such as those of an unused branch.
        found = {name: each for name, each in gradients(self.subject.model, loss).items() if each.norm() != 0}
        return {"loss": value, **found}
