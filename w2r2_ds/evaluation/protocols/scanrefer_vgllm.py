"""ScanRefer's Acc@k for answers that give a frame and a nine-number box in that frame's camera (VG-LLM's format).

The box is moved to the axis-aligned world with the pose of the predicted frame and compared as an oriented box. IoU is
exact (``boxes3d/iou.py``); hits are IoU >= k after rounding to ``IOU_DECIMALS``. An answer that cannot be parsed counts
as IoU 0. Accuracies are fractions in 0..1.

* ``vgllm-direct``, this project's protocol: strict JSON (``data/tasks/parsing.py``), angles are intrinsic ZXY as in the
  labels. "Direct" means without refinement by detected boxes.
* ``vgllm*``: LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scanrefer/utils.py``, ``scanrefer_process_results``. That evaluator
  takes IoU from pytorch3d's ``box3d_overlap`` in float32, which is off by up to 0.24 for nearly parallel faces and
  cannot be reproduced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding
from w2r2_ds.evaluation.protocols.records import IOU_DECIMALS, AnswerRecord, Proposals, camera_poses, nine_numbers
from w2r2_ds.evaluation.protocols.refinement import refine
from w2r2_ds.evaluation.protocols.registry import Protocol, ProtocolResult, register_protocol
from w2r2_ds.evaluation.protocols.scanrefer import (
    GROUPS,
    Box,
    ScanReferRecord,
    ScoredDescription,
    accuracies,
    accuracy_paths,
    check_descriptions,
    description_of,
)
from w2r2_ds.evaluation.protocols.vgllm_answer import PARSERS, TURNS
from w2r2_ds.types.sample import Sample

DIRECT = "vgllm-direct, exact IoU"


class Prediction(TypedDict):
    """One scored answer of ``vgllm-direct``; plain JSON.

    Keys:
        id: the sample's id.
        group: ``"unique"`` or ``"multiple"``.
        text: the generated answer.
        iou: oriented IoU with the annotated box; 0 if the answer could not be parsed.
        parsed: whether the answer could be parsed.
        reason: why it could not; None otherwise.
        frame: index of the predicted frame, or None.
        box_world: predicted box ``[9]`` in the axis-aligned world; None without one, or if its numbers overflow.
    """

    id: str
    group: str
    text: str
    iou: float
    parsed: bool
    reason: str | None
    frame: int | None
    box_world: list[float] | None


def score_prediction(text: str, sample: Sample) -> Prediction:
    """Parse one generated answer and compare its box with the sample's target."""
    assert sample.target is not None, "a ScanRefer sample has a target"
    return score_answer(sample.id, text, sample.cam_to_world, sample.target.box, sample.target.group)


def score_answer(identity: str, text: str, cam_to_world: np.ndarray, target: np.ndarray, group: str) -> Prediction:
    """`score_prediction` from the parts of a sample: poses ``[frames, 4, 4]`` and annotated world box ``[9]``."""
    scored = Prediction(
        id=identity, group=group, text=text, iou=0.0, parsed=False, reason=None, frame=None, box_world=None
    )
    try:
        answer = parse_grounding(text, len(cam_to_world))
    except AnswerError as error:
        scored["reason"] = error.reason
        return scored
    with np.errstate(over="ignore", invalid="ignore"):
        box = camera_to_world(answer.box, cam_to_world[answer.frame])
    scored["iou"] = _oriented_iou(box.tolist(), target.tolist())
    scored["parsed"] = True
    scored["frame"] = answer.frame
    scored["box_world"] = box.tolist() if np.isfinite(box).all() else None
    return scored


def score_direct(predictions: Iterable[Mapping[str, Any]]) -> ProtocolResult:
    """``vgllm-direct``: accuracies and mean IoU of a whole set.

    Args:
        predictions: one `Prediction` per sample; only id, group, iou, parsed and reason are used.

    Returns:
        ``protocol``; ``overall``, ``unique`` and ``multiple``, each with ``count``, ``acc@0.25``, ``acc@0.5`` and
        ``mean_iou`` (None for an empty group); ``parsed``, the share that could be parsed; ``failures``: reason ->
        number of answers.

    Raises:
        ValueError: no predictions, two of one sample, or an unknown group.
    """
    rows = list(predictions)
    _check_predictions(rows)
    reasons = Counter(str(row["reason"]) for row in rows if not row["parsed"])
    return {
        "protocol": DIRECT,
        "overall": _group_scores([float(row["iou"]) for row in rows]),
        **{group: _group_scores([float(row["iou"]) for row in rows if row["group"] == group]) for group in GROUPS},
        "parsed": sum(bool(row["parsed"]) for row in rows) / len(rows),
        "failures": dict(sorted(reasons.items())),
    }


def _group_scores(ious: Sequence[float]) -> dict[str, float | int | None]:
    rounded = (round(iou, IOU_DECIMALS) for iou in ious)
    return {"count": len(ious), **accuracies(rounded), "mean_iou": sum(ious) / len(ious) if ious else None}


def _check_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("There are no predictions to score.")
    repeated = [key for key, number in Counter(row["id"] for row in rows).items() if number > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} samples have more than one prediction, the first is {repeated[0]!r}.")
    unknown = {row["group"] for row in rows} - set(GROUPS)
    if unknown:
        raise ValueError(f"A sample's group must be unique or multiple, not {sorted(map(str, unknown))}.")


