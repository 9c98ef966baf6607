"""Every benchmark end to end in shapes of a second: what its table says. How long anything took is no matter here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.bench import BENCHMARKS, load
from w2r2_ds.bench.hf_trainer import BaselineModel, stock, stock_inputs
from w2r2_ds.bench.model import Subject, build
from w2r2_ds.bench.reference import check_equal, difference, gradients, plain_loss
from w2r2_ds.bench.shapes import TINY
from w2r2_ds.bench.step_ratio import BASELINE, CACHES, NAIVE, SINGLE, W2R2_STEP
from w2r2_ds.commands.bench import main


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build(TINY, torch.device("cpu"))


def rows_of(report: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Rows by their first column; all numbers are finite."""
    for row in report["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
    return {row[key]: row for row in report["rows"]}


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a command line writes."""
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert report["name"] == arguments[0]
    return report


def test_the_command_line_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name in BENCHMARKS:
        assert name in said and load(name).__doc__


def test_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "baseline", "--shape", "tiny", "--rounds", "2")
    rows = rows_of(report, "part")
    assert set(rows) == {"whole step", "without the towers"}
    assert rows["whole step"]["runs"] == 2 and rows["whole step"]["Tflop"] > rows["without the towers"]["Tflop"]
    assert "language model 2 layers of 64" in report["notes"][0]
    assert "whole step" in capsys.readouterr().out


def test_step_ratio(tmp_path: Path) -> None:
    report = run(tmp_path, "step_ratio", "--shape", "tiny", "--rounds", "1", "--memory", "false")
    rows = rows_of(report, "case")
    ways = {start + end for start in (SINGLE, W2R2_STEP) for end in CACHES}
    assert set(rows) == ways | {BASELINE, BASELINE + ", both cached", NAIVE}
    assert rows[BASELINE]["/baseline"] == rows[BASELINE]["model"] == 1.0
    assert all(rows[SINGLE + end]["/own single"] == 1.0 for end in CACHES)
    # The cost model's order: what a cache holds is not computed, a second pass is, and a graph makes it dearer.
    model = {name: row["model"] for name, row in rows.items()}
    assert model[W2R2_STEP + ", both cached"] < model[W2R2_STEP + ", geometry cached"] < model[W2R2_STEP]
    assert model[SINGLE] < model[W2R2_STEP] < model[NAIVE]
    claims = {each["claim"]: each for each in report["criteria"]}
    assert len(claims) == 2 and all(each["met"] for each in claims.values())


def test_scene_pack(tmp_path: Path) -> None:
    report = run(tmp_path, "scene_pack", "--shape", "tiny", "--questions", "[1,3]", "--rounds", "1")
    rows = rows_of(report, "case")
    packed = {f"W2R2, K = {count}, both cached" for count in (1, 3)} | {"W2R2, K = 3"}
    assert set(rows) == packed | {BASELINE, BASELINE + ", both cached", "own single pass, K = 3, both cached"}
    for name, row in rows.items():
        assert row["per sample"] == row["seconds"] / (3 if "K = 3" in name else 1)
    assert rows["W2R2, K = 3, both cached"]["model"] < rows["W2R2, K = 1, both cached"]["model"]
    (gradients_equal,) = report["criteria"]
    assert gradients_equal["met"] and gradients_equal["claim"].endswith("3 packed and apart")


def test_geometry_cache(tmp_path: Path) -> None:
    report = run(tmp_path, "geometry_cache", "--shape", "tiny", "--rounds", "1", "--folder", str(tmp_path))
    rows = rows_of(report, "what")
    assert len(rows) == 5 and rows["VGGT"]["/VGGT"] == 1.0
    # Two frames of 84 x 56 pixels, 6 x 4 patches, 64 channels of four bytes.
    assert rows["read and checksum"]["mib"] == 2 * 24 * 64 * 4 / 2**20
    kinds = [each["claim"].rpartition(", ")[2] for each in report["criteria"]]
    assert kinds == ["float32", "bfloat16"] and all(each["met"] for each in report["criteria"])
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_kernels(tmp_path: Path) -> None:
    report = run(tmp_path, "kernels", "--shape", "tiny", "--rounds", "1")
    ways = [(row["function"], row["way"]) for row in report["rows"]]
    projections = [f"lora_projection to {width}{end}" for width in (64, 128) for end in ("", ", dropout")]
    assert ways == [(name, way) for name in ["dual_stream_embed", *projections] for way in ("stock", "torch")]
    equal = [each for each in report["criteria"] if each["claim"].endswith("difference from stock")]
    assert len(equal) == 5 and all(each["met"] for each in equal)


@pytest.mark.nightly  # two ranks that import everything; what is gathered is also counted in test_zero3.py
def test_zero3_bytes(tmp_path: Path) -> None:
    report = run(tmp_path, "zero3_bytes", "--shape", "tiny")
    rows = rows_of(report, "pass_order")
    assert set(rows) == {"single pass", "sequential", "lockstep"}
    assert rows["sequential"]["gathered_mib"] > rows["single pass"]["gathered_mib"]
    assert rows["sequential"]["most of a layer's"] == 3 and rows["lockstep"]["most of a layer's"] == 2
    assert report["criteria"][0]["met"]


@pytest.mark.nightly  # three processes that import everything
def test_memory_of_steps(tmp_path: Path) -> None:
    report = run(tmp_path, "step_ratio", "--shape", "tiny", "--rounds", "1")
    found = [row["peak_mib"] for row in report["rows"] if row["peak_mib"] is not None]
    assert len(found) == 3 and "peak memory" in report["criteria"][-1]["claim"]


def test_the_field_and_our_single_pass_have_the_same_gradients(subject: Subject) -> None:
    batch = subject.batch()
    # float32, sums in another order
    assert max(check_equal(subject, batch).values()) <= 1e-5
    # The field's step is stock code through and through, and leaves ours as it was.
    modules, layers = list(subject.model.vlm.modules()), subject.model.base.model.language_model.layers
    bound = [module for module in modules if "forward" in module.__dict__]
    assert len(bound) == 8 * TINY.layers  # projections, and the layers, of which all but the last are recomputed
    with stock(subject.model):
        assert not any("forward" in module.__dict__ for module in modules)
        assert all(layer.gradient_checkpointing for layer in layers)
    assert [module for module in modules if "forward" in module.__dict__] == bound
    assert not any(layer.gradient_checkpointing for layer in layers)
    # ... and the comparison sees what differs: a push, and a layer of VGGT.
    model, none = subject.model, subject.step("none")
    own = gradients(model, none(batch)[0])
    assert difference(gradients(model, plain_loss(subject.step("poe"), batch)), own) > 1e-2
    field = BaselineModel(model)
    geometry = field.geometry
    field.geometry = lambda images: geometry(images).flip(0)  # type: ignore[method-assign]
    assert difference(gradients(model, field(**stock_inputs(batch)).loss), own) > 1e-4


def test_answers_have_just_the_tokens_that_the_shape_says(subject: Subject) -> None:
    batch = subject.batch(3)
    assert batch.input_ids.shape == (3, TINY.tokens) and bool(batch.attention_mask.all())
    assert len(batch.answer_positions.label) == 3 * TINY.answer_tokens
    assert len(set(batch.answers)) == 3 and batch.answer_positions.where.any()
