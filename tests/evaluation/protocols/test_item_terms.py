"""Terms of single records: their sums reproduce the scores and groups of every built-in protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hand_records import BOX, beside, camera_answer, caption, detection, grounding, in_world, question
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS, find_protocol, number_at
from w2r2_ds.evaluation.scoring import score_records
from w2r2_ds.types.sample import Sample

CORPUS_ONLY = ("BLEU-4", "METEOR")
"""Metrics that are no means of items, except in ``scan2cap_benchmark``."""


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java(program="no-such-java"))


def answered() -> dict[str, list[dict[str, Any]]]:
    """Task -> records with right and wrong answers, missing ones, and answers that cannot be parsed."""
    groundings = [grounding(str(number), number) for number in range(5)]
    groundings[1:3] = [
        replace(s, target=replace(s.target, group="multiple", scannet_class=17)) for s in groundings[1:3]
    ]
    boxes = [None, beside(0.4), beside(0.2), None, beside(3)]
    answers = [camera_answer(each, 0, box) for each, box in zip(groundings, boxes, strict=True)]
    captions = [caption(number) for number in range(3)]
    captions[1] = replace(captions[1], target=replace(captions[1].target, described=beside(0.4)[:6]))
    detections = [replace(detection(), id=f"scene0011_00|{number}") for number in range(3)]
    found = '[{"label": "chair", "bbox_3d": ' + str(BOX.tolist()) + "}]"
    return {
        "scanrefer": _records(groundings, [*answers[:4], "no box"]),
        "world": _records([in_world(each) for each in groundings], ["1.6,4.7,0.5,2.4,5.3,1.5", "x", None, "x", "x"]),
        "scan2cap": _records(captions, ["the chair 0 is black.", "the chair 1 is black.", None]),
        "scanqa": _records([question(number) for number in range(3)], ["brown", "a dark brown one", None]),
        "detection": _records(detections, [found, "nothing", "[]"]),
    }


def _records(samples: Sequence[Sample], texts: Sequence[str | None]) -> list[dict[str, Any]]:
    return [record_of(sample, text) for sample, text in zip(samples, texts, strict=True)]


CASES = [
    (task, name)
    for task in ("scanrefer", "world", "scan2cap", "scanqa", "detection")
    for name, protocol in PROTOCOLS.items()
    if protocol.task == task.replace("world", "scanrefer")
    and not (task == "world" and "world" not in protocol.coordinates)
]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_terms_reproduce_the_scores(task: str, name: str) -> None:
    records, protocol = answered()[task], find_protocol(name)
    proposals = {"scene0011_00": [BOX[:6].tolist()]}
    result = score_records(records, [name], proposals, items=True)[name]
    assert protocol.item_terms is not None
    terms = protocol.item_terms(result)
    assert len(terms) == len(records)
    for metric, score in protocol.printed(result).items():
        sums = np.array([item.sums[metric] for item in terms if metric in item.sums])
        if score is None:
            assert not len(sums), "no term without a score"
        elif metric.partition("@")[0] in CORPUS_ONLY and name != "scan2cap/scan2cap_benchmark":
            assert not len(sums)
        else:
            assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(score, abs=1e-12), metric


@pytest.mark.parametrize("name", ["vgllm-direct", "video3dllm", "scanrefer_official", "vgllm"])
def test_groups_are_those_of_the_protocol(name: str) -> None:
    protocol = find_protocol(f"scanrefer/{name}")
    records = answered()["scanrefer"]
    result = score_records(records, [name], items=True)[protocol.name]
    assert protocol.item_terms is not None
    terms = protocol.item_terms(result)
    if name == "vgllm":  # that evaluator has no groups
        assert [item.groups for item in terms] == [()] * 5
        return
    paths = {group: (group,) for group in ("unique", "multiple")}
    if name == "scanrefer_official":
        paths = {group: ("scores", group, "overall") for group in paths} | {
            "in_others": ("scores", "overall", "in_others")
        }
    for group, path in paths.items():
        hits = [item.sums["acc@0.25"][0] for item in terms if group in item.groups]
        expected = number_at(result, (*path, "acc@0.25"))
        if hits:
            assert np.mean(hits) == expected, group
        else:
            assert group == "unique" and name == "video3dllm" and expected is None
