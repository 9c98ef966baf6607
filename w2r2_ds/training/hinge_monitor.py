"""Warn if the hinge h = max(0, s_short - mu) is 0 in every step: a push term gated by h then has no effect."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.objective.push_terms import PushTerm
from w2r2_ds.training.metrics import METRICS_FILE, read_metrics

PATIENCE = 100
"""Number of optimizer steps without a sample above mu before the warning."""

logger = logging.getLogger(__name__)


class HingeMonitor:
    """Checks ``above_mu`` of every step, including the logged steps before a resume; warns once, on rank 0.

    Args:
        start: optimizer steps completed before this launch.
        config: run configuration.
        push_term: push term of the run; nothing is checked if it is not gated by h, or if lambda_det is 0.
    """

    def __init__(self, start: int, config: RunConfig, push_term: PushTerm) -> None:
        self.objective = config.objective
        gated = push_term.gated and config.objective.lambda_det > 0
        self.enabled = gated and dist.get_rank() == 0
        self.was_positive = self.warned = False
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
        self.was_positive = self.was_positive or metrics["above_mu"] > 0
        self.highest = max(self.highest, metrics["s_short"])

    def _warn(self) -> None:
        """Warn once if h was never positive."""
        if self.was_positive or self.warned:
            return
        self.warned = True
        logger.warning(
            "in %d steps no sample's shortcut answer was above objective.mu = %g (highest mean s %.3f), so the push "
            "term %s has had no effect; lower mu, or first fine-tune the VLM without geometry.",
            self.steps,
            self.objective.mu,
            self.highest,
            self.objective.push_term["name"],
        )
