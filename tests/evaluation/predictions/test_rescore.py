"""--score_only: own predictions, and those of VG-LLM and Video-3D-LLM joined with a prepared data set."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_records import BOX, ROOT, beside, camera_answer, caption, detection, grounding, question
from metric_cases import undocumented
from prepared_sets import write_prepared
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.evaluation.scoring import headline
from w2r2_ds.types.sample import Sample

ALIGN = np.array([[0, -1, 0, 2], [1, 0, 0, 3], [0, 0, 1, 0.5], [0, 0, 0, 1.0]])


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java(program="no-such-java"))


def write_set(folder: Path, samples: Sequence[Sample]) -> Path:
    """A prepared folder without images."""
    return write_prepared(folder, samples, ROOT)


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def vgllm_line(sample: Sample, text: str) -> dict[str, Any]:
    """A line as logged by lmms-eval: poses before alignment, images beside the document."""
    assert sample.target is not None
    poses = np.linalg.inv(ALIGN) @ sample.cam_to_world
    identity = {"object_id": str(sample.target.object_id), "ann_id": sample.target.ann_id}
    images = [f"scannet/posed_images/{sample.scene_id}/00010.jpg"]
    doc: dict[str, Any] = {"metadata": {"dataset": sample.task, **identity}}
    if sample.task == "scanrefer":
        doc |= {"axis_align_matrix": ALIGN.tolist(), "cam2global": poses.tolist()}
    else:
        doc |= {"iou": 0.4, "annotations": [each.text for each in reversed(sample.references)]}
    answers = {"resps": [[text]], "filtered_resps": [text]}
    return {"doc_id": 0, "doc": doc, **answers, f"{sample.task}_score": {"images": images}}


def video_line(sample: Sample, box: Sequence[float], truth: np.ndarray = BOX) -> dict[str, Any]:
    """A line as written by model_scanrefer.py."""
    text = sample.question[sample.what[0] : sample.what[1]]
    prompt = f"The video captures 3D.\n<image>Identify the object according to the following description.\n{text}"
    return {"sample_id": 7, "prompt": prompt, "pred_response": list(box), "gt_response": truth[:6].tolist()}


def test_own_files_need_no_data_set(tmp_path: Path) -> None:
    samples = [grounding("0"), grounding("1")]
    records = [record_of(samples[0], camera_answer(samples[0])), record_of(samples[1], "no idea")]
    file = write_lines(tmp_path / "predictions-scanrefer-fused.jsonl", records)
    scores = score_file(file, protocols=["all"], out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores-scanrefer-fused.json").read_text()) == scores
    assert (scores["task"], scores["samples"], scores["missing"], scores["data"]) == ("scanrefer", 2, 0, [])
    assert scores["protocols"]["scanrefer/vgllm-direct"]["overall"]["acc@0.5"] == 0.5
    assert headline(scores["protocols"])["scanrefer/video3dllm acc@0.5"] == 0.5
    assert undocumented(scores, "index") == set()


def test_own_files_joined_with_a_data_set(tmp_path: Path) -> None:
    samples = [grounding("0"), grounding("1")]
    other = grounding("9")
    lines = [record_of(each, camera_answer(each)) for each in (samples[1], other)]
    file = write_lines(tmp_path / "p.jsonl", [*lines, lines[0]])
    scores = score_file(file, data=write_set(tmp_path / "set", samples))
    assert (scores["samples"], scores["missing"], scores["unmatched"], scores["repeated"]) == (2, 1, 1, 1)
    assert scores["protocols"]["scanrefer/vgllm-direct"]["overall"]["acc@0.5"] == 0.5
    assert scores["data"][0]["path"] == str(tmp_path / "set")
    again = write_lines(tmp_path / "p.jsonl", [*lines, {**lines[0], "text": "other"}])
    with pytest.raises(ValueError, match=r"line 3 .*scene0011_00\|3\|office_chair\|1 .* line 1"):
        score_file(again, data=tmp_path / "set")


def test_answers_to_other_frames_or_questions_raise(tmp_path: Path) -> None:
    """A data set prepared with another seed has the same ids, but an index refers to another frame."""
    sample = grounding("0")
    folder = write_set(tmp_path / "set", [sample])
    for name, asked in (
        ("cam_to_world", replace(sample, cam_to_world=sample.cam_to_world[::-1])),
        ("question", replace(sample, question=f"Please {sample.question}")),
    ):
        file = write_lines(tmp_path / "p.jsonl", [record_of(asked, camera_answer(asked))])
        with pytest.raises(ValueError, match=f"line 1: field '{name}' .*scene0011_00"):
            score_file(file, data=folder)
        assert score_file(file)["protocols"]["scanrefer/vgllm-direct"]["overall"]["acc@0.5"] == 1.0


def test_vgllms_grounding_has_the_poses_of_its_own_frames(tmp_path: Path) -> None:
    samples = [grounding("0"), grounding("1"), grounding("2", 5)]
    theirs = replace(samples[0], cam_to_world=samples[0].cam_to_world[::-1])  # other frames than ours
    lines = [vgllm_line(theirs, camera_answer(theirs, 0)), vgllm_line(samples[1], "no idea")]
    lines.append(vgllm_line(grounding("0", scene="scene0999_00"), "x"))
    file = write_lines(tmp_path / "p.jsonl", lines)
    scores = score_file(file, "vgllm", write_set(tmp_path / "set", samples), protocols=["vgllm_ZXY", "video3dllm"])
    assert (scores["samples"], scores["missing"], scores["unmatched"]) == (3, 1, 1)
    result = scores["protocols"]["scanrefer/vgllm_ZXY"]
    assert (result["acc@0.5"], result["parsed"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert scores["protocols"]["scanrefer/video3dllm"]["multiple"] == {"count": 3, "acc@0.25": 1 / 3, "acc@0.5": 1 / 3}


def test_vgllms_captions_have_the_iou_of_their_file(tmp_path: Path) -> None:
    samples = [caption(3), caption(4)]
    file = write_lines(tmp_path / "p.jsonl", [vgllm_line(each, each.references[0].text) for each in samples[:1]])
    scores = score_file(file, "vgllm", write_set(tmp_path / "set", samples))
    result = scores["protocols"]["scan2cap/vgllm"]
    assert (result["at"]["0.25"]["passed"], result["at"]["0.5"]["passed"], result["missing"]) == (1, 0, 1)


def test_video3dllms_items_are_identified_by_description_and_box(tmp_path: Path) -> None:
    twin = replace(grounding("0", scene="scene0012_00"))
    assert twin.target is not None
    elsewhere = beside(4)
    twin = replace(twin, target=replace(twin.target, box=elsewhere))
    samples = [grounding("0"), twin, grounding("0", 5), grounding("0", 6)]
    moved = beside(0.4)[:6].tolist()
    lines = [
        video_line(twin, elsewhere[:6].tolist(), elsewhere + 0.01),
        video_line(samples[0], moved),
        video_line(samples[2], BOX[:6].tolist()) | {"pred_response": "no numbers"},
        video_line(samples[0], BOX[:6].tolist(), BOX + 50),
    ]
    file = write_lines(tmp_path / "p.jsonl", lines)
    scores = score_file(file, "video3dllm", write_set(tmp_path / "set", samples))
    (name,) = scores["protocols"]
    result = scores["protocols"][name]
    assert (name, scores["missing"], scores["unmatched"]) == ("scanrefer/video3dllm", 1, 1)
    assert result["all"] == {"count": 4, "acc@0.25": 0.5, "acc@0.5": 0.25} and result["parsed"] == 0.5
    with pytest.raises(ValueError, match="boxes in camera coordinates, but these answers are in box coordinates"):
        score_file(file, "video3dllm", tmp_path / "set", protocols=["vgllm-direct"])


def test_video3dllm_captions_and_answers(tmp_path: Path) -> None:
    objects = [caption(3), caption(4), caption(5)]
    lines = [
        {
            "sample_id": number,
            "pred_response": text,
            "gt_response": [reference.text for reference in each.references],
            "scene": f"scannet/{each.scene_id}",
        }
        # The line of the empty caption has the references of the line before it, as model_scan2cap.py writes it.
        for number, (each, text) in enumerate([(objects[0], "The chair 3 is black."), (objects[0], "")])
    ]
    data = write_set(tmp_path / "objects", objects)
    scores = score_file(write_lines(tmp_path / "c.jsonl", lines), "video3dllm", data)
    result = scores["protocols"]["scan2cap/vgllm"]
    assert (scores["empty"], scores["missing"], scores["repeated"], scores["unmatched"]) == (1, 2, 0, 0)
    assert (result["at"]["0.5"]["passed"], result["missing"], result["parsed"]) == (1, 2, pytest.approx(1 / 3))
    reverse = score_file(write_lines(tmp_path / "r.jsonl", lines[::-1]), "video3dllm", data)
    assert reverse["protocols"] == scores["protocols"], "an empty line takes no object from another line"

    questions = [question(0), question(1, ("two",))]
    lines = [{"sample_id": f"scanqa_{questions[1].id}_0", "pred_response": "two", "gt_response": "two"}]
    data = write_set(tmp_path / "questions", questions)
    scores = score_file(write_lines(tmp_path / "q.jsonl", lines), "video3dllm", data)
    assert scores["protocols"]["scanqa/video3dllm"]["corpus"]["EM"] == 0.5


def test_vgllms_grounding_needs_ann_ids(tmp_path: Path) -> None:
    sample = grounding("0")
    assert sample.target is not None
    file = write_lines(tmp_path / "p.jsonl", [vgllm_line(sample, "x")])
    without = replace(sample, target=replace(sample.target, ann_id=""))
    with pytest.raises(ValueError, match=r"scene0011_00.*'ann_id'"):
        score_file(file, "vgllm", write_set(tmp_path / "set", [without]))


def test_missing_and_wrong_fields_are_named(tmp_path: Path) -> None:
    sample = grounding()
    data = write_set(tmp_path / "set", [sample])
    good, theirs = record_of(sample, "x"), vgllm_line(sample, "x")
    no_images = {key: value for key, value in theirs.items() if key != "scanrefer_score"}
    without_class = {key: value for key, value in good["target"].items() if key != "scannet_class"}
    found = record_of(detection(), "[]")
    video = video_line(sample, BOX[:6].tolist())
    file = tmp_path / "p.jsonl"
    for form, lines, message in (
        ("ours", [good, {}], "line 2: field 'id'"),
        ("ours", [good | {"text": 3}], "line 1: field 'text'"),
        ("ours", [good | {"target": None}], "line 1: field 'target'"),
        ("ours", [good | {"target": without_class}], "line 1: field 'target.scannet_class'"),
        ("ours", [good | {"target": good["target"] | {"group": []}}], "line 1: field 'target.group'"),
        ("ours", [good | {"form": "x"}], "line 1: field 'form'"),
        ("ours", [good | {"form": None}], "line 1: field 'form'"),
        ("ours", [good | {"cam_to_world": [[1]]}], "line 1: field 'cam_to_world[0]"),
        ("ours", [good | {"cam_to_world": None}], "needs the field 'cam_to_world'"),
        ("ours", [good, good | {"id": "b", "task": "x"}], "line 2: field 'task'"),
        ("ours", [found | {"objects": [{"label": "a", "box": [1]}]}], "line 1: field 'objects[0].box'"),
        ("ours", [record_of(question(), "x") | {"references": [1]}], "line 1: field 'references[0]'"),
        ("vgllm", [no_images], "line 1: field 'scanrefer_score.images'"),
        ("vgllm", [theirs | {"filtered_resps": [[]]}], "field 'filtered_resps'"),
        ("vgllm", [theirs | {"scanrefer_score": {"images": ["x.jpg"]}}], "field 'scanrefer_score.images'"),
        ("video3dllm", [video | {"pred_response": [1, 2]}], "line 1: field 'pred_response"),
        ("video3dllm", [video | {"prompt": "x"}], "field 'prompt'"),
    ):
        write_lines(file, lines)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{re.escape(message)}"):
            score_file(file, form, None if form == "ours" else data)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"p\.jsonl does not exist.*--score_only"):
        score_file(file)
    for content, message in (
        (b'{"id": "\xff"}', r"p\.jsonl: line 1 "),
        (b"\n[1]\n", r"p\.jsonl: line 2 "),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            score_file(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no predictions to score"):
        score_file(file)
    with pytest.raises(ValueError, match="--data"):
        score_file(file, "vgllm")
    data = write_set(tmp_path / "set", [question()])
    with pytest.raises(ValueError, match=r"scanqa in the format vgllm .*scanrefer, scan2cap"):
        score_file(write_lines(file, [{}]), "vgllm", data)
    with pytest.raises(ValueError, match=r"set .*scanqa, not scan2cap; .*--task"):
        score_file(file, "ours", data, task="scan2cap")
