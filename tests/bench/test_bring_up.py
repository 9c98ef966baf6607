"""`bench.py bring_up` on the CPU: every part on the shape `tiny`; no times are asserted."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.backends.cuda import cudnn_sdp_enabled

from w2r2_ds.bench.bring_up import gpu_tests, modules, run, sdpa_backends, step_equivalence, steps, zero3
from w2r2_ds.bench.bring_up.modules import targets
from w2r2_ds.bench.bring_up.run import PARTS
from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.memory import measured_bytes, step_bytes, weight_bytes
from w2r2_ds.bench.model import Subject, bench_optimizer, build, update
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import TINY
from w2r2_ds.commands.bench import main
from w2r2_ds.kernels.select import TORCH_KERNELS
from w2r2_ds.models.fusion import FUSIONS


@pytest.fixture
def settings() -> Settings:
    return Settings.of(None, None, questions=[1, 3], rounds=1, steps=3)


def bring_up(tmp_path: Path, *options: str, status: int = 0) -> dict[str, Any]:
    """Run `w2r2 bench bring_up` and return its JSON report; all numbers are finite."""
    target = tmp_path / "report.json"
    assert main(["bring_up", "--rounds", "1", "--json", str(target), *options]) == status
    report: dict[str, Any] = json.loads(target.read_text())
    for part in report["parts"].values():
        for row in part["rows"]:
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
    return report


def test_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["sdpa_backends", "modules", "steps"]
    report = bring_up(tmp_path, "--parts", f"[{','.join(names)}]", "--steps", "3", "--questions", "[1,3]")
    assert [row["part"] for row in report["rows"]] == names == list(report["parts"])
    assert all(row["result"] == "done" for row in report["rows"])
    printed = capsys.readouterr()
    assert all(f"{name}: " in printed.out for name in names) and "modules, after" in printed.err
    assert [row["cuDNN"] for row in report["parts"]["sdpa_backends"]["rows"]] == ["on", "off"]
    timed = [row["module"] for row in report["parts"]["modules"]["rows"]]
    assert timed == list(targets(build(TINY, torch.device("cpu"))))
    rows = report["parts"]["steps"]["rows"]
    assert [(row["case"], row["K"]) for row in rows] == [
        ("single pass", 1),
        ("W2R2", 1),
        ("single pass", 3),
        ("W2R2", 3),
    ]
    assert all(row["peak_gib"] > 0 and row["predicted_gib"] > 0 for row in rows)


@pytest.mark.slow  # starts pytest
def test_gpu_tests_are_collected_and_run(settings: Settings) -> None:
    report = gpu_tests.run(settings)
    counts = {row["file"]: row for row in report.rows}
    assert "tests.kernels.test_gpu" in counts and report.criteria[0].met
    if settings.device.type == "cpu":
        assert all(row["skipped"] and not row["passed"] + row["failed"] for row in counts.values())


@pytest.mark.slow  # starts pytest
def test_a_failed_gpu_test_is_a_criterion(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_wrong():\n    assert 1 + 1 == 3\n\n"
        "@pytest.mark.gpu\ndef test_right():\n    pass\n\ndef test_other():\n    pass\n"
    )
    (tmp_path / "w2r2_ds").mkdir()
    monkeypatch.setattr(gpu_tests.w2r2_ds, "__file__", str(tmp_path / "w2r2_ds" / "__init__.py"))
    report = gpu_tests.run(settings)
    (row,) = report.rows
    assert (row["passed"], row["skipped"], row["failed"]) == (1, 0, 1)
    assert not report.criteria[0].met and any("test_wrong" in note for note in report.notes)


def test_an_installed_package_has_no_tests(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_tests.w2r2_ds, "__file__", str(tmp_path / "w2r2_ds" / "__init__.py"))
    with pytest.raises(ValueError, match="checkout"):
        gpu_tests.run(settings)


def test_the_comparison_of_backends_starts_with_all_shapes_known(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first row would have the time in which Triton compiles, and cuBLAS chooses kernels."""
    seen: list[bool] = []
    stock = sdpa_backends.update
    monkeypatch.setattr(sdpa_backends, "update", lambda *a: (seen.append(cudnn_sdp_enabled()), stock(*a)))
    sdpa_backends.run(settings)
    count = settings.steps + 1
    assert seen == [False] * count + [True] * count + [False] * count


def test_modules_hold_one_model_at_a_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """3B and 7B together do not fit on a GPU that can hold either."""
    models: list[Any] = []

    def recorded(shape: Any, device: torch.device) -> Any:
        gc.collect()
        assert not any(reference() for reference in models), "the model before is still in memory"
        subject = build(shape, device)
        models.append(weakref.ref(subject.model))
        return subject

    monkeypatch.setattr(modules, "build", recorded)
    monkeypatch.setattr(modules, "memory_bandwidth", lambda device: 1e9)
    modules.run(replace(settings, shapes=("tiny", "tiny")))
    assert len(models) == 2


