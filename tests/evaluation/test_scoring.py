"""Scores of answer records by every protocol, after a round trip through JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from hand_records import BOX, beside, camera_answer, caption, detection, grounding, in_world, question
from metric_cases import result_keys, undocumented
from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix, nearest_heading, world_to_camera
from w2r2_ds.data.tasks.scanrefer import answer_text
from w2r2_ds.evaluation import scoring
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import answer_world_box, enclosing_box
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS
from w2r2_ds.evaluation.protocols.scan2cap_rules import split_words
from w2r2_ds.evaluation.scoring import check_scorable, choose_protocols, headline, parsed_share, score_records
from w2r2_ds.types.sample import Reference, Sample

NAMES = ("vgllm-direct", "vgllm_ZXY", "scanrefer_official", "video3dllm")
MOVED = beside(0.4)
"""Moved by half a width: IoU 1/3."""


def records(pairs: Sequence[tuple[Sample, str | None]]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(record_of(sample, text, [1, 2]), allow_nan=False)) for sample, text in pairs]


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables METEOR, whose start takes longer than all of these tests; its values are tested elsewhere."""
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java(program="no-such-java"))


@pytest.fixture
def grounded() -> list[dict[str, Any]]:
    """A right answer, one at IoU 1/3, one that cannot be parsed, and a missing one."""
    one, two, three, four = (grounding(str(ann), number) for ann, number in ((0, 3), (1, 3), (0, 5), (1, 5)))
    three, four = (
        replace(each, target=replace(each.target, group="multiple", scannet_class=17)) for each in (three, four)
    )
    return records([(one, camera_answer(one)), (two, camera_answer(two, 1, MOVED)), (three, "no idea"), (four, None)])


def check_documented(results: dict[str, dict[str, Any]]) -> None:
    """Assert that every key of a result is on its task's docs page or on the common page."""
    for name, result in results.items():
        assert undocumented(result_keys(result), "index", name.partition("/")[0]) == set(), name


def test_grounding_by_every_protocol(grounded: list[dict[str, Any]]) -> None:
    proposals = {"scene0011_00": [BOX[:6].tolist(), [9, 9, 9, 1, 1, 1]]}
    results = score_records(grounded, ["all"], proposals)
    assert set(results) == {name for name in PROTOCOLS if name.startswith("scanrefer/")}
    check_documented(results)
    assert all((each["count"], each["missing"], each["parsed"]) == (4, 1, 0.5) for each in results.values())
    direct = results["scanrefer/vgllm-direct"]
    assert (direct["overall"]["acc@0.25"], direct["overall"]["acc@0.5"]) == (0.5, 0.25)
    assert direct["failures"] == {"it is not exactly one JSON object": 1, "no prediction": 1}
    official = results["scanrefer/scanrefer_official"]
    assert official["counts"]["unique"] == {"not_in_others": 2, "in_others": 0, "overall": 2}
    assert official["counts"]["multiple"] == {"not_in_others": 0, "in_others": 2, "overall": 2}
    assert official["scores"]["unique"]["overall"] == {"acc@0.25": 1.0, "acc@0.5": 0.5}
    other = results["scanrefer/video3dllm"]
    assert (other["unique"]["count"], other["multiple"]["count"]) == (0, 4), "the other class map's groups"
    assert other["all"]["acc@0.25"] == 0.5
    assert results["scanrefer/vgllm_ZXY"]["acc@0.25"] == 0.5
    assert results["scanrefer/vgllm_refined"]["acc@0.5"] == 0.5, "both mean the right object"
    assert headline(results)["scanrefer/scanrefer_official acc@0.5"] == 0.25
    assert headline(results)["scanrefer/video3dllm acc@0.25"] == 0.5
    assert headline(results)["scanrefer/vgllm-direct acc@0.5"] == headline(results)["scanrefer/vgllm_ZXY acc@0.5"]
    assert "scanrefer/vgllm_refined" not in score_records(grounded, ["all"])


def test_a_subset_of_a_split_keeps_its_groups(grounded: list[dict[str, Any]]) -> None:
    (result,) = score_records(grounded[2:3], ["video3dllm"]).values()
    assert result["multiple"]["count"] == 1, "the only object of these records, one of several in the split"


def test_world_box_answers() -> None:
    sample = in_world(grounding())
    (record,) = records([(sample, "1.6,4.7,0.5,2.4,5.3,1.5")])
    assert answer_world_box(record) == pytest.approx(BOX[:6].tolist())
    assert record["form"] == "world" and "cam_to_world" not in record
    ((name, result),) = score_records([record]).items()
    assert name == "scanrefer/video3dllm" and result["all"]["acc@0.5"] == 1 and parsed_share([record]) == 1
    assert set(score_records([record], ["all"])) == {"scanrefer/video3dllm", "scanrefer/scanrefer_official"}
    for protocol in ("vgllm-direct", "vgllm", "scanrefer/vgllm_ZXY"):
        with pytest.raises(ValueError, match="boxes in camera coordinates, but these answers are in world coordinates"):
            choose_protocols([protocol], [record])
    for text in (camera_answer(sample), "-1e308,0,0,1e308,1,1"):  # the second one's size overflows
        (rejected,) = records([(sample, text)])
        assert answer_world_box(rejected) is None
        assert score_records([rejected])["scanrefer/video3dllm"]["all"]["acc@0.25"] == 0
    assert parsed_share(records([(sample, camera_answer(sample))])) == 0
    with pytest.raises(ValueError, match="mix camera and world"):
        choose_protocols([], [record, *records([(grounding(), "")])])


