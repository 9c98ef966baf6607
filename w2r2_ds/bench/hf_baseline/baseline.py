"""Training step of the HF Trainer baseline, the denominator of the ratios in the other benchmarks."""

from __future__ import annotations

from functools import partial

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.harness import Case, Spread, find_device, interleave
from w2r2_ds.bench.hf_baseline.hf_trainer import BaselineTrainer
from w2r2_ds.bench.model import build, shape_description
from w2r2_ds.bench.report import BenchReport
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.training.throughput import matrix_rate


def run(shape_name: str, frames: list[int] | None, rounds: int) -> BenchReport:
    """Time `rounds` steps of the baseline for every number of frames, with the towers and without them."""
    device = find_device()  # first, because the report records the number of threads
    report = BenchReport("baseline", "training step of the HF Trainer baseline: one sample, LoRA, checkpointing", [])
    for shape in find_shapes(shape_name, frames):
        subject = build(shape, device)
        trainer = BaselineTrainer(subject, subject.batch())
        towers = trainer.towers()
        cases: dict[str, Case] = {"whole step": trainer.step, "without the towers": partial(trainer.step, towers)}
        warmups = 2 if device.type == "cuda" else 0
        spreads = interleave(cases, rounds, device, warmups)
        rate = matrix_rate(device, resolve_dtype(shape.dtype)) if device.type == "cuda" else None
        for name, spread in spreads.items():
            report.rows.append(row(shape, name, spread, rate))
        report.notes.append(shape_description(shape))
    return report


def row(shape: Shape, name: str, spread: Spread, rate: float | None) -> dict[str, object]:
    """Table row: time and FLOP/s of one part; on a GPU also the language model's MFU."""
    whole = name == "whole step"
    tflop = cost_model.baseline_step(shape, cost_model.LORA).total(geometry=whole, vision=whole) / cost_model.TERA
    values: dict[str, object] = {
        "part": name,
        "shape": shape.label,
        **spread.columns(),
        "tokens/s": shape.tokens / spread.median,
        "Tflop": tflop,
        "Tflop/s": tflop / spread.median,
    }
    if rate is not None and not whole:
        values["MFU"] = cost_model.model_operations(shape, two_passes=False) / spread.median / rate
    return values
