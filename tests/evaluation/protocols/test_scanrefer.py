"""ScanRefer: scores of single answers, and Acc@k of a set."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2r2_ds.boxes3d.transforms import camera_to_world, world_to_camera
from w2r2_ds.data.tasks.parsing import parse_grounding
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription
from w2r2_ds.evaluation.protocols.scanrefer_vgllm import answer_item, direct_scores, score_direct

HERE = Path(__file__).parents[2] / "golden" / "boxes.json"
OTHER = Path(os.environ.get("W2R2_GOLDEN", HERE.parent)) / "boxes.json"
LEVEL = np.array([[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])
WORLD = np.array([2, 5, 1, 0.8, 0.6, 1, 0, 0, 0.0])


def score(text: str | None, box: np.ndarray, cam_to_world: np.ndarray) -> dict[str, Any]:
    return answer_item(text, box.tolist(), cam_to_world, parse_grounding, camera_to_world)


def answer(frame: int, box: np.ndarray) -> str:
    return json.dumps({"frame": frame, "bbox_3d": [round(float(value), 2) for value in box]})


def item(iou: float, group: str, reason: str | None = None) -> dict[str, Any]:
    return {"iou": iou, "group": group, "reason": reason}


@pytest.mark.golden
def test_answers_have_the_golden_scores() -> None:
    """Angles are intrinsic ZXY. If a text has two answers, the golden value is the first's; here it is invalid."""
    for case in json.loads((OTHER if OTHER.exists() else HERE).read_text())["scanrefer_eval"]:
        poses = np.array(case["axis_align_matrix"]) @ np.array(case["cam2global"])
        scored = score(case["text"], np.array(case["gt_bbox"]), poses)
        several = case["text"].count("bbox_3d") > 1
        expected = 0.0 if several else case["iou_if_angles_read_as_intrinsic_ZXY"]
        assert scored["iou"] == pytest.approx(expected, abs=1e-6)
        assert (scored["reason"] is None) == (expected > 0)


def test_the_box_is_in_the_coordinates_of_the_predicted_frame() -> None:
    other = np.eye(4)
    poses = np.stack([other, LEVEL])
    text = answer(1, world_to_camera(WORLD, LEVEL))
    scored = score(text, WORLD, poses)
    assert scored["reason"] is None
    assert scored["iou"] > 0.99
    np.testing.assert_allclose(scored["box"][:6], WORLD[:6], atol=0.01)
    assert score(text.replace('"frame": 1', '"frame": 0'), WORLD, poses)["iou"] == 0


def test_a_rotated_box_rounded_to_two_decimals() -> None:
    """Level camera, box yawed by 0.5: rounding changes the IoU little, a wrong angle convention a lot."""
    yawed = np.array([2, 5, 1, 0.8, 0.6, 1, 0.5, 0, 0.0])
    written = np.array([1, 0.5, 3, 0.8, 0.6, 1, 1.57, 1.07, -1.57])
    assert score(answer(0, written), yawed, LEVEL[None])["iou"] > 0.99


def test_an_invalid_answer_scores_zero_with_a_reason() -> None:
    assert score("no idea", WORLD, LEVEL[None]) == {
        "iou": 0.0,
        "box": None,
        "reason": "it is not exactly one JSON object",
    }
    description = ScoredDescription("a", "scene0000_00", WORLD.tolist(), "multiple")
    result = score_direct([description], {}, {"a": LEVEL[None]})
    assert result["items"] == {"a": {"group": "multiple", "iou": 0.0, "box": None, "reason": "no prediction"}}
    assert result["overall"] == {"count": 1, "acc@0.25": 0.0, "acc@0.5": 0.0, "mean_iou": 0.0}
    assert (result["protocol"], result["parsed"]) == ("vgllm-direct", 0.0)
    assert result["failures"] == {"no prediction": 1}


def test_huge_numbers_score_zero_and_stay_valid_json() -> None:
    tilted = LEVEL.copy()
    tilted[:3, :3] = [[0.6, -0.8, 0], [0, 0, 1], [0.8, 0.6, 0]]
    for huge in ("1e308", "-1.79e308"):
        text = f'{{"frame": 0, "bbox_3d": [{huge}, {huge}, 1.79e308, 1e308, 1, 1, {huge}, 1, 1]}}'
        scored = score(text, WORLD, tilted[None])
        assert scored["reason"] is None
        assert scored["iou"] == 0
        json.dumps(scored, allow_nan=False)


def test_accuracy_by_hand() -> None:
    rows = [item(0.60, "multiple"), item(0.30, "multiple"), item(0.25, "unique"), item(0.49, "unique")]
    result = direct_scores(rows)
    assert result["overall"] == {"count": 4, "acc@0.25": 1.0, "acc@0.5": 0.25, "mean_iou": pytest.approx(0.41)}
    assert (result["unique"]["acc@0.25"], result["unique"]["acc@0.5"]) == (1.0, 0.0)
    assert (result["multiple"]["acc@0.25"], result["multiple"]["acc@0.5"]) == (1.0, 0.5)
    assert result["parsed"] == 1.0
    assert result["failures"] == {}


def test_accuracy_by_hand_with_an_invalid_answer() -> None:
    rows = [item(0.60, "multiple"), item(0.30, "multiple"), item(0.25, "unique"), item(0.49, "unique")]
    result = direct_scores([*rows, item(0.0, "multiple", "why")])
    assert (result["overall"]["acc@0.25"], result["overall"]["acc@0.5"]) == (0.8, 0.2)
    assert result["multiple"]["acc@0.25"] == pytest.approx(2 / 3)
    assert result["multiple"]["acc@0.5"] == pytest.approx(1 / 3)
    assert result["unique"]["count"] == 2
    assert result["parsed"] == 0.8
    assert result["failures"] == {"why": 1}


def test_an_iou_of_one_half_counts() -> None:
    result = direct_scores([item(math.nextafter(0.5, 0), "unique"), item(0.25, "multiple")])
    assert result["unique"]["acc@0.5"] == 1.0
    assert result["multiple"]["acc@0.25"] == 1.0
    taller = np.array([0, 0, 3.0, 1, 1, 2, 0, 0, 0])
    description = ScoredDescription("a", "scene0000_00", taller.tolist(), "unique")
    text = answer(0, np.array([0, 0, 3.0, 1, 1, 1, 0, 0, 0]))
    result = score_direct([description], {"a": text}, {"a": np.eye(4)[None]})
    assert result["unique"]["acc@0.5"] == 1.0


def test_an_empty_group_has_no_accuracy() -> None:
    assert direct_scores([item(0.6, "unique")])["multiple"] == {
        "count": 0,
        "acc@0.25": None,
        "acc@0.5": None,
        "mean_iou": None,
    }


def test_misleading_sets_are_rejected() -> None:
    description = ScoredDescription("a", "scene0000_00", WORLD.tolist(), "unique")
    poses = {"a": LEVEL[None]}
    with pytest.raises(ValueError, match="no descriptions"):
        score_direct([], {}, poses)
    with pytest.raises(ValueError, match="1 descriptions appear more than once, the first is 'a'"):
        score_direct([description] * 2, {}, poses)
    with pytest.raises(ValueError, match="unique or multiple"):
        direct_scores([item(0.1, "others")])
