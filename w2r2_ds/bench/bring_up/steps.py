"""Whole training steps: W2R2 against a single pass, MFU, and peak memory against the prediction."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.feature_cache import CachedFeatures
from w2r2_ds.bench.harness import Case, interleave, time_ratio
from w2r2_ds.bench.memory import measured_bytes, step_bytes
from w2r2_ds.bench.model import Subject, bench_optimizer, build, update
from w2r2_ds.bench.report import BenchReport
from w2r2_ds.bench.shapes import Shape
from w2r2_ds.bench.step_time import SINGLE, W2R2_STEP, single_pass
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.throughput import matrix_rate, step_flops
from w2r2_ds.types.batch import Batch

GIB = 2**30


def run(settings: Settings) -> BenchReport:
    """Steps of every shape, number of frames and number K of packed questions; both encoders run in every step."""
    report = BenchReport("steps", "seconds of one training step, LoRA, checkpointing, one packed sequence", [])
    for shape in settings.all_shapes():
        if_it_fits(partial(measure_shape, shape, settings, report), shape.name, settings.device, report)
    report.notes.append(
        "MFU: model FLOPs (training/throughput.py) relative to the measured matrix rate. Predicted memory: "
        "bench/memory.py, without the allocator's fragmentation and workspaces."
    )
    return report


def measure_shape(shape: Shape, settings: Settings, report: BenchReport) -> None:
    """Add the rows of one shape."""
    rate = matrix_rate(settings.device, resolve_dtype(shape.dtype))
    subject = build(shape, settings.device)
    subject.model.family.use_packed_attention(subject.model.base)
    for frames in settings.frames:
        sized = replace(subject, shape=replace(shape, frames=frames))
        for questions in settings.questions:
            name = f"{sized.shape.label}, K {questions}"
            if settings.expired():
                report.notes.append(f"{name}: not measured, the time is over (--seconds).")
                continue
            case = partial(measure, sized, questions, settings, rate, report)
            if_it_fits(case, name, settings.device, report)


def if_it_fits(case: Callable[[], None], name: str, device: torch.device, report: BenchReport) -> None:
    """Run a case, and free its memory; one that is too large for the GPU becomes a note, and does not stop the others.

    Args:
        case: adds rows to the report.
        name: its name in the note.
        device: device of the measurements.
        report: report of the part.
    """
    try:
        case()
    except torch.OutOfMemoryError as error:
        report.notes.append(f"{name}: not measured, out of memory ({str(error).split('. ')[0]}).")
    release(device)  # not in the handler, where the exception still refers to the tensors of the case


def measure(subject: Subject, questions: int, settings: Settings, rate: float, report: BenchReport) -> None:
    """Add the rows of one number of frames and of questions."""
    shape, model = subject.shape, subject.model
    batch, optimizer = subject.batch(questions, packed=True), bench_optimizer(model)
    cached = CachedFeatures(model, batch)
    step, single = subject.step(), single_pass(subject, batch, cached.visual, cached.geometry)
    del cached

    def one(step: W2R2Step, batch: Batch) -> None:
        update(optimizer, step(batch)[0])

    cases: dict[str, Case] = {SINGLE: partial(one, single, batch), W2R2_STEP: partial(one, step, batch)}
    spreads = interleave(cases, settings.rounds, settings.device, warmups=1)
    # On a CPU the matrix rate is wall-clock time, but the seconds of a step are process time.
    flops, cuda = step_flops(model, step.push_term, batch), settings.device.type == "cuda"
    for name, spread in spreads.items():
        predicted, peak = step_bytes(subject, questions), measured_bytes(subject, cases[name])
        report.rows.append(
            {
                "case": name,
                "shape": shape.label,
                "K": questions,
                "seconds": spread.median,
                "per sample": spread.median / questions,
                "/single pass": time_ratio(spread, spreads[SINGLE]),
                "MFU": flops / spread.median / rate if cuda and name == W2R2_STEP else None,
                "peak_gib": peak / GIB,
                "predicted_gib": predicted / GIB,
                "/predicted": peak / predicted,
            }
        )


def release(device: torch.device) -> None:
    """Free the memory of a model that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
