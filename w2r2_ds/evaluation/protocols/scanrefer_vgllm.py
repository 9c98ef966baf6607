"""ScanRefer's Acc@k for answers that give a frame and a nine-number box in that frame's camera (VG-LLM's format).

The box is moved to the axis-aligned world with the pose of the predicted frame and compared as an oriented box. IoU is
exact (``boxes3d/iou.py``); hits are IoU >= k after rounding to ``IOU_DECIMALS``. An answer that cannot be parsed counts
as IoU 0. Accuracies are fractions in 0..1.

* ``vgllm-direct``, this project's protocol: strict JSON (``data/tasks/parsing.py``); angles of answers and annotations
  are intrinsic ZXY. "Direct" means without refinement by detected boxes.
* ``vgllm``, ``vgllm_ZXY`` and ``vgllm_refined``: LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scanrefer/utils.py``,
  ``scanrefer_process_results``. The annotated box is enclosed by an axis-aligned one. That evaluator takes IoU from
  pytorch3d's ``box3d_overlap`` in float32, which is off by up to 0.24 for nearly parallel faces and is not reproduced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding
from w2r2_ds.evaluation.protocols.records import (
    IOU_DECIMALS,
    AnswerRecord,
    Proposals,
    check_keys,
    enclosing_box,
    nine_numbers,
    raise_with_first,
)
from w2r2_ds.evaluation.protocols.refinement import refine
from w2r2_ds.evaluation.protocols.registry import Protocol, ProtocolResult, register_protocol
from w2r2_ds.evaluation.protocols.scanrefer import (
    GROUPS,
    Box,
    ScanReferRecord,
    ScoredDescription,
    accuracies,
    accuracy_paths,
    accuracy_terms,
    description_of,
)
from w2r2_ds.evaluation.protocols.vgllm_answer import ANGLES, PARSERS, AnswerParser, BoxTransform


def score_direct(
    descriptions: Sequence[ScoredDescription], answers: Mapping[str, str], poses: Mapping[str, np.ndarray]
) -> ProtocolResult:
    """``vgllm-direct``: accuracies and mean IoU, overall and by group.

    Args:
        descriptions: all descriptions to score, with their group; boxes are compared with their angles.
        answers: as for `score_vgllm`.
        poses: as for `score_vgllm`.

    Returns:
        ``protocol``; the scores of `direct_scores`; ``items``: those of `score_vgllm`, and ``group``.

    Raises:
        ValueError: a group other than unique and multiple; no descriptions, a description twice, an answer to an
            unknown one, or poses missing.
    """
    _check(descriptions, answers, poses)
    items = {
        description.key: {
            "group": description.group,
            **answer_item(
                answers.get(description.key), description.box, poses[description.key], parse_grounding, camera_to_world
            ),
        }
        for description in descriptions
    }
    return {"protocol": "vgllm-direct", **direct_scores(list(items.values())), "items": items}


def direct_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of `score_direct` from items with ``iou``, ``group`` and ``reason``.

    Returns:
        ``overall``, ``unique`` and ``multiple``, each with ``count``, ``acc@0.25``, ``acc@0.5`` and ``mean_iou`` (the
        last three None for an empty group); ``parsed``: share of answers that could be parsed; ``failures``: reason ->
        number of answers.

    Raises:
        ValueError: a group other than unique and multiple.
    """
    unknown = {item["group"] for item in items} - set(GROUPS)
    if unknown:
        raise ValueError(f"A description's group must be unique or multiple, not {sorted(map(str, unknown))}.")
    reasons = Counter(item["reason"] for item in items if item["reason"] is not None)
    return {
        "overall": _group_scores([item["iou"] for item in items]),
        **{group: _group_scores([item["iou"] for item in items if item["group"] == group]) for group in GROUPS},
        "parsed": sum(item["reason"] is None for item in items) / len(items),
        "failures": dict(sorted(reasons.items())),
    }


def _group_scores(ious: Sequence[float]) -> dict[str, float | int | None]:
    # The thresholds use rounded IoU, the mean does not need it.
    rounded = (round(iou, IOU_DECIMALS) for iou in ious)
    return {"count": len(ious), **accuracies(rounded), "mean_iou": sum(ious) / len(ious) if ious else None}


