"""What a W2R2 step costs beside the field's single pass and beside our own, that it is exact, and what it remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.geometry_cache import OnDisk
from w2r2_ds.bench.harness import Case, Spread, find_device, in_fresh_process, interleave, peak_bytes, ratio
from w2r2_ds.bench.hf_trainer import BaselineTrainer, stock
from w2r2_ds.bench.model import Subject, build, describe, optimizer_of, update
from w2r2_ds.bench.reference import check_equal, plain_loss
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.throughput import matrix_rate
from w2r2_ds.types.batch import Batch

BASELINE, SINGLE, W2R2_STEP, NAIVE = "field (baseline)", "own single pass", "W2R2", "naive two passes"
GEOMETRY, BOTH = ", geometry cached", ", both cached"
CACHES = ("", GEOMETRY, BOTH)
"""Suffixes of the rows' names: features that a step reads from the disk cache."""
LORA = cost_model.Mode()
LIMITS = {("", BASELINE): 0.90, (GEOMETRY, BASELINE): 0.80, ("", SINGLE): 1.40, (BOTH, SINGLE): 1.40}
"""(caches, base) -> maximum time of W2R2 relative to the base."""
GRADIENTS = 1e-5


def step_ratio(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 3, memory: bool = True) -> Report:
    """Time of a training step: HF Trainer baseline, W2R2 with and without caches, a single pass, naive two passes.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of runs per case, interleaved.
        memory: on the CPU, also measure peak memory in a process per case; on a GPU it is always measured.
    """
    report = Report("step_ratio", "seconds of one training step, LoRA, checkpointing, one sample", [])
    for each in find_shapes(shape, frames or []):
        measure(each, rounds, memory, report)
    return report


def measure(shape: Shape, rounds: int, memory: bool, report: Report) -> None:
    """Add one shape's rows, criteria and notes."""
    device = find_device()
    subject = build(shape, device)
    batch = subject.batch()
    equal = check_equal(subject, batch) if shape.dtype == "float32" else {}
    spreads = interleave(cases(subject, batch), rounds, device, warmups=2 if device.type == "cuda" else 0)
    rate = matrix_rate(device, resolve_dtype(shape.dtype)) if device.type == "cuda" else None
    for name, spread in spreads.items():
        report.rows.append(row(shape, name, spread, spreads, rate))
    report.criteria += criteria(shape, spreads, equal)
    if memory:
        peaks = {name: spreads[name].peak or 0 for name in PEAKS}
        if device.type == "cpu":
            peaks = {name: in_fresh_process(peak_of, shape.name, shape.frames, name)["bytes"] for name in PEAKS}
            for each in report.rows[-len(spreads) :]:
                each["peak_mib"] = peaks[each["case"]] / 2**20 if each["case"] in peaks else None
        grows = peaks[W2R2_STEP + BOTH] / peaks[SINGLE + BOTH]
        report.criteria.append(Criterion("peak memory, W2R2 / own single pass, both cached", grows, 1.05))
    report.notes.append(describe(shape))


def cases(subject: Subject, batch: Batch) -> dict[str, Case]:
    """Cases to compare; they share one model."""
    model, optimizer = subject.model, optimizer_of(subject.model)
    field, disk = BaselineTrainer(subject, batch), OnDisk(model, batch)
    known = disk.kept_2d, disk.kept_3d
    step, single, naive = subject.step(), single_pass(subject, batch, *known), subject.step("unblocked")

    def run(step: W2R2Step, caches: str) -> Case:
        def once() -> None:
            given = disk.into(batch, both=caches == BOTH) if caches else batch
            update(optimizer, step(given)[0])

        return once

    def twice() -> None:
        with stock(model):
            update(optimizer, plain_loss(naive, batch))

    result: dict[str, Case] = {BASELINE: field.step, BASELINE + BOTH: lambda: field.step(known)}
    for caches in CACHES:
        result[SINGLE + caches] = run(single, caches)
        result[W2R2_STEP + caches] = run(step, caches)
    return result | {NAIVE: twice}


def single_pass(subject: Subject, batch: Batch, visual: Any, features: Tensor) -> W2R2Step:
    """Push `none` without the shortcut, which is then only read for the statistics: its states are there already."""
    step = subject.step("none")
    model = step.model
    with torch.no_grad():
        short = model.hidden(batch, step.visual_only(visual, [features]))

    def pass_order(batch: Batch, visual_only: Any, fused: Any, with_what: bool) -> tuple[Tensor, Tensor]:
        return short, model.hidden(batch, fused, with_what)

    step.two_pass = pass_order
    return step


def row(shape: Shape, name: str, spread: Spread, spreads: dict[str, Spread], rate: float | None) -> dict[str, Any]:
    """Table row: one case relative to both bases, measured and predicted by the cost model."""
    caches = caches_of(name)
    own = SINGLE + caches
    values = {
        "case": name,
        "shape": f"{shape.name}, {shape.frames} frames",
        **spread.columns(),
        "/baseline": ratio(spread, spreads[BASELINE]),
        "model": predicted(shape, name) / predicted(shape, BASELINE),
        "/own single": ratio(spread, spreads[own]),
        "its model": predicted(shape, name) / predicted(shape, own),
    }
    if rate is not None:
        needed = cost_model.model_operations(shape, two_passes=name.startswith((W2R2_STEP, NAIVE)))
        values["MFU"] = needed / spread.median / rate if caches == BOTH else None
    return values


def predicted(shape: Shape, name: str) -> float:
    """FLOPs of a case by the cost model."""
    ways: dict[str, Callable[[], cost_model.Step]] = {
        BASELINE: lambda: cost_model.baseline_step(shape, LORA),
        SINGLE: lambda: cost_model.own_step(shape, LORA, two_passes=False),
        W2R2_STEP: lambda: cost_model.own_step(shape, LORA),
        NAIVE: lambda: cost_model.naive_step(shape, LORA),
    }
    step = next(way() for start, way in ways.items() if name.startswith(start))
    return step.total(geometry=not caches_of(name), vision=caches_of(name) != BOTH)


def caches_of(name: str) -> str:
    """Suffix of a row's name."""
    return next(end for end in reversed(CACHES) if name.endswith(end))


def criteria(shape: Shape, spreads: dict[str, Spread], equal: dict[str, float]) -> list[Criterion]:
    """Criteria of the report; limits on time hold only for the fixed shapes, not for `tiny`."""
    found = [Criterion(f"relative difference of gradients, {name}", gap, GRADIENTS) for name, gap in equal.items()]
    if shape.name == "tiny":
        return found
    for (caches, base), limit in LIMITS.items():
        against = base if base == BASELINE else base + caches
        claim = f"{shape.name}, {shape.frames} frames: {W2R2_STEP}{caches} / {against}"
        found.append(Criterion(claim, ratio(spreads[W2R2_STEP + caches], spreads[against]), limit))
    return found


PEAKS = tuple(name + BOTH for name in (BASELINE, SINGLE, W2R2_STEP))
"""Cases whose peak memory is measured on the CPU; both caches, so that only the language model counts."""


def peak_of(shape: str, frames: int, name: str) -> dict[str, Any]:
    """Peak memory in bytes of a case's second step; runs in a fresh process."""
    (chosen,) = find_shapes(shape, [frames])
    subject = build(chosen, find_device())
    case = cases(subject, subject.batch())[name]
    case()
    return {"bytes": peak_bytes(case)}
