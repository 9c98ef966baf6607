"""Print the tables of docs/research/cost-model.md and README.md: ``python docs/scripts/cost_model.py``.

FLOPs are counted from the shapes of the architectures (w2r2_ds/bench/cost_model.py); nothing here was measured.
"""

from __future__ import annotations

from dataclasses import replace

from w2r2_ds.bench import cost_model
from w2r2_ds.bench.cost_model import TERA, Step, TrainingMode
from w2r2_ds.bench.shapes import QWEN_3B, QWEN_7B, Shape

SIZES = {"3B": QWEN_3B, "7B": QWEN_7B}
MODES = {
    "full, checkpointed": TrainingMode(full=True),
    "LoRA, checkpointed": TrainingMode(full=False),
    "full": TrainingMode(full=True, checkpointing=False),
    "LoRA": TrainingMode(full=False, checkpointing=False),
}
SQUARE: dict[str, tuple[int, int]] = {"frame_size": (518, 518), "grid": (32, 32)}
"""518 x 518 pixels for VGGT and 448 x 448 for the VLM: 256 tokens. The default is 518 x 392 and 252, as in VG-LLM."""
QUESTIONS = (1, 2, 4, 8, 16)
RATE = 400 * TERA
"""Assumed FLOP/s of a step: 40 % of the dense bfloat16 peak of an H100 SXM, 989 TFLOP/s."""
BYTES = 2
"""Bytes of a value in bfloat16."""
FP8 = 0.6
"""Assumed cost of a forward pass in FP8 relative to bfloat16."""
APPROXIMATIONS: dict[str, tuple[float, float]] = {
    "exact": (1.0, 1.0),
    "FP8 shortcut": (1.0, FP8),
    "half of the frames": (0.5, 1.0),
    "a quarter of the frames": (0.25, 1.0),
    "FP8, half of the frames": (0.5, FP8),
    "every second step": (1.0, 0.5),
    "every fourth step": (1.0, 0.25),
}
"""Approximation of the shortcut pass -> share of its frames, relative cost of one of its operations."""

Row = list[str]


def square(shape: Shape, frames: int) -> Shape:
    """The shape with square frames."""
    return replace(shape, frames=frames, **SQUARE)


def summary() -> tuple[Row, list[Row]]:
    """Memory and predicted time per sample: LoRA, activation checkpointing, 24 frames of 518 x 392.

    Seconds are FLOPs / `RATE`. Data loading, communication, the optimizer step and launch overhead are not counted.
    """
    rows = []
    for name, size in SIZES.items():
        shape, mode = replace(size, frames=24), MODES["LoRA, checkpointed"]
        found = cost_model.modules(shape)
        weights = [sum(p.numel() for p in module.parameters()) * BYTES / 1e9 for module in (found.vlm, found.vggt)]
        layer_inputs = shape.tokens * shape.hidden * shape.layers * BYTES / 1e9
        memory = [f"{weights[0]:.1f} + {weights[1]:.1f} GB", f"{layer_inputs:.1f} GB"]
        steps = [cost_model.baseline_step(shape, mode).total(), cost_model.own_step(shape, mode).total()]
        steps += [cost_model.own_step(shape, mode, count).total(geometry=False, vision=False) for count in (1, 4, 8)]
        rows.append([name, *memory, *(f"{step / RATE:.2f} s ({step / TERA:.0f})" for step in steps)])
    head = ["model", "weights, VLM + VGGT", "layer inputs", "baseline", "W2R2", "W2R2, both cached"]
    return [*head, "K = 4, both cached", "K = 8, both cached"], rows


def parts() -> tuple[Row, list[Row]]:
    """FLOPs of every part, in Tflop per sample."""
    rows = []
    for name, size in SIZES.items():
        for frames in (8, 16, 32):
            shape = square(size, frames)
            full, answers = cost_model.language(shape), cost_model.language(shape, shape.answer_tokens)
            step = cost_model.baseline_step(shape, MODES["LoRA, checkpointed"])
            values = (step.vision, step.geometry, full.linear + full.attention, full.head, answers.forward())
            rows.append([name, str(frames), str(shape.tokens), *(f"{value / TERA:.1f}" for value in values)])
    head = ["size", "frames", "tokens", "vision tower", "VGGT", "LLM forward", "head, all positions"]
    return [*head, "shortcut forward"], rows


