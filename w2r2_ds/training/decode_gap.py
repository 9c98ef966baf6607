"""How far the teacher-forced reading of the shortcut's answer is from greedy decoding, on a fixed set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.loader import checked, measure_loader
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.validation import draw, share
from w2r2_ds.types.sample import Sample


class DecodeGap:
    """Measures ``gap_s_teacher``, ``gap_s_greedy`` (means of s) and ``gap_abs`` (mean of their distance).

    The set is drawn once from the training samples, the same for every world size up to rounding it to whole batches.

    Args:
        samples: the training split.
        frontend: tokenizer and vision facts.
        config: `objective.gap_samples`, `train.seed`, `train.micro_batch`.
        device: of the model.
    """

    def __init__(
        self, samples: Sequence[Sample], frontend: VlmFrontend, config: RunConfig, device: torch.device
    ) -> None:
        world, rank, micro = dist.get_world_size(), dist.get_rank(), config.train.micro_batch
        chosen = draw(len(samples), config.objective.gap_samples, config.train.seed)
        self.wanted, self.device = len(chosen), device
        self.share = share(len(chosen), micro, rank, world)
        mine = [samples[chosen[index]] for index in self.share.indices]
        self.loader = measure_loader(mine, frontend, config.data, micro)

    @torch.no_grad()
    def measure(self, engine: Any) -> dict[str, float]:
        """Both readings of the shortcut's answers; every rank calls it."""
        engine.eval()
        pairs = [engine(batch.to(self.device), mode="measure") for batch in checked(self.loader)]
        engine.train()
        teacher, greedy = torch.cat(pairs).double().unbind(-1)
        # What was repeated to fill the last batches counts once.
        once = torch.tensor(self.share.once, device=self.device).double()
        sums = torch.stack([teacher * once, greedy * once, (teacher - greedy).abs() * once]).sum(-1)
        dist.all_reduce(sums)
        means = (sums / self.wanted).tolist()
        return dict(zip(("gap_s_teacher", "gap_s_greedy", "gap_abs"), means, strict=True))
