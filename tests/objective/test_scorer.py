"""Similarity s of batches with several kinds of answers, for every configured measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from objectives import objective_config
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.data.tasks.scanrefer import ScanRefer
from w2r2_ds.objective.scorer import Scorer


@pytest.mark.parametrize(
    ("options", "caption", "answer"),
    [
        # "a red door" for "the red door": 2 of 3 words in order; without articles all of them.
        ({}, pytest.approx(2 / 3), 0.0),
        ({"caption_similarity": "token_f1"}, 1.0, 0.0),
        # "two brown chairs" for "brown chairs": 2 common words of 3 and 2.
        ({"answer_similarity": "token_f1"}, pytest.approx(2 / 3), pytest.approx(0.8)),
    ],
)
def test_decoded_texts_use_the_configured_similarity(
    batch_of: Any,
    samples: list[Any],
    caption_sample: Any,
    answer_sample: Any,
    tables: Any,
    frontend: Any,
    options: dict[str, Any],
    caption: Any,
    answer: Any,
) -> None:
    mixed = [samples[0], replace(caption_sample, answer="the red door"), replace(answer_sample, answer="brown chairs")]
    scorer = Scorer(tables, frontend.tokenizer, objective_config(**options))
    score = scorer.decoded([samples[0].answer, "a red door", "two brown chairs"], batch_of(mixed))
    assert score.s.tolist() == [pytest.approx(1, abs=0.05), caption, answer]
    assert score.valid.tolist() == [True, True, True]


def test_teacher_forced_labels_have_similarity_one_for_every_kind(
    batch_of: Any, samples: list[Any], caption_sample: Any, answer_sample: Any, tables: Any, frontend: Any
) -> None:
    batch = batch_of([samples[0], caption_sample, answer_sample])
    score = Scorer(tables, frontend.tokenizer, objective_config()).teacher_forced(batch.answer_positions.label, batch)
    assert score.s.tolist() == [pytest.approx(1, abs=0.05), 1.0, 1.0] and score.valid.all()


def test_a_task_parses_and_compares_its_own_answers(
    monkeypatch: pytest.MonkeyPatch, batch_of: Any, samples: list[Any], answer_sample: Any, tables: Any, frontend: Any
) -> None:
    class Prefixed(ScanRefer):
        """Answers begin with ``box:``; short answers are compared by their length."""

        name = "prefixed"

        def parse(self, text: str, frame_count: int, box_format: Any = "camera") -> Any:
            if not text.startswith("box:"):
                raise AnswerError("no box:")
            return super().parse(text.removeprefix("box:"), frame_count, box_format)

        def text_similarity(self, prediction: str, reference: str) -> float | None:
            return 1 / (1 + abs(len(prediction) - len(reference)))

    monkeypatch.setitem(TASKS, "prefixed", Prefixed())
    mixed = [replace(each, task="prefixed") for each in (samples[0], samples[0], replace(answer_sample, answer="two"))]
    scorer = Scorer(tables, frontend.tokenizer, objective_config())
    score = scorer.decoded([f"box:{samples[0].answer}", samples[0].answer, "five"], batch_of(mixed))
    assert score.s.tolist() == [pytest.approx(1, abs=0.05), 0.0, 0.5]
    assert score.valid.tolist() == [True, False, True]
