"""`model.kernels: auto`: compare every kernel with PyTorch on the device, and use those that are correct and faster.

Runs once, when the model is built and before its weights are on the device. Rank 0 measures and broadcasts the
measurements. All ranks choose from the same numbers, so that they run the same operations. A resumed run measures
nothing if it can reuse the kernels of its checkpoint (saved_selection.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.kernels.candidates import Candidate, Shapes, make_candidates
from w2r2_ds.kernels.saved_selection import kernels_from_manifest
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS, Kernels, check_kernels, unavailable
from w2r2_ds.utils.distributed import on_rank_zero, raise_on_all_ranks

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Maximum accepted error of a dtype, relative to the largest value of a tensor.

bfloat16 has 8 significant bits and rounds by up to 2**-8 = 0.004 of a value. Kernel and reference round a few
intermediate results differently. A wrong row, tile or mask gives an error near 1.
"""
WARMUP, ROUNDS = 3, 10
"""Number of runs before the timing (the first one compiles the kernel), and number of timed runs."""

Workload = Callable[[], list[Tensor]]
"""One forward and backward pass, see `make_run`."""


@dataclass(frozen=True)
class Measurement:
    """A kernel compared with PyTorch, forward and backward, over all its cases.

    Attributes:
        name: kernel name.
        error: largest relative error of outputs and gradients; NaN if a value is not finite, if expected and actual
            values of a tensor are all 0, or if the kernel failed.
        tolerance: maximum accepted error.
        torch_seconds: time of the reference, summed over the cases.
        kernel_seconds: time of the kernel, summed over the cases; NaN if it failed.
        failure: type and first line of the exception that the kernel raised; empty if it ran.
    """

    name: str
    error: float
    tolerance: float
    torch_seconds: float
    kernel_seconds: float
    failure: str = ""

    @property
    def rejection(self) -> str:
        """Reason why PyTorch is used instead; empty if the kernel is correct and faster."""
        if self.failure:
            return self.failure
        # Written so that NaN is rejected: every comparison with NaN is false.
        if not self.error <= self.tolerance:
            return "values differ"
        return "" if self.kernel_seconds < self.torch_seconds else "not faster"


def select_kernels(
    mode: str, make_shapes: Callable[[], Shapes], device: torch.device, saved: Mapping[str, Any] | None = None
) -> Kernels:
    """Kernels for `model.kernels`. With auto it is a collective on a CUDA device, or if `saved` is passed.

    Args:
        mode: value of `model.kernels`: torch, triton or auto.
        make_shapes: returns the run's shapes; called only where kernels are measured.
        device: the model's device.
        saved: `kernels_to_manifest` of the checkpoint that the run resumes from, the same on every rank; for auto only.

    Raises:
        ValueError: the kernels that are configured or were chosen cannot run on a rank.
    """
    check_kernels(mode)
    if mode != "auto":
        return ALL_KERNELS if mode == "triton" else TORCH_KERNELS
    # Rank 0 decides for all ranks whether the stored kernels are reused: machines may differ, and ranks with different
    # kernels would round differently.
    kernels = on_rank_zero(lambda: kernels_from_manifest(saved, device)) if saved else None
    if kernels is not None:
        logger.info("kernels (model.kernels auto), as in the checkpoint: %s", ", ".join(sorted(kernels)) or "none")
    elif device.type == "cuda":
        kernels = measured_kernels(make_shapes, device)
    else:
        logger.info("kernels: PyTorch (model.kernels auto), since the model is on the %s", device.type)
        return TORCH_KERNELS
    # Rank 0 can run the kernels; on another machine a package may be missing.
    with raise_on_all_ranks():
        reason = unavailable(interpreted=True) if kernels - TORCH_KERNELS else ""
        if reason:
            raise ValueError(
                f"rank 0 chose the kernels {', '.join(sorted(kernels))} (model.kernels auto), but on another rank's "
                f"machine {reason}; install the same packages on every machine, or use --model.kernels torch."
            )
    return kernels


def measured_kernels(make_shapes: Callable[[], Shapes], device: torch.device) -> Kernels:
    """Kernels chosen from rank 0's measurements, which are logged. Collective."""
    reason, measurements = on_rank_zero(lambda: measure_all(make_shapes(), device))
    fallback = f"kernels: PyTorch (model.kernels auto), since {reason}"
    logger.info("%s", measurement_table(measurements) if measurements else fallback)
    return choose(measurements)


def choose(measurements: Sequence[Measurement]) -> Kernels:
    """The kernels that are correct and faster; `TORCH_KERNELS` if nothing was measured."""
    if not measurements:
        return TORCH_KERNELS
    kernels = frozenset(each.name for each in measurements if not each.rejection)
    # Only the LoRA projection calls the dropout kernel; PEFT's forward does not.
    return kernels if "lora_projection" in kernels else kernels - {"dropout_matmul"}


