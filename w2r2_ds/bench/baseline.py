"""Training step of the HF Trainer baseline, the denominator of the ratios in the other benchmarks."""

from __future__ import annotations

from functools import partial

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.harness import Case, Spread, find_device, interleave
from w2r2_ds.bench.hf_trainer import BaselineTrainer
from w2r2_ds.bench.model import build, describe
from w2r2_ds.bench.report import Report
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.training.throughput import matrix_rate

LORA = cost_model.Mode()


def baseline(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 3) -> Report:
    """Train stock Qwen2.5-VL with PEFT LoRA by HF's Trainer: logits at all positions, all of VGGT in every step.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of steps.
    """
    report = Report("baseline", "training step of the HF Trainer baseline: one sample, LoRA, checkpointing", [])
    for each in find_shapes(shape, frames or []):
        device = find_device()
        subject = build(each, device)
        trainer = BaselineTrainer(subject, subject.batch())
        towers = trainer.towers()
        cases: dict[str, Case] = {"whole step": trainer.step, "without the towers": partial(trainer.step, towers)}
        warmups = 2 if device.type == "cuda" else 0
        spreads = interleave(cases, rounds, device, warmups)
        rate = matrix_rate(device, resolve_dtype(each.dtype)) if device.type == "cuda" else None
        for name, spread in spreads.items():
            report.rows.append(row(each, name, spread, rate))
        report.notes.append(describe(each))
    return report


def row(shape: Shape, name: str, spread: Spread, rate: float | None) -> dict[str, object]:
    """Table row: time and FLOP/s of one part; on a GPU also the language model's MFU."""
    whole = name == "whole step"
    tflop = cost_model.baseline_step(shape, LORA).total(geometry=whole, vision=whole) / cost_model.TERA
    values: dict[str, object] = {
        "part": name,
        "shape": f"{shape.name}, {shape.frames} frames",
        **spread.columns(),
        "tokens/s": shape.tokens / spread.median,
        "Tflop": tflop,
        "Tflop/s": tflop / spread.median,
    }
    if rate is not None and not whole:
        values["MFU"] = cost_model.model_operations(shape, two_passes=False) / spread.median / rate
    return values
