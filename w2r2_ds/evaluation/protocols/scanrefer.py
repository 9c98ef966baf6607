"""ScanRefer's Acc@k for answers that name a frame and a box in that frame's camera.

Protocol ``vgllm-direct, exact IoU``: the box is moved to the axis-aligned world with the predicted frame's pose and
compared as an oriented box with the annotated one (VG-LLM, ``src/lmms_eval/tasks/scanrefer/utils.py``). "Direct" means
without refinement by detected proposals. Three things differ from VG-LLM's evaluator, on purpose: angles are intrinsic
ZXY throughout, IoU is exact (pytorch3d's is wrong for some nearly aligned boxes; ``boxes3d/iou.py``), and answers
are read
strictly as JSON (``data/tasks/parsing.py``).

An answer that cannot be read counts as IoU 0 and stays in the denominator. Hits are ``IoU >= k``, as in every reference
implementation. Accuracies are fractions in 0..1. Other projects' protocols: ``evaluation/protocols/registry.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.sources.labels import MULTIPLE, OTHERS, UNIQUE, LabelMap, groups, nyu40_class, scannet_class
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding
from w2r2_ds.evaluation.protocols.refinement import nine_numbers, refine
from w2r2_ds.evaluation.protocols.vgllm_answer import READINGS, TURNS
from w2r2_ds.types.sample import Sample

PROTOCOL = "vgllm-direct, exact IoU"
THRESHOLDS = (0.25, 0.5)
GROUPS = ("unique", "multiple")
IOU_DECIMALS = 9
"""IoU is rounded to this before ``>=``: an exact half must not miss 0.5 by float64's last bit."""


class Prediction(TypedDict):
    """One scored answer; plain values, ready for a line of JSON.

    Keys:
        id: the sample's id.
        group: ``"unique"`` or ``"multiple"``.
        text: the answer as it was generated.
        iou: oriented IoU with the annotated box, 0 where the answer could not be read.
        parsed: whether it could be read.
        reason: why not; None where it could.
        frame: the predicted frame index, or None.
        box_world: the predicted box ``[9]`` in the axis-aligned world; None where there is none, or where
            its numbers are so large that the world's overflow.
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
    """Read one generated answer and compare its box with the sample's target."""
    assert sample.target is not None, "a ScanRefer sample has a target"
    return score_answer(sample.id, text, sample.cam_to_world, sample.target.box, sample.target.group)


def score_answer(identity: str, text: str, cam_to_world: np.ndarray, target: np.ndarray, group: str) -> Prediction:
    """The same from the parts of a sample: poses ``[frames, 4, 4]`` and world box ``[9]``."""
    record = Prediction(
        id=identity, group=group, text=text, iou=0.0, parsed=False, reason=None, frame=None, box_world=None
    )
    try:
        answer = parse_grounding(text, len(cam_to_world))
    except AnswerError as error:
        record["reason"] = error.reason
        return record
    with np.errstate(over="ignore", invalid="ignore"):
        box = camera_to_world(answer.box, cam_to_world[answer.frame])
    pair = torch.tensor([box.tolist(), target.tolist()], dtype=torch.float64)
    record["iou"] = float(box_iou(pair[:1], pair[1:]))
    record["parsed"] = True
    record["frame"] = answer.frame
    record["box_world"] = box.tolist() if np.isfinite(box).all() else None
    return record


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a whole set.

    Args:
        records: ``Prediction``s (or the same read back from JSON), one per sample; only id, group, iou, parsed and
            reason are looked at.

    Returns:
        ``protocol``; ``overall``, ``unique`` and ``multiple``, each with ``count``, ``acc@0.25``, ``acc@0.5`` and
        ``mean_iou`` (None for a group without samples); ``parsed``, the share that could be read; ``failures``, how
        often each reason was given.
    """
    rows = list(records)
    _check_answers(rows)
    reasons = Counter(str(row["reason"]) for row in rows if not row["parsed"])
    return {
        "protocol": PROTOCOL,
        "overall": _scores([float(row["iou"]) for row in rows]),
        **{group: _scores([float(row["iou"]) for row in rows if row["group"] == group]) for group in GROUPS},
        "parsed": sum(bool(row["parsed"]) for row in rows) / len(rows),
        "failures": dict(sorted(reasons.items())),
    }


def _scores(ious: Sequence[float]) -> dict[str, float | int | None]:
    """Count, accuracies and mean IoU of one group."""
    count = len(ious)
    scores: dict[str, float | int | None] = {"count": count}
    for threshold in THRESHOLDS:
        hits = sum(round(iou, IOU_DECIMALS) >= threshold for iou in ious)
        scores[f"acc@{threshold}"] = hits / count if count else None
    scores["mean_iou"] = sum(ious) / count if count else None
    return scores


def _check_answers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse sets whose scores would mislead: none, or an answer counted twice, or an unknown group."""
    if not rows:
        raise ValueError("There are no predictions to summarise.")
    twice = [key for key, number in Counter(row["id"] for row in rows).items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} samples have more than one prediction, the first is {twice[0]!r}.")
    unknown = {row["group"] for row in rows} - set(GROUPS)
    if unknown:
        raise ValueError(f"A sample's group must be unique or multiple, not {sorted(map(str, unknown))}.")


