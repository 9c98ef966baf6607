"""The command on a trained tiny model: files, rows that equal evaluate's, reuse of answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runs import ZERO3, World, launch
from w2r2_ds.commands.diagnose import main, run
from w2r2_ds.convert.peft_adapter import export_adapter
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.demo.synthetic.options import ShiftOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.evaluation.options import EvaluationOptions
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
        "fused": evaluate(trained, out, EvaluationOptions(max_new_tokens=TOKENS, data=TRAIN)),
        "zero": evaluate(
            trained, out / "own", EvaluationOptions("zero", max_new_tokens=TOKENS, limit=LIMIT, data=TRAIN)
        ),
    }
    before = (out / "predictions-scanrefer-fused.jsonl").stat().st_mtime_ns
    (result,) = run(trained, data=TRAIN, out=out, **OPTIONS)
    assert (out / "predictions-scanrefer-fused.jsonl").stat().st_mtime_ns == before, "the answers were reused"
    return out, scores, result


@pytest.fixture(scope="module")
def with_point_maps(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose geometry encoder takes point maps in the coordinates of the cameras."""
    out = tmp_path_factory.mktemp("point_maps") / "run"
    geometry = {"name": "point_map", "path": "", "reference_frame": "camera", "layers": "[0]"}
    options = {f"model__geometry__{name}": value for name, value in geometry.items()}
    words = world.arguments(out, train__steps=1, train__save_every=1, **options)
    done = launch(1, "launchers/train.py", ["--deepspeed", str(ZERO3), *words])
    assert done.returncode == 0, done.stdout[-4000:]
    return out


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


def test_an_encoder_of_pixels_has_no_interventions(diagnosed: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    causality = diagnosed[2]["causality"]
    assert causality["interventions"] == causality["removed_frame"] == causality["paired"] == {}
    assert causality["not_evaluated"].keys() == {"scale", "shift", "turn", "removed_frame"}
    assert causality["replaced"].keys() == {"zero", "shuffle"}
    assert 0 <= causality["replaced"]["zero"]["unchanged"]["value"] <= 1


def test_point_maps_are_scaled_shifted_turned_removed_and_replaced(
    with_point_maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every intervention is evaluated; answers of one trained step have a box, which may move or not."""
    root, out = tmp_path / "rooms", tmp_path / "out"
    write_dataset(root, 3, 1, 2, (64, 48), 2, shift=ShiftOptions(("room_scale",)), workers=1)
    for split in ("val", "val_room_scale"):
        options = TaskOptions("scanrefer", split, frames=FrameOptions("uniform", 2), visibility="depth")
        prepare(root, options, root / split, quiet=True)
    words = ["--checkpoint", str(with_point_maps), "--root", str(root), "--data", "val", "--out", str(out)]
    words += ["--limit", "3", "--draws", "2", "--resamples", "100", "--causality_limit", "2"]
    assert main([*words, "--paired", "[val_room_scale]"]) == 0
    causality = json.loads((out / "diagnosis-scanrefer.json").read_text())["causality"]
    assert causality["not_evaluated"] == {}
    assert causality["interventions"].keys() == {"scale", "shift", "turn"}
    for kind, measures in causality["interventions"].items():
        assert (measures["samples"], measures["rows"], len(measures["amounts"])) == (2, 8, 4)
        assert len(list(out.glob(f"predictions-scanrefer-{kind}_*.jsonl"))) == 4
    assert causality["removed_frame"].keys() == {"target", "other"}
    assert causality["removed_frame"]["target"]["samples"] <= 2
    assert causality["paired"].keys() == {"room_scale"} and causality["paired"]["room_scale"]["rows"] == 2
    for name in ("turn_+0.262", "removed_target", "removed_other", "paired_room_scale"):
        assert len((out / f"predictions-scanrefer-{name}.jsonl").read_text().splitlines()) == 2, name
    printed = capsys.readouterr().out
    assert "do(F3D), turn: 2 samples" in printed and "(room_scale)" in printed and "one frame removed" in printed
    with pytest.raises(ValueError, match=r"--paired.*--causality"):
        run(with_point_maps, paired=[Path("val_room_scale")], causality=False)
    assert main([*words, "--causality", "false"]) == 0
    assert "causality" not in json.loads((out / "diagnosis-scanrefer.json").read_text())


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
    assert evaluate(trained, tmp_path, EvaluationOptions("zero", **options)) == json.loads(scores_file.read_text())
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
    scores = evaluate(trained, tmp_path, EvaluationOptions("zero", **options))
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
