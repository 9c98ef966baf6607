"""ScanRefer's Acc@k against that of three public evaluators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from annotation_json import descriptions_from
from golden_files import Golden, find, is_scanrefer_scores
from metric_cases import assert_all_fields_read, assert_numbers_equal
from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix
from w2r2_ds.data.sources.labels import OTHERS
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription, official_scores
from w2r2_ds.evaluation.protocols.scanrefer_vgllm import score_vgllm

pytestmark = pytest.mark.golden

FILES = find(is_scanrefer_scores)
FILE = pytest.mark.parametrize("golden", FILES, ids=lambda golden: golden.name)
VARIANTS = [
    pytest.param(golden, variant, parser, id=f"{golden.name}-{variant}-{parser}")
    for golden in FILES
    for variant in golden.record["protocols"]["vgllm"]["scores"]
    for parser in ("line", "anywhere")
]
VGLLM = pytest.mark.parametrize(("golden", "variant", "parser"), VARIANTS)


def names(entry: dict[str, Any]) -> str:
    return "|".join(entry[field] for field in ("scene_id", "object_id", "ann_id"))


def descriptions(golden: Golden) -> list[ScoredDescription]:
    return descriptions_from(golden.beside("annotations"), golden.beside("scenes")["gt_boxes"], labels(golden))


def predictions(golden: Golden, field: str) -> dict[str, Any]:
    return {names(entry): entry[field] for entry in golden.beside("predictions")}


def labels(golden: Golden) -> dict[str, tuple[int, str]]:
    return {name: (number, word) for name, (number, word) in golden.beside("scenes")["label_map"].items()}


def percent(block: dict[str, Any]) -> float:
    """Accuracies in percent, as recorded."""
    return 100.0 if block["options"]["unit"].startswith("percent") else 1.0


def printed(scores: dict[str, Any]) -> dict[str, Any]:
    """Recorded accuracies with this package's metric names."""
    return {
        name.removesuffix("iou"): printed(value) if isinstance(value, dict) else value for name, value in scores.items()
    }


def score(golden: Golden, name: str, kept: list[ScoredDescription]) -> dict[str, Any]:
    boxes = {key: box for key, box in predictions(golden, "box").items() if key in {each.key for each in kept}}
    return find_protocol(f"scanrefer/{name}").score(kept, boxes)


def with_box(golden: Golden) -> list[ScoredDescription]:
    boxes = predictions(golden, "box")
    return [each for each in descriptions(golden) if boxes.get(each.key) is not None]


@FILE
def test_ious_of_single_answers(golden: Golden) -> None:
    official = score(golden, "scanrefer_official", descriptions(golden))["items"]
    other = score(golden, "video3dllm", descriptions(golden))["items"]
    assert [names(item) for item in golden.record["items"]] == list(official) == list(other)
    for expected in golden.record["items"]:
        ours, theirs = official[names(expected)], other[names(expected)]
        assert (ours["group"], ours["class"]) == (expected["unique_multiple_official"], expected["class_official"])
        assert expected["others_official"] == (ours["class"] == OTHERS)
        assert theirs["group"] == expected["unique_multiple_video3dllm"]
        assert ours["iou"] == pytest.approx(expected["iou_aabb"], abs=1e-9)
        assert theirs["iou"] == pytest.approx(expected["iou_aabb_video3dllm"], abs=1e-9)
        for hit in (part for part in expected if part.startswith("hit@")):
            assert (ours["iou"] >= float(hit.removeprefix("hit@"))) == expected[hit]


@FILE
def test_official_accuracy(golden: Golden) -> None:
    block = golden.record["protocols"]["scanrefer_official"]
    assert_all_fields_read(
        block,
        *("reference", "options", "failed_counted_as_zero_box", "failed_left_out", "two_duplicated_predictions"),
    )
    everything = score(golden, "scanrefer_official", descriptions(golden))
    rows = list(everything["items"].values())
    for part, got in {
        "failed_counted_as_zero_box": everything,
        "failed_left_out": score(golden, "scanrefer_official", with_box(golden)),
        "two_duplicated_predictions": official_scores([*rows, rows[0], rows[-1]]),
    }.items():
        assert_numbers_equal(printed(block[part]["scores"]), got["scores"], part, percent(block))
        assert_numbers_equal(block[part]["counts"], got["counts"], part)


@FILE
def test_video3dllm_accuracy(golden: Golden) -> None:
    block = golden.record["protocols"]["video3dllm"]
    assert_all_fields_read(block, "reference", "options", "failed_counted_as_zero_box", "failed_left_out")
    for part, kept in {"failed_counted_as_zero_box": descriptions(golden), "failed_left_out": with_box(golden)}.items():
        got = score(golden, "video3dllm", kept)
        assert_numbers_equal(printed(block[part]), got, part, percent(block))


def vgllm(golden: Golden, variant: str, parser: str) -> dict[str, Any]:
    """The recorded names are FIELD|decode_ANGLES."""
    field, _, angles = variant.partition("|decode_")
    poses = {}
    for each in descriptions(golden):
        frames = golden.beside("scenes")["frames"][each.scene_id]
        poses[each.key] = np.array(frames["axis_align_matrix"]) @ np.array(frames["cam2global"])
    answers = predictions(golden, field)
    return score_vgllm(descriptions(golden), answers, poses, angles=angles, parser=parser)


@VGLLM
def test_vgllm_accuracy(golden: Golden, variant: str, parser: str) -> None:
    """With exact IoU. The recorded IoU of pytorch3d is wrong for nearly aligned boxes."""
    block = golden.record["protocols"]["vgllm"]
    expected = block["scores"][variant]
    got = vgllm(golden, variant, parser)
    part = "with_exact_iou" if parser == "line" else "with_exact_iou_and_lenient_parsing"
    assert_numbers_equal(printed(expected[part]), got, variant, percent(block))
    assert got["count"] == expected["total"]
    if parser == "line":
        assert got["parsed"] == expected["parsed"] / expected["total"]


@VGLLM
def test_vgllm_ious_of_single_answers(golden: Golden, variant: str, parser: str) -> None:
    got = vgllm(golden, variant, parser)["items"]
    for item in golden.record["items"]:
        ours, expected = got[names(item)], item["vgllm"][variant]
        parsed = expected["parsed"]
        if parser == "anywhere" and "if_parsed_leniently" in expected:
            expected, parsed = expected["if_parsed_leniently"], True
        assert (ours["reason"] is None) == parsed, item["edge"]
        assert ours["iou"] == pytest.approx(expected["iou_exact_float64"], abs=1e-6), item["edge"]
        if parsed:
            box = np.array(expected["pred_box_world"])
            np.testing.assert_allclose(ours["box"][:6], box[:6], atol=1e-6)
            np.testing.assert_allclose(
                euler_angles_to_matrix(ours["box"][6:]), euler_angles_to_matrix(box[6:]), atol=1e-5
            )