def score_vgllm(
    descriptions: Sequence[ScoredDescription],
    answers: Mapping[str, str],
    poses: Mapping[str, np.ndarray],
    proposals: Proposals | None = None,
    angles: str = "zxy",
    parser: str = "line",
) -> ProtocolResult:
    """VG-LLM's evaluator: oriented IoU, no groups.

    Args:
        descriptions: all descriptions to score.
        answers: ``ScoredDescription.key`` -> generated text; a missing answer is a failure.
        poses: the same key -> ``[frames, 4, 4]``, camera to axis-aligned world of the model's input frames.
        proposals: scene -> detected boxes; each predicted box is first refined by them (``refinement.refine``).
        angles: ``zxy`` as VG-LLM's evaluator interprets them, ``ZXY`` as its labels are written
            (``vgllm_answer.ANGLES``).
        parser: ``line`` as in the evaluator, ``anywhere`` for a lenient one (``vgllm_answer.PARSERS``).

    Returns:
        ``protocol``, ``angles``, ``parser``, ``count``, ``parsed`` (share of answers that could be parsed),
        ``acc@0.25``, ``acc@0.5``, ``items``: key -> the result of `answer_item`.

    Raises:
        ValueError: unknown options, no descriptions, a description twice, an answer to an unknown one, or poses or a
            scene's proposals missing.
    """
    _check(descriptions, answers, poses)
    for name, value, choices in (("angles", angles, ANGLES), ("parser", parser, PARSERS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}.")
    if proposals is not None:
        missing = sorted({description.scene_id for description in descriptions} - proposals.keys())
        raise_with_first(missing, "scenes have no proposals")
    items = {}
    for description in descriptions:
        annotated = enclosing_box(description.box)  # EmbodiedScan's boxes may have angles
        boxes = () if proposals is None else proposals[description.scene_id]
        items[description.key] = answer_item(
            answers.get(description.key), annotated, poses[description.key], PARSERS[parser], ANGLES[angles], boxes
        )
    return {
        "protocol": "vgllm" if proposals is None else "vgllm_refined",
        "angles": angles,
        "parser": parser,
        "count": len(items),
        "parsed": sum(item["reason"] is None for item in items.values()) / len(items),
        **accuracies(round(item["iou"], IOU_DECIMALS) for item in items.values()),
        "items": items,
    }


def answer_item(
    text: str | None,
    annotated: Box,
    poses: np.ndarray,
    parse: AnswerParser,
    to_world: BoxTransform,
    proposals: Sequence[Box] = (),
) -> dict[str, Any]:
    """Parse one answer and compare its box with the annotated one.

    Args:
        text: generated text; None for a missing answer.
        annotated: world box, six or nine numbers.
        poses: ``[frames, 4, 4]``, camera to axis-aligned world.
        parse: parser of the text.
        to_world: moves the parsed box from its frame's camera to the world.
        proposals: detected boxes of the scene; empty for no refinement.

    Returns:
        ``iou``: 0 if the answer cannot be parsed; ``box``: the compared world box ``[9]``, None without one or if its
        numbers overflow; ``reason``: why the text cannot be parsed, or None.
    """
    if text is None:
        return {"iou": 0.0, "box": None, "reason": "no prediction"}
    try:
        answer = parse(text, len(poses))
    except AnswerError as error:
        return {"iou": 0.0, "box": None, "reason": error.reason}
    # Huge generated numbers overflow. Such an answer is parsed, and its box has IoU 0.
    with np.errstate(over="ignore", invalid="ignore"):
        box = nine_numbers(refine(to_world(answer.box, np.asarray(poses[answer.frame])).tolist(), proposals))
    pair = torch.tensor([box, nine_numbers(annotated)], dtype=torch.float64)
    iou = float(box_iou(pair[:1], pair[1:]))
    return {"iou": iou, "box": box if np.isfinite(box).all() else None, "reason": None}


def _check(
    descriptions: Sequence[ScoredDescription], answers: Mapping[str, str], poses: Mapping[str, np.ndarray]
) -> None:
    check_keys("descriptions", [description.key for description in descriptions], answers)
    # Descriptions without an answer need poses too: missing poses are an error of the data, not of the model.
    without_poses = [
        description.key for description in descriptions if np.shape(poses.get(description.key, ()))[1:] != (4, 4)
    ]
    raise_with_first(without_poses, "descriptions have no camera poses [n, 4, 4]")


def _inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    """Descriptions, texts and poses, as arguments of `score_direct` and `score_vgllm`."""
    descriptions = [description_of(record) for record in records]
    texts = {record["id"]: record["text"] for record in records if record["text"] is not None}
    poses = {record["id"]: np.array(record["cam_to_world"], dtype=np.float64).reshape(-1, 4, 4) for record in records}
    return descriptions, texts, poses


def _refined_inputs(records: Sequence[AnswerRecord], proposals: Proposals | None) -> tuple[Any, ...]:
    assert proposals is not None, "choose_protocols requires proposals for this protocol"
    return *_inputs(records, None), proposals


# These protocols parse a frame and a box in its camera, so they cannot score world boxes.
_camera_protocol = partial(
    Protocol,
    inputs=_inputs,
    record_model=ScanReferRecord,
    coordinates=("camera",),
    best_by="acc@0.25",
    item_terms=partial(accuracy_terms, decimals=IOU_DECIMALS),
)

register_protocol(
    _camera_protocol(
        "scanrefer/vgllm-direct",
        "This project's own: strict JSON, angles are intrinsic ZXY as in the labels, exact oriented IoU.",
        "w2r2_ds/evaluation/protocols/scanrefer_vgllm.py",
        score_direct,
        accuracy_paths("overall"),
        default=True,
        extra_metrics={"mean_iou": ("overall", "mean_iou")},
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm",
        "Answers parsed as in VG-LLM's evaluator, their angles interpreted as extrinsic zxy; exact oriented IoU.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py",
        score_vgllm,
        accuracy_paths(),
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm_ZXY",
        "As vgllm, but angles are intrinsic ZXY as in the labels.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py, its two 'zxy' changed to 'ZXY'",
        partial(score_vgllm, angles="ZXY"),
        accuracy_paths(),
    )
)
register_protocol(
    _camera_protocol(
        "scanrefer/vgllm_refined",
        "As vgllm, but each box is first replaced by the detected box of its scene that overlaps it most.",
        "LaVi-Lab/VG-LLM, as its paper describes the numbers in parentheses; no public evaluator to compare with",
        score_vgllm,
        accuracy_paths(),
        inputs=_refined_inputs,
        needs_proposals=True,
    )
)
