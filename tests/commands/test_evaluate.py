"""w2r2 evaluate --evaluations: options of several evaluations, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.commands.evaluate import main, run
from w2r2_ds.evaluation import runner
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED


def test_own_options_take_precedence_over_those_of_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    found: dict[str, Any] = {}

    def evaluate_all(path: Path, out: Path, evaluations: dict[str, EvaluationOptions], ranks: Any) -> dict[str, Any]:
        found.update(evaluations, path=path, out=out)
        return {}

    monkeypatch.setattr(runner, "evaluate_all", evaluate_all)
    file = tmp_path / "evaluations.yaml"
    file.write_text("a: {}\nb: {data: some/set, limit: 0, protocol: 'leo, vgllm'}\n")
    words = ["--checkpoint", str(tmp_path), "--limit=5", "--reuse=true", "--protocol=all", f"--evaluations={file}"]
    assert main(words) == DONE
    assert (found.pop("path"), found.pop("out")) == (tmp_path, tmp_path / "evaluation")
    assert found == {
        "a": EvaluationOptions(limit=5, protocols=["all"], reuse=True),
        "b": EvaluationOptions(data=Path("some/set"), protocols=["leo", "vgllm"], reuse=True),
    }


@pytest.mark.parametrize(
    ("evaluations", "named"),
    [
        ("{a: {out: x}}", "out"),
        ("{a: {geometry_path: x}}", "geometry_path"),
        ("{a: {evaluations: x}}", "evaluations"),
        ("{a: {geometri: zero}}", "geometri"),
        ("{a: {geometry: both}}", "geometry"),
        ("{a: {limit: .inf}}", "limit"),
        ("{a: 3}", "--evaluations"),
        ("{}", "--evaluations"),
        ("{a/b: {}}", "a/b"),
        ("{a: {limit: -1}}", "evaluations: a: --limit"),
        ("{a: {batch_size: 0}}", "evaluations: a: --batch_size"),
    ],
)
def test_errors_name_the_evaluation_and_the_option(
    tmp_path: Path, evaluations: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path), "--evaluations", evaluations]) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("w2r2 evaluate: ") and named in error


def test_saved_answers_are_scored_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--evaluations.*--score_only"):
        run(score_only=tmp_path / "x.jsonl", evaluations="{a: {}}")