def test_what_does_not_fit_is_a_note(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape, or one number of questions; everything else is measured."""

    def too_large(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has more lines")

    monkeypatch.setattr(modules, "build", too_large)
    monkeypatch.setattr(modules, "memory_bandwidth", lambda device: 1e9)
    report = modules.run(settings)
    assert not report.rows
    assert "tiny, 2 frames: not measured, out of memory (CUDA out of memory)." in report.notes
    stock = Subject.batch
    monkeypatch.setattr(
        Subject, "batch", lambda self, count=1, packed=False: too_large() if count == 3 else stock(self, count, packed)
    )
    report = steps.run(settings)
    assert [row["K"] for row in report.rows] == [1, 1]
    assert any(note.startswith("tiny, 2 frames, K 3: not measured") for note in report.notes)


def test_step_equivalence(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_equivalence, "FUSIONS", {"add": FUSIONS["add"]})
    report = step_equivalence.run(settings)
    assert len(report.rows) == 2 * 2 * 2 and report.criteria[0].met
    losses = {(row["zero_geometry"], row["visual_mask_ratio"]): row["loss"] for row in report.rows}
    assert len(set(losses.values())) == 4, "every option changes the loss"


@pytest.mark.parametrize("fault", ["values", "no gradient", "NaN"])
def test_step_equivalence_finds_a_wrong_kernel(settings: Settings, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from w2r2_ds.kernels import lora_linear

    right = lora_linear.lora_projection

    def wrong(*arguments: Any) -> torch.Tensor:
        if fault == "no gradient":
            return right(*(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments))
        return right(*arguments) * (1.001 if fault == "values" else torch.nan)

    monkeypatch.setattr(lora_linear, "lora_projection", wrong)
    monkeypatch.setattr(step_equivalence, "ZERO_GEOMETRY", ("merged",))
    monkeypatch.setattr(step_equivalence, "FUSIONS", {"add": FUSIONS["add"]})
    report = step_equivalence.run(settings)
    assert not report.criteria[0].met
    assert all(row["largest difference"] > step_equivalence.TOLERANCE for row in report.rows)


def test_the_measured_zero3_settings_are_those_of_the_shipped_json() -> None:
    """All that are not DeepSpeed's defaults, or about printing and saving."""
    shipped = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    for name in ("steps_per_print", "wall_clock_breakdown"):
        del shipped[name]
    for name in ("contiguous_gradients", "sub_group_size", "stage3_gather_16bit_weights_on_model_save"):
        del shipped["zero_optimization"][name]
    assert zero3.zero3_json(overlap_comm=True) == shipped


@pytest.mark.nightly  # starts a process that imports everything
def test_zero3(tmp_path: Path) -> None:
    report = bring_up(tmp_path, "--parts", "[zero3]")
    cases = {row["case"]: row for row in report["parts"]["zero3"]["rows"]}
    assert list(cases) == list(zero3.CASES) and cases[zero3.SHIPPED]["/as shipped"] == 1.0


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Settings) -> BenchReport:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    def wrong(settings: Settings) -> BenchReport:
        return BenchReport("wrong", "a value above its limit", [{"row": 1}], [Criterion("value", 2.0, 1.0)])

    def right(settings: Settings) -> BenchReport:
        return BenchReport("right", "no criteria", [{"row": 1}])

    monkeypatch.setattr(run, "PARTS", {"broken": broken, "wrong": wrong, "right": right})
    report = bring_up(tmp_path, status=1)
    results = {row["part"]: row["result"] for row in report["rows"]}
    assert results["broken"] == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert results["wrong"].startswith("1 of 1") and results["right"] == "done"
    assert list(report["parts"]) == ["wrong", "right"]


def test_a_broken_cuda_context_does_not_lose_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory can be freed after an illegal access. An error of a kernel may first be seen there."""

    def broken(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    def unaware(settings: Settings) -> BenchReport:
        return BenchReport("unaware", "the error comes later", [{"row": 1}])

    monkeypatch.setattr(steps, "release", broken)
    monkeypatch.setattr(run, "PARTS", {"unaware": unaware, "broken": broken})
    report = bring_up(tmp_path, status=1)
    expected = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [row["result"] for row in report["rows"]] == [expected] * 2


def test_no_part_starts_after_the_time(tmp_path: Path) -> None:
    report = bring_up(tmp_path, "--seconds", "0", status=1)
    assert [row["part"] for row in report["rows"]] == list(PARTS) and not report["parts"]
    assert all("--seconds" in row["result"] for row in report["rows"])


def test_steps_that_are_not_measured_in_time_are_notes(settings: Settings) -> None:
    report = steps.run(replace(settings, deadline=0.0))
    assert report.rows == [] and sum("--seconds" in note for note in report.notes) == len(settings.questions)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--parts", "[modules,nothing]"], "--parts"),
        (["--shapes", "[5b]"], "--shape"),
        (["--frames", "[0]"], "--frames"),
        (["--questions", "[0]"], "--questions"),
        (["--rounds", "0"], "--rounds"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_options(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bring_up", *options]) == 1
    assert named in capsys.readouterr().err


def test_predicted_memory_grows_with_the_tokens() -> None:
    subject = build(TINY, torch.device("cpu"), TORCH_KERNELS)
    weights = sum(each.nbytes for each in subject.model.parameters())
    assert weights < weight_bytes(subject) < step_bytes(subject, 1) < step_bytes(subject, 4)
    step, optimizer = subject.step(), bench_optimizer(subject.model)
    batch = subject.batch()
    update(optimizer, step(batch)[0])  # creates the optimizer states
    assert measured_bytes(subject, lambda: update(optimizer, step(batch)[0])) >= weight_bytes(subject)
