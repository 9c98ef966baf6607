"""Which rows of a batch's hidden states are read: where answers are predicted, and where prompts say what is meant."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from w2r2_ds.data.answer_tokens import NUMBERS
from w2r2_ds.data.packing import TokenPlacement
from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import AnswerRows, PromptRows


def prompt_rows(features: Sequence[Features], places: Sequence[TokenPlacement]) -> PromptRows:
    """Where the description's tokens are."""
    tokens = [f.what.nonzero().squeeze(-1) for f in features]
    position = [place.at(own) for place, own in zip(places, tokens, strict=True)]
    sample, sequence = _owners([len(own) for own in tokens], places)
    return PromptRows(sample, sequence, torch.cat(position))


def answer_rows(features: Sequence[Features], places: Sequence[TokenPlacement]) -> AnswerRows:
    """Flatten the answer positions of the batch and point the digit tokens at them."""
    answers = [f.digit_tokens for f in features if f.digit_tokens is not None]
    assert len(answers) == len(features), "training features carry answers"
    width = max([1, *(len(tokens) for tokens_of in answers for tokens in tokens_of.tokens)])
    number = torch.full((len(features), NUMBERS, width), -1, dtype=torch.int64)
    place = torch.zeros((len(features), NUMBERS, width), dtype=torch.float64)
    lead = torch.zeros((len(features), NUMBERS), dtype=torch.int64)
    position, label, where = [], [], []
    first_row = 0
    for index, (feature, tokens_of) in enumerate(zip(features, answers, strict=True)):
        length, count = len(feature.input_ids), feature.answer_tokens
        position.append(places[index].at(torch.arange(length - count - 1, length - 1)))
        label.append(feature.input_ids[length - count :])
        where.append(torch.from_numpy(tokens_of.where))
        if tokens_of.digits:
            lead[index] = torch.from_numpy(tokens_of.lead) + first_row
        for i, (tokens, units) in enumerate(zip(tokens_of.tokens, tokens_of.places, strict=True)):
            number[index, i, : len(tokens)] = torch.tensor(tokens) + first_row
            place[index, i, : len(tokens)] = torch.tensor(units, dtype=torch.float64)
        first_row += count
    sample, sequence = _owners([f.answer_tokens for f in features], places)
    return AnswerRows(sample, sequence, torch.cat(position), torch.cat(label), torch.cat(where), number, place, lead)


def _owners(counts: Sequence[int], places: Sequence[TokenPlacement]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows]`` each: sample and sequence of so many rows of every sample."""
    sample = torch.repeat_interleave(torch.tensor(counts))
    return sample, torch.tensor([place.sequence for place in places])[sample]
