"""ScanRefer's Acc@k for axis-aligned boxes in world coordinates, as two public evaluators compute it.

Acc@k is the share of descriptions whose predicted box has IoU >= k with the annotated one. A description without a
prediction, or with one that cannot be parsed, counts as IoU 0. Accuracies are fractions in 0..1.

Answers in a frame's camera are scored here too: ``answer_world_box`` moves their box to the world and encloses it in an
axis-aligned box. Protocols that compare them as oriented boxes are in ``scanrefer_vgllm.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import model_validator

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.data.sources.labels import MULTIPLE, OTHERS, UNIQUE
from w2r2_ds.data.sources.validation import FrozenModel
from w2r2_ds.evaluation.protocols.records import (
    THRESHOLDS,
    AnswerRecord,
    Box6,
    Box9,
    Coordinates,
    Pose,
    Proposals,
    RecordFields,
    answer_world_box,
    check_keys,
    enclosing_box,
)
from w2r2_ds.evaluation.protocols.registry import ItemTerms, KeyPath, Protocol, ProtocolResult, register_protocol

GROUPS = (UNIQUE, MULTIPLE)
Box = Sequence[float]
"""``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres; annotated boxes may have three ZXY angles too."""


@dataclass(frozen=True)
class ScoredDescription:
    """One annotated description.

    Attributes:
        key: id of the description in predictions and results.
        scene_id: name of its scene.
        box: world box of its object, six numbers, or nine with angles.
        group: ``unique`` or ``multiple`` by ScanNet's 18 classes, computed from the whole split
            (``data/sources/labels.py``).
        group_nyu40: the same by NYU40 class ids.
        scannet_class: 0 to 16 for ScanNet's named classes, 17 (``OTHERS``) for all others.
    """

    key: str
    scene_id: str
    box: Box
    group: str = ""
    group_nyu40: str = ""
    scannet_class: int = OTHERS


def score_official(descriptions: Sequence[ScoredDescription], boxes: Mapping[str, Box | None]) -> ProtocolResult:
    """ScanRefer's own evaluator: axis-aligned IoU with + 1e-8, grouped by ScanNet-18 classes.

    Source: daveredrum/ScanRefer ``benchmark/eval.py``, ``evaluate``.

    Args:
        descriptions: all descriptions to score.
        boxes: ``ScoredDescription.key`` -> predicted box; None for an answer that could not be parsed. A missing key is
            a failure too.

    Returns:
        ``protocol``; ``parsed`` (share of descriptions with a box); ``scores`` and ``counts``: group (unique, multiple,
        overall) -> class (in_others, not_in_others, overall) -> accuracies, or the number of descriptions; ``items``:
        key -> ``iou``, ``group``, ``class``. As in the reference, an empty group has accuracy 0: check its count.

    Raises:
        ValueError: no descriptions, a description twice, or a box of an unknown description.
    """
    ious = _box_ious(descriptions, boxes)
    items = {
        description.key: {"iou": ious[description.key], "group": description.group, "class": description.scannet_class}
        for description in descriptions
    }
    scores = official_scores(list(items.values()))
    return {"protocol": "scanrefer_official", "parsed": _share_with_box(boxes, items), **scores, "items": items}


def official_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``scores`` and ``counts`` of `score_official` from items with ``iou``, ``group`` and ``class``."""
    scores: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for group in (*GROUPS, "overall"):
        members = [item for item in items if group in ("overall", item["group"])]
        parts = {
            "not_in_others": [item for item in members if item["class"] != OTHERS],
            "in_others": [item for item in members if item["class"] == OTHERS],
            "overall": members,
        }
        counts[group] = {name: len(part) for name, part in parts.items()}
        # As in the reference, the accuracy of an empty part is 0, not None.
        scores[group] = {
            name: accuracies(item["iou"] for item in part) if part else {f"acc@{k}": 0.0 for k in THRESHOLDS}
            for name, part in parts.items()
        }
    return {"scores": scores, "counts": counts}


def score_video3dllm(descriptions: Sequence[ScoredDescription], boxes: Mapping[str, Box | None]) -> ProtocolResult:
    """Video-3D-LLM's evaluator: axis-aligned IoU with + 1e-8, grouped by NYU40 ids.

    Source: LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scanrefer.py``, ``main``.

    Args:
        descriptions: all descriptions to score.
        boxes: as for `score_official`.

    Returns:
        ``protocol``; ``parsed`` (share of descriptions with a box); ``all``, ``unique``, ``multiple``, each with
        ``count`` and accuracies (None in an empty group); ``items``: key -> ``iou``, ``group``.

    Raises:
        ValueError: as `score_official`.
    """
    ious = _box_ious(descriptions, boxes)
    items: dict[str, dict[str, Any]] = {
        description.key: {"iou": ious[description.key], "group": description.group_nyu40}
        for description in descriptions
    }
    result: ProtocolResult = {"protocol": "video3dllm", "parsed": _share_with_box(boxes, items)}
    for name in ("all", *GROUPS):
        values = [item["iou"] for item in items.values() if name in ("all", item["group"])]  # "all": every item
        result[name] = {"count": len(values), **accuracies(values)}
    return {**result, "items": items}


