"""What a sample costs where K questions about the same frames share one visual prefix, and that it is exact."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.geometry_cache import OnDisk
from w2r2_ds.bench.harness import Case, Lap, find_device, interleave, ratio
from w2r2_ds.bench.hf_trainer import BaselineTrainer
from w2r2_ds.bench.model import Subject, build, describe, optimizer_of, update
from w2r2_ds.bench.reference import difference, gradients
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.bench.step_ratio import BASELINE, BOTH, GRADIENTS, LORA, SINGLE, W2R2_STEP, single_pass
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch

LIMIT = 0.22
"""Of the field's time per sample that one of eight packed questions may cost."""


def scene_pack(
    shape: str = "cpu", frames: list[int] | None = None, questions: tuple[int, ...] = (1, 4, 8), rounds: int = 3
) -> Report:
    """Time per sample of W2R2 with K questions in one sequence, against the field's single pass per sample.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: frames per sample, one or several; the shape's own without it.
        questions: K, one or several; the last one is also run without caches, as a single pass, and compared.
        rounds: how often each is run, in turns.
    """
    report = Report("scene_pack", "seconds per sample, K questions share a visual prefix, LoRA, checkpointing", [])
    for each in find_shapes(shape, frames or []):
        measure(each, questions, rounds, report)
    return report


def measure(shape: Shape, questions: tuple[int, ...], rounds: int, report: Report) -> None:
    """Add one shape's rows, criteria and notes."""
    device = find_device()
    subject = build(shape, device)
    batches = {count: subject.batch(count, packed=True) for count in questions}
    most = questions[-1]
    where = f"{shape.name}, {shape.frames} frames"
    if shape.dtype == "float32":
        gap = separate_difference(subject, batches[most])
        report.criteria.append(Criterion(f"relative difference of gradients, {most} packed and apart", gap, GRADIENTS))
    spreads = interleave(cases(subject, batches), rounds, device, warmups=2 if device.type == "cuda" else 0)
    per_sample = {name: (int(name.partition("K = ")[2].partition(",")[0] or 1)) for name in spreads}
    for name, spread in spreads.items():
        count, base = per_sample[name], BASELINE + (BOTH if name.endswith(BOTH) else "")
        measured = {"per sample": spread.median / count, "/field": ratio(spread, spreads[BASELINE]) / count}
        report.rows.append(
            {
                "case": name,
                "shape": where,
                **spread.columns(),
                **measured,
                "model": predicted(shape, name, count) / predicted(shape, BASELINE, 1),
                "/field, as cached": ratio(spread, spreads[base]) / count,
                "its model": predicted(shape, name, count) / predicted(shape, base, 1),
            }
        )
    if shape.name != "tiny":
        for end in ("", BOTH):
            name = f"{W2R2_STEP}, K = {most}{end}"
            claim = f"{where}: {name}, per sample / {BASELINE}"
            report.criteria.append(Criterion(claim, ratio(spreads[name], spreads[BASELINE]) / most, LIMIT))
    report.notes.append(describe(shape))


def cases(subject: Subject, batches: dict[int, Batch]) -> dict[str, Case]:
    """What is run in turns."""
    model, optimizer = subject.model, optimizer_of(subject.model)
    most, alone = list(batches)[-1], subject.batch()
    disk, field = OnDisk(model, alone), BaselineTrainer(subject, alone)
    known = disk.kept_2d, disk.kept_3d
    whole = model.family.language_model(model.base).config._attn_implementation

    def stock(given: Any = None) -> Lap:
        model.base.set_attn_implementation({"text_config": whole})
        lap = field.step(given)
        model.family.use_packed_attention(model.base)
        return lap

    def run(step: W2R2Step, batch: Batch, cached: bool) -> None:
        given = disk.into(batch, both=True) if cached else batch
        update(optimizer, step(given)[0])

    model.family.use_packed_attention(model.base)
    result: dict[str, Case] = {BASELINE: stock, BASELINE + BOTH: partial(stock, known)}
    for count, batch in batches.items():
        result[f"{W2R2_STEP}, K = {count}{BOTH}"] = partial(run, subject.step(), batch, True)
    result[f"{W2R2_STEP}, K = {most}"] = partial(run, subject.step(), batches[most], False)
    single = single_pass(subject, batches[most], *known)
    result[f"{SINGLE}, K = {most}{BOTH}"] = partial(run, single, batches[most], True)
    return result


def separate_difference(subject: Subject, packed: Batch) -> float:
    """Gradients of packed samples against the sum of those of each sample alone, by push `poe`."""
    model, step = subject.model, subject.step("poe")
    disk = OnDisk(model, packed)
    total: dict[str, Tensor] = {}
    for index in range(len(packed.ids)):
        own = gradients(model, step(disk.into(subject.alone(index), both=True))[0])
        total = {name: total.get(name, torch.zeros_like(each)) + each for name, each in own.items()}
    model.family.use_packed_attention(model.base)
    return difference(gradients(model, step(disk.into(packed, both=True))[0]), total)


def predicted(shape: Shape, name: str, count: int) -> float:
    """The cost model's operations per sample of a case."""
    if name.startswith(BASELINE):
        step = cost_model.baseline_step(shape, LORA)
    else:
        step = cost_model.own_step(shape, LORA, count, two_passes=name.startswith(W2R2_STEP))
    towers = not name.endswith(BOTH)
    return step.total(geometry=towers, vision=towers)
