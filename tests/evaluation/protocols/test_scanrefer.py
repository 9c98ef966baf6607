"""Scoring of single answers, and Acc@k of a set."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.evaluation.protocols.scanrefer_vgllm import DIRECT, score_direct, score_prediction
from w2r2_ds.types.sample import Sample, Target

HERE = Path(__file__).parents[2] / "golden" / "boxes.json"
OTHER = Path(os.environ.get("W2R2_GOLDEN", HERE.parent)) / "boxes.json"
LEVEL = np.array([[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])
WORLD = np.array([2, 5, 1, 0.8, 0.6, 1, 0, 0, 0.0])


def sample(box: np.ndarray, cam_to_world: np.ndarray, group: str = "unique") -> Sample:
    frames = tuple(Path(f"{number}.jpg") for number in range(len(cam_to_world)))
    target = Target(box=box, object_id=1, object_name="chair", group=group)
    return Sample("scene0000_00|1|chair|0", "scanrefer", "scene0000_00", frames, cam_to_world, "", "", target)


def answer(frame: int, box: np.ndarray) -> str:
    return json.dumps({"frame": frame, "bbox_3d": [round(float(value), 2) for value in box]})


def record(iou: float, group: str, parsed: bool = True, name: str = "") -> dict[str, Any]:
    return {
        "id": name or f"{iou}{group}",
        "iou": iou,
        "group": group,
        "parsed": parsed,
        "reason": None if parsed else "why",
    }


@pytest.mark.golden
def test_texts_match() -> None:
    """Our reading is intrinsic ZXY. Where a text holds two answers the golden value is of the first; we fail it."""
    for case in json.loads((OTHER if OTHER.exists() else HERE).read_text())["scanrefer_eval"]:
        poses = np.array(case["axis_align_matrix"]) @ np.array(case["cam2global"])
        scored = score_prediction(case["text"], sample(np.array(case["gt_bbox"]), poses))
        several = case["text"].count("bbox_3d") > 1
        expected = 0.0 if several else case["iou_if_angles_read_as_intrinsic_ZXY"]
        assert scored["iou"] == pytest.approx(expected, abs=1e-6)
        assert scored["parsed"] == (expected > 0)


def test_the_box_is_read_in_the_predicted_frame() -> None:
    other = np.eye(4)
    poses = np.stack([other, LEVEL])
    text = answer(1, world_to_camera(WORLD, LEVEL))
    scored = score_prediction(text, sample(WORLD, poses))
    assert scored["parsed"]
    assert scored["reason"] is None
    assert scored["frame"] == 1
    assert scored["iou"] > 0.99
    assert scored["box_world"] is not None
    np.testing.assert_allclose(scored["box_world"][:6], WORLD[:6], atol=0.01)
    assert score_prediction(text.replace('"frame": 1', '"frame": 0'), sample(WORLD, poses))["iou"] == 0


def test_a_world_turn_at_two_decimals() -> None:
    """Gravity-aligned camera, box yawed by 0.5: rounding costs little, a mixed convention would cost a lot."""
    yawed = np.array([2, 5, 1, 0.8, 0.6, 1, 0.5, 0, 0.0])
    written = np.array([1, 0.5, 3, 0.8, 0.6, 1, 1.57, 1.07, -1.57])
    assert score_prediction(answer(0, written), sample(yawed, LEVEL[None]))["iou"] > 0.99


def test_a_failure_is_a_zero_with_a_reason() -> None:
    scored = score_prediction("no idea", sample(WORLD, LEVEL[None], "multiple"))
    assert scored == {
        "id": "scene0000_00|1|chair|0",
        "group": "multiple",
        "text": "no idea",
        "iou": 0.0,
        "parsed": False,
        "reason": "it is not exactly one JSON object",
        "frame": None,
        "box_world": None,
    }
    assert score_direct([scored])["overall"] == {"count": 1, "acc@0.25": 0.0, "acc@0.5": 0.0, "mean_iou": 0.0}


def test_absurd_numbers_are_a_zero_and_valid_json() -> None:
    tilted = LEVEL.copy()
    tilted[:3, :3] = [[0.6, -0.8, 0], [0, 0, 1], [0.8, 0.6, 0]]
    for huge in ("1e308", "-1.79e308"):
        text = f'{{"frame": 0, "bbox_3d": [{huge}, {huge}, 1.79e308, 1e308, 1, 1, {huge}, 1, 1]}}'
        scored = score_prediction(text, sample(WORLD, tilted[None]))
        assert scored["parsed"]
        assert scored["iou"] == 0
        json.dumps(scored, allow_nan=False)


def test_hand_vector() -> None:
    rows = [record(0.60, "multiple"), record(0.30, "multiple"), record(0.25, "unique"), record(0.49, "unique")]
    result = score_direct(rows)
    assert result["protocol"] == DIRECT == "vgllm-direct, exact IoU"
    assert result["overall"] == {"count": 4, "acc@0.25": 1.0, "acc@0.5": 0.25, "mean_iou": pytest.approx(0.41)}
    assert (result["unique"]["acc@0.25"], result["unique"]["acc@0.5"]) == (1.0, 0.0)
    assert (result["multiple"]["acc@0.25"], result["multiple"]["acc@0.5"]) == (1.0, 0.5)
    assert result["parsed"] == 1.0
    assert result["failures"] == {}


def test_hand_vector_with_a_failure() -> None:
    rows = [record(0.60, "multiple"), record(0.30, "multiple"), record(0.25, "unique"), record(0.49, "unique")]
    result = score_direct([*rows, record(0.0, "multiple", parsed=False)])
    assert (result["overall"]["acc@0.25"], result["overall"]["acc@0.5"]) == (0.8, 0.2)
    assert result["multiple"]["acc@0.25"] == pytest.approx(2 / 3)
    assert result["multiple"]["acc@0.5"] == pytest.approx(1 / 3)
    assert result["unique"]["count"] == 2
    assert result["parsed"] == 0.8
    assert result["failures"] == {"why": 1}


def test_an_exact_half_is_a_hit() -> None:
    result = score_direct([record(math.nextafter(0.5, 0), "unique"), record(0.25, "multiple")])
    assert result["unique"]["acc@0.5"] == 1.0
    assert result["multiple"]["acc@0.25"] == 1.0
    taller = np.array([0, 0, 3.0, 1, 1, 2, 0, 0, 0])
    scored = score_prediction(answer(0, np.array([0, 0, 3.0, 1, 1, 1, 0, 0, 0])), sample(taller, np.eye(4)[None]))
    assert score_direct([scored])["unique"]["acc@0.5"] == 1.0


def test_an_empty_group_has_no_accuracy() -> None:
    assert score_direct([record(0.6, "unique")])["multiple"] == {
        "count": 0,
        "acc@0.25": None,
        "acc@0.5": None,
        "mean_iou": None,
    }


def test_misleading_sets_are_rejected() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        score_direct([])
    with pytest.raises(ValueError, match="more than one prediction, the first is 'a'"):
        score_direct([record(0.1, "unique", name="a"), record(0.2, "unique", name="a")])
    with pytest.raises(ValueError, match="unique or multiple"):
        score_direct([record(0.1, "others")])
