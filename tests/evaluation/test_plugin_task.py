"""A task and its protocol from one file outside the package: scored, scored again from saved answers, and validated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from hand_records import LEVEL, ROOT
from prepared_sets import write_prepared
from w2r2_ds.commands import evaluate
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.evaluation import validator
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS, Protocol, protocols_of, register_protocol
from w2r2_ds.evaluation.resumable import write_records
from w2r2_ds.evaluation.runner import _is_plugin, _reused_scores
from w2r2_ds.evaluation.scoring import choose_protocols, default_protocol, headline, score_records
from w2r2_ds.types.sample import Reference, Sample
from w2r2_ds.utils.plugins import import_plugin

PLUGIN = Path(__file__).parents[2] / "examples" / "custom_task.py"
TEXTS = ("2", "many", "3", None)
"""Correct, not a number, wrong, and no prediction."""


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Restores the registries, so that other tests do not have the plug-in's task."""
    with patch.dict(TASKS), patch.dict(PROTOCOLS):
        yield


@pytest.fixture
def samples() -> list[Sample]:
    texts = {"question": "How many chairs are there?", "answer": "2", "references": (Reference("2"),)}
    frames = {"frames": (ROOT / "a.jpg",), "cam_to_world": np.stack([LEVEL])}
    return [Sample(f"s{i}", "counting", "scene0011_00", kind="answer", **frames, **texts) for i in range(4)]


@pytest.fixture
def records(samples: list[Sample]) -> list[dict[str, Any]]:
    return [record_of(sample, text) for sample, text in zip(samples, TEXTS, strict=True)]


def test_the_task_is_scored(records: list[dict[str, Any]]) -> None:
    import_plugin(str(PLUGIN))
    results = score_records(records)
    assert results == {
        "counting/accuracy": {
            "accuracy": 0.25,
            "count": 4,
            "parsed": 0.5,
            "missing": 1,
            "protocol": "counting/accuracy",
        }
    }
    assert headline(results) == {"counting/accuracy accuracy": 0.25}
    assert score_records(records, ["all"], items=True)["counting/accuracy"]["items"]["s0"] is True


def test_finished_answers_are_scored_again(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """By protocols of a plug-in, whose code may have changed."""
    import_plugin(str(PLUGIN))
    predictions, scores = tmp_path / "predictions.jsonl", tmp_path / "scores.json"
    write_records(predictions, records)
    scores.write_text(json.dumps({"samples": len(records), "protocols": {"counting/accuracy": {"accuracy": 0.0}}}))
    found = _reused_scores(scores, predictions, ["counting/accuracy"], None)
    assert found["protocols"]["counting/accuracy"]["accuracy"] == 0.25
    assert [_is_plugin(name) for name in ("counting/accuracy", "scanqa/leo", "scanrefer/vgllm-direct")] == [
        True,
        False,
        False,
    ]


def test_validation_logs_its_metrics(records: list[dict[str, Any]]) -> None:
    import_plugin(str(PLUGIN))
    assert validator.score(records) == {"counting/accuracy": 0.25, "counting/parsed": 0.5}
    assert default_protocol(records[0]).best_by == "accuracy"


def test_saved_answers_are_scored_again(
    records: list[dict[str, Any]], samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "predictions-counting-fused.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate.main(["--score_only", str(file), "--plugin", str(PLUGIN), "--protocol", "accuracy"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["task"], printed["samples"], printed["missing"]) == ("counting", 4, 1)
    assert printed["protocols"]["counting/accuracy"]["accuracy"] == 0.25
    joined = score_file(file, data=write_prepared(tmp_path / "set", samples, ROOT))
    assert joined["protocols"]["counting/accuracy"]["accuracy"] == 0.25
    file.write_text(json.dumps({**records[0], "references": [{"text": "2"}]}) + "\n")
    with pytest.raises(ValueError, match=r"fused\.jsonl: line 1: field 'references\[0\]\.words'"):
        score_file(file)


def test_a_plugin_with_only_a_protocol(
    records: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, file = tmp_path / "protocol_only.py", tmp_path / "predictions.jsonl"
    plugin.write_text(PLUGIN.read_text().replace("@register_task\n", ""))
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate.main(["--score_only", str(file), "--plugin", str(plugin)]) == 0
    scores = json.loads(capsys.readouterr().out)["protocols"]["counting/accuracy"]
    assert (scores["accuracy"], scores["parsed"], scores["missing"]) == (0.25, 0.75, 1)


def test_without_the_plugin(records: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl: line 1: field 'task': .*'counting'.*--plugin"):
        score_file(file)
    with pytest.raises(ValueError, match=r"'counting'.*register_protocol"):
        choose_protocols((), records)


def test_protocols_that_cannot_be_registered() -> None:
    known = protocols_of("scanqa")[0]
    values = {"score": len, "metrics": {"accuracy": ("accuracy",)}, "best_by": "accuracy"}
    for name, changes, message in (
        (known.name, {}, f"'{known.name}'"),
        ("accuracy", {}, "'accuracy' must be named task/protocol"),
        ("scanqa/new", {"best_by": "F1"}, "best_by of protocol scanqa/new is 'F1'"),
    ):
        with pytest.raises(ValueError, match=message):
            register_protocol(Protocol(name, "New.", "here", **{**values, **changes}))
    assert "scanqa/new" not in PROTOCOLS
