"""Scan2Cap's scores against those of six public evaluators."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from annotation_json import captions_from, objects_from
from golden_files import Golden, find, is_scan2cap_scores
from metric_cases import assert_all_fields_read, assert_numbers_equal, assert_scores_equal, has_java
from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.evaluation.metrics.captions import CAPTION_METRICS
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.protocols.scan2cap_rules import SCAN2CAP_RULES, Caption, DescribedObject

pytestmark = pytest.mark.golden

FILES = find(is_scan2cap_scores)
NAMES = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L")
PRINTED = dict(zip(("CIDER", "BLEU", "METEOR", "Rouge"), NAMES, strict=True))
"""Metric in the output of Video-3D-LLM's script -> metric of this package."""


def data(golden: Golden) -> tuple[list[DescribedObject], dict[str, Caption]]:
    boxes = golden.beside("boxes")["gt_boxes"]
    return objects_from(golden.beside("annotations"), boxes), captions_from(golden.beside("predictions"))


def cases(with_: str) -> list[Any]:
    """(file, protocol) for every recorded protocol that has a part whose name begins with `with_`."""
    return [
        pytest.param(golden, name, id=f"{golden.name}-{name}")
        for golden in FILES
        for name, block in golden.record["protocols"].items()
        if any(part.startswith(with_) for part in block)
    ]


def score(name: str, objects: list[DescribedObject], captions: dict[str, Caption], k: float, java: Java) -> Any:
    return find_protocol(f"scan2cap/{name}").score(objects, captions, thresholds=[k], java=java)["at"][str(k)]


@pytest.mark.parametrize("golden", FILES, ids=lambda golden: golden.name)
def test_recorded_ious(golden: Golden) -> None:
    objects, captions = data(golden)
    assert [each.key for each in objects] == list(golden.record["items"])
    for each in objects:
        expected = golden.record["items"][each.key]
        if each.key not in captions:
            assert expected["iou_float64"] is None
            continue
        box = captions[each.key].box
        assert box is not None
        assert aabb_iou(box, each.box) == pytest.approx(expected["iou_float64"], abs=1e-9)
        assert aabb_iou(box, each.box, np.float32) == pytest.approx(expected["iou_float32"], abs=1e-6)


@pytest.mark.parametrize(("golden", "name"), cases("at"))
def test_scores_equal_the_recorded_ones(golden: Golden, name: str, either_java: Java) -> None:
    block = golden.record["protocols"][name]
    tokenizer = SCAN2CAP_RULES[name].tokenizer
    objects, captions = data(golden)
    for k, expected in block["at"].items():
        got = score(name, objects, captions, float(k), either_java)
        if "mask" in expected:
            same_as_benchmark(block, expected, got, either_java)
            continue
        assert_all_fields_read(expected, "corpus", "items")
        assert_scores_equal(expected["corpus"], got["corpus"], either_java, tokenizer, f"{name}@{k}")
        assert got["items"].keys() == expected["items"].keys()
        for key, item in expected["items"].items():
            text = got["candidates"].get(key)
            assert text == item["candidate"] or (text is None and tokenizer == "ptb" and not has_java(either_java))
            numbers = {metric: value for metric, value in item.items() if metric != "candidate"}
            assert_scores_equal(numbers, got["items"][key], either_java, tokenizer, key)
        if got["references"]:
            assert_numbers_equal(block.get("references", {}), got["references"], "references")


def same_as_benchmark(block: dict[str, Any], expected: dict[str, Any], got: dict[str, Any], java: Java) -> None:
    """Compare the scores of ``scan2cap_benchmark``, whose recorded keys have no object name."""
    assert_all_fields_read(expected, "precision", "recall", "f1", "mask", "items_before_mask")
    for part in ("precision", "recall", "f1"):
        assert_scores_equal(expected[part], got[part], java, "none", part)
    short = {key.rpartition("|")[0]: key for key in got["mask"]}
    assert len(short) == block["num_objects"]
    assert {name: got["mask"][key] for name, key in short.items()} == expected["mask"]
    for name, item in expected["items_before_mask"].items():
        assert_scores_equal(item, got["items_before_mask"][short[name]], java, "none", name)


@pytest.mark.parametrize(("golden", "name"), cases("reference"))
def test_every_recorded_part_is_compared(golden: Golden, name: str) -> None:
    block = golden.record["protocols"][name]
    omitted = [part for part in block if part.startswith("failed_left_out_at_")]
    assert_all_fields_read(
        block,
        *("reference", "options", "at", "references", "key", "num_objects", "num_predictions", "CIDEr_percent"),
        *("at_missing_left_out", *omitted),
    )
    if "num_predictions" in block:
        assert len(data(golden)[1]) == block["num_predictions"]


@pytest.mark.parametrize(("golden", "name"), cases("at_missing_left_out"))
def test_missing_captions_omitted(golden: Golden, name: str, either_java: Java) -> None:
    objects, captions = data(golden)
    objects = [each for each in objects if each.key in captions]
    for k, expected in golden.record["protocols"][name]["at_missing_left_out"].items():
        got = score(name, objects, captions, float(k), either_java)
        assert_scores_equal(
            expected["corpus"], got["corpus"], either_java, SCAN2CAP_RULES[name].tokenizer, f"{name}@{k}"
        )


@pytest.mark.parametrize(("golden", "name"), cases("failed_left_out_at_"))
def test_failed_captions_omitted(golden: Golden, name: str, java: Java) -> None:
    """Dropping failures, which is wrong; recorded for comparison."""
    for part, expected in golden.record["protocols"][name].items():
        if not part.startswith("failed_left_out_at_"):
            continue
        k = part.rpartition("_")[2]
        objects, captions = data(golden)
        rules = SCAN2CAP_RULES[name]
        kept = [
            each
            for each in objects
            if (caption := captions.get(each.key)) is not None
            and caption.text
            and caption.box is not None
            and rules.passes(aabb_iou(caption.box, each.box, rules.precision), float(k))
        ]
        assert len(kept) == expected["rows"]
        got = score(name, kept, {each.key: captions[each.key] for each in kept}, float(k), java)
        for printed, value in expected["scores_percent"].items():
            assert got["corpus"][PRINTED[printed]] * 100 == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(("golden", "name"), cases("CIDEr_percent"))
def test_scores_with_given_ious(golden: Golden, name: str, no_java: Java) -> None:
    """VG-LLM's data files contain the IoU of the proposal."""
    block = golden.record["protocols"][name]
    found = re.search(r">= ([\d.]+)", block["options"]["gate"])
    assert found is not None
    k = float(found.group(1))
    objects, captions = data(golden)
    ious = {key: item["iou_float64"] for key, item in golden.record["items"].items()}
    gated = {key: replace(caption, box=None, iou=ious[key]) for key, caption in captions.items()}
    for given in (captions, gated):
        got = score(name, objects, given, k, no_java)
        assert got["corpus"]["CIDEr"] * 100 == pytest.approx(block["CIDEr_percent"], abs=1e-4)


def test_every_protocol_is_recorded() -> None:
    recorded = {name for golden in FILES for name in golden.record["protocols"]}
    assert recorded == set(SCAN2CAP_RULES) or not FILES
    assert set(NAMES) <= set(CAPTION_METRICS)
