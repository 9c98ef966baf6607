"""Time of the kernels in `w2r2_ds/kernels/`, forward and backward, relative to PyTorch and to the roofline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from w2r2_ds.bench.harness import Case, Lap, find_device, interleave, ratio, timed
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed
from w2r2_ds.kernels.lora_linear import lora_projection
from w2r2_ds.kernels.select import Implementation, resolve_dtype, unavailable
from w2r2_ds.training.throughput import matrix_rate

Function = Callable[..., Any]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Maximum relative difference of results and gradients: sums in another order, fewer roundings."""
COPY_BYTES = 2**30
"""Bytes copied to measure the memory bandwidth."""
DROPOUT, LORA_SCALE = 0.05, 2.0


def kernels(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 15) -> Report:
    """Time of every implementation of a kernel at the sizes of a sample. Triton is timed on a GPU only.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b.
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of runs per case, interleaved.
    """
    device = find_device()
    report = Report("kernels", "seconds forward and backward of one call", [])
    triton = not unavailable()
    for each in find_shapes(shape, frames or []):
        dtype = resolve_dtype(each.dtype)  # type: ignore[arg-type]
        rates = (matrix_rate(device, dtype), memory_rate()) if device.type == "cuda" else None
        for kernel in kernel_calls(each, device, dtype):
            measure(kernel, triton, rounds, rates, f"{each.name}, {each.frames} frames", report)
    if not triton:
        report.notes.append("Triton's kernels are timed on a GPU only: the time of its interpreter has no meaning.")
    return report


@dataclass(frozen=True)
class KernelCall:
    """One kernel with its inputs and the code that it replaces.

    Attributes:
        name: name of the kernel and its variant.
        function: takes the inputs and `kernels`, the implementation to use.
        inputs: inputs; every run gets copies.
        leaves: number of leading inputs that need a gradient.
        moved: minimum bytes to and from memory, forward and backward, as in the docstrings of `w2r2_ds/kernels/`.
        flops: FLOPs of the matrix products.
        stock: the code that the kernel replaces.
    """

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    leaves: int
    moved: int
    flops: int
    stock: Function

    def implementations(self, triton: bool) -> dict[str, Function]:
        """Name -> implementation; the first is the baseline."""
        names: tuple[Implementation, ...] = ("torch", "triton") if triton else ("torch",)
        return {"stock": self.stock} | {name: partial(self.function, kernels=name) for name in names}