Box = Sequence[float]
"""``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""


@dataclass(frozen=True)
class ScoredDescription:
    """One annotated description.

    Attributes:
        scene_id, object_id, object_name, ann_id: as in ScanRefer's file.
        box: of its object, see ``Box``.
        group, group_nyu40: unique or multiple by each class map, where that was found out before (``record.py``).
        scannet_class: class of the object, see ``scannet_class``.
        name: what it is called in results; ``scene|object|ann`` without.
    """

    scene_id: str
    object_id: str
    object_name: str
    ann_id: str
    box: tuple[float, ...]
    group: str = ""
    group_nyu40: str = ""
    scannet_class: int = OTHERS
    name: str = ""

    @property
    def key(self) -> str:
        """The name, or ``scene|object|ann``."""
        return self.name or f"{self.scene_id}|{self.object_id}|{self.ann_id}"


def score_official(
    descriptions: Sequence[ScoredDescription],
    boxes: Mapping[str, Box | None],
    labels: LabelMap | None = None,
    split: Sequence[ScoredDescription] | None = None,
) -> dict[str, Any]:
    """ScanRefer's own evaluator: axis-aligned IoU with + 1e-8, ScanNet-18 classes, classes in and not in "others".

    daveredrum/ScanRefer ``benchmark/eval.py``: ``evaluate``.

    Args:
        descriptions: those that count.
        boxes: by ``ScoredDescription.key``; None for an answer that could not be read.
        labels: see ``LabelMap``; without it, groups and classes are those that the descriptions bring.
        split: all descriptions of the split, which decide what is unique; ``descriptions`` without it.

    Returns:
        ``protocol``; ``scores`` and ``counts``: group (unique, multiple, overall) -> in_others, not_in_others, overall
        -> accuracies, or the number; ``items``. As in the reference, an empty group has accuracy 0: see its count.

    Raises:
        ValueError: no descriptions, one twice, or a box of none of them.
    """
    _check(descriptions, boxes)
    known = {(each.scene_id, each.object_id): each.group for each in descriptions}
    if labels is not None:
        known = groups(split or descriptions, labels, scannet_class)
    items = _box_items(descriptions, boxes, known)
    for item, each in zip(items.values(), descriptions, strict=True):
        item["class"] = each.scannet_class if labels is None else scannet_class(each.object_name, labels)
    return {"protocol": "scanrefer_official", **official_scores(list(items.values())), "items": items}


def official_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``scores`` and ``counts`` as ``score_official`` of rows with ``iou``, ``group``, ``class``; each row counts."""
    scores: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for group in (UNIQUE, MULTIPLE, "overall"):
        rows = [item for item in items if group in ("overall", item["group"])]
        parts = {
            "not_in_others": [row for row in rows if row["class"] != OTHERS],
            "in_others": [row for row in rows if row["class"] == OTHERS],
            "overall": rows,
        }
        counts[group] = {name: len(part) for name, part in parts.items()}
        scores[group] = {
            name: accuracies(row["iou"] for row in part) if part else {_acc(k): 0.0 for k in THRESHOLDS}
            for name, part in parts.items()
        }
    return {"scores": scores, "counts": counts}


def score_video3dllm(
    descriptions: Sequence[ScoredDescription],
    boxes: Mapping[str, Box | None],
    labels: LabelMap | None = None,
    split: Sequence[ScoredDescription] | None = None,
) -> dict[str, Any]:
    """Video-3D-LLM's evaluator: axis-aligned IoU with + 1e-8, unique by NYU40 ids.

    LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scanrefer.py``: ``main``.

    Args and errors: as ``score_official``.

    Returns:
        ``protocol``; ``items``; ``all``, ``unique``, ``multiple``, each with ``count`` and accuracies (None of none).
    """
    _check(descriptions, boxes)
    known = {(each.scene_id, each.object_id): each.group_nyu40 for each in descriptions}
    if labels is not None:
        known = groups(split or descriptions, labels, nyu40_class)
    items = _box_items(descriptions, boxes, known)
    result: dict[str, Any] = {"protocol": "video3dllm"}
    for name in ("all", UNIQUE, MULTIPLE):
        ious = [item["iou"] for item in items.values() if name in ("all", item["group"])]
        result[name] = {"count": len(ious), **accuracies(ious)}
    return {**result, "items": items}