def accuracies(ious: Iterable[float]) -> dict[str, float | None]:
    """``acc@k`` -> share of the IoUs that are >= k; None without IoUs."""
    values = list(ious)
    return {f"acc@{k}": sum(iou >= k for iou in values) / len(values) if values else None for k in THRESHOLDS}


def accuracy_paths(*path: str) -> dict[str, KeyPath]:
    """``Protocol.metrics`` of a protocol whose result has the accuracies at a path of keys."""
    return {f"acc@{k}": (*path, f"acc@{k}") for k in THRESHOLDS}


def accuracy_terms(result: ProtocolResult, decimals: int | None = None) -> list[ItemTerms]:
    """``Protocol.item_terms`` of accuracies: groups and hits of every description.

    Args:
        result: result with ``items``, which have ``iou``, and maybe ``group`` and ``class``.
        decimals: decimals to which IoU is rounded before it is compared; None for no rounding.
    """
    terms = []
    for item in result["items"].values():
        iou = item["iou"] if decimals is None else round(item["iou"], decimals)
        groups = [item["group"]] if "group" in item else []
        if "class" in item:
            groups.append("in_others" if item["class"] == OTHERS else "not_in_others")
        terms.append(ItemTerms(tuple(groups), {f"acc@{k}": (float(iou >= k), 1.0) for k in THRESHOLDS}))
    return terms


def _box_ious(descriptions: Sequence[ScoredDescription], boxes: Mapping[str, Box | None]) -> dict[str, float]:
    """Key -> IoU of the predicted and the enclosing annotated box; 0 without a prediction."""
    check_keys("descriptions", [description.key for description in descriptions], boxes)
    ious = {}
    for description in descriptions:
        box = boxes.get(description.key)
        # Not rounded, unlike exact IoU: as in the references, + 1e-8 in the denominator turns an exact 0.5 into a miss.
        ious[description.key] = 0.0 if box is None else aabb_iou(box, enclosing_box(description.box))
    return ious


def _share_with_box(boxes: Mapping[str, Box | None], items: Mapping[str, Any]) -> float:
    return sum(box is not None for box in boxes.values()) / len(items)


class GroundingTarget(FrozenModel):
    """Fields of a target that ScanRefer's protocols read."""

    box: Box9
    scannet_class: int
    group: Literal["unique", "multiple"]
    group_nyu40: Literal["unique", "multiple"]


class ScanReferRecord(RecordFields):
    """Fields of a record that ScanRefer's protocols read."""

    target: GroundingTarget
    form: Coordinates
    box: Box6 | None = None
    cam_to_world: list[Pose] | None = None

    @model_validator(mode="after")
    def _has_poses(self) -> ScanReferRecord:
        if self.form == "camera" and self.cam_to_world is None:
            raise ValueError("a record whose form is 'camera' needs the field 'cam_to_world'")
        return self


def description_of(record: AnswerRecord) -> ScoredDescription:
    """The annotated description of a record."""
    target = record["target"]
    return ScoredDescription(
        key=record["id"],
        scene_id=record["scene_id"],
        box=target["box"],
        group=target["group"],
        group_nyu40=target["group_nyu40"],
        scannet_class=target["scannet_class"],
    )


def _world_inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    """Descriptions and world boxes, as arguments of `score_official` and `score_video3dllm`."""
    return [description_of(record) for record in records], {
        record["id"]: answer_world_box(record) for record in records
    }


# Every form of answer can be moved to the world, so these protocols have all coordinates (the default).
_world_protocol = partial(
    Protocol, inputs=_world_inputs, record_model=ScanReferRecord, best_by="acc@0.25", item_terms=accuracy_terms
)

register_protocol(
    _world_protocol(
        "scanrefer/scanrefer_official",
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by ScanNet-18 classes, other classes separate.",
        "daveredrum/ScanRefer benchmark/eval.py",
        score_official,
        accuracy_paths("scores", "overall", "overall"),
    )
)
register_protocol(
    _world_protocol(
        "scanrefer/video3dllm",
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by NYU40 ids.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scanrefer.py",
        score_video3dllm,
        accuracy_paths("all"),
        default=True,
    )
)
