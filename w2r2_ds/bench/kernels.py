"""Time of the kernels in `w2r2_ds/kernels/`, forward and backward, relative to PyTorch and to the roofline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2r2_ds.bench.harness import Case, Lap, find_device, interleave, ratio, timed
from w2r2_ds.bench.operations import Operation, Way, operations
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import find_shapes
from w2r2_ds.kernels.select import resolve_dtype, resolve_kernels
from w2r2_ds.training.throughput import matrix_rate

EQUAL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Maximum relative difference of results and gradients: sums in another order, fewer roundings."""
MEMORY = 2**30
"""Bytes copied to measure the memory bandwidth."""


def kernels(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 15) -> Report:
    """Time of every kernel's ways at the sizes of a sample; on the CPU of those that are more than one without Triton.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b.
        frames: frames per sample, one or several; the shape's own without it.
        rounds: how often each is run, in turns.
    """
    device = find_device()
    report = Report("kernels", "seconds forward and backward of one call", [])
    triton = resolve_kernels("auto") == "triton"
    for each in find_shapes(shape, frames or []):
        dtype = resolve_dtype(each.dtype)  # type: ignore[arg-type]
        rates = (matrix_rate(device, dtype), memory_rate()) if device.type == "cuda" else None
        for operation in operations(each, device, dtype):
            ways = operation.ways(triton)
            if len(ways) > 1:
                measure(operation, ways, rounds, rates, f"{each.name}, {each.frames} frames", report)
    if not triton:
        report.notes.append("Without a GPU Triton's kernels are not timed: its interpreter says nothing about speed.")
    return report


def measure(
    operation: Operation,
    ways: dict[str, Way],
    rounds: int,
    rates: tuple[float, float] | None,
    where: str,
    report: Report,
) -> None:
    """Add one function's rows and criteria."""
    device, dtype = operation.inputs[0].device, operation.inputs[0].dtype
    base = next(iter(ways))
    cases: dict[str, Case] = {name: case(operation, way) for name, way in ways.items()}
    spreads = interleave(cases, rounds, device, warmups=3)
    for name, spread in spreads.items():
        values: dict[str, Any] = {"function": operation.name, "shape": where, "way": name, **spread.columns()}
        values |= {f"/{base}": ratio(spread, spreads[base]), "mib": operation.moved / 2**20}
        if rates is not None:
            least = operation.operations / rates[0] + operation.moved / rates[1]
            values |= {"/roofline": spread.median / least}
        report.rows.append(values)
    triton = "triton" in ways
    ours = "triton" if triton else "torch"
    if operation.name != "dual_stream_embed":  # one code path without a read of the device; its time is no matter
        claim = f"{where}: {operation.name}, {ours} / {base}"
        report.criteria.append(Criterion(claim, ratio(spreads[ours], spreads[base]), 1.0))
    reference = "torch" if triton else base  # which draws the same dropout, on a GPU too
    gap = difference(operation, ways[ours], ways[reference])
    report.criteria.append(Criterion(f"{where}: {operation.name}, difference from {reference}", gap, EQUAL[dtype]))


def case(operation: Operation, way: Way) -> Case:
    """Time one call and its backward pass, without the copy of its inputs."""

    def once() -> Lap:
        inputs, cotangents = prepare(operation, way)
        lap = Lap()
        with timed(lap, inputs[0].device):
            call(operation, way, inputs, cotangents)
        return lap

    return once


def prepare(operation: Operation, way: Way) -> tuple[list[Tensor], list[Tensor]]:
    """Copy of the inputs (some backward passes overwrite theirs) and a gradient for every output."""
    inputs = [each.clone() for each in operation.inputs]
    with torch.no_grad():
        outputs = way(*(each.clone() for each in inputs))
    for leaf in inputs[: operation.leaves]:
        leaf.requires_grad_()
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    made = outputs if isinstance(outputs, tuple) else (outputs,)
    return inputs, [torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) for o in made]


def call(operation: Operation, way: Way, inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = way(*inputs)
    made = list(outputs) if isinstance(outputs, tuple) else [outputs]
    gradients = torch.autograd.grad(made, inputs[: operation.leaves], cotangents)
    return [each.detach() for each in (*made, *gradients)]


def difference(operation: Operation, ours: Way, base: Way) -> float:
    """Largest relative difference of an output or a gradient, with the same dropout mask."""
    found = []
    for way in (ours, base):
        inputs, cotangents = prepare(operation, way)
        torch.manual_seed(2)
        found.append(call(operation, way, inputs, cotangents))
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))


def memory_rate() -> float:
    """Memory bandwidth in bytes per second, read and written, of a copy; the best of ten."""
    source = torch.empty(MEMORY, dtype=torch.uint8, device="cuda")
    target, laps = torch.empty_like(source), []
    for _ in range(10):
        laps.append(Lap())
        with timed(laps[-1], source.device):
            target.copy_(source)
    return 2 * MEMORY / min(lap.total() for lap in laps)