def test_a_rotated_camera_box_is_enclosed_in_a_world_box() -> None:
    """A unit square rotated by 30 degrees has an axis-aligned width of cos + sin; here the box is 2 by 1."""
    yawed = np.array([0, 0, 0, 2, 1, 3, np.pi / 6, 0, 0])
    wide, deep = 2 * np.cos(np.pi / 6) + 0.5, 2 * 0.5 + np.cos(np.pi / 6)
    assert enclosing_box(yawed.tolist()) == pytest.approx([0, 0, 0, wide, deep, 3])
    assert enclosing_box(BOX.tolist()) == enclosing_box(BOX[:6].tolist()) == BOX[:6].tolist()
    sample = grounding()
    for frame in (0, 1):
        (record,) = records([(sample, camera_answer(sample, frame))])
        assert answer_world_box(record) == pytest.approx(BOX[:6].tolist(), abs=1e-4)
    huge = '{"frame": 1, "bbox_3d": [1e308, 1e308, 1e308, 1e308, 1e308, 1e308, 1, 1, 1]}'
    assert answer_world_box(records([(sample, huge)])[0]) is None


def test_equal_descriptions_of_a_box_have_equal_scores() -> None:
    """For random poses, by all protocols that take angles as the labels have them, in camera and world coordinates."""
    draw = np.random.default_rng(0)
    read_as_extrinsic = []
    for _ in range(20):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = euler_angles_to_matrix(draw.uniform(-1.5, 1.5, 3)), draw.normal(size=3)
        sample = replace(grounding(), cam_to_world=pose[None])
        turned = world_to_camera(nearest_heading(BOX, pose), pose)
        results = score_records(records([(sample, answer_text(0, turned, decimals=9))]), ["all"], items=True)
        (ious,) = zip(*(result["items"].values() for result in results.values()), strict=True)
        by_name = {name: item["iou"] for name, item in zip(results, ious, strict=True)}
        read_as_extrinsic.append(by_name.pop("scanrefer/vgllm"))
        assert set(by_name) == {f"scanrefer/{each}" for each in NAMES}
        assert all(iou == pytest.approx(1, abs=1e-6) for iou in by_name.values()), by_name
    # VG-LLM's evaluator exchanges the order of the angles, so there the score of a label depends on its description.
    assert min(read_as_extrinsic) < 0.5


def test_captions_by_every_protocol() -> None:
    near, far = beside(0.4), beside(5)
    pairs = [
        (caption(3), "The chair 3 is black."),
        (caption(4, near[:6]), "A black chair 4, by the desk."),
        (caption(5, far[:6]), "The chair 5 is black."),
        (caption(6, None), "The chair 6 is black."),
        (caption(7), None),
    ]
    results = score_records(records(pairs), ["all"])
    assert set(results) == {name for name in PROTOCOLS if name.startswith("scan2cap/")}
    check_documented(results)
    for result in results.values():
        assert (result["count"], result["objects"], result["missing"], result["parsed"]) == (5, 5, 1, 0.8)
        assert (result["at"]["0.25"]["passed"], result["at"]["0.5"]["passed"]) == (2, 1)
        assert result["at"]["0.5"]["corpus"]["METEOR"] is None and "METEOR" in result["at"]["0.5"]["not_computed"]
        assert not {"items", "candidates", "references"} & result["at"]["0.5"].keys()
    assert list(score_records(records(pairs))) == ["scan2cap/vgllm"]
    shown = headline(results)
    assert shown["scan2cap/vgllm CIDEr@0.25"] > shown["scan2cap/vgllm CIDEr@0.5"] > 0
    kept = score_records(records(pairs), ["vgllm"], items=True)["scan2cap/vgllm"]["at"]["0.5"]
    assert kept["candidates"]["scene0011_00|3|office chair"] == "sos the chair 3 is black .  eos"


def test_protocols_that_need_words_raise_an_error_without_them() -> None:
    bare = replace(caption(), references=tuple(replace(each, words=()) for each in caption().references))
    for protocol in ("scan2cap_original", "leo"):
        with pytest.raises(ValueError, match=f"scan2cap/{protocol} .*'token'"):
            score_records(records([(bare, "x")]), [protocol])
    assert split_words("It's a T.V., isn't it? L-shaped") == [
        *("it", "'s", "a", "t", ".", "v", ".", ",", "is", "n't", "it", "?", "l", "-", "shaped"),
    ]


