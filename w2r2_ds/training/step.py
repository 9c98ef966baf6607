"""The W2R2 training step: one engine forward that runs the shortcut pass and the fused pass.

Passes (see `two_pass.py` for their order):

* shortcut: Phi(F2D, 0), visual tokens without geometry (2D only), under ``no_grad`` unless the push term needs its
  autograd graph;
* fused: Phi(F2D, F3D), the pass from which the gradients come.

For a push term with `needs_other_geometry`, the shortcut pass is Phi(F2D, G), with the geometry G of another scene.

Every rank calls the same modules in the same order for every batch; a batch without frames has a dummy frame. The host
synchronizes with the device only to compare captions and short answers, to decode greedily (`shortcut_decode: greedy`,
the decode gap, validation), and to copy new features to the feature cache.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.attention.visual_attention import VisualAttention
from w2r2_ds.models.token_masking import mask_images
from w2r2_ds.models.w2r2 import W2R2, Mask
from w2r2_ds.objective.loss import PassOutputs, ShortcutOutputs, score_shortcut, w2r2_loss
from w2r2_ds.objective.push_terms import build_push_term
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.reduce import TowerCallCount
from w2r2_ds.training.two_pass import build_pass_order, dropouts_of, without_dropout
from w2r2_ds.types.batch import Batch, Prompts, Visuals

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

Mode = Literal["loss", "decode_gap", "generate"]
EXTRA_TOKENS = 16
"""Number of tokens by which a decoded answer may be longer than its label. The rest is cut."""


class W2R2Step(nn.Module):
    """Training step of W2R2: the module that DeepSpeed wraps.

    It has one ``forward`` with a mode, not one method per purpose: ZeRO-3 gathers sharded weights in hooks of module
    forwards, and resets its parameter trace in the hook of the engine's forward. A method that bypasses the engine's
    forward would run with empty weights and invalidate that trace.

    Args:
        model: the composed model.
        config: objective, pass order, seed, and nominal frame rate of a video.
        scorer: similarity of an answer to its label.
        zero3: whether DeepSpeed shards the parameters, which determines the default pass order.
    """

    def __init__(self, model: W2R2, config: RunConfig, scorer: Scorer, zero3: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objective = config.objective
        self.video_fps, self.seed = config.data.video_fps, config.train.seed
        # Teacher-forced texts end where decoded ones do.
        self.scorer = dataclasses.replace(scorer, end_tokens=model.family.end_tokens(model.base, scorer.tokenizer))
        self.tower_calls = TowerCallCount(config.data)
        self.push_term = build_push_term(config.objective.push_term)
        self.dropouts = dropouts_of(model)
        self.run_passes = build_pass_order(model, config.train.pass_order, self.push_term.stop_gradient, zero3)

    def forward(
        self, batch: Batch, mode: Mode = "loss", optimizer_step: int = 0, max_new_tokens: int = 0
    ) -> tuple[Tensor, Tensor] | Tensor | list[list[int]]:
        """Compute the loss, the decode gap or generated answers of one micro-batch.

        Args:
            batch: micro-batch on the model's device; for ``generate``, of prompts without answers.
            mode: result to compute, see Returns.
            optimizer_step: number of completed optimizer steps, from which the masks of `visual_mask_ratio` are drawn.
            max_new_tokens: largest number of generated tokens, for ``generate``.

        Returns:
            ``loss``: weighted sum of the samples' losses, and their statistics ``[batch, len(STATS)]``.
            ``decode_gap``: ``[batch, 2]`` similarity s of the shortcut's answer, teacher-forced and greedily decoded.
            ``generate``: token ids of the greedy answers from fused tokens.
        """
        # Both passes share F2D and F3D: the encoders are frozen and run once per micro-batch, under no_grad. `fuse`
        # copies the vision output, so the shortcut pass cannot change what the fused pass reads.
        vision_output = self.model.encode_2d(batch.visuals, self.tower_calls.maximum(batch.visuals))
        geometry = self.model.encode_3d(batch.visuals)
        if mode == "decode_gap":
            return self.measure_decode_gap(batch, vision_output, geometry)
        if mode == "generate":
            fused = self.model.fuse(vision_output, self.model.merge(geometry))
            return self.generate(batch, batch.visuals, fused, max_new_tokens)
        return self.compute_loss(batch, vision_output, geometry, optimizer_step)

    def compute_loss(
        self, batch: Batch, vision_output: VisionOutput, geometry: list[Tensor], optimizer_step: int
    ) -> tuple[Tensor, Tensor]:
        """Both passes and the objective; see `forward`."""
        # The shortcut comes first in every module. A forward resets ZeRO-3's count of the gradients after which the
        # backward pass releases the module: if one under no_grad came last, the weights would stay gathered. The order
        # is the same in every step, so ZeRO-3's trace stays valid.
        # With the geometry of another scene, both passes use the merger's output, so it comes before both.
        merged = self.model.merge(geometry) if self.push_term.needs_other_geometry else None
        with self.shortcut_context():
            if merged is None:
                shortcut_visual = self.fuse_shortcut(vision_output, geometry)
            else:
                shortcut_visual = self.model.fuse(vision_output, other_geometry(merged, batch))
            answers = self.decode(batch, shortcut_visual) if self.objective.shortcut_decode == "greedy" else None
        # With a detached shortcut all gradients come from the fused pass.
        if merged is None:
            merged = self.model.merge(geometry)
        fused = self.model.fuse(vision_output, merged, self.token_mask(batch, geometry, optimizer_step))
        # With greedy decoding the answers are known already; the teacher-forced shortcut pass still runs, because the
        # push terms need its distributions at the answer positions.
        # With anchors, the attention is recorded for a batch without frames too: under ZeRO-3, all ranks must call the
        # same projections.
        recorder = VisualAttention(self.model.family, batch) if self.objective.shortcut_decode == "anchor" else None
        shortcut_states, fused_states = self.run_passes(
            batch, shortcut_visual, fused, self.push_term.needs_states, recorder
        )
        attention = None if recorder is None else recorder.mean_map()
        shortcut = self.shortcut_outputs(batch, shortcut_states, answers, attention)
        norms = geometry_norm(vision_output, merged, batch)
        # The LM head runs on answer positions only: logits of the prompt would be the largest tensor of the step.
        outputs = self.pass_outputs(batch, fused_states)
        loss, stats = w2r2_loss(outputs, shortcut, batch, self.objective, self.push_term, self.scorer, norms)
        if batch.visuals.dummy:
            # Without frames the merger's output is not in the loss. Adding it times zero gives the merger a (zero)
            # gradient. Gradient reduction is a collective: if this rank skipped the merger's, the others would hang.
            loss = loss + 0.0 * torch.cat(fused.pooler_output).sum()
        return loss, stats

    def fuse_shortcut(self, vision_output: VisionOutput, geometry: list[Tensor]) -> VisionOutput:
        """Phi(F2D, 0): the shortcut's visual tokens."""
        return self.model.fuse(vision_output, self.model.zero_geometry_tokens(geometry))

    def shortcut_outputs(
        self, batch: Batch, states: Tensor, answers: list[str] | None, attention: Tensor | None = None
    ) -> ShortcutOutputs:
        """Similarity and distributions of the shortcut.

        Args:
            batch: labels.
            states: ``[answer tokens, hidden]`` last hidden states of the shortcut pass, the description's appended if
                the push term needs them.
            answers: greedily decoded answer of every sample; None without decoding.
            attention: see `score_shortcut`.
        """
        with self.shortcut_context():
            outputs = self.pass_outputs(batch, states)
            return score_shortcut(outputs, batch, self.push_term, self.scorer, answers, attention)

    def shortcut_context(self) -> AbstractContextManager[None]:
        """Context of the shortcut pass: ``no_grad`` unless the push term differentiates through it."""
        return torch.no_grad() if self.push_term.stop_gradient else nullcontext()

    def token_mask(self, batch: Batch, geometry: list[Tensor], optimizer_step: int) -> Mask | None:
        """Function that masks 2D tokens in the fused pass (`objective.visual_mask_ratio`); None if none is masked."""
        if not self.training or not self.objective.visual_mask_ratio or batch.visuals.dummy:
            return None
        owners = list(zip(batch.visuals.ids, map(len, geometry), strict=True))
        ratio = self.objective.visual_mask_ratio
        return functools.partial(mask_images, samples=owners, ratio=ratio, seed=self.seed, step=optimizer_step)

    def measure_decode_gap(self, batch: Batch, vision_output: VisionOutput, geometry: list[Tensor]) -> Tensor:
        """``[batch, 2]`` similarity s of the shortcut's answer: teacher-forced, greedily decoded."""
        shortcut_visual = self.fuse_shortcut(vision_output, geometry)
        logits = self.pass_outputs(batch, self.model.answer_hidden_states(batch, shortcut_visual)).logits
        teacher_forced = self.scorer.teacher_forced(logits.argmax(-1), batch)
        decoded = self.scorer.decoded(self.decode(batch, shortcut_visual), batch)
        return torch.stack([teacher_forced.s, decoded.s], dim=-1)

    def pass_outputs(self, batch: Batch, states: Tensor) -> PassOutputs:
        """Logits of the answer tokens, from hidden states of the answer tokens and then of the description, if any."""
        logits = self.model.logits(states[: len(batch.answer_positions.label)])
        return PassOutputs(logits, states if self.push_term.needs_states else None)

    def decode(self, batch: Batch, vision_output: VisionOutput) -> list[str]:
        """Greedily decoded answer of every sample of a training batch, as text.

        Args:
            batch: training batch with prompts.
            vision_output: visual tokens of the batch, from `fuse_shortcut`.
        """
        assert batch.prompts is not None, "the loader makes prompts if answers are decoded"
        max_lengths = (batch.answer_positions.sample.bincount(minlength=len(batch.ids)) + EXTRA_TOKENS).tolist()
        visuals, prompts = batch.visuals, batch.prompts
        if not visuals.dummy:
            # Samples of a batch may share frames; every prompt has its own copy of their tokens.
            visuals = dataclasses.replace(visuals, grid_thw=prompts.grid_thw)
            vision_output = self.model.family.select(vision_output, prompts.order)
        tokens = self.generate(prompts, visuals, vision_output, max(max_lengths))
        # Cut each answer at its own limit: the result must not depend on the other samples of the batch.
        return [
            self.scorer.tokenizer.decode(ids[:length], skip_special_tokens=True)
            for ids, length in zip(tokens, max_lengths, strict=True)
        ]

    def generate(
        self, prompts: Prompts | Batch, visuals: Visuals, vision_output: VisionOutput, max_new_tokens: int
    ) -> list[list[int]]:
        """Token ids of the greedy answer to every prompt."""
        # ZeRO-3 gathers the weights once per token, so all ranks run as many steps as the rank with the longest answer.
        synced_gpus = dist.is_initialized() and dist.get_world_size() > 1
        return self.model.family.generate(
            self.model.base,
            prompts,
            visuals,
            vision_output,
            self.scorer.tokenizer,
            max_new_tokens,
            self.video_fps,
            synced_gpus,
        )

    def recompute_context_fn(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for `torch.utils.checkpoint`: (first forward of a layer, its recomputation).

        The shortcut pass runs without dropout. If it has a graph, its layers are recomputed in the backward pass, when
        dropout is on again, so dropout is disabled for the recomputation too.
        """
        # Called at a layer's first forward: whether dropout is disabled now identifies the pass.
        is_shortcut = bool(self.dropouts) and not self.dropouts[0].training
        return nullcontext(), without_dropout(self.dropouts) if is_shortcut else nullcontext()


def other_geometry(merged: Tensor, batch: Batch) -> Tensor:
    """The merged geometry of another scene at every visual token, ``[tokens, hidden]``; 0 where there is none.

    Args:
        merged: ``[tokens, hidden]`` merged geometry of all images.
        batch: with `other_geometry`. For a batch without frames (dummy) the result is 0.
    """
    pairs = batch.other_geometry
    assert pairs is not None, "a training batch has it"
    if batch.visuals.dummy:
        return torch.zeros_like(merged)
    other = merged.index_select(0, pairs.token.clamp(min=0))
    return torch.where((pairs.token >= 0)[:, None], other, 0.0)


@torch.no_grad()
def geometry_norm(vision_output: VisionOutput, merged: Tensor, batch: Batch) -> Tensor:
    """``[batch]`` Frobenius norm of a sample's merged geometry relative to that of its 2D tokens; 0 without frames.

    Args:
        vision_output: F2D; `pooler_output` is ``[tokens, hidden]`` per image.
        merged: ``[tokens, hidden]`` merged geometry of all images.
        batch: maps tokens and samples to frame sets; several samples may share one.
    """
    if batch.visuals.dummy:
        return merged.new_zeros(len(batch.ids))
    sets = len(batch.visuals.geometry_frames)
    # Sum the squares of all tokens of a frame set; `frame_set_of_token` is the set's index for each visual token.
    squares = [
        torch.zeros(sets, device=merged.device).index_add(0, batch.frame_set_of_token, tokens.float().square().sum(-1))
        for tokens in (merged, torch.cat(vision_output.pooler_output))
    ]
    ratio = (squares[0] / squares[1].clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    return torch.where(batch.frame_set_of_sample >= 0, ratio[batch.frame_set_of_sample.clamp(min=0)], 0.0)
