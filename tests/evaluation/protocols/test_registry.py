"""The registered protocols, the paper's Overall, and what each task rejects."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from annotation_json import NamedObject, answers_from, captions_from, descriptions_from, objects_from, questions_from
from metric_cases import undocumented
from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.data.sources.labels import nyu40_class, scannet_class, unique_or_multiple
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.protocols.refinement import refine
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS, find_protocol, overall
from w2r2_ds.evaluation.protocols.scan2cap import score_scan2cap
from w2r2_ds.evaluation.protocols.scan2cap_rules import SCAN2CAP_RULES, Caption, DescribedObject
from w2r2_ds.evaluation.protocols.scanqa import match_any, match_in_order, match_nonempty, score_scanqa
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription, score_official, score_video3dllm
from w2r2_ds.evaluation.protocols.scanrefer_vgllm import score_vgllm
from w2r2_ds.evaluation.protocols.vgllm_answer import extrinsic_to_world, parse_anywhere, parse_line

UNIT = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
LABELS = {"chair": (5, "chair"), "office chair": (5, "chair"), "table": (7, "table"), "wall": (1, "wall")}


def describe(ann: str = "0") -> ScoredDescription:
    return ScoredDescription(f"scene0000_00|1|{ann}", "scene0000_00", UNIT, "unique", "unique", 2)


def named(name: str, number: str, scene: str = "scene0000_00") -> NamedObject:
    return NamedObject(scene, number, name)


def described(number: str = "1") -> DescribedObject:
    return DescribedObject(f"s|{number}|chair", ("A chair.",), (("a", "chair", "."),), UNIT)


def test_protocol_names() -> None:
    assert find_protocol("scan2cap/leo").task == "scan2cap"
    assert all(name == each.name and name.startswith(each.task + "/") for name, each in PROTOCOLS.items())
    assert all(each.description.endswith(".") and each.source for each in PROTOCOLS.values())
    with pytest.raises(ValueError, match=r"'leo'.*scanqa/leo"):
        find_protocol("leo")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_page_of_a_task_has_its_protocols_and_metrics(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert undocumented([name, *protocol.metrics, *protocol.extra_metrics], protocol.task) == set()


@pytest.mark.parametrize(
    ("numbers", "printed"),
    [((63.6, 54.2, 44.8, 82.1, 30.8), 55.1), ((58.1, 51.7, 41.3, 83.8, 30.1), 53.0)],
)
def test_overall_score_by_the_papers_formula(numbers: tuple[float, ...], printed: float) -> None:
    assert overall(*(number / 100 for number in numbers)) == pytest.approx(printed, abs=0.05)
    assert overall(*(number / 100 for number in numbers[:4]), None) is None


@pytest.mark.parametrize(("shift", "expected"), [(0.2, 2 / 3), (1 / 3, 0.5), (0.5, 1 / 3), (0.6, 0.25), (1.0, 0.0)])
def test_aabb_iou_of_a_shifted_cube(shift: float, expected: float) -> None:
    moved = (shift, 0, 0, 1, 1, 1)
    assert aabb_iou(UNIT, moved) == pytest.approx(expected, abs=1e-8)
    assert aabb_iou(UNIT, moved, np.float32) == pytest.approx(expected, abs=1e-6)


def test_an_exact_half_depends_on_the_precision() -> None:
    taller = (0, 0, 0, 1, 1, 2)
    assert aabb_iou(UNIT, taller) == pytest.approx(0.4999999975, abs=1e-12)
    assert aabb_iou(UNIT, taller, np.float32) == 0.5


def test_degenerate_boxes() -> None:
    assert aabb_iou(UNIT, (0, 0, 0, 1, 1, 0)) == aabb_iou((0, 0, 0, -1, -1, 1), UNIT) == 0
    for box in ((0, 0, 0, 1, 1), (0, 0, 0, 1, 1, float("nan"))):
        with pytest.raises(ValueError, match="six finite numbers"):
            aabb_iou(UNIT, box)


def test_groups_by_each_class_map() -> None:
    annotated = [named("chair", "3"), named("office_chair", "5"), named("table", "7"), named("table", "7")]
    annotated += [named("wall", "8"), named("plant", "9"), named("chair", "1", "scene0001_00")]
    official = unique_or_multiple(annotated, LABELS, scannet_class)
    assert [official["scene0000_00", number] for number in "35789"] == ["multiple"] * 2 + ["unique"] + ["multiple"] * 2
    assert official["scene0001_00", "1"] == "unique"
    other = unique_or_multiple(annotated, LABELS, nyu40_class)
    assert (other["scene0000_00", "8"], other["scene0000_00", "9"]) == ("unique", "unique")
    renamed = unique_or_multiple([named("table", "7"), named("chair", "7"), named("chair", "1")], LABELS, scannet_class)
    assert set(renamed.values()) == {"unique"}, "the first name of an object decides"


def test_a_failed_description_stays_in_the_denominator() -> None:
    rows = [describe(ann) for ann in "012"]
    boxes = {rows[0].key: UNIT, rows[1].key: None}
    assert score_official(rows, boxes)["scores"]["overall"]["overall"]["acc@0.5"] == pytest.approx(1 / 3)
    result = score_video3dllm(rows, boxes)
    assert result["all"] == {"count": 3, "acc@0.25": pytest.approx(1 / 3), "acc@0.5": pytest.approx(1 / 3)}
    assert result["multiple"] == {"count": 0, "acc@0.25": None, "acc@0.5": None}


def test_misleading_grounding_sets_are_rejected() -> None:
    with pytest.raises(ValueError, match="no descriptions"):
        score_official([], {})
    with pytest.raises(ValueError, match=r"1 descriptions appear more than once, the first is 'scene0000_00\|1\|0'"):
        score_video3dllm([describe()] * 2, {})
    with pytest.raises(ValueError, match="1 predictions belong to none of the descriptions, the first is 'x'"):
        score_official([describe()], {"x": None})
    with pytest.raises(ValueError, match="1 descriptions have no camera poses"):
        score_vgllm([describe()], {}, {})
    with pytest.raises(ValueError, match="angles is 'xyz'; it is one of zxy, ZXY"):
        score_vgllm([describe()], {}, {describe().key: np.eye(4)[None]}, angles="xyz")


def vgllm_text(box: list[float]) -> str:
    return json.dumps({"frame": 0, "bbox_3d": box})


def test_vgllm_counts_an_iou_of_one_half_and_accepts_huge_numbers() -> None:
    row = describe()
    poses = {row.key: np.eye(4)[None]}
    half = vgllm_text([0, 0, 0, 1, 1, 2, 0, 0, 0])
    assert score_vgllm([row], {row.key: half}, poses)["acc@0.5"] == 1.0
    for angles in ("zxy", "ZXY"):
        huge = vgllm_text([1e308, 1e308, 1e308, 1e308, 1, 1, 1e300, 1, 1])
        scored = score_vgllm([row], {row.key: huge}, poses, angles=angles)
        assert (scored["parsed"], scored["acc@0.25"]) == (1, 0.0)
        json.dumps(scored, allow_nan=False)


BOX = [1.0, 2.0, 3.0, 0.5, 0.6, 0.7, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "text",
    [
        f"{{'frame': 1, 'bbox_3d': {BOX}}}",
        f'```json\n\t{{"frame": 1, "bbox_3d": {BOX}}},\n```',
        f'{{"frame": 1, "bbox_3d": {BOX}}}\n{{"frame": 0, "bbox_3d": {BOX}}}',
    ],
)
def test_a_line_is_parsed_as_a_literal(text: str) -> None:
    found = parse_line(text, 2)
    assert found.frame == 1 and found.box.tolist() == BOX


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bbox_3d",
        "__import__('os').system('true') or 'bbox_3d'",
        "(" * 10000 + "bbox_3d",
        f'{{"frame": 2, "bbox_3d": {BOX}}}',
        f'{{"frame": True, "bbox_3d": {BOX}}}',
        f'{{"frame": 0, "bbox_3d": {BOX[:8]}}}',
        f'{{"frame": 0, "bbox_3d": {[*BOX[:8], "x"]}}}',
        f'{{"frame": 0, "bbox_3d": {[*BOX[:8], 10**400]}}}',
        f'{{"frame": 0,\n"bbox_3d": {BOX}}}',
    ],
)
def test_a_text_without_a_literal_raises(text: str) -> None:
    with pytest.raises(AnswerError):
        parse_line(text, 2)


def test_the_lenient_parser_finds_an_object_anywhere() -> None:
    text = f'{{ no }} {{"frame": 0}} then {{"frame": 1,\n "bbox_3d": {BOX}}} done'
    assert parse_anywhere(text, 2).frame == 1
    with pytest.raises(AnswerError, match="out of range"):
        parse_anywhere(text, 1)
    with pytest.raises(AnswerError, match="no JSON object"):
        parse_anywhere("{" * 2000, 2)


def test_both_angle_conventions_agree_without_rotation() -> None:
    level = np.array([0.5, 1.0, 2.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(extrinsic_to_world(level, np.eye(4)), level, atol=1e-12)


def test_refinement_uses_the_proposal_with_the_largest_iou() -> None:
    near, nearer, far = (0.5, 0, 0, 1, 1, 1), (0.2, 0, 0, 1, 1, 1), (9, 0, 0, 1, 1, 1)
    assert refine(UNIT, [near, nearer, far]) == nearer
    assert refine(UNIT, [nearer, nearer]) == nearer
    assert refine(UNIT, [far]) == refine(UNIT, []) == UNIT
    turned = (*UNIT, 0.785398, 0.0, 0.0)
    assert refine(turned, [near, UNIT]) == UNIT
    with pytest.raises(ValueError, match="six numbers"):
        refine(UNIT, [(0, 0, 0)])


def test_vgllm_refined_replaces_the_box_by_a_proposal() -> None:
    row = describe()
    poses, texts = {row.key: np.eye(4)[None]}, {row.key: vgllm_text([0.7, 0, 0, 1, 1, 1, 0, 0, 0])}
    assert score_vgllm([row], texts, poses)["acc@0.25"] == 0.0
    score = find_protocol("scanrefer/vgllm_refined").score
    refined = score([row], texts, poses, {row.scene_id: [UNIT, (5, 0, 0, 1, 1, 1)]})
    assert (refined["protocol"], refined["acc@0.5"]) == ("vgllm_refined", 1.0)
    assert refined["items"][row.key]["box"] == [*UNIT, 0.0, 0.0, 0.0]
    assert score([row], texts, poses, {row.scene_id: []})["acc@0.25"] == 0.0
    with pytest.raises(ValueError, match="1 scenes have no proposals, the first is 'scene0000_00'"):
        score([row], texts, poses, {})


def test_answer_matching_rules() -> None:
    cases = {
        ("two", ("two",)): ((1, 1), (1, 1)),
        ("black chair", ("black", "chair")): ((0, 1), (0, 1)),
        ("chair black", ("black chair",)): ((0, 0), (0, 0)),
        ("brown", ("dark brown", "brown")): ((1, 1), (0, 1)),
        ("", ("brown",)): ((0, 1), (0, 1)),
    }
    for (prediction, answers), expected in cases.items():
        assert (match_any(prediction, answers), match_in_order(prediction, answers)) == expected
        assert match_nonempty(prediction, answers) == (expected[0] if prediction else (0, 0))


def test_one_answer_per_question_has_no_em_at_10(no_java: Java) -> None:
    result = score_scanqa({"q": ["two"], "r": ["red"]}, {"q": ["two"]}, "scanqa_official", no_java)
    assert result["corpus"]["EM"] == 0.5 and result["missing"] == 1
    assert result["corpus"]["EM@10"] is None and "second answer" in result["not_computed"]["EM@10"]
    ranked = score_scanqa({"q": ["two"], "r": ["red"]}, {"q": ["one", "two"]}, "scanqa_official", no_java)
    assert (ranked["corpus"]["EM"], ranked["corpus"]["EM@10"]) == (0.0, 0.5)


def test_misleading_answers_are_rejected(no_java: Java) -> None:
    with pytest.raises(ValueError, match="no questions"):
        score_scanqa({}, {}, "leo", no_java)
    with pytest.raises(ValueError, match="1 questions have no answers, the first is 'q'; the test split"):
        score_scanqa({"q": []}, {}, "leo", no_java)
    with pytest.raises(ValueError, match="1 predictions belong to none of the questions, the first is 'x'"):
        score_scanqa({"q": ["two"]}, {"x": ["two"]}, "leo", no_java)
    with pytest.raises(ValueError, match=r"1 predictions .* instead of a list .* 'q'"):
        score_scanqa({"q": ["two"]}, {"q": "two"}, "leo", no_java)


def test_misleading_captions_are_rejected(no_java: Java) -> None:
    caption = Caption("a chair", UNIT)
    with pytest.raises(ValueError, match=r"1 annotated objects appear more than once, the first is 's\|1\|chair'"):
        score_scan2cap([described(), described()], {}, "leo", java=no_java)
    with pytest.raises(
        ValueError, match=r"1 predictions belong to none of the annotated objects, the first is 's\|2\|chair'"
    ):
        score_scan2cap([described()], {"s|2|chair": caption}, "leo", java=no_java)
    with pytest.raises(ValueError, match=r"Caption\.tokens"):
        score_scan2cap([described()], {"s|1|chair": caption}, "scan2cap_original", java=no_java)
    with pytest.raises(ValueError, match="no annotated objects"):
        score_scan2cap([], {}, "leo", java=no_java)


@pytest.mark.parametrize("protocol", SCAN2CAP_RULES)
def test_a_set_without_predictions_has_scores(protocol: str, no_java: Java) -> None:
    result = score_scan2cap([described("1"), described("2")], {}, protocol, java=no_java)
    assert (result["objects"], result["missing"]) == (2, 2)
    for at in result["at"].values():
        assert at["passed"] == 0 and at["corpus"]["METEOR"] is None
        if SCAN2CAP_RULES[protocol].tokenizer == "none":
            assert at["corpus"]["CIDEr"] == 0
    json.dumps(result, allow_nan=False)


def test_a_given_iou_replaces_the_boxs_iou(no_java: Java) -> None:
    caption = Caption("a chair", box=(9, 9, 9, 1, 1, 1), iou=0.3)
    at = score_scan2cap([described()], {"s|1|chair": caption}, "vgllm", java=no_java)["at"]
    assert (at["0.25"]["passed"], at["0.5"]["passed"]) == (1, 0)
    none = replace(caption, iou=None, box=None)
    assert score_scan2cap([described()], {"s|1|chair": none}, "vgllm", java=no_java)["at"]["0.25"]["passed"] == 0


def test_errors_name_the_entry_and_the_missing_field() -> None:
    entry = {"scene_id": "s", "object_id": "1", "object_name": "chair", "ann_id": "0", "description": "A chair."}
    boxes = {"s": {"1": UNIT}}
    assert descriptions_from([entry], boxes, LABELS)[0].key == "s|1|0"
    assert objects_from([entry | {"token": ["a"]}] * 2, boxes)[0].descriptions == ("A chair.", "A chair.")
    first, later = entry | {"caption": "x"}, entry | {"caption": "y", "iou": 0.5}
    assert captions_from([first, later])["s|1|chair"] == Caption("y", iou=0.5)
    for broken, message in (
        (lambda: descriptions_from([entry, {}], boxes, LABELS), "Entry 1 has no field 'scene_id'"),
        (lambda: objects_from([entry], boxes), "Entry 0 has no field 'token'"),
        (lambda: descriptions_from([entry], {"s": {}}, LABELS), "Entry 0: object '1' of s has no box"),
        (lambda: captions_from([entry]), "Entry 0 has no field 'caption'"),
        (lambda: questions_from([{"question_id": "q"}]), "Entry 0 has no field 'answers'"),
        (lambda: answers_from([{"question_id": "q", "answer_top10": ["a"]}] * 2), "Entry 1 repeats question_id 'q'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            broken()
