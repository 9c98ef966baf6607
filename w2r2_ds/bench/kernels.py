"""Time of the kernels of `model.kernels`, forward and backward, relative to the PyTorch operations that they replace.

Kernels, references and inputs are those that `model.kernels: auto` compares (kernels/candidates.py).
"""

from __future__ import annotations

from torch import Tensor

from w2r2_ds.bench.harness import find_device, interleave, time_ratio
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import find_shapes
from w2r2_ds.kernels.candidates import Candidate, Shapes, make_candidates
from w2r2_ds.kernels.measure import TOLERANCE, make_run, max_error
from w2r2_ds.kernels.select import TORCH_KERNELS, resolve_dtype, unavailable

DROPOUT = 0.05
"""LoRA dropout, as in the recipes."""


def run(shape_name: str, frames: list[int] | None, rounds: int) -> BenchReport:
    """Time every available kernel at the sizes of a sample, for every number of frames."""
    device, skipped = find_device(), unavailable()
    report = BenchReport("kernels", "seconds forward and backward of one call", [])
    for shape in find_shapes(shape_name, frames):
        dtype = resolve_dtype(shape.dtype)
        sizes = Shapes(shape.hidden, shape.intermediate, shape.lora_rank, DROPOUT, dtype, shape.tokens)
        for candidate in make_candidates(sizes, device):
            if candidate.name in TORCH_KERNELS or not skipped:
                for make_inputs in candidate.cases:
                    measure(candidate, make_inputs(), rounds, shape.label, report)
    if skipped:
        report.notes.append(f"Triton's and Liger's kernels are not timed, since {skipped}.")
    return report


def measure(candidate: Candidate, inputs: tuple[Tensor, ...], rounds: int, label: str, report: BenchReport) -> None:
    """Add the rows and criteria of a kernel for one set of inputs to the report.

    Args:
        candidate: the kernel and its reference.
        inputs: inputs of one of its cases; the table shows the shapes of the first and the last input.
        rounds: number of runs of the kernel and of the reference, interleaved.
        label: label of the benchmark shape.
        report: report to extend.
    """
    functions = {"PyTorch": candidate.reference, "kernel": candidate.kernel}
    runs = {name: make_run(function, inputs, candidate.num_differentiable) for name, function in functions.items()}
    error = max_error(runs["kernel"](), runs["PyTorch"]())
    spreads = interleave(dict(runs), rounds, inputs[0].device, warmups=3)
    first, last = ("x".join(map(str, each.shape)) for each in (inputs[0], inputs[-1]))
    name = f"{candidate.name} ({first}, ..., {last})"
    for implementation, spread in spreads.items():
        values = {"function": name, "shape": label, "implementation": implementation, **spread.columns()}
        report.rows.append(values | {"/PyTorch": time_ratio(spread, spreads["PyTorch"])})
    if candidate.name != "dual_stream_embed":  # its purpose is to avoid waiting for the device; about 0.1 % of a step
        relative = time_ratio(spreads["kernel"], spreads["PyTorch"])
        report.criteria.append(Criterion(f"{label}: {name}, kernel / PyTorch", relative, 1.0))
    report.criteria.append(Criterion(f"{label}: {name}, largest error", error, TOLERANCE[inputs[0].dtype]))
