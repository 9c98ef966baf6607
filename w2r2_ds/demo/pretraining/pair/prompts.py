"""Token ids and positions of the prompts, as `data.processor.Processor` and the model make them.

The frames of a prompt come before the question, so all questions about a room share a prefix.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from w2r2_ds.data.processor import QUESTION_PLACEHOLDER
from w2r2_ds.demo.pretraining.pair.rooms.room_set import GRID, TOKENS
from w2r2_ds.demo.pretraining.pair.settings import SAMPLE_FRAMES
from w2r2_ds.models.family import find_family


class Prompts:
    """Prompts with `SAMPLE_FRAMES` frames.

    Attributes:
        prefix: ``[tokens]`` int64 token ids of system turn and frames.
        visual: ``[visual tokens]`` int64 indices of the visual tokens in `prefix`.
        positions: ``[3, tokens]`` int64 rotary positions of the prefix.
        next_position: position of the first token after the prefix.
        end_of_turn: id of the token that ends an answer.
        padding: id of the padding token.
    """

    def __init__(self, tokenizer: Any, vlm: PreTrainedModel) -> None:
        self.tokenizer = tokenizer
        content: list[dict[str, str]] = []
        for index in range(SAMPLE_FRAMES):
            content += [{"type": "text", "text": f"Frame-{index}: "}, {"type": "image"}]
        content.append({"type": "text", "text": QUESTION_PLACEHOLDER})
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, self._after = text.split(QUESTION_PLACEHOLDER)
        image = vlm.config.image_token_id
        ids = [
            token
            for token in tokenizer(before, add_special_tokens=False)["input_ids"]
            for _ in range(TOKENS if token == image else 1)
        ]
        self.prefix = torch.tensor(ids)
        is_visual = self.prefix == image
        self.visual = is_visual.nonzero()[:, 0]
        grid = torch.tensor([[1, *GRID]] * SAMPLE_FRAMES)
        positions, _ = vlm.model.get_rope_index(self.prefix[None], is_visual.long()[None], image_grid_thw=grid)
        self.positions = positions[:, 0]
        self.next_position = int(self.positions.max()) + 1
        self._end = find_family(vlm.config.model_type).end_of_turn
        self.end_of_turn = int(tokenizer.convert_tokens_to_ids(self._end))
        self.padding = int(tokenizer.pad_token_id)
        self._cache: dict[str, list[int]] = {}

    def question(self, text: str) -> list[int]:
        """Token ids after the prefix, up to the answer; `text` is the text of the prompt after the frames."""
        return self._ids(text + self._after)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and the end of turn."""
        return self._ids(text + self._end)

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]
