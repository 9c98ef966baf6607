"""Samples that share frames, their packed batches, and the dense attention mask of a packed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

WORDS = ("chair", "brown table beside the door", "lamp", "sofa that stands below the large window of the room")


def questions(sample: Any, count: int) -> list[Any]:
    """`count` samples with the frames of `sample`; their questions and answers differ."""
    from w2r2_ds.data.tasks.scanrefer import description_span, question_text

    found = []
    for index in range(count):
        text = f"the {WORDS[index % len(WORDS)]} {'and ' * (index // len(WORDS))}."
        answer = sample.answer.replace('"frame": 2', f'"frame": {index % 4}')
        changes = {"id": f"{sample.id} {index}", "question": question_text(text), "what": description_span(text)}
        found.append(replace(sample, answer=answer, **changes))
    return found


def packed_of(frontend: Any, data_config: Callable[..., Any]) -> Callable[..., Any]:
    """`batch_of` (tests/conftest.py) with the loader's `make_collate`, which packs if the configuration has packing."""
    from w2r2_ds.data.loader import make_collate, make_processor

    def make(chosen: Sequence[Any], with_prompts: bool = False, **changes: Any) -> Any:
        config = data_config(**changes)
        processor = make_processor(frontend, config)
        return make_collate(frontend, config, with_prompts)([processor(sample, True) for sample in chosen])

    return make


def visible(layout: Any) -> torch.Tensor:
    """``[sequences, 1, length, length]`` bool: dense attention mask of a packed `Layout` (True: attend)."""
    group, suffix = layout.group, layout.suffix
    length = group.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    same = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] >= 0)
    shared = (suffix[:, None, :] == 0) | (suffix[:, None, :] == suffix[:, :, None])
    return (before & same & shared)[:, None]
