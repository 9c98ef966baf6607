"""Table 1 of prediction files, without a model: own files, with and without their data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hand_records import ROOT, beside, camera_answer, grounding, question
from prepared_sets import write_prepared
from w2r2_ds.commands.diagnose import main
from w2r2_ds.commands.diagnose import run as diagnose_command
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.types.sample import Sample


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes 8 s to start."""
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java(program="no-such-java"))


def rooms(count: int = 6) -> list[Sample]:
    samples = [grounding("0", number, f"scene{number:04d}_00") for number in range(count)]
    return [replace(sample, answer=camera_answer(sample)) for sample in samples]


def write_predictions(file: Path, samples: list[Sample], shift: float) -> Path:
    lines = [record_of(sample, camera_answer(sample, box=beside(shift))) for sample in samples]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def command(tmp_path: Path, samples: list[Sample], *more: str) -> list[str]:
    files = {"2D only": 3.0, "[bold]2D + 3D": 0.4}
    words = []
    for number, (label, shift) in enumerate(files.items()):
        words += ["--predictions", f"{label}={write_predictions(tmp_path / f'{number}.jsonl', samples, shift)}"]
    return [*words, "--out", str(tmp_path / "out"), *more]


def test_two_files_and_a_random_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rooms have the same box in the same cameras, so the random guess is always right."""
    samples = rooms()
    data = write_prepared(tmp_path / "set", samples, ROOT)
    assert main(command(tmp_path, samples, "--data", str(data), "--draws", "3", "--resamples", "200")) == 0
    result = json.loads((tmp_path / "out" / "diagnosis-scanrefer.json").read_text())
    assert (result["task"], result["samples"], result["scenes"]) == ("scanrefer", 6, 6)
    assert (result["seed"], result["resamples"], result["not_evaluated"]) == (0, 200, {})
    assert [row["row"] for row in result["table1"]["rows"]] == ["2D only", "[bold]2D + 3D", "random"]
    values = {
        (cell["row"], cell["metric"]): cell["value"]
        for cell in result["table1"]["cells"]
        if cell["group"] == "overall" and cell["protocol"] == "scanrefer/vgllm-direct"
    }
    assert [values[row, "acc@0.25"] for row in ("2D only", "[bold]2D + 3D", "random")] == [0, 1, 1]
    assert [values[row, "acc@0.5"] for row in ("2D only", "[bold]2D + 3D", "random")] == [0, 0, 1]
    printed = capsys.readouterr().out
    assert "[bold]2D + 3D" in printed and "100.0 [100.0, 100.0]" in printed and "6 samples of 6 scenes" in printed
    (gain,) = [line for line in printed.splitlines() if "2D only minus [bold]2D + 3D" in line][:1]
    assert "-100.0 [-100.0, -100.0]" in gain and "+0.0 [+0.0, +0.0]" in gain


def test_without_data_there_is_no_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, rooms(2), "--protocol", "vgllm,video3dllm", "--limit", "1")) == 0
    result = json.loads((tmp_path / "out" / "diagnosis-scanrefer.json").read_text())
    assert result["samples"] == 1 and "--data" in result["not_evaluated"]["random"]
    assert {cell["protocol"] for cell in result["table1"]["cells"]} == {"scanrefer/vgllm", "scanrefer/video3dllm"}
    assert "not evaluated" in capsys.readouterr().out


def test_short_answers_are_compared_with_the_most_frequent_one(tmp_path: Path) -> None:
    samples = [replace(question(number, ("brown",)), scene_id=f"scene{number:04d}_00") for number in range(4)]
    samples = [replace(each, answer="brown" if number else "two") for number, each in enumerate(samples)]
    data = write_prepared(tmp_path / "set", samples, ROOT)
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(record_of(each, "red")) + "\n" for each in samples))
    (result,) = diagnose_command(
        predictions=[f"2D={file}"], data=data, out=tmp_path / "out", protocols=["leo"], draws=2, resamples=100
    )
    scores = {cell["row"]: cell["value"] for cell in result["table1"]["cells"] if cell["metric"] == "EM"}
    assert scores["2D"] == 0 and scores["frequent"] == 1 and 0 < scores["random"] <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "--checkpoint"),
        ({"checkpoint": Path("run"), "predictions": ["a=b"]}, "--checkpoint"),
        ({"predictions": ["a=b"]}, "--out"),
        ({"checkpoint": Path("run"), "data": Path("set")}, "--out"),
        ({"predictions": ["a"], "out": Path("out")}, "LABEL=FILE"),
        ({"predictions": ["a=b", "a=c"], "out": Path("out")}, "'a'"),
        ({"predictions": ["random=b"], "out": Path("out")}, "'random'"),
        ({"checkpoint": Path("run"), "draws": 0}, "--draws"),
        ({"checkpoint": Path("run"), "resamples": 10}, "--resamples"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, object], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        diagnose_command(**options)  # type: ignore[arg-type]


def test_a_test_split_cannot_be_diagnosed(tmp_path: Path) -> None:
    records = [{**record_of(grounding(), "x"), "annotated": False}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(ValueError, match=str(file)):
        diagnose_command(predictions=[f"a={file}"], out=tmp_path / "out")
