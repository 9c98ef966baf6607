"""Time and memory of a W2R2 training step relative to the HF Trainer baseline and to an equally optimised single pass.

For float32 shapes the gradients are compared with those of stock code first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.feature_cache import CachedFeatures
from w2r2_ds.bench.harness import Case, Spread, find_device, in_fresh_process, interleave, peak_bytes, time_ratio
from w2r2_ds.bench.hf_baseline.hf_trainer import BaselineTrainer, stock_forwards
from w2r2_ds.bench.hf_baseline.reference import compare_gradients, reference_loss
from w2r2_ds.bench.model import Subject, bench_optimizer, build, shape_description, update
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.models.layer_inputs import OnInput
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.throughput import matrix_rate
from w2r2_ds.types.batch import Batch

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

BASELINE, SINGLE, W2R2_STEP, NAIVE = "HF Trainer baseline", "single pass", "W2R2", "naive two passes"
GEOMETRY, BOTH = ", geometry cached", ", both cached"
CACHES = ("", GEOMETRY, BOTH)
"""Suffixes of case names: the features that a step reads from the cache on disk."""
LIMITS = {("", BASELINE): 0.90, (GEOMETRY, BASELINE): 0.80, ("", SINGLE): 1.40, (BOTH, SINGLE): 1.40}
"""(caches, base) -> maximum time of W2R2 relative to the base."""
MEMORY_LIMIT = 1.05
"""Maximum peak memory of W2R2 relative to the single pass."""
GRADIENT_TOLERANCE = 1e-5
"""Maximum relative difference of gradients, for float32 sums in another order."""
PEAKS = tuple(name + BOTH for name in (BASELINE, SINGLE, W2R2_STEP))
"""Cases whose peak memory is measured on the CPU; with both caches, so that only the language model counts."""


def run(shape_name: str, frames: list[int] | None, rounds: int, memory: bool) -> BenchReport:
    """Time all cases for every number of frames; with `memory`, also measure peak memory on the CPU."""
    device = find_device()  # first, because the report records the number of threads
    report = BenchReport("step_time", "seconds of one training step, LoRA, checkpointing, one sample", [])
    for shape in find_shapes(shape_name, frames):
        measure(shape, device, rounds, memory, report)
    return report


def measure(shape: Shape, device: torch.device, rounds: int, memory: bool, report: BenchReport) -> None:
    """Add one shape's rows, criteria and notes to the report."""
    subject = build(shape, device)
    batch = subject.batch()
    differences = compare_gradients(subject, batch) if shape.dtype == "float32" else {}
    spreads = interleave(cases(subject, batch), rounds, device, warmups=2 if device.type == "cuda" else 0)
    rate = matrix_rate(device, resolve_dtype(shape.dtype)) if device.type == "cuda" else None
    for name, spread in spreads.items():
        report.rows.append(row(shape, name, spread, spreads, rate))
    report.criteria += criteria(shape, spreads, differences)
    if memory:
        peaks = {name: spreads[name].peak or 0 for name in PEAKS}
        if device.type == "cpu":
            # In a process per case: memory that one case has used stays resident and would hide the peak of the next.
            peaks = {name: in_fresh_process(peak_of, shape.name, shape.frames, name)["bytes"] for name in PEAKS}
            for each in report.rows[-len(spreads) :]:
                each["peak_mib"] = peaks[each["case"]] / 2**20 if each["case"] in peaks else None
        relative = peaks[W2R2_STEP + BOTH] / peaks[SINGLE + BOTH]
        report.criteria.append(Criterion("peak memory, W2R2 / single pass, both cached", relative, MEMORY_LIMIT))
    report.notes.append(shape_description(shape))


def cases(subject: Subject, batch: Batch) -> dict[str, Case]:
    """Name -> case. All cases share one model."""
    model, optimizer = subject.model, bench_optimizer(subject.model)
    baseline, cached = BaselineTrainer(subject, batch), CachedFeatures(model, batch)
    towers = cached.visual, cached.geometry
    step, single, naive = subject.step(), single_pass(subject, batch, *towers), subject.step("unblocked")

    def case(step: W2R2Step, caches: str) -> Case:
        def run() -> None:
            # The time of a step includes reading the cache, which the data loader does in training.
            inputs = cached.into(batch, both=caches == BOTH) if caches else batch
            update(optimizer, step(inputs)[0])

        return run

    def naive_two_passes() -> None:
        with stock_forwards(model):
            update(optimizer, reference_loss(naive, batch))

    result: dict[str, Case] = {BASELINE: baseline.step, BASELINE + BOTH: lambda: baseline.step(towers)}
    for caches in CACHES:
        result[SINGLE + caches] = case(single, caches)
        result[W2R2_STEP + caches] = case(step, caches)
    return result | {NAIVE: naive_two_passes}


