"""`model.kernels: auto`: the decision over injected measurements, on one rank and on two, and the comparison itself."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runs import run_ranks
from w2r2_ds.kernels import measure, select
from w2r2_ds.kernels.candidates import Candidate, Shapes, make_candidates
from w2r2_ds.kernels.measure import Measurement, choose, max_error, measurement_table, select_kernels
from w2r2_ds.kernels.saved_selection import kernels_to_manifest
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS

GOOD = Measurement("rms_norm", error=1e-3, tolerance=1e-2, torch_seconds=2e-3, kernel_seconds=1e-3)
SHAPES = Shapes(hidden=32, intermediate=48, rank=4, dropout=0.1, dtype=torch.float32, rows=70)
CUDA = torch.device("cuda")


def no_shapes() -> Shapes:
    raise AssertionError("shapes are needed only to measure")


def changed(**values: Any) -> Measurement:
    return dataclasses.replace(GOOD, **values)


@pytest.mark.parametrize(
    ("measurement", "used"),
    [
        (GOOD, True),
        (changed(error=1e-2), True),
        (changed(error=1.1e-2), False),
        (changed(error=float("nan")), False),
        (changed(error=float("inf")), False),
        (changed(kernel_seconds=2e-3), False),
        (changed(kernel_seconds=3e-3), False),
        (changed(kernel_seconds=float("nan")), False),
        (changed(failure="CompilationError: at 1:2"), False),
    ],
)
def test_a_kernel_must_be_correct_and_faster(measurement: Measurement, used: bool) -> None:
    assert choose([measurement, changed(name="swiglu")]) == ({"rms_norm", "swiglu"} if used else {"swiglu"})
    assert bool(measurement.rejection) is not used


def test_the_dropout_kernel_needs_the_projection() -> None:
    projection, dropout = changed(name="lora_projection"), changed(name="dropout_matmul")
    assert choose([projection, dropout]) == {"lora_projection", "dropout_matmul"}
    assert choose([changed(name="lora_projection", kernel_seconds=1.0), dropout]) == frozenset()


def test_without_measurements_pytorch_runs() -> None:
    assert choose([]) == TORCH_KERNELS


def test_table_has_a_line_per_kernel() -> None:
    failed = changed(name="swiglu", failure="OutOfResources: shared memory")
    lines = measurement_table([GOOD, failed, changed(name="dual_stream_embed", error=0.5)]).splitlines()
    assert len(lines) == 2 + 3 and len({line.find("1.0e-02") for line in lines[2:]}) == 1
    assert lines[2].split() == ["rms_norm", "1.0e-03", "1.0e-02", "2.000", "1.000", "kernel"]
    assert "OutOfResources: shared memory" in lines[3] and "values differ" in lines[4]


def test_maximum_error_of_one_wrong_row_and_of_a_value_that_is_not_finite() -> None:
    expected = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    wrong = expected.clone()
    wrong[-1] += 1
    assert max_error([expected, wrong], [expected, expected]) > 0.1
    wrong[0, 0] = torch.inf
    assert torch.tensor(max_error([wrong, expected], [expected, expected])).isnan()


def square(x: Tensor) -> Tensor:
    return x * x


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nfor this device")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def measured(kernel: Any) -> Measurement:
    """A kernel against `square`; the reference takes 2 s per case, the kernel 1 s."""
    times: Iterator[float] = iter([2.0, 1.0] * 2)
    draw = torch.Generator().manual_seed(0)
    case = lambda: (torch.randn(5, 3, generator=draw),)  # noqa: E731
    candidate = Candidate("square", kernel, square, (case, case), num_differentiable=1)
    return measure.measure(candidate, 1e-4, lambda run: next(times))


def test_values_and_gradients_are_compared() -> None:
    assert measured(lambda x: x.pow(2)) == Measurement("square", 0.0, 1e-4, 4.0, 2.0)
    assert measured(lambda x: x * x + 1).error > 0.1
    assert measured(WrongGradient.apply).error > 0.1
    assert torch.tensor(measured(lambda x: x * x / 0).error).isnan()
    failed = measured(raises)
    assert failed.failure == "RuntimeError: no kernel image" and failed.rejection


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_in_any_mode_of_the_caller(mode: Any) -> None:
    with mode():
        assert measured(lambda x: x.pow(2)).error == 0 and measured(WrongGradient.apply).error > 0.1


def test_the_lora_projection_equals_peft_on_the_cpu() -> None:
    candidate = next(each for each in make_candidates(SHAPES, torch.device("cpu")) if each.name == "lora_projection")
    found = measure.measure(candidate, measure.TOLERANCE[torch.float32], lambda run: 1.0)
    assert not found.failure and 0 <= found.error <= 1e-5


def test_on_a_cpu_pytorch_runs_and_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_kernels("auto", no_shapes, torch.device("cpu")) == TORCH_KERNELS
    assert len(caplog.records) == 1 and "cpu" in caplog.text and "auto" in caplog.text
    assert select_kernels("torch", no_shapes, CUDA) == TORCH_KERNELS


def test_one_table_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(measure, "measure_all", lambda shapes, device: ("", [GOOD, changed(name="swiglu", error=1.0)]))
    with caplog.at_level(logging.INFO):
        assert select_kernels("auto", lambda: SHAPES, CUDA) == {"rms_norm"}
    assert len(caplog.records) == 1 and measurement_table([GOOD]) in caplog.text
    monkeypatch.setattr(measure, "measure_all", lambda shapes, device: ("there is no compiler", []))
    assert select_kernels("auto", lambda: SHAPES, CUDA) == TORCH_KERNELS


def test_triton_is_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert select_kernels("triton", no_shapes, CUDA) == ALL_KERNELS
    assert {each.name for each in make_candidates(SHAPES, torch.device("cpu"))} == ALL_KERNELS
    without = dataclasses.replace(SHAPES, dropout=0.0)
    assert {each.name for each in make_candidates(without, torch.device("cpu"))} == ALL_KERNELS - {"dropout_matmul"}


def work(folder: Path) -> None:
    """Each rank measures another kernel; rank 1 has another GPU than the checkpoint, and at last no Liger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        own = [[GOOD], [changed(name="swiglu"), changed(error=1.0)]][rank]
        patch.setattr(measure, "measure_all", lambda shapes, device: ("", own))
        found: dict[str, Any] = {"kernels": sorted(select_kernels("auto", lambda: SHAPES, CUDA))}
        patch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
        saved = kernels_to_manifest("auto", frozenset({"swiglu"}), CUDA)
        patch.setattr(torch.cuda, "get_device_name", lambda device: ["GPU A", "GPU B"][rank])
        found["resumed"] = sorted(select_kernels("auto", lambda: SHAPES, CUDA, saved))
        if rank == 1:
            patch.setattr(select, "import_problem", lambda name: "is not installed" if "liger" in name else "")
        with pytest.raises(ValueError, match="liger-kernel") as caught:
            select_kernels("auto", lambda: SHAPES, CUDA)
        found["error"] = str(caught.value)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


@pytest.mark.distributed
def test_all_ranks_use_what_rank_0_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_ranks(2, Path(__file__), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["kernels"] == ["rms_norm"] and first["resumed"] == ["swiglu"]
