"""Measure the decode gap: similarity s of teacher-forced and of greedily decoded shortcut answers, on fixed samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.loader import labeled_loader
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.validation import draw_subset, rank_subset
from w2r2_ds.types.sample import Sample

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class DecodeGap:
    """Measures ``gap_s_teacher`` and ``gap_s_greedy`` (means of s), and ``gap_abs`` (mean absolute difference).

    The samples are drawn once from the training samples by `train.seed`, the same for every world size.

    Args:
        samples: training samples.
        frontend: tokenizer and vision sizes.
        config: run configuration.
        device: device of this rank.
    """

    def __init__(
        self, samples: Sequence[Sample], frontend: VlmFrontend, config: RunConfig, device: torch.device
    ) -> None:
        world_size, rank, micro_batch = dist.get_world_size(), dist.get_rank(), config.train.micro_batch
        chosen = draw_subset(len(samples), config.objective.decode_gap_samples, config.train.seed)
        self.count, self.device = len(chosen), device
        self.subset = rank_subset(len(chosen), micro_batch, rank, world_size)
        own = [samples[chosen[index]] for index in self.subset.indices]
        self.loader = labeled_loader(own, frontend, config.data, micro_batch, with_prompts=True)

    @torch.no_grad()
    def measure(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """The three means. Collective."""
        engine.eval()  # no dropout, so that both answers come from the same model
        pairs = [engine(batch.to(self.device), mode="decode_gap") for batch in self.loader]
        engine.train()
        teacher, greedy = torch.cat(pairs).double().unbind(-1)
        # Samples that are repeated to fill the last batches are counted once.
        once = torch.tensor(self.subset.once, device=self.device).double()
        sums = torch.stack([teacher * once, greedy * once, (teacher - greedy).abs() * once]).sum(-1)
        dist.all_reduce(sums)
        means = (sums / self.count).tolist()
        return dict(zip(("gap_s_teacher", "gap_s_greedy", "gap_abs"), means, strict=True))