def single_pass(subject: Subject, batch: Batch, visual: VisionOutput, geometry: Tensor) -> W2R2Step:
    """Build a step with push term `none` that runs only the fused pass.

    With `none`, the shortcut is used only for statistics. Its hidden states are computed here, once, so that the step
    does all of its usual work except the shortcut pass.
    """
    step = subject.step("none")
    model = step.model
    with torch.no_grad():
        shortcut_states = model.answer_hidden_states(batch, step.fuse_shortcut(visual, [geometry]))

    def two_pass(
        batch: Batch,
        shortcut: VisionOutput,
        fused: VisionOutput,
        include_description: bool,
        on_shortcut_input: OnInput | None = None,
    ) -> tuple[Tensor, Tensor]:
        return shortcut_states, model.answer_hidden_states(batch, fused, include_description)

    step.run_passes = two_pass
    return step


def row(shape: Shape, name: str, spread: Spread, spreads: dict[str, Spread], rate: float | None) -> dict[str, Any]:
    """Table row of a case: ratios to the baseline and to the single pass, measured and predicted by the cost model."""
    caches = caches_of(name)
    single = SINGLE + caches
    values = {
        "case": name,
        "shape": shape.label,
        **spread.columns(),
        "/baseline": time_ratio(spread, spreads[BASELINE]),
        "/baseline, predicted": predicted(shape, name) / predicted(shape, BASELINE),
        "/single pass": time_ratio(spread, spreads[single]),
        "/single pass, predicted": predicted(shape, name) / predicted(shape, single),
    }
    if rate is not None:
        flops = cost_model.model_operations(shape, two_passes=name.startswith((W2R2_STEP, NAIVE)))
        values["MFU"] = flops / spread.median / rate if caches == BOTH else None
    return values


def predicted(shape: Shape, name: str, questions: int = 1) -> float:
    """FLOPs per sample of a case by the cost model, with `questions` questions packed in one sequence."""
    steps: dict[str, Callable[[], cost_model.Step]] = {
        BASELINE: lambda: cost_model.baseline_step(shape, cost_model.LORA),
        SINGLE: lambda: cost_model.own_step(shape, cost_model.LORA, questions, two_passes=False),
        W2R2_STEP: lambda: cost_model.own_step(shape, cost_model.LORA, questions),
        NAIVE: lambda: cost_model.naive_step(shape, cost_model.LORA),
    }
    step = next(make() for prefix, make in steps.items() if name.startswith(prefix))
    return step.total(geometry=not caches_of(name), vision=caches_of(name) != BOTH)


def caches_of(name: str) -> str:
    """Suffix of a case name that lists its cached features, one of `CACHES`."""
    # Longest first: every name ends with the empty suffix.
    return next(end for end in reversed(CACHES) if name.endswith(end))


def criteria(shape: Shape, spreads: dict[str, Spread], differences: dict[str, float]) -> list[Criterion]:
    """Criteria of the report; the shape `tiny`, which is for tests, has no limits on time."""
    found = [
        Criterion(f"relative difference of gradients, {name}", difference, GRADIENT_TOLERANCE)
        for name, difference in differences.items()
    ]
    if shape.name == "tiny":
        return found
    for (caches, base), limit in LIMITS.items():
        denominator = base if base == BASELINE else base + caches
        claim = f"{shape.label}: {W2R2_STEP}{caches} / {denominator}"
        found.append(Criterion(claim, time_ratio(spreads[W2R2_STEP + caches], spreads[denominator]), limit))
    return found


def peak_of(shape: str, frames: int, name: str) -> dict[str, Any]:
    """Peak memory in bytes of a case's second step; runs in a fresh process."""
    (chosen,) = find_shapes(shape, [frames])
    subject = build(chosen, find_device())
    case = cases(subject, subject.batch())[name]
    case()
    return {"bytes": peak_bytes(case)}
