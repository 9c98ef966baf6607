"""Training steps of varying lengths with and without cuDNN's attention.

cuDNN builds an execution plan for every new shape, which takes longer than the attention.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.model import SEED, Subject, bench_optimizer, build, update
from w2r2_ds.bench.report import BenchReport

SLOW = 2.0
"""A step is slow if it takes this many times the median."""


def run(settings: Settings) -> BenchReport:
    """Wall-clock seconds per step: median, slowest and sum over `settings.steps` steps, every one of another length."""
    shape = settings.shallow_shape()
    title = f"seconds per step, {settings.steps} steps of other lengths, {shape.label}, {shape.layers} decoder layers"
    report = BenchReport("sdpa_backends", title, [])
    subject = build(shape, settings.device)
    drawn = np.random.default_rng(SEED)
    fewest = 2 * shape.frames + 1  # start and end tokens of the frames, and one of the question
    lengths = drawn.integers(fewest, shape.prompt_tokens + 1, settings.steps)
    answers = shape.answer_tokens + drawn.integers(0, 16, settings.steps)
    subjects = [
        replace(subject, shape=replace(shape, prompt_tokens=int(prompt), answer_tokens=int(answer)))
        for prompt, answer in zip(lengths, answers, strict=True)
    ]
    # All steps run once before the rows, without cuDNN. Triton compiles a kernel again for numbers that are not
    # multiples of 16, and cuBLAS chooses one per shape: the first row would have this time in addition to cuDNN's.
    with cudnn_sdp(False):
        step_seconds(subject, subjects)
    for enabled in (True, False):
        with cudnn_sdp(enabled):
            seconds = step_seconds(subject, subjects)
        median = float(np.median(seconds))
        report.rows.append(
            {
                "cuDNN": "on" if enabled else "off",
                "median": median,
                "slowest": max(seconds),
                "sum": sum(seconds),
                f"slower than {SLOW:g} medians": sum(each > SLOW * median for each in seconds),
            }
        )
    report.notes.append("All steps have run once before, with cuDNN off. Training runs with cuDNN off.")
    if settings.device.type == "cpu":
        report.notes.append("A CPU has no cuDNN: both rows run the same code.")
    return report


def step_seconds(subject: Subject, subjects: list[Subject]) -> list[float]:
    """Wall-clock seconds of a step on each subject's batch; the subjects share one model."""
    step, optimizer = subject.step(), bench_optimizer(subject.model)
    update(optimizer, step(subject.batch())[0])
    seconds = []
    for each in subjects:
        batch = each.batch()
        synchronize(subject.device)
        began = time.perf_counter()
        update(optimizer, step(batch)[0])
        synchronize(subject.device)
        seconds.append(time.perf_counter() - began)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def cudnn_sdp(enabled: bool) -> Iterator[None]:
    """Allow or forbid cuDNN in scaled_dot_product_attention in this block, for all threads."""
    previous = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(previous)
