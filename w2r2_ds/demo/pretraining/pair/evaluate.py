"""Greedy answers on validation rooms: with geometry, in 2D only, and with geometry or everything of another room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import DynamicCache

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.data.tasks.parsing import AnswerError, parse_world_box
from w2r2_ds.demo.pretraining.pair.pair import Pair
from w2r2_ds.demo.pretraining.pair.rooms.tasks import Task, TaskQuestion, answers, caption, grounding, targets
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, View, make_view, stack_views
from w2r2_ds.demo.pretraining.pair.scene_attention import run_layers
from w2r2_ds.demo.pretraining.pair.stages.dense import prefix_positions

FRAMES = np.array([0, 1, 3, 5])
"""The frames that data preparation selects uniformly: 4 of 6."""
BATCH = 128
MAX_NEW_TOKENS = 40

Mode = Literal["fused", "only_2d", "shuffled", "other_room"]


def all_questions(data: RoomData, view: View, task: Task) -> list[TaskQuestion]:
    """All questions of a task about a view."""
    if task == "answer":
        return answers(data, view)
    return [(grounding if task == "grounding" else caption)(data, view, int(i)) for i in targets(data, view)]


def evaluate(pair: Pair, data: RoomData, task: Task, limit: int) -> dict[str, dict[str, float]]:
    """Scores of the first `limit` questions in every mode; all questions of a room or none are taken.

    Returns:
        Per mode, ``n``; grounding: ``acc25`` and ``acc50`` (percent with an IoU of at least 0.25 and 0.5), ``median_m``
        (median distance of centres of valid answers, metres) and ``invalid`` (percent); other tasks: ``exact``
        (percent of answers that are equal to the label).
    """
    views: list[View] = []
    items: list[tuple[int, TaskQuestion]] = []
    for room in range(len(data.rooms)):
        view = make_view(data, room, FRAMES)
        found = all_questions(data, view, task)
        items += [(len(views), question) for question in found]
        views.append(view)
        if len(items) >= limit:
            break
    scores = {}
    for mode in get_args(Mode):
        texts = greedy(pair, data, views, items, mode)
        if task == "grounding":
            scores[mode] = grounding_scores(texts, [views[i].boxes[q.target] for i, q in items])
        else:
            exact = np.mean([text == q.answer for text, (_, q) in zip(texts, items, strict=True)])
            scores[mode] = {"n": len(items), "exact": round(100 * float(exact), 1)}
    return scores


def grounding_scores(texts: Sequence[str], boxes: Sequence[np.ndarray]) -> dict[str, float]:
    """Scores of grounding answers; `boxes` are the true ones, centre and size."""
    overlaps, distances = [], []
    for text, box in zip(texts, boxes, strict=True):
        try:
            found = parse_world_box(text)
        except AnswerError:
            overlaps.append(0.0)
            continue
        overlaps.append(aabb_iou(found.tolist(), box.tolist()))
        distances.append(float(np.linalg.norm(found[:3] - box[:3])))
    values = np.array(overlaps)
    return {
        "n": len(values),
        "acc25": round(100 * float((values >= 0.25).mean()), 1),
        "acc50": round(100 * float((values >= 0.5).mean()), 1),
        "median_m": round(float(np.median(distances)), 2) if distances else float("nan"),
        "invalid": round(100 * (1 - len(distances) / len(values)), 1),
    }


@torch.no_grad()
def greedy(
    pair: Pair, data: RoomData, views: Sequence[View], items: Sequence[tuple[int, TaskQuestion]], mode: Mode
) -> list[str]:
    """Greedy answers.

    Args:
        pair: the pair.
        data: rooms of the views.
        views: one view per room.
        items: index of the view and question.
        mode: ``fused``; ``only_2d`` without geometry; ``shuffled`` with the geometry of the next view; ``other_room``
            with its images too, so that only the text fits: a baseline of answers that need no frames.
    """
    visual, geometry = stack_views(views)
    if mode in ("shuffled", "other_room"):
        geometry = geometry.roll(-1, 0)
    if mode == "other_room":
        visual = visual.roll(-1, 0)
    embeddings = pair.prefix_embeddings(visual, geometry, torch.full((len(views),), mode != "only_2d"))
    ids = [pair.prompts.question(question.question) for _, question in items]
    by_length: dict[int, list[int]] = {}
    for index, each in enumerate(ids):
        by_length.setdefault(len(each), []).append(index)
    texts = [""] * len(items)
    for indices in by_length.values():
        for begin in range(0, len(indices), BATCH):
            chosen = indices[begin : begin + BATCH]
            prefix = embeddings[[items[i][0] for i in chosen]]
            for index, tokens in zip(chosen, _continue(pair, prefix, [ids[i] for i in chosen]), strict=True):
                texts[index] = pair.prompts.tokenizer.decode(tokens)
    return texts


def _continue(pair: Pair, prefix: torch.Tensor, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens up to the end of turn, after prefixes ``[n, tokens, hidden]`` and questions of equal length."""
    text, prompts, rows = pair.text, pair.prompts, len(ids)
    cache: Any = DynamicCache(config=text.config)
    embeddings = torch.cat([prefix, text.embed_tokens(torch.tensor(ids))], 1)
    position = prompts.next_position + len(ids[0])
    own = torch.arange(prompts.next_position, position).expand(3, rows, -1)
    positions = torch.cat([prefix_positions(pair, rows), own], -1)
    generated: list[torch.Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool)
    while len(generated) < MAX_NEW_TOKENS and not bool(ended.all()):
        states = run_layers(text, embeddings, positions, cache=cache)
        token = pair.logits(states[:, -1]).argmax(-1)
        generated.append(token)
        ended |= token == prompts.end_of_turn
        embeddings = text.embed_tokens(token[:, None])
        positions = torch.full((3, rows, 1), position)
        position += 1
    rows_of_tokens = torch.stack(generated, 1).tolist()
    return [row[: row.index(prompts.end_of_turn)] if prompts.end_of_turn in row else row for row in rows_of_tokens]