def kernel_calls(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[KernelCall]:
    """All kernels, at the sizes of one decoder layer and one sample."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return [
        embedding_call(shape, draw),
        *(
            lora_call(shape.tokens, shape.hidden, width, shape.lora_rank, rate, draw)
            for width in (shape.hidden, shape.intermediate)
            for rate in (0, DROPOUT)
        ),
    ]


def embedding_call(shape: Shape, draw: Callable[..., Tensor]) -> KernelCall:
    """The input embeddings of both streams; they need a gradient for activation checkpointing."""
    tokens, visual, hidden = shape.tokens, shape.visual_tokens, shape.hidden
    embeds, geometry, visual_2d = draw(1, tokens, hidden), draw(visual, hidden), draw(visual, hidden)
    positions = torch.arange(visual, device=embeds.device) + 1
    moved = (4 * visual + 3 * (tokens - visual) + 2 * visual + 2 * tokens) * hidden * embeds.itemsize
    return KernelCall("dual_stream_embed", _embed, (embeds, geometry, visual_2d, positions), 2, moved, 0, _stock_embed)


def _embed(embeds: Tensor, geometry: Tensor, visual_2d: Tensor, positions: Tensor, kernels: Implementation) -> Tensor:
    return dual_stream_embed(embeds, positions, visual_2d, visual_2d + geometry, kernels)[0]


def _stock_embed(embeds: Tensor, geometry: Tensor, visual_2d: Tensor, positions: Tensor) -> Tensor:
    """Scatter both streams' visual tokens into the embeddings, as the forward of transformers does for one."""
    mask = torch.zeros(embeds.shape[1], dtype=torch.bool, device=embeds.device).index_fill_(0, positions, True)
    places = mask[None, :, None].expand_as(embeds)
    fused = embeds.masked_scatter(places, visual_2d + geometry)
    embeds.detach().masked_scatter(places, visual_2d)
    return fused


def lora_call(tokens: int, hidden: int, width: int, rank: int, rate: float, draw: Callable[..., Tensor]) -> KernelCall:
    """A LoRA projection from `hidden` to `width` with dropout `rate`."""
    x, a, b, weight = draw(tokens, hidden), draw(rank, hidden), draw(width, rank), draw(width, hidden)
    read, out, mask = x.nbytes, tokens * width * x.itemsize, tokens * hidden if rate else 0
    moved = read + 2 * out + 2 * mask + 2 * out + 3 * read + 2 * mask
    own, stock = partial(_lora, rate=rate), partial(_peft_lora, rate=rate)
    name = f"lora_projection to {width}" + (", dropout" if rate else "")
    return KernelCall(name, own, (x, a, b, weight), 3, moved, 4 * tokens * hidden * width, stock)


def _lora(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, kernels: Implementation, rate: float) -> Tensor:
    return lora_projection(x, weight, None, a, b, LORA_SCALE, rate, kernels)


def _peft_lora(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, rate: float) -> Tensor:
    """The products and sums of PEFT's LoRA layer."""
    return linear(x, weight) + linear(linear(dropout(x, rate) if rate else x, a), b) * LORA_SCALE


def measure(
    kernel: KernelCall, triton: bool, rounds: int, rates: tuple[float, float] | None, where: str, report: Report
) -> None:
    """Add one kernel's rows and criteria to the report.

    Args:
        kernel: the call to time.
        triton: also time the Triton implementation.
        rounds: number of runs per implementation.
        rates: FLOP/s and bytes/s of the device, for the roofline.
        where: the shape, for the report.
        report: gets the rows.
    """
    device, dtype = kernel.inputs[0].device, kernel.inputs[0].dtype
    implementations = kernel.implementations(triton)
    cases = {name: case(kernel, function) for name, function in implementations.items()}
    spreads = interleave(cases, rounds, device, warmups=3)
    for name, spread in spreads.items():
        values: dict[str, Any] = {"function": kernel.name, "shape": where, "implementation": name, **spread.columns()}
        values |= {"/stock": ratio(spread, spreads["stock"]), "mib": kernel.moved / 2**20}
        if rates is not None:
            least = kernel.flops / rates[0] + kernel.moved / rates[1]
            values |= {"/roofline": spread.median / least}
        report.rows.append(values)
    ours = "triton" if triton else "torch"
    if kernel.name != "dual_stream_embed":  # about 0.1 % of a step; its purpose is to avoid waiting for the device
        claim = f"{where}: {kernel.name}, {ours} / stock"
        report.criteria.append(Criterion(claim, ratio(spreads[ours], spreads["stock"]), 1.0))
    # Triton's kernels draw the same dropout mask as the torch implementation, also on a GPU.
    reference = "torch" if triton else "stock"
    difference = largest_difference(kernel, implementations[ours], implementations[reference])
    claim = f"{where}: {kernel.name}, difference from {reference}"
    report.criteria.append(Criterion(claim, difference, TOLERANCE[dtype]))


def case(kernel: KernelCall, function: Function) -> Case:
    """Time one forward and backward pass, without copying the inputs."""

    def once() -> Lap:
        inputs, cotangents = prepare(kernel, function)
        lap = Lap()
        with timed(lap, inputs[0].device):
            forward_backward(kernel, function, inputs, cotangents)
        return lap

    return once


def prepare(kernel: KernelCall, function: Function) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of the inputs (some backward passes overwrite theirs) and a random gradient for every output."""
    inputs = [each.clone() for each in kernel.inputs]
    with torch.no_grad():
        outputs = function(*(each.clone() for each in inputs))
    for leaf in inputs[: kernel.leaves]:
        leaf.requires_grad_()
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return inputs, [torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) for o in outputs]


def forward_backward(
    kernel: KernelCall, function: Function, inputs: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    """Outputs and gradients of one call."""
    result = function(*inputs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    grads = torch.autograd.grad(outputs, inputs[: kernel.leaves], cotangents)
    return [each.detach() for each in (*outputs, *grads)]


def largest_difference(kernel: KernelCall, ours: Function, reference: Function) -> float:
    """Largest relative difference of an output or a gradient, with the same dropout mask."""
    results = []
    for function in (ours, reference):
        inputs, cotangents = prepare(kernel, function)
        torch.manual_seed(2)
        results.append(forward_backward(kernel, function, inputs, cotangents))
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*results, strict=True))


def memory_rate() -> float:
    """Memory bandwidth in bytes per second, reads plus writes, of a copy on the GPU; the best of ten."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target, laps = torch.empty_like(source), []
    for _ in range(10):
        laps.append(Lap())
        with timed(laps[-1], source.device):
            target.copy_(source)
    return 2 * COPY_BYTES / min(lap.total() for lap in laps)