def score_vgllm(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    angles: str = "zxy",
    reading: str = "line",
    proposals: Mapping[str, Sequence[Box]] | None = None,
) -> ProtocolResult:
    """VG-LLM's evaluator: oriented IoU, no groups.

    Args:
        descriptions: all descriptions to score.
        answers: generated texts by ``ScoredDescription.key``.
        poses: by the same key, ``[n, 4, 4]``: camera to axis-aligned world of the frames that the model got.
        angles: ``zxy`` as VG-LLM's evaluator interprets them, ``ZXY`` as its labels are written
            (``vgllm_answer.TURNS``).
        reading: parser of the texts: ``line`` as the evaluator's, ``anywhere`` for a lenient one
            (``vgllm_answer.PARSERS``).
        proposals: detected boxes by scene; predicted boxes are refined by them first (``refinement.refine``).

    Returns:
        ``protocol``, ``angles``, ``reading``, ``count``, ``parsed`` (share that could be parsed), accuracies,
        ``items`` (``iou``; ``box`` that was compared; ``reason`` why the text could not be parsed).

    Raises:
        ValueError: unknown options, no descriptions, a description twice, an answer to an unknown one, or poses or a
            scene's proposals missing.
    """
    _check_vgllm(descriptions, answers, poses, angles, reading, proposals)
    items = {}
    for each in descriptions:
        boxes = () if proposals is None else proposals[each.scene_id]
        items[each.key] = _answer_item(answers.get(each.key, ""), each.box, poses[each.key], angles, reading, boxes)
    return {
        "protocol": "vgllm" if proposals is None else "vgllm_refined",
        "angles": angles,
        "reading": reading,
        "count": len(items),
        "parsed": sum(item["reason"] is None for item in items.values()) / len(items),
        **accuracies(round(item["iou"], IOU_DECIMALS) for item in items.values()),
        "items": items,
    }


def score_vgllm_refined(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    proposals: Mapping[str, Sequence[Box]],
) -> ProtocolResult:
    """`score_vgllm` after refinement by detected boxes."""
    return score_vgllm(descriptions, answers, poses, proposals=proposals)


def _answer_item(
    text: str, truth: Box, poses: np.ndarray, angles: str, reading: str, proposals: Sequence[Box]
) -> dict[str, Any]:
    try:
        answer = PARSERS[reading](text, len(poses))
    except AnswerError as error:
        return {"iou": 0.0, "box": None, "reason": error.reason}
    with np.errstate(over="ignore", invalid="ignore"):  # huge generated numbers overflow: IoU 0
        box = nine_numbers(refine(TURNS[angles](answer.box, np.asarray(poses[answer.frame])).tolist(), proposals))
    return {"iou": _oriented_iou(box, truth), "box": box if np.isfinite(box).all() else None, "reason": None}


def _oriented_iou(box: Box, truth: Box) -> float:
    pair = torch.tensor([nine_numbers(box), nine_numbers(truth)], dtype=torch.float64)
    return float(box_iou(pair[:1], pair[1:]))


def _check_vgllm(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    angles: str,
    reading: str,
    proposals: Mapping[str, Sequence[Box]] | None,
) -> None:
    check_descriptions(descriptions, answers)
    for name, value, choices in (("angles", angles, TURNS), ("reading", reading, PARSERS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}.")
    without_poses = [each.key for each in descriptions if np.shape(poses.get(each.key, ()))[1:] != (4, 4)]
    if without_poses:
        raise ValueError(
            f"{len(without_poses)} descriptions have no camera poses [n, 4, 4], the first is {without_poses[0]!r}."
        )
    if proposals is not None:
        missing = sorted({each.scene_id for each in descriptions} - proposals.keys())
        if missing:
            raise ValueError(f"{len(missing)} scenes have no proposals, the first is {missing[0]}.")


def _direct_prediction(record: AnswerRecord) -> Mapping[str, Any]:
    target = record["target"]
    if record["text"] is None:
        return {"id": record["id"], "group": target["group"], "iou": 0.0, "parsed": False, "reason": "no prediction"}
    box = np.array(nine_numbers(target["box"]))
    return score_answer(record["id"], record["text"], camera_poses(record), box, target["group"])


def _direct_inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    return ([_direct_prediction(record) for record in records],)


def _vgllm_inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    descriptions = [description_of(record) for record in records]
    texts = {record["id"]: record["text"] or "" for record in records}
    return descriptions, texts, {record["id"]: camera_poses(record) for record in records}


def _refined_inputs(records: Sequence[AnswerRecord], proposals: Proposals | None) -> tuple[Any, ...]:
    assert proposals is not None, "choose_protocols raises an error without proposals"
    return *_vgllm_inputs(records, None), proposals


_camera_protocol = partial(Protocol, record_model=ScanReferRecord, coordinates=("camera",), best_by="acc@0.25")

register_protocol(
    _camera_protocol(
        "scanrefer/vgllm-direct",
        "This project's own: strict JSON, angles as the labels are written, exact oriented IoU.",
        "w2r2_ds/evaluation/protocols/scanrefer_vgllm.py",
        score_direct,
        accuracy_paths("overall"),
        inputs=_direct_inputs,
        default=True,
        extra_metrics={"mean_iou": ("overall", "mean_iou")},
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm",
        "VG-LLM's answers as its evaluator parses them, angles as extrinsic zxy included; exact oriented IoU.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py",
        score_vgllm,
        accuracy_paths(),
        inputs=_vgllm_inputs,
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm_ZXY",
        "As vgllm, but angles are intrinsic ZXY as the labels are written.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py, its two 'zxy' changed to 'ZXY'",
        partial(score_vgllm, angles="ZXY"),
        accuracy_paths(),
        inputs=_vgllm_inputs,
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm_refined",
        "As vgllm, but each box is first replaced by the detected box of its scene that overlaps it most.",
        "LaVi-Lab/VG-LLM, as its paper describes the numbers in parentheses; no public evaluator to compare with",
        score_vgllm_refined,
        accuracy_paths(),
        inputs=_refined_inputs,
        needs_proposals=True,
    )
)
