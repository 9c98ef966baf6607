"""Labels of a batch: the answer tokens and the positions that predict them; and the positions of the *what* tokens.

*What* tokens are those of the description in the prompt. `processor.py` determines which tokens are the answer.

The loss is computed at these positions only, so there is no ``labels`` tensor with -100 for the other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from w2r2_ds.data.answer_tokens import MAX_NUMBERS
from w2r2_ds.data.batching.packing import TokenPlacement
from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import AnswerPositions, DescriptionPositions


def collate_description_positions(
    features: Sequence[Features], placements: Sequence[TokenPlacement]
) -> DescriptionPositions:
    """Positions of the *what* tokens of every sample."""
    tokens = [feature.what.nonzero().squeeze(-1) for feature in features]
    position = [placement.positions_of(indices) for placement, indices in zip(placements, tokens, strict=True)]
    sample, sequence = _sample_and_sequence([len(indices) for indices in tokens], placements)
    return DescriptionPositions(sample, sequence, torch.cat(position))


def collate_answer_positions(features: Sequence[Features], placements: Sequence[TokenPlacement]) -> AnswerPositions:
    """Concatenate the answers of all samples; ``digit`` and ``sign`` index the concatenation."""
    answers = [feature.answer_tokens for feature in features if feature.answer_tokens is not None]
    assert len(answers) == len(features), "training features have answers"
    width = max([1, *(len(tokens) for answer in answers for tokens in answer.digits)])
    digit = torch.full((len(features), MAX_NUMBERS, width), -1, dtype=torch.int64)
    place_value = torch.zeros((len(features), MAX_NUMBERS, width), dtype=torch.float64)
    sign = torch.zeros((len(features), MAX_NUMBERS), dtype=torch.int64)
    position, label, where = [], [], []
    begin = 0  # first entry of this sample's answer in the concatenation
    for index, (feature, answer) in enumerate(zip(features, answers, strict=True)):
        length, count = len(feature.input_ids), feature.num_answer_tokens
        # The answer and its end of turn are the last `count` tokens; each is predicted by the hidden state one position
        # before it: the shift is here, not in the loss.
        position.append(placements[index].positions_of(torch.arange(length - count - 1, length - 1)))
        label.append(feature.input_ids[length - count :])
        where.append(torch.from_numpy(answer.where))
        if answer.single_digits:
            sign[index, : len(answer.sign)] = torch.from_numpy(answer.sign) + begin
        for number, (tokens, values) in enumerate(zip(answer.digits, answer.place_values, strict=True)):
            digit[index, number, : len(tokens)] = torch.tensor(tokens) + begin
            place_value[index, number, : len(tokens)] = torch.tensor(values, dtype=torch.float64)
        begin += count
    sample, sequence = _sample_and_sequence([feature.num_answer_tokens for feature in features], placements)
    return AnswerPositions(
        sample=sample,
        sequence=sequence,
        position=torch.cat(position),
        label=torch.cat(label),
        where=torch.cat(where),
        digit=digit,
        place_value=place_value,
        sign=sign,
        in_world=torch.tensor(
            [each.sample.kind == "grounding" and each.sample.box_format == "world" for each in features]
        ),
    )


def _sample_and_sequence(
    counts: Sequence[int], placements: Sequence[TokenPlacement]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample and sequence index of every token, ``[sum(counts)]`` int64 each; sample i has counts[i] tokens."""
    sample = torch.repeat_interleave(torch.tensor(counts))  # counts [2, 1] -> [0, 0, 1]
    return sample, torch.tensor([placement.sequence for placement in placements])[sample]