def score_vgllm(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    angles: str = "zxy",
    reading: str = "line",
    proposals: Mapping[str, Sequence[Box]] | None = None,
) -> dict[str, Any]:
    """VG-LLM's evaluator of answers that name a frame and a box in its camera: oriented IoU, no groups.

    LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scanrefer/utils.py``: ``scanrefer_process_results``. It takes IoU from
    pytorch3d's ``box3d_overlap`` in float32, which is off by up to 0.24 where faces are nearly parallel and cannot be
    reproduced: IoU is exact here. As in float32, an exact 0.5 is a hit (rounded to ``IOU_DECIMALS``).

    Args:
        descriptions: those that count.
        answers: generated texts by ``ScoredDescription.key``.
        poses: by the same key, ``[n, 4, 4]``: camera to axis-aligned world of the frames that the model saw.
        angles: ``zxy`` as the evaluator reads them, ``ZXY`` as the labels mean them (``vgllm_answer.TURNS``).
        reading: ``line`` as the evaluator reads texts, ``anywhere`` leniently (``vgllm_answer.READINGS``).
        proposals: by scene; boxes are refined by them first (``proposals.refine``).

    Returns:
        ``protocol``, ``angles``, ``reading``, ``count``, ``parsed`` (how many could be read), accuracies, ``items``
        (``iou``, ``box`` as it was compared, ``reason`` why it could not be read).

    Raises:
        ValueError: unknown options, no descriptions, one twice, an answer to none of them, or poses or a scene's
            proposals missing.
    """
    _check(descriptions, answers)
    for name, value, choices in (("angles", angles, TURNS), ("reading", reading, READINGS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}.")
    lost = [each.key for each in descriptions if np.shape(poses.get(each.key, ()))[1:] != (4, 4)]
    if lost:
        raise ValueError(f"{len(lost)} descriptions have no camera poses [n, 4, 4], the first is {lost[0]!r}.")
    if proposals is not None:
        bare = sorted({each.scene_id for each in descriptions} - proposals.keys())
        if bare:
            raise ValueError(f"{len(bare)} scenes have no proposals, the first is {bare[0]}.")
    items = {}
    for each in descriptions:
        known = () if proposals is None else proposals[each.scene_id]
        items[each.key] = _answer_item(answers.get(each.key, ""), each.box, poses[each.key], angles, reading, known)
    return {
        "protocol": "vgllm" if proposals is None else "vgllm_refined",
        "angles": angles,
        "reading": reading,
        "count": len(items),
        "parsed": sum(item["reason"] is None for item in items.values()),
        **accuracies(round(item["iou"], IOU_DECIMALS) for item in items.values()),
        "items": items,
    }


def score_vgllm_refined(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    proposals: Mapping[str, Sequence[Box]],
    angles: str = "zxy",
    reading: str = "line",
) -> dict[str, Any]:
    """``score_vgllm`` after refinement by detected boxes; the arguments are its."""
    return score_vgllm(descriptions, answers, poses, angles, reading, proposals)


def accuracies(ious: Iterable[float]) -> dict[str, float | None]:
    """``acc@k``: share of IoU >= k, None of nothing."""
    values = list(ious)
    return {_acc(k): sum(iou >= k for iou in values) / len(values) if values else None for k in THRESHOLDS}


def _acc(k: float) -> str:
    return f"acc@{k}"


def _box_items(
    descriptions: Sequence[ScoredDescription], boxes: Mapping[str, Box | None], group_of: Mapping[tuple[str, str], str]
) -> dict[str, dict[str, Any]]:
    items = {}
    for each in descriptions:
        box = boxes.get(each.key)
        iou = 0.0 if box is None else aabb_iou(box, each.box)
        items[each.key] = {"iou": iou, "group": group_of[each.scene_id, each.object_id]}
    return items


def _answer_item(
    text: str, truth: Box, poses: np.ndarray, angles: str, reading: str, proposals: Sequence[Box]
) -> dict[str, Any]:
    try:
        answer = READINGS[reading](text, len(poses))
    except AnswerError as error:
        return {"iou": 0.0, "box": None, "reason": error.reason}
    with np.errstate(over="ignore", invalid="ignore"):  # numbers as large as the world's: IoU 0
        box = nine_numbers(refine(TURNS[angles](answer.box, np.asarray(poses[answer.frame])).tolist(), proposals))
    pair = torch.tensor([box, nine_numbers(truth)], dtype=torch.float64)
    iou = float(box_iou(pair[:1], pair[1:]))
    return {"iou": iou, "box": box if np.isfinite(box).all() else None, "reason": None}


def _check(descriptions: Sequence[ScoredDescription], predictions: Mapping[str, Any]) -> None:
    if not descriptions:
        raise ValueError("There are no descriptions to score.")
    twice = [key for key, number in Counter(each.key for each in descriptions).items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} descriptions are there more than once, the first is {twice[0]!r}.")
    strange = sorted(predictions.keys() - {each.key for each in descriptions})
    if strange:
        raise ValueError(f"{len(strange)} predictions belong to no description, the first is {strange[0]!r}.")