def variants(shape: Shape, mode: TrainingMode) -> dict[str, float]:
    """FLOPs of a step by variant, in Tflop per sample."""
    own, single = cost_model.own_step(shape, mode), cost_model.own_step(shape, mode, two_passes=False)
    found = {
        "baseline": cost_model.baseline_step(shape, mode).total(),
        "naive": cost_model.naive_step(shape, mode).total(),
        "shared": cost_model.shared_step(shape, mode).total(),
        "exact": own.total(),
        "geometry": own.total(geometry=False),
        "both": own.total(geometry=False, vision=False),
        "single": single.total(),
        "single, geometry": single.total(geometry=False),
        "single, both": single.total(geometry=False, vision=False),
    }
    return {name: value / TERA for name, value in found.items()}


def ratios() -> tuple[Row, list[Row]]:
    """W2R2 relative to the HF Trainer baseline and to the single pass, one question per sequence."""
    rows = []
    for name, size in SIZES.items():
        for mode_name, mode in MODES.items():
            for frames in (8, 16, 32):
                step = variants(square(size, frames), mode)
                to_baseline = [step[key] / step["baseline"] for key in ("naive", "shared", "exact", "geometry", "both")]
                to_single = [
                    step[key] / step[own]
                    for key, own in (("exact", "single"), ("geometry", "single, geometry"), ("both", "single, both"))
                ]
                numbers = [f"{value:.2f}" for value in to_baseline + to_single]
                rows.append([name, str(frames), mode_name, f"{step['baseline']:.0f}", *numbers])
    head = ["size", "frames", "training", "baseline, Tflop", "naive", "shared features", "exact", "geometry cached"]
    return [*head, "both cached", "exact / single", "geometry cached / single", "both cached / single"], rows


def packed() -> tuple[Row, list[Row]]:
    """Tflop per sample with several questions about a scene in one sequence, 24 frames of 518 x 392."""
    rows = []
    for name, size in SIZES.items():
        for mode_name in ("full, checkpointed", "LoRA, checkpointed"):
            shape, mode = replace(size, frames=24), MODES[mode_name]
            baseline = cost_model.baseline_step(shape, mode).total()
            steps = [cost_model.own_step(shape, mode, count).total(geometry=False, vision=False) for count in QUESTIONS]
            steps.append(cost_model.own_step(shape, mode, 8).total())
            cells = [f"{value / TERA:.0f} ({value / baseline:.2f}x)" for value in steps]
            rows.append([name, mode_name, f"{baseline / TERA:.0f}", *cells])
    head = ["size", "training", "baseline", *(f"K = {count}, cached" for count in QUESTIONS), "K = 8, no cache"]
    return head, rows


def approximate() -> tuple[Row, list[Row]]:
    """Predicted cost of an approximate shortcut relative to the single pass; 24 frames, geometry cached."""
    rows = []
    for name, (share, cost) in APPROXIMATIONS.items():
        cells = []
        for mode_name in ("LoRA, checkpointed", "full, checkpointed"):
            shape, mode = replace(QWEN_7B, frames=24), MODES[mode_name]
            single = cost_model.own_step(shape, mode, two_passes=False)
            fewer = replace(shape, frames=round(shape.frames * share), prompt_tokens=shape.prompt_tokens)
            shortcut = cost_model.own_step(fewer, mode).shortcut * cost
            both: Step = replace(single, shortcut=shortcut)
            cells.append(f"{both.total(geometry=False) / single.total(geometry=False):.2f}")
        rows.append([name, *cells])
    return ["7B", "LoRA, checkpointed / single", "full, checkpointed / single"], rows


def markdown(table: tuple[Row, list[Row]]) -> str:
    """A Markdown table, as in docs/research/cost-model.md."""
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {
    "Memory, and seconds (Tflop) per sample at an assumed 400 TFLOP/s": summary,
    "Operations per sample, Tflop (square frames)": parts,
    "A step relative to the HF Trainer baseline and to the single pass (square frames)": ratios,
    "Scene packing, Tflop per sample (24 frames of 518 x 392)": packed,
    "Approximate shortcut (predicted)": approximate,
}

if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"### {title}\n\n{markdown(make())}\n")