def measure_all(shapes: Shapes, device: torch.device) -> tuple[str, list[Measurement]]:
    """Measure all candidates; restores the random state and frees the memory.

    Returns:
        The reason why nothing can be measured (else empty), and the measurements.
    """
    reason = unavailable()
    if reason:
        return reason, []
    with torch.random.fork_rng([device]):
        candidates = make_candidates(shapes, device)
        measurements = [measure(candidate, TOLERANCE[shapes.dtype], cuda_seconds) for candidate in candidates]
    torch.cuda.empty_cache()
    return "", measurements


def measure(candidate: Candidate, tolerance: float, timer: Callable[[Workload], float]) -> Measurement:
    """Compare one kernel with its reference: values and gradients, then time.

    Args:
        candidate: the kernel and its reference.
        tolerance: maximum accepted error.
        timer: returns the seconds of a run.
    """
    cases = [compare(candidate, case(), tolerance, timer) for case in candidate.cases]
    return Measurement(
        candidate.name,
        # torch's maximum keeps NaN; Python's max may drop it.
        error=float(torch.tensor([case.error for case in cases]).max()),
        tolerance=tolerance,
        torch_seconds=sum(case.torch_seconds for case in cases),
        kernel_seconds=sum(case.kernel_seconds for case in cases),
        failure=next((case.failure for case in cases if case.failure), ""),
    )


# The caller may be in inference or no_grad mode; gradients are compared too.
@torch.inference_mode(False)
@torch.enable_grad()
def compare(
    candidate: Candidate, inputs: Sequence[Tensor], tolerance: float, timer: Callable[[Workload], float]
) -> Measurement:
    """Compare one kernel with its reference for the inputs of one case."""
    expected_run = make_run(candidate.reference, inputs, candidate.num_differentiable)
    expected = expected_run()
    torch_seconds = timer(expected_run)
    try:
        kernel_run = make_run(candidate.kernel, inputs, candidate.num_differentiable)
        error = max_error(kernel_run(), expected)
        return Measurement(candidate.name, error, tolerance, torch_seconds, timer(kernel_run))
    except Exception as exception:  # compilers and drivers raise many types
        # A kernel that fails is not used. An error that broke the CUDA context is raised again here and ends the run:
        # no later operation could succeed.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Measurement(candidate.name, torch.nan, tolerance, torch_seconds, torch.nan, describe_error(exception))


def make_run(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], num_differentiable: int
) -> Workload:
    """One forward and backward pass as a function without arguments.

    It returns the outputs, then the gradients of the first `num_differentiable` inputs.
    """
    # Some backward passes overwrite their inputs (Liger's SwiGLU). Kernel and reference therefore have copies. Only the
    # values of the first run are compared; later runs, whose inputs the kernel may have overwritten, are only timed.
    copies = [each.clone() for each in inputs]
    for leaf in copies[:num_differentiable]:
        leaf.requires_grad_()
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        torch.manual_seed(0)  # the same dropout mask in all runs
        outputs = function(*copies)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        differentiable = [each for each in outputs if each.requires_grad]
        if not upstream:
            # Gradients of the outputs, with another value in every element, so that a permutation is an error.
            upstream.extend(
                torch.linspace(-1, 1, each.numel(), device=each.device).view_as(each).to(each.dtype)
                for each in differentiable
            )
        gradients = torch.autograd.grad(differentiable, copies[:num_differentiable], upstream)
        return [each.detach() for each in (*outputs, *gradients)]

    return run


def max_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference relative to the largest value of the expected tensor, over all tensors.

    NaN if an actual value is not finite, or if expected and actual values of a tensor are all 0.
    """
    errors = []
    for result, reference in zip(actual, expected, strict=True):
        # Not relative to the norm, which a single wrong row among thousands would hardly change.
        error = (result.float() - reference.float()).abs().max() / reference.float().abs().max()
        errors.append(torch.where(result.isfinite().all(), error, torch.nan))
    return float(torch.stack(errors).max())


def cuda_seconds(run: Workload) -> float:
    """Median time of a run on the GPU, in seconds."""
    times = []
    for index in range(WARMUP + ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if index >= WARMUP:
            times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def describe_error(error: Exception) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measurement_table(measurements: Sequence[Measurement]) -> str:
    """Table of the measurements and the choice, one kernel per line; milliseconds for forward and backward."""
    lines = [
        "kernels (model.kernels auto), measured on this device:",
        f"{'kernel':<18}{'max error':>11}{'tolerance':>11}{'PyTorch ms':>12}{'kernel ms':>11}  used",
    ]
    kernels = choose(measurements)
    for each in measurements:
        used = "kernel" if each.name in kernels else f"PyTorch ({each.rejection or 'needs lora_projection'})"
        lines.append(
            f"{each.name:<18}{each.error:>11.1e}{each.tolerance:>11.1e}{1000 * each.torch_seconds:>12.3f}"
            f"{1000 * each.kernel_seconds:>11.3f}  {used}"
        )
    return "\n".join(lines)
