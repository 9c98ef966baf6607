"""Warn if a push term has no effect: in every step its hinge h = max(0, s_short - mu) is 0, or no sample is paired."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.objective.push_terms import PushTerm
from w2r2_ds.training.metrics import METRICS_FILE, read_metrics

PATIENCE = 100
"""Number of optimizer steps without such a sample before the warning."""

logger = logging.getLogger(__name__)


class HingeMonitor:
    """Checks ``above_mu`` or ``unpaired`` of every step, with the logged steps before a resume; warns once, on rank 0.

    Args:
        start: optimizer steps completed before this launch.
        config: run configuration.
        push_term: push term of the run; nothing is checked if it is neither gated by h nor needs the geometry of
            another scene, or if lambda_det is 0.
    """

    def __init__(self, start: int, config: RunConfig, push_term: PushTerm) -> None:
        self.objective = config.objective
        self.gated = push_term.gated
        conditional = (push_term.gated or push_term.needs_other_geometry) and config.objective.lambda_det > 0
        self.enabled = conditional and dist.get_rank() == 0
        self.was_possible = self.warned = False
        self.steps, self.highest = 0, 0.0
        path = Path(config.out) / METRICS_FILE
        if self.enabled and start and path.exists():
            for step, metrics in read_metrics(path):
                if step <= start:
                    self._count(metrics)

    def update(self, metrics: dict[str, float]) -> None:
        """Count a step; warn after `PATIENCE` steps."""
        if not self.enabled:
            return
        self._count(metrics)
        if self.steps == PATIENCE:
            self._warn()

    def finish(self) -> None:
        """Warn at the end of a run that is shorter than `PATIENCE`."""
        if self.enabled and self.steps:
            self._warn()

    def _count(self, metrics: dict[str, float]) -> None:
        self.steps += 1
        self.was_possible = self.was_possible or (metrics["above_mu"] > 0 if self.gated else metrics["unpaired"] < 1)
        self.highest = max(self.highest, metrics["s_short"])

    def _warn(self) -> None:
        """Warn once if no sample of any step fulfilled the condition of the term."""
        if self.was_possible or self.warned:
            return
        self.warned = True
        if not self.gated:
            logger.warning(
                "in %d steps no micro-batch had a second room whose frames have the same number and size, so the push "
                "term %s has had no effect; raise train.micro_batch, or prepare all scenes with one number of frames.",
                self.steps,
                self.objective.push_term["name"],
            )
            return
        logger.warning(
            "in %d steps no sample's shortcut answer was above objective.mu = %g (highest mean s %.3f), so the push "
            "term %s has had no effect; lower mu, or first fine-tune the VLM without geometry.",
            self.steps,
            self.objective.mu,
            self.highest,
            self.objective.push_term["name"],
        )
