"""The command on a trained tiny model: files, rows that equal evaluate's, reuse of answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.commands.diagnose import main, run
from w2r2_ds.convert.peft_adapter import export_adapter
from w2r2_ds.evaluation.runner import evaluate

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TRAIN = Path("prepared/scanrefer/train")
LIMIT, TOKENS = 6, 40
OPTIONS: dict[str, Any] = {"limit": LIMIT, "max_new_tokens": TOKENS, "draws": 3, "resamples": 100}
NAME = "scanrefer/vgllm-direct"


@pytest.fixture(scope="module")
def diagnosed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder of a diagnosis on the two training rooms, whose fused answers existed; evaluate's scores; the result."""
    out = tmp_path_factory.mktemp("diagnosis")
    scores = {
        "fused": evaluate(trained, out, "fused", max_new_tokens=TOKENS, data=TRAIN),
        "zero": evaluate(trained, out / "own", "zero", max_new_tokens=TOKENS, limit=LIMIT, data=TRAIN),
    }
    before = (out / "predictions-scanrefer-fused.jsonl").stat().st_mtime_ns
    (result,) = run(trained, data=TRAIN, out=out, **OPTIONS)
    assert (out / "predictions-scanrefer-fused.jsonl").stat().st_mtime_ns == before, "the answers were reused"
    return out, scores, result


def overall(result: dict[str, Any], row: str) -> dict[str, Any]:
    """Metric -> value of a row."""
    cells = [cell for cell in result["table1"]["cells"] if (cell["row"], cell["group"]) == (row, "overall")]
    return {cell["metric"]: cell["value"] for cell in cells}


def test_rows_and_files(diagnosed: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, _, result = diagnosed
    assert json.loads((out / "diagnosis-scanrefer.json").read_text()) == result
    assert [row["row"] for row in result["table1"]["rows"]] == ["fused", "zero", "shuffle", "no_image", "random"]
    assert (result["samples"], result["scenes"], result["not_evaluated"]) == (LIMIT, 1, {})
    for row in result["table1"]["rows"][:4]:
        lines = Path(row["predictions"]).read_text().splitlines()
        assert len(lines) >= LIMIT and row["parsed"].keys() == {NAME}
    assert overall(result, "random")["acc@0.25"] is not None
    assert result["table1"]["rows"][4]["parsed"] == {NAME: 1.0}


def test_rows_equal_those_of_evaluate(diagnosed: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    out, scores, result = diagnosed
    own = (out / "own" / "predictions-scanrefer-zero.jsonl").read_bytes()
    assert (out / "predictions-scanrefer-zero.jsonl").read_bytes() == own
    result_zero = scores["zero"]["protocols"][NAME]["overall"]
    assert overall(result, "zero") == {metric: result_zero[metric] for metric in ("acc@0.25", "acc@0.5")}
    assert scores["fused"]["samples"] > LIMIT
    texts = {
        name: [json.loads(line)["text"] for line in (out / f"predictions-scanrefer-{name}.jsonl").open()][:LIMIT]
        for name in ("fused", "zero", "shuffle", "no_image")
    }
    assert texts["no_image"] != texts["zero"]


def test_a_second_diagnosis_generates_nothing(
    diagnosed: tuple[Path, dict[str, Any], dict[str, Any]],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(diagnosed[0], tmp_path / "copy"))
    monkeypatch.setattr(
        "w2r2_ds.evaluation.generate.generate_tokens", lambda *_: pytest.fail("an answer was generated again")
    )
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    words = ["--checkpoint", str(trained), "--data", str(TRAIN), "--out", str(out), *options]
    assert main(words) == 0
    again = json.loads((out / "diagnosis-scanrefer.json").read_text())
    for result in (again, diagnosed[2]):
        for row in result["table1"]["rows"]:
            row["predictions"] = Path(row["predictions"]).name
    assert again == diagnosed[2]
    assert "2D only" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["tokens", "weights", "predictions", "fewer"])
def test_other_answers_are_not_reused(
    diagnosed: tuple[Path, dict[str, Any], dict[str, Any]], trained: Path, tmp_path: Path, change: str
) -> None:
    """Those of other options or weights, of a killed evaluation, or of fewer samples."""
    shutil.copy(diagnosed[0] / "scores-scanrefer-zero.json", tmp_path)
    file = Path(shutil.copy(diagnosed[0] / "predictions-scanrefer-zero.jsonl", tmp_path))
    scores_file = tmp_path / "scores-scanrefer-zero.json"
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "limit": 2, "data": TRAIN, "reuse": True}
    before = file.stat().st_mtime_ns
    assert evaluate(trained, tmp_path, "zero", **options) == json.loads(scores_file.read_text())
    assert file.stat().st_mtime_ns == before
    if change == "tokens":
        options["max_new_tokens"] = 3
    if change == "weights":
        scores = json.loads(scores_file.read_text())
        scores_file.write_text(json.dumps({**scores, "run": {**scores["run"], "weights": "other"}}))
    if change == "predictions":
        file.write_text(file.read_text().replace("scene", "place"))
    if change == "fewer":
        options["limit"] = LIMIT + 1
    scores = evaluate(trained, tmp_path, "zero", **options)
    assert scores["samples"] == options["limit"] == len(file.read_text().splitlines())


def test_an_adapter_on_a_set_with_one_room(trained: Path, tmp_path: Path) -> None:
    """There is no other geometry; the labels of the guess come from the training rooms."""
    adapter = export_adapter(trained, tmp_path / "adapter")
    (result,) = run(adapter, **{**OPTIONS, "limit": 2})
    assert result["not_evaluated"].keys() == {"shuffle"}
    assert [row["row"] for row in result["table1"]["rows"]] == ["fused", "zero", "no_image", "random"]
    assert result["guessed_from"] == "labels of the training sets"
    assert (adapter / "evaluation" / "diagnosis-scanrefer.json").is_file()
    assert all(cell["low"] is None and cell["reason"] for cell in result["table1"]["cells"])
