"""Stage 3: language model and merger on questions; the tower is frozen, and the loss of stage 2 stays.

Rooms with geometry are in a random world frame, which only geometry can tell. Rooms in 2D only are in the frame of the
demo, which the first image tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from w2r2_ds.demo.pretraining.muon import Muon
from w2r2_ds.demo.pretraining.pair.pair import DENSE_LAYERS, Pair
from w2r2_ds.demo.pretraining.pair.prompts import Prompts
from w2r2_ds.demo.pretraining.pair.rooms.tasks import TaskQuestion, draw_questions, targets
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, View, draw_view, stack_views
from w2r2_ds.demo.pretraining.pair.scene_attention import Blocks, run_layers
from w2r2_ds.demo.pretraining.pair.settings import Settings
from w2r2_ds.demo.pretraining.pair.stages.dense import DenseHead, dense_targets, prefix_positions
from w2r2_ds.demo.pretraining.pair.stages.tower import MIN_PIXELS
from w2r2_ds.demo.pretraining.schedule import set_learning_rates, warm_up_and_decay

PUNCTUATION_WEIGHT = 0.1
"""Weight of the tokens ``,`` and ``.``, which are soon learnt, in the loss."""
IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """Questions and answers about several rooms.

    Attributes:
        ids: ``[rooms, questions, tokens]`` int64, padded on the right.
        labels: ``[rooms, questions, tokens]`` int64: the next token at the tokens of an answer, else `IGNORED`.
    """

    ids: Tensor
    labels: Tensor

    @property
    def blocks(self) -> tuple[int, int]:
        """Questions per room, and tokens per question."""
        return self.ids.shape[1], self.ids.shape[2]


def pack(prompts: Prompts, rows: Sequence[Sequence[TaskQuestion]]) -> Packed:
    """Token ids and labels of the questions about each room."""
    encoded = [[(prompts.question(q.question), prompts.answer(q.answer)) for q in row] for row in rows]
    length = max(len(question) + len(answer) for row in encoded for question, answer in row)
    ids = torch.full((len(rows), len(rows[0]), length), prompts.padding)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(encoded):
        for j, (question, answer) in enumerate(row):
            end = len(question) + len(answer)
            ids[i, j, :end] = torch.tensor(question + answer)
            labels[i, j, len(question) - 1 : end - 1] = torch.tensor(answer)
    return Packed(ids, labels)


def packed_states(
    pair: Pair,
    views: Sequence[View],
    with_geometry: Tensor,
    packed: Packed,
    maps: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """States of packed questions.

    Args:
        pair: the pair.
        views: one view per room.
        with_geometry: ``[rooms]`` bool; False for rooms in 2D only.
        packed: questions about each room.
        maps: list to which the attention of the layers after `DENSE_LAYERS` is appended, see `scene_attention`.

    Returns:
        ``[answer tokens, hidden]`` outputs of the last layer that predict the labels, in the order of `packed.labels`;
        ``[rooms, visual tokens, hidden]`` outputs of layer `DENSE_LAYERS` at the visual tokens.
    """
    prompts, rows, (count, length) = pair.prompts, len(views), packed.blocks
    prefix = pair.prefix_embeddings(*stack_views(views), with_geometry)
    embeddings = torch.cat([prefix, pair.text.embed_tokens(packed.ids).flatten(1, 2)], 1)
    own = (prompts.next_position + torch.arange(length)).repeat(count).expand(3, rows, -1)
    positions = torch.cat([prefix_positions(pair, rows), own], -1)
    blocks = Blocks(len(prompts.prefix), count, length)
    early = run_layers(pair.text, embeddings, positions, end=DENSE_LAYERS, blocks=blocks)
    late = run_layers(pair.text, early, positions, begin=DENSE_LAYERS, blocks=blocks, maps=maps)
    states = late[:, blocks.prefix :].unflatten(1, (count, length))[packed.labels != IGNORED]
    return states, early[:, prompts.visual]


def object_tokens(views: Sequence[View], questions: Sequence[Sequence[TaskQuestion]]) -> Tensor:
    """``[rooms, questions, visual tokens]`` bool: the tokens that show a question's object; none without an object.

    They have at least `MIN_PIXELS` pixels of it, or as many as any token has.
    """
    rows = []
    for view, row in zip(views, questions, strict=True):
        for question in row:
            pixels = view.pixels[..., max(question.target, 0)].reshape(-1)
            rows.append((pixels >= min(MIN_PIXELS, pixels.max())) & (pixels > 0) & (question.target >= 0))
    return torch.from_numpy(np.stack(rows)).unflatten(0, (len(views), -1))


class QuestionTrainer:
    """Losses and optimizers of stage 3.

    Args:
        pair: the pair.
        head: the head of stage 2.
        data: training rooms.
        settings: lengths, learning rates and seed.
    """

    def __init__(self, pair: Pair, head: DenseHead, data: RoomData, settings: Settings) -> None:
        self.pair, self.head, self.data, self.settings = pair, head, data, settings
        self.rng = np.random.default_rng([settings.seed, 13])
        self.others = [*pair.others(), *head.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(pair.matrices(early=False), settings.muon_lr),
            Muon(pair.matrices(early=True), settings.muon_lr),
            torch.optim.AdamW(self.others, settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = [settings.muon_lr, settings.muon_lr * settings.early_factor, settings.adamw_lr]
        vocabulary = pair.vlm.config.get_text_config().vocab_size
        self.token_weights = torch.ones(vocabulary)
        self.token_weights[pair.prompts.answer(".,")[:-1]] = PUNCTUATION_WEIGHT

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns the losses."""
        factor = warm_up_and_decay(number, self.settings.question_steps, warm_up=50, decay=0.6)
        set_learning_rates(self.optimizers, self.rates, factor)
        only_2d = self.settings.only_2d if number >= self.settings.geometry_steps else 0.0
        with_geometry = torch.from_numpy(self.rng.random(self.settings.question_rooms) >= only_2d)
        views = [self._draw_view(bool(geometry)) for geometry in with_geometry]
        questions = [draw_questions(self.data, view, self.rng, self.settings) for view in views]
        losses = self.losses(views, with_geometry, questions)
        weights = {
            "answers": 1.0,
            "boxes": self.settings.dense_weight,
            "labels": self.settings.dense_weight * self.settings.label_weight,
            "attention": self.settings.attention_weight,
        }
        total: Tensor = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros(()))
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def losses(
        self, views: Sequence[View], with_geometry: Tensor, questions: Sequence[Sequence[TaskQuestion]]
    ) -> dict[str, Tensor]:
        """Losses of questions about rooms.

        Returns:
            ``answers``: cross-entropy of the answers, each with the same weight; ``boxes`` and ``labels``: losses of
            stage 2; ``attention``: see `attention_loss`.
        """
        maps: list[Tensor] = []
        packed = pack(self.pair.prompts, questions)
        states, visual = packed_states(self.pair, views, with_geometry, packed, maps)
        dense = self.head.losses(visual, dense_targets(self.data, views), with_geometry)
        labels = packed.labels[packed.labels != IGNORED]
        errors = cross_entropy(self.pair.logits(states), labels, reduction="none")
        weights = self.answer_weights(packed)
        attention = self.attention_loss(maps, packed, object_tokens(views, questions))
        return {"answers": (errors * weights).sum() / weights.sum(), **dense, "attention": attention}

    def answer_weights(self, packed: Packed) -> Tensor:
        """``[answer tokens]`` weights in the order of `packed.labels`; those of an answer have the sum 1.

        So a box of 25 tokens counts as much as a color of one.
        """
        chosen = packed.labels != IGNORED
        weights = torch.zeros(packed.labels.shape)
        weights[chosen] = self.token_weights[packed.labels[chosen]]
        return (weights / weights.sum(-1, keepdim=True))[chosen]

    def attention_loss(self, maps: Sequence[Tensor], packed: Packed, shown: Tensor) -> Tensor:
        """Negative logarithm of the attention to an object's tokens: mean over answer tokens, questions and layers.

        Args:
            maps: attention of layers, see `scene_attention`.
            packed: questions.
            shown: ``[rooms, questions, visual tokens]`` bool of `object_tokens`.
        """
        # Not for the token that predicts the end of the turn.
        chosen = (packed.labels != IGNORED) & (packed.labels != self.pair.prompts.end_of_turn)
        chosen = chosen & shown.any(-1, keepdim=True)
        weights = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
        weights = weights / weights.sum().clamp(min=1)
        total = torch.zeros(())
        for each in maps:
            to_visual = each.mean(1)[..., self.pair.prompts.visual]  # [rooms, questions, tokens, visual tokens]
            mass = (to_visual * shown[:, :, None]).sum(-1)
            total = total - (torch.log(mass + 1e-4) * weights).sum()
        return total / len(maps)

    def _draw_view(self, geometry: bool) -> View:
        """A random view that shows at least one target."""
        while True:
            view = draw_view(self.data, self.rng, demo_frame=not geometry)
            if len(targets(self.data, view)):
                return view
