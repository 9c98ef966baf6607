"""Several evaluations of one model in one process: the results of single evaluations, errors, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import run_ranks
from w2r2_ds.commands import evaluate as command
from w2r2_ds.evaluation import loading, runner
from w2r2_ds.evaluation.loading import trained_model
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.evaluation.runner import evaluate, evaluate_all

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TRAIN = "prepared/scanrefer/train"
EVALUATIONS = {"val": {"geometry": "zero"}, "train": {"data": TRAIN, "limit": 3, "protocol": "video3dllm"}}
NAMES = {"val": "scanrefer-zero", "train": "scanrefer-fused"}
SINGLE = {
    "val": EvaluationOptions("zero", limit=2, max_new_tokens=8),
    "train": EvaluationOptions(data=Path(TRAIN), limit=3, max_new_tokens=8, protocols=["video3dllm"]),
}
"""The same evaluations alone, with the options of `words`."""


def words(run: Path, out: Path, evaluations: Any = EVALUATIONS) -> list[str]:
    options = {"checkpoint": run, "out": out, "limit": 2, "max_new_tokens": 8, "reuse": "true"}
    return [*(f"--{name}={value}" for name, value in options.items()), f"--evaluations={json.dumps(evaluations)}"]


def results(out: Path) -> dict[str, tuple[bytes, bytes]]:
    """Predictions and score file of each evaluation."""
    return {
        name: (
            (out / name / f"predictions-{file}.jsonl").read_bytes(),
            (out / name / f"scores-{file}.json").read_bytes(),
        )
        for name, file in NAMES.items()
    }


def work(folder: Path) -> None:
    """Run the command in a forked rank."""
    command.main(json.loads((folder / "words.json").read_text()))


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    """Results of single evaluations."""
    out = tmp_path_factory.mktemp("alone")
    for name, options in SINGLE.items():
        evaluate(trained, out / name, options)
    return results(out)


def test_two_evaluations_equal_the_two_alone_and_load_one_model(
    alone: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loaded = []
    monkeypatch.setattr(loading, "trained_model", lambda *of: loaded.append(of[0]) or trained_model(*of))
    assert command.main(words(trained, tmp_path)) == 0
    assert loaded == [trained]
    assert results(tmp_path) == alone
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == list(EVALUATIONS) and scores["train"] == json.loads(alone["train"][1])
    # Both are finished: no answer is generated and no model is loaded.
    monkeypatch.setattr(runner, "answer_remaining", lambda *_: pytest.fail("an answer was generated again"))
    assert command.main(words(trained, tmp_path)) == 0
    assert loaded == [trained] and results(tmp_path) == alone


def test_two_ranks(alone: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps([*words(trained, tmp_path), "--batch_size=1"]))
    run_ranks(2, Path(__file__), tmp_path)
    for name, (predictions, _) in results(tmp_path).items():
        ours, theirs = (
            [json.loads(line)["text"] for line in text.splitlines()] for text in (predictions, alone[name][0])
        )
        assert ours == theirs


def test_options_of_all_evaluations_are_checked_before_the_model_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "trained_model", lambda *_: pytest.fail("the model was loaded"))
    evaluations = {"good": EvaluationOptions(), "wrong": EvaluationOptions(task="scanqa")}
    with pytest.raises(ValueError, match=r"evaluation wrong: .*scanqa"):
        evaluate_all(trained, tmp_path, evaluations)


@pytest.mark.parametrize("error", [ValueError("unreadable"), RuntimeError("out of memory")])
def test_a_failing_evaluation_is_named_and_earlier_ones_are_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    answer = runner.answer_remaining

    def fail(answerer: Any, *others: Any) -> None:
        if answerer.condition.name == "zero":
            raise error
        answer(answerer, *others)

    monkeypatch.setattr(runner, "answer_remaining", fail)
    options = {name: EvaluationOptions(name, limit=1, max_new_tokens=2) for name in ("fused", "zero")}
    with pytest.raises(type(error)) as raised:
        evaluate_all(trained, tmp_path, options)
    assert "evaluation zero" in " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert (tmp_path / "fused" / "scores-scanrefer-fused.json").is_file()
