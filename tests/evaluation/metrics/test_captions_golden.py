"""Caption scores, the PTB tokenizer and clean_answer against outputs of the public code."""

from __future__ import annotations

from typing import Any

import pytest

from golden_files import Golden, find, is_caption_vectors, is_clean_answer_pairs, is_tokenizer_pairs
from metric_cases import assert_all_fields_read, assert_scores_equal
from w2r2_ds.evaluation.metrics.captions import score_captions
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.protocols.scanqa import clean_answer

pytestmark = pytest.mark.golden

VECTORS = [
    pytest.param(vector, id=f"{golden.name}-{name}")
    for golden in find(is_caption_vectors)
    for name, vector in golden.record["vectors"].items()
]


@pytest.mark.parametrize("vector", VECTORS)
def test_scores_of_small_corpora(vector: dict[str, Any], either_java: Java) -> None:
    assert_all_fields_read(vector, "references", "candidates", "corpus", "items", "note")
    scores = score_captions(vector["references"], vector["candidates"], java=either_java)
    assert_scores_equal(vector["corpus"], scores.corpus, either_java, "none", "corpus")
    assert scores.items.keys() == vector["items"].keys()
    for key, item in vector["items"].items():
        assert_scores_equal(item, scores.items[key], either_java, "none", key)


@pytest.mark.parametrize("golden", find(is_tokenizer_pairs), ids=lambda golden: golden.name)
def test_ptb_tokenizer(golden: Golden, java: Java) -> None:
    pairs = golden.record["pairs"]
    assert java.tokenize([pair["text"] for pair in pairs]) == [pair["tokens"] for pair in pairs]


@pytest.mark.parametrize("golden", find(is_clean_answer_pairs), ids=lambda golden: golden.name)
def test_clean_answer(golden: Golden) -> None:
    for pair in golden.record["pairs"]:
        assert clean_answer(pair["text"]) == pair["clean"], pair["text"]
