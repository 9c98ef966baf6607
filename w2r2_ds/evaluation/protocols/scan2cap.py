"""Scan2Cap: captions of objects, gated by IoU, as six public evaluators score them.

``m@k`` is a caption metric over *all* annotated objects in which an object counts with its caption only where the box
that it was described from has IoU >= k with the annotated one, else with a placeholder. The evaluators differ in the
comparison, the text around and inside the caption, the placeholder and the average: ``PROTOCOLS``.

A placeholder has CIDEr 0, but neither ROUGE-L, METEOR nor BLEU-1 of 0. An object without a prediction is a failure and
stays in the denominator. Of two predictions for one object the later counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.evaluation.metrics.captions import METRICS, CaptionScores, Score, Tokenizer, score_captions

if TYPE_CHECKING:
    from w2r2_ds.evaluation.metrics.meteor import Java

THRESHOLDS = (0.25, 0.5)
TOKEN_LIMIT = 30
"""Words of a reference that Scan2Cap and LEO compare with (Scan2Cap ``lib/config.py``, MAX_DES_LEN)."""


@dataclass(frozen=True)
class DescribedObject:
    """An annotated object; ``descriptions`` and ``tokens`` are parallel.

    Attributes:
        scene_id, object_id, object_name: as in ScanRefer's file.
        descriptions: as written.
        tokens: the words of each, as ScanRefer's file has them; only Scan2Cap's and LEO's protocols look at them.
        box: ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres.
    """

    scene_id: str
    object_id: str
    object_name: str
    descriptions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    box: tuple[float, ...]

    @property
    def key(self) -> str:
        """``scene|object|name``."""
        return f"{self.scene_id}|{self.object_id}|{self.object_name}"


@dataclass(frozen=True)
class Caption:
    """A generated caption.

    Attributes:
        text: as generated.
        box: the box it was described from, as in ``DescribedObject``; None for none.
        tokens: its words, for Scan2Cap's own two protocols.
        iou: IoU of that box where it is known from elsewhere (VG-LLM's data files have it); used instead of the box.
    """

    text: str
    box: tuple[float, ...] | None = None
    tokens: tuple[str, ...] | None = None
    iou: float | None = None


@dataclass(frozen=True)
class Rules:
    """What one evaluator does.

    Attributes:
        reference: strings of an object's references.
        candidate: string of a caption.
        placeholder: string of a caption that fails the gate or is missing.
        passes: gate, from IoU and k.
        precision: of the arithmetic of IoU.
        tokenizer: what both sides go through last.
    """

    reference: Callable[[DescribedObject], list[str]]
    candidate: Callable[[Caption], str]
    placeholder: str
    passes: Callable[[float, float], bool]
    precision: type[np.floating] = np.float64
    tokenizer: Tokenizer = "none"


def wrap(text: str) -> str:
    """``sos text eos``."""
    return f"sos {text} eos"


def spaced(text: str) -> str:
    """VG-LLM's and Video-3D-LLM's wrapping: blanks round full stops and commas, then lower case.

    LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scan2cap.py``, LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scan2cap/utils.py``.
    """
    return wrap(text.replace(".", " . ").replace(",", " , ").lower())


def _at_least(iou: float, k: float) -> bool:
    return iou >= k


def _above(iou: float, k: float) -> bool:
    return iou > k


def _words(caption: Caption) -> str:
    if caption.tokens is None:
        raise ValueError("Scan2Cap's own protocols score words as ScanRefer's file has them: give each caption tokens.")
    return wrap(" ".join(caption.tokens))


def _cut(annotated: DescribedObject) -> list[str]:
    return [wrap(" ".join(words[:TOKEN_LIMIT])) for words in annotated.tokens]


def _uncut(annotated: DescribedObject) -> list[str]:
    return [wrap(" ".join(words)) for words in annotated.tokens]


def _spaced_references(annotated: DescribedObject) -> list[str]:
    return [spaced(text) for text in annotated.descriptions]


def _raw_references(annotated: DescribedObject) -> list[str]:
    return [wrap(text) for text in annotated.descriptions]


_SPACED = Rules(_spaced_references, lambda caption: spaced(caption.text), spaced(""), _at_least)

PROTOCOLS: Mapping[str, Rules] = {
    # daveredrum/Scan2Cap lib/eval_helper.py: prepare_corpus, check_candidates, organize_candidates
    "scan2cap_original": Rules(_cut, _words, "sos eos", _above, np.float32),
    # daveredrum/Scan2Cap benchmark/eval.py: evaluate_captioning; see `_score_benchmark`
    "scan2cap_benchmark": Rules(_uncut, _words, "sos eos", _at_least, np.float32),
    # embodied-generalist evaluator/cap_eval.py: CaptionEvaluator.update
    "leo": Rules(_cut, lambda caption: wrap(caption.text).replace(". ", " . "), "sos eos", _at_least),
    # LaVi-Lab/Video-3D-LLM llava/eval/eval_scan2cap.py: main
    "video3dllm": _SPACED,
    # LaVi-Lab/VG-LLM src/lmms_eval/tasks/scan2cap/utils.py: scan2cap_process_results; it knows k = 0.5 and CIDEr only
    "vgllm": _SPACED,
    # ZzZZCHS/Chat-Scene utils/eval.py: calc_scan2cap_score
    "chatscene": Rules(_raw_references, lambda caption: wrap(caption.text), "sos eos", _at_least, tokenizer="ptb"),
}


def score_scan2cap(
    objects: Sequence[DescribedObject],
    captions: Mapping[str, Caption],
    protocol: str,
    thresholds: Sequence[float] = THRESHOLDS,
    java: Java | None = None,
) -> dict[str, Any]:
    """Caption metrics at each IoU threshold.

    Args:
        objects: all that count; the CIDEr of a subset is not comparable with that of the whole.
        captions: by ``DescribedObject.key``.
        protocol: one of ``PROTOCOLS``.
        thresholds: the k.
        java: see ``score_captions``.

    Returns:
        ``protocol``, ``objects``, ``missing`` (how many have no prediction) and ``at``: threshold, as text ->
        ``passed`` (how many passed the gate), ``corpus``, ``items``, ``candidates``, ``references``, ``not_computed``
        (see ``CaptionScores``). ``scan2cap_benchmark`` has ``precision``, ``recall``, ``f1``, ``mask`` and
        ``items_before_mask`` instead of the items; its ``corpus`` is the recall.

    Raises:
        ValueError: unknown protocol, no objects, an object twice, a caption of an object that is not there or without
            what the protocol looks at.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Scan2Cap has no protocol {protocol!r}; it is one of {', '.join(PROTOCOLS)}.")
    _check(objects, captions)
    rules = PROTOCOLS[protocol]
    ious = {each.key: _iou(each, captions.get(each.key), rules) for each in objects}
    if protocol == "scan2cap_benchmark":
        at = _score_benchmark(objects, captions, rules, ious, thresholds, java)
    else:
        at = {str(k): _score_gated(objects, captions, rules, ious, k, java) for k in thresholds}
    missing = sum(each.key not in captions for each in objects)
    return {"protocol": protocol, "objects": len(objects), "missing": missing, "at": at}


def _score_gated(
    objects: Sequence[DescribedObject],
    captions: Mapping[str, Caption],
    rules: Rules,
    ious: Mapping[str, float],
    k: float,
    java: Java | None,
) -> dict[str, Any]:
    """One threshold: what fails is replaced by the placeholder, and the whole corpus is scored."""
    passed = {key for key, iou in ious.items() if key in captions and rules.passes(iou, k)}
    candidates = {
        each.key: rules.candidate(captions[each.key]) if each.key in passed else rules.placeholder for each in objects
    }
    scores = score_captions({each.key: rules.reference(each) for each in objects}, candidates, rules.tokenizer, java)
    return {"passed": len(passed), **vars(scores)}


def _score_benchmark(
    objects: Sequence[DescribedObject],
    captions: Mapping[str, Caption],
    rules: Rules,
    ious: Mapping[str, float],
    thresholds: Sequence[float],
    java: Java | None,
) -> dict[str, Any]:
    """All captions are scored once; an item that fails then counts as a true 0.

    recall = sum(score x mask) / objects, precision = sum(score x mask) / predictions, F1 their harmonic mean. METEOR is
    the mean of items here, unlike everywhere else. The reference's matching of proposals to objects by the Hungarian
    method is left out: every caption names its object.
    """
    candidates = {
        each.key: rules.candidate(captions[each.key]) if each.key in captions else rules.placeholder for each in objects
    }
    scores = score_captions({each.key: rules.reference(each) for each in objects}, candidates, rules.tokenizer, java)
    at = {}
    for k in thresholds:
        mask = {key: int(key in captions and rules.passes(iou, k)) for key, iou in ious.items()}
        recall = _masked(scores, mask, len(objects))
        precision = _masked(scores, mask, len(captions))
        at[str(k)] = {
            "passed": sum(mask.values()),
            "corpus": recall,
            "recall": recall,
            "precision": precision,
            "f1": {name: _harmonic(precision[name], recall[name]) for name in METRICS},
            "mask": mask,
            "items_before_mask": scores.items,
            "candidates": scores.candidates,
            "references": scores.references,
            "not_computed": scores.not_computed,
        }
    return at


def _masked(scores: CaptionScores, mask: Mapping[str, int], count: int) -> dict[str, Score]:
    means: dict[str, Score] = {}
    for name in METRICS:
        values = [(item[name], mask[key]) for key, item in scores.items.items()]
        known = [value * counts for value, counts in values if value is not None]
        means[name] = sum(known) / max(count, 1) if len(known) == len(values) else None
    return means


def _harmonic(first: Score, second: Score) -> Score:
    if first is None or second is None:
        return None
    return 2 * first * second / (first + second) if first + second else 0.0


def _iou(annotated: DescribedObject, caption: Caption | None, rules: Rules) -> float:
    if caption is None:
        return 0.0
    if caption.iou is not None:
        return caption.iou
    return 0.0 if caption.box is None else aabb_iou(caption.box, annotated.box, rules.precision)


def _check(objects: Sequence[DescribedObject], captions: Mapping[str, Caption]) -> None:
    keys = [each.key for each in objects]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Object {twice!r} is annotated twice; gather its descriptions in one.")
    strange = sorted(captions.keys() - set(keys))
    if strange:
        raise ValueError(f"{len(strange)} captions are of objects without annotation, the first is {strange[0]!r}.")
