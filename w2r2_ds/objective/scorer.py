"""Similarity s of answers to their labels: IoU3D for boxes, word overlap for captions and short answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.objective.anchor import anchor_similarity
from w2r2_ds.objective.similarity import (
    decoded_grounding_similarity,
    grounding_similarity,
    has_text,
    predicted_texts,
)
from w2r2_ds.objective.text_similarity import text_similarity
from w2r2_ds.types.batch import Batch


@dataclass(frozen=True)
class Score:
    """Similarity of the answers of a batch to their labels.

    Attributes:
        s: ``[batch]`` float64 in [0, 1]; 0 for an invalid answer.
        valid: ``[batch]`` bool, False for a grounding answer without a box or with a frame that does not exist.
            Captions and short answers are always valid.
    """

    s: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Scorer:
    """Computes s of teacher-forced predictions, of decoded answers, or of attention anchors.

    Attributes:
        tables: digit and sign of every token of the vocabulary, on the model's device.
        tokenizer: the VLM's tokenizer.
        config: similarity measures of captions and short answers.
        end_tokens: end tokens besides the label's, at which teacher-forced texts end; `W2R2Step` sets those of the VLM.
    """

    tables: TokenTables
    tokenizer: Any
    config: ObjectiveConfig
    end_tokens: tuple[int, ...] = ()

    def teacher_forced(self, predicted: Tensor, batch: Batch) -> Score:
        """Score of teacher-forced predictions, ``[answer tokens]`` int64.

        Synchronizes with the device only if the batch has captions or short answers.
        """
        s, valid = grounding_similarity(predicted, batch, self.tables)
        texts = predicted_texts(predicted, batch, self._decode, self.end_tokens)
        return self._add_text_similarity(s, valid, texts, batch)

    def decoded(self, answers: Sequence[str], batch: Batch) -> Score:
        """Score of decoded answers, one per sample."""
        s, valid = decoded_grounding_similarity(answers, batch)
        device = batch.input_ids.device
        return self._add_text_similarity(s.to(device), valid.to(device), answers, batch)

    def anchored(self, attention: Tensor, predicted: Tensor, batch: Batch) -> Score:
        """Score of the boxes at the attention anchors; captions and short answers are scored as teacher-forced.

        Args:
            attention: ``[batch, visual tokens]``, see `find_anchors`.
            predicted: ``[answer tokens]`` int64 teacher-forced predictions, for the texts.
            batch: labels and inputs of the anchors.
        """
        s, valid = anchor_similarity(attention, batch)
        texts = predicted_texts(predicted, batch, self._decode, self.end_tokens)
        return self._add_text_similarity(s, valid, texts, batch)

    def _add_text_similarity(self, s: Tensor, valid: Tensor, texts: Sequence[str], batch: Batch) -> Score:
        """Complete the boxes' score by that of captions and short answers."""
        if not has_text(batch):
            return Score(s, valid)
        text_s = text_similarity(
            texts,
            batch.answers,
            batch.tasks,
            batch.kinds,
            self.config.caption_similarity,
            self.config.answer_similarity,
        )
        is_text = torch.tensor([kind != "grounding" for kind in batch.kinds]).to(valid.device)
        # A sample has one kind: the similarity of the other kind is 0.
        return Score(s + text_s.to(s.device, non_blocking=True), valid | is_text)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
