"""Kernels of `model.kernels: auto` in a checkpoint: a resumed run reuses them, or warns and measures again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.kernels import measure, saved_selection
from w2r2_ds.kernels.candidates import Shapes
from w2r2_ds.kernels.measure import Measurement, select_kernels
from w2r2_ds.kernels.saved_selection import kernels_to_manifest
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS
from w2r2_ds.training.checkpoint import save
from w2r2_ds.training.checkpoint.save import CheckpointInfo

SHAPES = Shapes(hidden=32, intermediate=48, rank=4, dropout=0.1, dtype=torch.float32, rows=70)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
VERSIONS = {"torch": "2.13.0+cu130", "triton": "3.7.0", "liger-kernel": "0.6.4", "w2r2-ds": "0.1.0"}
CHOSEN = frozenset({"lora_projection", "swiglu"})


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Shapes]:
    """Shapes of every measurement, on a made-up GPU on which only `rms_norm` is right and faster."""
    calls: list[Shapes] = []

    def measure_all(shapes: Shapes, device: torch.device) -> tuple[str, list[Measurement]]:
        calls.append(shapes)
        return "", [Measurement("rms_norm", 1e-3, 1e-2, torch_seconds=2e-3, kernel_seconds=1e-3)]

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
    monkeypatch.setattr(saved_selection, "version", VERSIONS.__getitem__)
    monkeypatch.setattr(measure, "measure_all", measure_all)
    return calls


def record(kernels: Sequence[str] = tuple(CHOSEN), **changes: Any) -> dict[str, Any]:
    """A selection as it is read from a manifest."""
    saved: dict[str, Any] = json.loads(json.dumps(kernels_to_manifest("auto", frozenset(kernels), CUDA)))
    return saved | changes


def test_the_manifest_holds_the_kernels_that_auto_chose(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Shapes]
) -> None:
    monkeypatch.setattr(save.dist, "get_world_size", lambda: 2)
    model = SimpleNamespace(fingerprint={}, kernels=CHOSEN)
    engine: Any = SimpleNamespace(module=SimpleNamespace(model=model), device=CUDA, zero_optimization_stage=lambda: 3)
    info, token = CheckpointInfo(step=10, metrics={}, data=[]), SimpleNamespace(number=1)
    kernels = {
        name: save.build_manifest(engine, RunConfig(model=ModelConfig(kernels=name)), info, token)["kernels"]  # type: ignore[arg-type]
        for name in ("auto", "torch", "triton")
    }
    stored = {"names": sorted(CHOSEN), "device": "GPU A"} | VERSIONS
    assert kernels == {"auto": stored, "torch": None, "triton": None}
    assert kernels_to_manifest("auto", TORCH_KERNELS, CPU) is None


@pytest.mark.parametrize("kernels", [CHOSEN, TORCH_KERNELS, frozenset[str]()])
def test_a_resumed_run_reuses_them_and_measures_nothing(measurements: list[Shapes], kernels: frozenset[str]) -> None:
    assert select_kernels("auto", lambda: SHAPES, CUDA, record(tuple(kernels))) == kernels
    assert measurements == []
    assert select_kernels("auto", lambda: SHAPES, CUDA) == {"rms_norm"}
    assert measurements == [SHAPES]


def test_explicit_kernels_take_precedence(measurements: list[Shapes]) -> None:
    assert select_kernels("torch", lambda: SHAPES, CUDA, record()) == TORCH_KERNELS
    assert select_kernels("triton", lambda: SHAPES, CUDA, record()) == ALL_KERNELS
    assert measurements == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "GPU B"}, ["device", "GPU B", "GPU A"]),
        ({"triton": "3.6.0"}, ["triton", "3.6.0", "3.7.0"]),
        ({"liger-kernel": "none"}, ["liger-kernel", "none", "0.6.4"]),
        ({"names": ["removed_kernel"]}, ["removed_kernel"]),
    ],
)
def test_another_environment_warns_and_measures_again(
    measurements: list[Shapes], caplog: pytest.LogCaptureFixture, changes: dict[str, Any], named: list[str]
) -> None:
    assert select_kernels("auto", lambda: SHAPES, CUDA, record(**changes)) == {"rms_norm"}
    assert measurements == [SHAPES]
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert all(name in warning for name in (*named, "model.kernels"))


def test_without_a_gpu_a_resumed_run_warns_and_uses_pytorch(
    measurements: list[Shapes], caplog: pytest.LogCaptureFixture
) -> None:
    assert select_kernels("auto", lambda: SHAPES, CPU, record()) == TORCH_KERNELS
    assert measurements == []
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "GPU A" in warning and "cpu" in warning


def test_without_triton_a_resumed_run_warns_and_measures_again(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Shapes], caplog: pytest.LogCaptureFixture
) -> None:
    saved = record()

    def version(package: str) -> str:
        if package == "triton":
            raise saved_selection.PackageNotFoundError(package)
        return VERSIONS[package]

    monkeypatch.setattr(saved_selection, "version", version)
    monkeypatch.setattr(measure, "measure_all", lambda shapes, device: ("triton is not installed", []))
    assert select_kernels("auto", lambda: SHAPES, CUDA, saved) == TORCH_KERNELS
    assert "triton was 3.7.0, now none" in caplog.text
