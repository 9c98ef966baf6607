"""Every benchmark end to end on the shape `tiny`: rows, columns and criteria of its report; no times are asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.bench.hf_baseline.hf_trainer import BaselineModel, stock_forwards, stock_inputs
from w2r2_ds.bench.hf_baseline.reference import compare_gradients, gradients, largest_difference, reference_loss
from w2r2_ds.bench.model import Subject, build
from w2r2_ds.bench.shapes import TINY
from w2r2_ds.bench.step_time import BASELINE, CACHES, NAIVE, SINGLE, W2R2_STEP
from w2r2_ds.commands.bench import BENCHMARKS, main
from w2r2_ds.models.attention.vision import VISION_ATTENTION


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build(TINY, torch.device("cpu"))


def rows_of(report: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Rows by their first column; all numbers are finite."""
    for row in report["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
    return {row[key]: row for row in report["rows"]}


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run `w2r2 bench` and return the JSON report that it wrote."""
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert report["name"] == arguments[0]
    return report


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {name}" in printed for name in BENCHMARKS)


def test_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "baseline", "--shape", "tiny", "--rounds", "2")
    rows = rows_of(report, "part")
    assert set(rows) == {"whole step", "without the towers"}
    assert rows["whole step"]["runs"] == 2 and rows["whole step"]["Tflop"] > rows["without the towers"]["Tflop"]
    assert "language model 2 layers of 64" in report["notes"][0]
    assert "whole step" in capsys.readouterr().out


def test_step_time(tmp_path: Path) -> None:
    report = run(tmp_path, "step_time", "--shape", "tiny", "--rounds", "1", "--memory", "false")
    rows = rows_of(report, "case")
    names = {start + end for start in (SINGLE, W2R2_STEP) for end in CACHES}
    assert set(rows) == names | {BASELINE, BASELINE + ", both cached", NAIVE}
    assert rows[BASELINE]["/baseline"] == rows[BASELINE]["/baseline, predicted"] == 1.0
    assert all(rows[SINGLE + end]["/single pass"] == 1.0 for end in CACHES)
    # Cached features are not computed; a second pass costs extra, and more so with a graph.
    predicted = {name: row["/baseline, predicted"] for name, row in rows.items()}
    assert predicted[W2R2_STEP + ", both cached"] < predicted[W2R2_STEP + ", geometry cached"] < predicted[W2R2_STEP]
    assert predicted[SINGLE] < predicted[W2R2_STEP] < predicted[NAIVE]
    claims = {each["claim"]: each for each in report["criteria"]}
    assert len(claims) == 2 and all(each["met"] for each in claims.values())


def test_scene_packing(tmp_path: Path) -> None:
    report = run(tmp_path, "scene_packing", "--shape", "tiny", "--questions", "[1,3]", "--rounds", "1")
    rows = rows_of(report, "case")
    packed = {f"W2R2, K = {count}, both cached" for count in (1, 3)} | {"W2R2, K = 3"}
    assert set(rows) == packed | {BASELINE, BASELINE + ", both cached", "single pass, K = 3, both cached"}
    for name, row in rows.items():
        assert row["per sample"] == row["seconds"] / (3 if "K = 3" in name else 1)
    predicted = {name: row["/baseline, predicted"] for name, row in rows.items()}
    assert predicted["W2R2, K = 3, both cached"] < predicted["W2R2, K = 1, both cached"]
    (criterion,) = report["criteria"]
    assert criterion["met"] and criterion["claim"].endswith("3 packed and separate")


def test_feature_cache(tmp_path: Path) -> None:
    report = run(tmp_path, "feature_cache", "--shape", "tiny", "--rounds", "1", "--folder", str(tmp_path))
    rows = rows_of(report, "operation")
    assert len(rows) == 5 and rows["VGGT"]["/VGGT"] == 1.0
    # Two frames of 84 x 56 pixels, 6 x 4 patches, 64 channels of four bytes.
    assert rows["read and verify checksum"]["mib"] == 2 * 24 * 64 * 4 / 2**20
    kinds = [each["claim"].rpartition(", ")[2] for each in report["criteria"]]
    assert kinds == ["float32", "bfloat16"] and all(each["met"] for each in report["criteria"])
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    report = run(tmp_path, "loader", "--shape", "tiny", "--size", "[120, 90]", "--rounds", "1")
    rows = rows_of(report, "case")
    own = ["decode", "decode and resize, 1 thread", "decode and resize, 2 threads"]
    assert [*rows][:4] == [*own, "decode, resize with torch"]
    assert [*rows][-1] == "copy to the device, normalise and cut patches"
    assert rows["decode, resize with torch"]["differing"] > 0, "the reason why Pillow resizes"
    assert rows["decode and resize, 1 thread"]["/1 thread"] == 1.0
    assert all(row["samples/s"] == 1 / row["seconds"] for row in rows.values())
    # 84 x 56 pixels, all of which the vision tower gets, twice in time: 1 byte instead of (1 + 2) * 4.
    (criterion,) = report["criteria"]
    assert criterion["met"] and criterion["measured"] == pytest.approx(1 / 12)


def test_kernels(tmp_path: Path) -> None:
    """Without a GPU only the LoRA projection is timed: for attention and for the first and last MLP projection."""
    report = run(tmp_path, "kernels", "--shape", "tiny", "--rounds", "1")
    rows = [row for row in report["rows"] if row["function"].startswith("lora_projection")]
    assert [row["implementation"] for row in rows] == ["PyTorch", "kernel"] * 3
    assert all(row["/PyTorch"] == 1.0 for row in rows[::2])
    errors = [each for each in report["criteria"] if each["claim"].endswith("largest error")]
    assert len(errors) == len(report["rows"]) / 2 and all(each["met"] for each in errors)
    if not torch.cuda.is_available():
        assert rows == report["rows"] and len(report["notes"]) == 1


@pytest.mark.nightly  # two processes that import everything; test_two_pass.py also counts gathers
def test_zero3_gathers(tmp_path: Path) -> None:
    report = run(tmp_path, "zero3_gathers", "--shape", "tiny")
    rows = rows_of(report, "pass_order")
    assert set(rows) == {"single pass", "sequential", "lockstep"}
    assert rows["sequential"]["gathered_mib"] > rows["single pass"]["gathered_mib"]
    assert rows["sequential"]["most per layer"] == 3 and rows["lockstep"]["most per layer"] == 2
    assert report["criteria"][0]["met"]


@pytest.mark.nightly  # three processes that import everything
def test_step_time_measures_peak_memory(tmp_path: Path) -> None:
    report = run(tmp_path, "step_time", "--shape", "tiny", "--rounds", "1")
    found = [row["peak_mib"] for row in report["rows"] if row["peak_mib"] is not None]
    assert len(found) == 3 and "peak memory" in report["criteria"][-1]["claim"]


def test_gradients_equal_those_of_stock_code(subject: Subject) -> None:
    assert max(compare_gradients(subject, subject.batch()).values()) <= 1e-5  # float32, sums in another order


def test_stock_forwards_removes_and_restores_all_overrides(subject: Subject) -> None:
    modules, layers = list(subject.model.vlm.modules()), subject.model.base.model.language_model.layers
    overridden = [module for module in modules if "forward" in module.__dict__]
    assert len(overridden) == 8 * TINY.layers + 1  # seven projections and the layer itself; the patch embedding
    tower = subject.model.base.config.vision_config
    assert tower._attn_implementation == VISION_ATTENTION
    with stock_forwards(subject.model):
        assert tower._attn_implementation == "sdpa"
        assert not any("forward" in module.__dict__ for module in modules)
        assert all(layer.gradient_checkpointing for layer in layers)
    assert [module for module in modules if "forward" in module.__dict__] == overridden
    assert not any(layer.gradient_checkpointing for layer in layers)
    assert tower._attn_implementation == VISION_ATTENTION


def test_largest_difference_detects_a_push_term_and_other_geometry(subject: Subject) -> None:
    batch, model = subject.batch(), subject.model
    expected = gradients(model, subject.step("none")(batch)[0])
    pushed = gradients(model, reference_loss(subject.step("poe"), batch))
    assert largest_difference(pushed, expected) > 1e-2
    baseline = BaselineModel(model)
    geometry = baseline.geometry
    baseline.geometry = lambda images: geometry(images).flip(0)  # type: ignore[method-assign]
    assert largest_difference(gradients(model, baseline(**stock_inputs(batch)).loss), expected) > 1e-4


def test_samples_have_the_number_of_tokens_of_the_shape(subject: Subject) -> None:
    batch = subject.batch(3)
    assert batch.input_ids.shape == (3, TINY.tokens) and bool(batch.attention_mask.all())
    assert len(batch.answer_positions.label) == 3 * TINY.answer_tokens
    assert len(set(batch.answers)) == 3 and batch.answer_positions.where.any()