def test_missing_words_are_found_before_there_are_answers() -> None:
    sample = caption(3)
    bare = replace(sample, references=tuple(Reference(each.text) for each in sample.references))
    check_scorable(records([(bare, None)]), ["scan2cap/vgllm", "scan2cap/chatscene"])
    check_scorable(records([(sample, None)]), ["scan2cap/leo"])
    for name in ("scan2cap_original", "scan2cap_benchmark", "leo"):
        with pytest.raises(ValueError, match=rf"scan2cap/{name} .*'token'"):
            check_scorable(records([(bare, None)]), [f"scan2cap/{name}"])


def test_answers_by_every_protocol() -> None:
    pairs = [(question(0), "brown"), (question(1, ("two",)), "three"), (question(2, ("red",)), None)]
    results = score_records(records(pairs), ["all"])
    assert set(results) == {name for name in PROTOCOLS if name.startswith("scanqa/")}
    check_documented(results)
    for name, result in results.items():
        assert (result["count"], result["questions"], result["missing"]) == (3, 3, 1)
        assert result["corpus"]["EM"] == pytest.approx(1 / 3)
        assert headline(results)[f"{name} EM"] == pytest.approx(1 / 3)
    assert list(score_records(records(pairs))) == ["scanqa/video3dllm"]
    with pytest.raises(ValueError, match="have no answers"):
        score_records(records([(question(0, ()), "x")]))


def test_detection() -> None:
    text = json.dumps([{"label": "chair", "box_3d": BOX.tolist()}])
    (result,) = score_records(records([(detection(), text)])).values()
    assert result["protocol"] == "detection/f1" and result["at"]["0.5"]["F1"] == pytest.approx(2 / 3)
    check_documented({"detection/f1": result})
    assert headline({"detection/f1": result})["detection/f1 F1@0.5"] == pytest.approx(2 / 3)


def test_unknown_or_unfitting_protocols_raise(grounded: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"Protocol scanqa/leo scores scanqa, but these are answers of scanrefer\."):
        score_records(grounded, ["scanqa/leo"])
    with pytest.raises(ValueError, match="protocol is 'scanrefer/leo'"):
        score_records(grounded, ["leo"])
    for name in ("vgllm_refined", "scanrefer/vgllm_refined"):
        with pytest.raises(ValueError, match=r"vgllm_refined .* --proposals"):
            score_records(grounded, [name])
    assert choose_protocols(["vgllm", "scanrefer/vgllm", "video3dllm"], grounded) == [
        *("scanrefer/vgllm", "scanrefer/video3dllm"),
    ]


@pytest.mark.parametrize("names", [(), ("all",), ("vgllm",)])
@patch.dict(PROTOCOLS)
def test_coordinates_without_a_protocol(grounded: list[dict[str, Any]], names: Sequence[str]) -> None:
    for name, each in list(PROTOCOLS.items()):
        if each.task != "scanrefer" or "world" in each.coordinates:
            del PROTOCOLS[name]
    assert "scanrefer/vgllm" in PROTOCOLS
    with pytest.raises(ValueError, match=r"scanrefer .*world coordinates.*scanrefer/vgllm \(camera"):
        choose_protocols(names, [{**grounded[0], "form": "world"}])


@patch.dict(PROTOCOLS)
def test_default_protocols_that_need_proposals(grounded: list[dict[str, Any]]) -> None:
    refined = replace(PROTOCOLS["scanrefer/vgllm_refined"], default=True, coordinates=("camera",))
    other = replace(PROTOCOLS["scanrefer/vgllm"], default=False)
    PROTOCOLS.clear()
    PROTOCOLS.update({each.name: each for each in (refined, other)})
    assert choose_protocols((), grounded) == ["scanrefer/vgllm"]
    assert choose_protocols((), grounded, has_proposals=True) == ["scanrefer/vgllm_refined"]
    del PROTOCOLS["scanrefer/vgllm"]
    for names in ((), ("all",)):
        with pytest.raises(ValueError, match=r"scanrefer/vgllm_refined.*--proposals"):
            choose_protocols(names, grounded)


def test_misleading_sets_are_rejected(grounded: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no predictions"):
        score_records([])
    with pytest.raises(ValueError, match="1 predictions appear more than once"):
        score_records([*grounded, grounded[0]])
    with pytest.raises(ValueError, match=r"several tasks \(scanqa, scanrefer\)"):
        score_records([*grounded, *records([(question(), "x")])])


def test_proposals_are_read(tmp_path: Path, grounded: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"scannet/scene0011_00": [[0] * 6, BOX[:6].tolist()]}))
    boxes = scoring.read_boxes(file)
    assert boxes == {"scene0011_00": [BOX[:6].tolist()]} and scoring.read_boxes(None) is None
    assert "1 broken boxes" in caplog.text and "scene0011_00[0]" in caplog.text
    assert score_records(grounded, ["vgllm_refined"], boxes)["scanrefer/vgllm_refined"]["count"] == 4
