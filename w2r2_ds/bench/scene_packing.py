"""Time per sample if K questions about one frame set share a visual prefix; also checks the gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from w2r2_ds.bench.feature_cache import CachedFeatures
from w2r2_ds.bench.harness import Case, Lap, find_device, interleave, time_ratio
from w2r2_ds.bench.hf_baseline.hf_trainer import BaselineTrainer, TowerOutputs
from w2r2_ds.bench.hf_baseline.reference import gradients, largest_difference
from w2r2_ds.bench.model import Subject, bench_optimizer, build, shape_description, update
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.bench.step_time import BASELINE, BOTH, GRADIENT_TOLERANCE, SINGLE, W2R2_STEP, predicted, single_pass
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch

LIMIT = 0.22
"""Maximum time per sample of one of K packed questions relative to the baseline."""


def run(shape_name: str, frames: list[int] | None, questions: tuple[int, ...], rounds: int) -> BenchReport:
    """Time all cases for every number of frames and of packed questions."""
    device = find_device()  # first, because the report records the number of threads
    report = BenchReport(
        "scene_packing", "seconds per sample, K questions share a visual prefix, LoRA, checkpointing", []
    )
    for shape in find_shapes(shape_name, frames):
        measure(shape, device, questions, rounds, report)
    return report


def measure(shape: Shape, device: torch.device, questions: tuple[int, ...], rounds: int, report: BenchReport) -> None:
    """Add one shape's rows, criteria and notes to the report."""
    subject = build(shape, device)
    batches = {count: subject.batch(count, packed=True) for count in questions}
    most = questions[-1]
    if shape.dtype == "float32":
        difference = packed_difference(subject, batches[most])
        claim = f"relative difference of gradients, {most} packed and separate"
        report.criteria.append(Criterion(claim, difference, GRADIENT_TOLERANCE))
    spreads = interleave(cases(subject, batches), rounds, device, warmups=2 if device.type == "cuda" else 0)
    for name, spread in spreads.items():
        count = int(name.partition("K = ")[2].partition(",")[0] or 1)  # the baseline's names have no K
        cached_base = BASELINE + (BOTH if name.endswith(BOTH) else "")
        report.rows.append(
            {
                "case": name,
                "shape": shape.label,
                **spread.columns(),
                "per sample": spread.median / count,
                "/baseline": time_ratio(spread, spreads[BASELINE]) / count,
                "/baseline, predicted": predicted(shape, name, count) / predicted(shape, BASELINE, 1),
                "/baseline, as cached": time_ratio(spread, spreads[cached_base]) / count,
                "/baseline, as cached, predicted": predicted(shape, name, count) / predicted(shape, cached_base, 1),
            }
        )
    if shape.name != "tiny":
        for caches in ("", BOTH):
            name = f"{W2R2_STEP}, K = {most}{caches}"
            claim = f"{shape.label}: {name}, per sample / {BASELINE}"
            report.criteria.append(Criterion(claim, time_ratio(spreads[name], spreads[BASELINE]) / most, LIMIT))
    report.notes.append(shape_description(shape))


def cases(subject: Subject, batches: dict[int, Batch]) -> dict[str, Case]:
    """Name -> case. All cases share one model."""
    model, optimizer = subject.model, bench_optimizer(subject.model)
    most, one = list(batches)[-1], subject.batch()
    cached, baseline = CachedFeatures(model, one), BaselineTrainer(subject, one)
    towers = cached.visual, cached.geometry
    stock_attention = model.family.language_model(model.base).config._attn_implementation

    def stock(given: TowerOutputs | None = None) -> Lap:
        # The baseline uses the attention of transformers; all other cases need packed attention.
        model.base.set_attn_implementation({"text_config": stock_attention})
        lap = baseline.step(given)
        model.family.use_packed_attention(model.base)
        return lap

    def run(step: W2R2Step, batch: Batch, use_cache: bool) -> None:
        inputs = cached.into(batch, both=True) if use_cache else batch
        update(optimizer, step(inputs)[0])

    model.family.use_packed_attention(model.base)
    result: dict[str, Case] = {BASELINE: stock, BASELINE + BOTH: partial(stock, towers)}
    for count, batch in batches.items():
        result[f"{W2R2_STEP}, K = {count}{BOTH}"] = partial(run, subject.step(), batch, True)
    result[f"{W2R2_STEP}, K = {most}"] = partial(run, subject.step(), batches[most], False)
    single = single_pass(subject, batches[most], *towers)
    result[f"{SINGLE}, K = {most}{BOTH}"] = partial(run, single, batches[most], True)
    return result


def packed_difference(subject: Subject, packed: Batch) -> float:
    """Largest relative difference between the gradients of packed samples and of the same samples in own sequences.

    With push term `poe`, see `reference.compare_gradients`.
    """
    model, step = subject.model, subject.step("poe")
    cached = CachedFeatures(model, packed)
    total: dict[str, Tensor] = {}
    for index in range(len(packed.ids)):
        separate = gradients(model, step(cached.into(subject.single(index), both=True))[0])
        total = {name: total.get(name, torch.zeros_like(each)) + each for name, each in separate.items()}
    model.family.use_packed_attention(model.base)
    return largest_difference(gradients(model, step(cached.into(packed, both=True))[0]), total)
