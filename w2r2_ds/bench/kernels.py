"""Time of the kernels of `model.kernels`, forward and backward, relative to the PyTorch operations that they replace.

Kernels, references and inputs are those that `model.kernels: auto` compares (kernels/candidates.py).
"""

from __future__ import annotations

from torch import Tensor

from w2r2_ds.bench.harness import find_device, interleave, ratio
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import find_shapes
from w2r2_ds.kernels.candidates import Candidate, Shapes, make_candidates
from w2r2_ds.kernels.measure import TOLERANCE, make_run, max_error
from w2r2_ds.kernels.select import TORCH_KERNELS, resolve_dtype, unavailable

DROPOUT = 0.05


def kernels(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 15) -> Report:
    """Time of every kernel at the sizes of a sample. Triton's and Liger's kernels are timed on a GPU only.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b.
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of runs per case, interleaved.
    """
    device, skipped = find_device(), unavailable()
    report = Report("kernels", "seconds forward and backward of one call", [])
    for each in find_shapes(shape, frames or []):
        dtype = resolve_dtype(each.dtype)
        shapes = Shapes(each.hidden, each.intermediate, each.lora_rank, DROPOUT, dtype, each.tokens)
        for candidate in make_candidates(shapes, device):
            if candidate.name in TORCH_KERNELS or not skipped:
                for make_inputs in candidate.cases:
                    measure(candidate, make_inputs(), rounds, f"{each.name}, {each.frames} frames", report)
    if skipped:
        report.notes.append(f"Triton's and Liger's kernels are not timed, since {skipped}.")
    return report


def measure(candidate: Candidate, inputs: tuple[Tensor, ...], rounds: int, where: str, report: Report) -> None:
    """Add the rows and criteria of a kernel for one set of inputs to the report.

    Args:
        candidate: the kernel and its reference.
        inputs: inputs of one of its cases; the shapes of the first and the last one are in the table.
        rounds: number of runs of the kernel and of the reference.
        where: the shape, for the report.
        report: gets the rows.
    """
    functions = {"PyTorch": candidate.reference, "kernel": candidate.kernel}
    runs = {name: make_run(function, inputs, candidate.leaves) for name, function in functions.items()}
    error = max_error(runs["kernel"](), runs["PyTorch"]())
    spreads = interleave(dict(runs), rounds, inputs[0].device, warmups=3)
    first, last = ("x".join(map(str, each.shape)) for each in (inputs[0], inputs[-1]))
    name = f"{candidate.name} ({first}, ..., {last})"
    for implementation, spread in spreads.items():
        values = {"function": name, "shape": where, "implementation": implementation, **spread.columns()}
        report.rows.append(values | {"/PyTorch": ratio(spread, spreads["PyTorch"])})
    if candidate.name != "dual_stream_embed":  # about 0.1 % of a step; its purpose is to avoid waiting for the device
        relative = ratio(spreads["kernel"], spreads["PyTorch"])
        report.criteria.append(Criterion(f"{where}: {name}, kernel / PyTorch", relative, 1.0))
    report.criteria.append(Criterion(f"{where}: {name}, largest error", error, TOLERANCE[inputs[0].dtype]))
