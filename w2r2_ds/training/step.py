"""The W2R2 step: one engine forward that makes both passes, the shortcut's under no_grad (training/two_pass.py).

Every rank calls the same modules in the same order, whatever its batch holds: a batch without frames carries a dummy
one. Nothing in it makes the host wait for the device, except that answers made of words are compared as text (captions
and short answers: one read in either pass), that decoding (`shortcut_decode: greedy`, the gap, validation) reads
every token, and that features which the feature cache lacks are copied to the host. DeepSpeed's own waits aside.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.qwen2_5_vl.generate import PromptInputs, greedy_tokens
from w2r2_ds.models.token_masking import mask_images
from w2r2_ds.models.w2r2 import W2R2, Mask
from w2r2_ds.objective.loss import Outputs, Shortcut, read_shortcut, w2r2_loss
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.cache_stats import TowerCalls
from w2r2_ds.training.two_pass import dropouts_of, make_two_pass, without_dropout
from w2r2_ds.types.batch import Batch, Visuals

Forward = tuple[Tensor, Tensor] | Tensor | list[list[int]]
SLACK = 16
"""Tokens that a decoded answer may have more than its label; a longer one is cut."""


class W2R2Step(nn.Module):
    """What DeepSpeed wraps: forward makes the loss of one micro-batch.

    Args:
        model: the composed model.
        config: objective, and the nominal frame rate of a video.
        scorer: how similar an answer is to its label.
        zero3: DeepSpeed will gather the parameters layer by layer.
    """

    def __init__(self, model: W2R2, config: RunConfig, scorer: Scorer, zero3: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objective = config.objective
        self.video_fps, self.seed = config.data.video_fps, config.train.seed
        self.optimizer_step = 0  # which the loop keeps: the masks of `visual_mask_ratio` follow from it
        self.scorer = scorer
        self.calls = TowerCalls(config.data)
        self.reading = find_push_term(config.objective.push)
        self.dropouts = dropouts_of(model)
        self.two_pass = make_two_pass(model, config, zero3)

    def forward(self, batch: Batch, measure: bool = False, answer: int = 0) -> Forward:
        """Weighted sum of the losses of the samples, and their statistics ``[batch, len(STATS)]``.

        A batch whose only frame is a dummy adds its tokens times zero, so that the merger has a gradient on every rank.
        With `measure`, no loss: ``[batch, 2]`` s of the shortcut's answer, teacher-forced and greedily decoded. With
        `answer`, no loss either: token ids of the fused pass's greedy answers, at most so many each, of prompts alone.
        """
        visual = self.model.encode_2d(batch.visuals, self.calls.agreed(batch.visuals))
        features = self.model.encode_3d(batch.visuals)
        if measure:
            return self.both_readings(batch, visual, features)
        if answer:
            fused = self.model.fuse(visual, self.model.merge(features))
            return self.greedy(batch, batch.visuals, fused, answer)
        with self.without_graph():
            plain = self.plain(visual, features)
            answers = self.decode(batch, plain) if self.objective.shortcut_decode == "greedy" else None
        merged = self.model.merge(features)
        fused = self.model.fuse(visual, merged, self.mask(batch, features))
        short_states, states = self.two_pass(batch, plain, fused, self.reading.states)
        shortcut = self.read(batch, short_states, answers)
        ratio = geometry_norm(visual, merged, batch)
        outputs = self.outputs(batch, states)
        loss, stats = w2r2_loss(outputs, shortcut, batch, self.objective, self.scorer, ratio)
        if batch.visuals.dummy:
            loss = loss + 0.0 * torch.cat(fused.pooler_output).sum()
        return loss, stats

    def plain(self, visual: Any, features: list[Tensor]) -> Any:
        """Phi(F2D, 0): what the shortcut sees."""
        return self.model.fuse(visual, self.model.merge_nothing(features))

    def read(self, batch: Batch, states: Tensor, answers: list[str] | None) -> Shortcut:
        """What is kept of the shortcut's last hidden states, and of its decoded answers where there are some."""
        with self.without_graph():
            return read_shortcut(self.outputs(batch, states), batch, self.objective, self.scorer, answers)

    def without_graph(self) -> AbstractContextManager[None]:
        """For what the shortcut makes: no graph unless the reading keeps it."""
        return torch.no_grad() if self.reading.blocked else nullcontext()

    def mask(self, batch: Batch, features: list[Tensor]) -> Mask | None:
        """What `objective.visual_mask_ratio` does to the fused pass in training; None where it does nothing."""
        if not self.training or not self.objective.visual_mask_ratio or batch.visuals.dummy:
            return None
        owners = list(zip(batch.visuals.ids, map(len, features), strict=True))
        share, seed, step = self.objective.visual_mask_ratio, self.seed, self.optimizer_step
        return functools.partial(mask_images, owners=owners, share=share, seed=seed, step=step)

    def both_readings(self, batch: Batch, visual: Any, features: list[Tensor]) -> Tensor:
        """``[batch, 2]`` s of the shortcut's answer: teacher-forced, greedily decoded."""
        plain = self.plain(visual, features)
        logits = self.outputs(batch, self.model.hidden(batch, plain)).logits
        teacher = self.scorer.teacher(logits.argmax(-1), batch)
        decoded = self.scorer.decoded(self.decode(batch, plain), batch)
        return torch.stack([teacher.s, decoded.s], dim=-1)

    def outputs(self, batch: Batch, states: Tensor) -> Outputs:
        """What one pass gives, from the last hidden states of the rows that are read."""
        logits = self.model.logits(states[: len(batch.answer_rows.label)])
        return Outputs(logits, states if self.reading.states else None)

    def decode(self, batch: Batch, visual: Any) -> list[str]:
        """Greedy answers of every sample of a training batch."""
        assert batch.prompts is not None, "the loader makes prompts where answers are decoded"
        longest = (batch.answer_rows.sample.bincount(minlength=len(batch.ids)) + SLACK).tolist()
        tokens = self.greedy(batch.prompts, *batch.prompts.seen(batch.visuals, visual), max(longest))
        # Each at its own length: what a sample's neighbours are must not matter.
        return [
            self.scorer.tokenizer.decode(ids[:most], skip_special_tokens=True)
            for ids, most in zip(tokens, longest, strict=True)
        ]

    def greedy(self, prompts: PromptInputs, visuals: Visuals, visual: Any, most: int) -> list[list[int]]:
        """Greedy token ids; all ranks together, for ZeRO-3 gathers the weights once per token."""
        synced = dist.is_initialized() and dist.get_world_size() > 1
        return greedy_tokens(
            self.model.base, prompts, visuals, visual, self.scorer.tokenizer, most, self.video_fps, synced
        )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch's checkpointing: a layer that ran without dropout is computed again without it.

        A shortcut with a graph (`unblocked`) is computed again in the backward pass, when its dropout is on again.
        """
        off = bool(self.dropouts) and not self.dropouts[0].training
        return nullcontext(), without_dropout(self.dropouts) if off else nullcontext()


@torch.no_grad()
def geometry_norm(visual: Any, merged: Tensor, batch: Batch) -> Tensor:
    """``[batch]`` Frobenius norm of a sample's merged geometry relative to that of its 2D tokens; 0 without frames."""
    if batch.visuals.dummy:
        return merged.new_zeros(len(batch.ids))
    sets = len(batch.visuals.geometry_images)
    squares = [
        torch.zeros(sets, device=merged.device).index_add(0, batch.token_set, tokens.float().square().sum(-1))
        for tokens in (merged, torch.cat(visual.pooler_output))
    ]
    ratio = (squares[0] / squares[1].clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    return torch.where(batch.frame_set >= 0, ratio[batch.frame_set.clamp(min=0)], 0.0)
