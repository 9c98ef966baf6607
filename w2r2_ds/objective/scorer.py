"""Similarity s of answers, also of several tasks in one batch: boxes by IoU3D, captions and short answers by words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.objective.similarity import (
    decoded_grounding_similarity,
    grounding_similarity,
    has_text,
    read_texts,
    similarity,
)
from w2r2_ds.objective.text_similarity import text_similarity
from w2r2_ds.types.batch import Batch


@dataclass(frozen=True)
class Score:
    """How good the answers of a batch are.

    Attributes:
        s: ``[batch]`` float64 in [0, 1], the similarity to the label; 0 for an invalid answer.
        valid: ``[batch]`` bool; False for a box that is none or lies in a frame that does not exist. Words are valid.
    """

    s: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Scorer:
    """Similarity of teacher-forced predictions or decoded answers to the labels.

    Attributes:
        tables: what a token means inside a number, on the model's device.
        tokenizer: the VLM's tokenizer.
        config: which similarity captions and short answers have.
    """

    tables: TokenTables
    tokenizer: Any
    config: ObjectiveConfig

    def teacher(self, predicted: Tensor, batch: Batch) -> Score:
        """Score of teacher-forced predictions ``[rows]``; waits for the device only where a sample has words."""
        s, valid = grounding_similarity(predicted, batch, self.tables)
        return self._with_words(s, valid, read_texts(predicted, batch, self._decode), batch)

    def decoded(self, answers: Sequence[str], batch: Batch) -> Score:
        """Score of decoded answers, one per sample."""
        s, valid = decoded_grounding_similarity(answers, batch)
        device = batch.input_ids.device
        return self._with_words(s.to(device), valid.to(device), answers, batch)

    def _with_words(self, s: Tensor, valid: Tensor, texts: Sequence[str], batch: Batch) -> Score:
        """Complete the boxes' score with that of the words."""
        if not has_text(batch):
            return Score(s, valid)
        words = text_similarity(
            texts,
            batch.answers,
            batch.tasks,
            batch.kinds,
            self.config.caption_similarity,
            self.config.answer_similarity,
        )
        is_words = torch.tensor([kind != "grounding" for kind in batch.kinds]).to(valid.device)
        return Score(similarity(s, words), valid | is_words)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
