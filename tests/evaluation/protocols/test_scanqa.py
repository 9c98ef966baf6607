"""ScanQA's scores against those of five public evaluators."""

from __future__ import annotations

from typing import Any

import pytest

from annotation_json import answers_from, questions_from
from golden_files import Golden, find, is_scanqa_scores
from metric_cases import assert_all_fields_read, assert_scores_equal
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.protocols.scanqa import SCANQA_RULES

pytestmark = pytest.mark.golden

FILES = find(is_scanqa_scores)
CASES = [
    pytest.param(golden, name, id=f"{golden.name}-{name}") for golden in FILES for name in golden.record["protocols"]
]


def compare(expected: dict[str, Any], got: dict[str, Any], name: str, java: Java) -> None:
    corpus = dict(expected["corpus"])
    assert corpus.pop("count", got["questions"]) == got["questions"]
    assert_scores_equal(corpus, got["corpus"], java, SCANQA_RULES[name].tokenizer, name)
    for key, item in expected.get("items", {}).items():
        texts = {part: item[part] for part in ("candidate", "references") if part in item}
        numbers = {metric: value for metric, value in item.items() if metric not in texts}
        assert_scores_equal(numbers, got["items"][key], java, SCANQA_RULES[name].tokenizer, key)
        if got["candidates"]:
            assert got["candidates"][key] == texts.get("candidate", got["candidates"][key])
            assert got["references"][key] == texts.get("references", got["references"][key])


@pytest.mark.parametrize(("golden", "name"), CASES)
def test_scores_equal_the_recorded_ones(golden: Golden, name: str, either_java: Java) -> None:
    block = golden.record["protocols"][name]
    assert_all_fields_read(block, "reference", "options", "corpus", "items", "missing_left_out")
    questions, answers = questions_from(golden.beside("questions")), answers_from(golden.beside("predictions"))
    assert set(block["items"]) == set(questions)
    score = find_protocol(f"scanqa/{name}").score
    got = score(questions, answers, java=either_java)
    assert got["missing"] == len(questions) - len(answers)
    compare(block, got, name, either_java)
    if "missing_left_out" in block:
        answered = {key: texts for key, texts in questions.items() if key in answers}
        compare(block["missing_left_out"], score(answered, answers, java=either_java), name, either_java)


def test_every_protocol_is_recorded() -> None:
    assert {name for golden in FILES for name in golden.record["protocols"]} == set(SCANQA_RULES) or not FILES
