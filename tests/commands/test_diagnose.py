"""Options of ``w2r2 diagnose`` for the feature map and the attention anchors, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from w2r2_ds.commands import diagnose
from w2r2_ds.diagnostics import reliance, visual_tokens
from w2r2_ds.evaluation import loading


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls of the functions behind the command, in order; the run has two tasks."""
    found: list[tuple[str, Any]] = []
    monkeypatch.setattr(loading, "run_config", lambda *where: SimpleNamespace(data=where))
    monkeypatch.setattr(reliance, "tasks_of", lambda data: ["scanrefer", "scanqa"])

    def visual(path: Path, out: Path, options: Any, *, task: str | None, **where: Any) -> None:
        found.append(("visual", (path, out, options, task, where)))

    def model(path: Path, out: Path, evaluation: Any, options: Any, ranks: Any) -> list[Any]:
        found.append(("table", (path, out, evaluation.data)))
        return []

    monkeypatch.setattr(visual_tokens, "diagnose_visual_tokens", visual)
    monkeypatch.setattr(reliance, "diagnose_model", model)
    return found


def test_parts_of_all_tasks_come_before_the_table(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    diagnose.main(["--checkpoint", str(tmp_path), "--features", "true", "--attention", "true", "--perplexity", "7"])
    assert [kind for kind, _ in calls] == ["visual", "visual", "table"]
    assert [arguments[3] for kind, arguments in calls if kind == "visual"] == ["scanrefer", "scanqa"]
    for _, (path, out, options, _, _) in calls[:2]:
        assert path == tmp_path and out == calls[2][1][1] == tmp_path / "evaluation"
        assert list(options.parts) == ["features", "attention"] and options.features.perplexity == 7.0


@pytest.mark.parametrize(("option", "parts"), [("--features", ["features"]), ("--attention", ["attention"])])
def test_one_part_of_one_set(calls: list[tuple[str, Any]], tmp_path: Path, option: str, parts: list[str]) -> None:
    out = tmp_path / "out"
    diagnose.main(
        ["--checkpoint", str(tmp_path), "--data", "some/set", "--out", str(out), option, "true", "--seed", "5"]
    )
    (_, (_, folder, options, task, where)), (last, _) = calls
    assert last == "table" and folder == out and task is None and where["data"] == Path("some/set")
    assert list(options.parts) == parts and options.seed == options.features.seed == 5


def test_parts_are_off_by_default_and_need_a_model(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    diagnose.main(["--checkpoint", str(tmp_path)])
    assert [kind for kind, _ in calls] == ["table"]
    with pytest.raises(ValueError, match=r"--features and --attention need a model.*--checkpoint"):
        diagnose.run(predictions=["a=b.jsonl"], out=tmp_path, attention=True)


def test_paired_rooms_need_a_model(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--paired needs a model.*--checkpoint"):
        diagnose.run(predictions=["a=b.jsonl"], out=tmp_path, paired=[Path("val_camera")])
    assert not calls
