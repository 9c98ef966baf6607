"""Warns of a run in which the hinge never acts: then an h-gated push term trains as `none` does."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.training.metrics import FILE, read_metrics

PATIENCE = 100
"""Optimizer steps without a sample above mu after which to warn, once."""


class HingeMonitor:
    """Looks at ``above_mu`` of every step, those before a resume among them; rank 0 speaks.

    Args:
        start: step that the run goes on from.
        config: of the run; readings that h does not gate, and those without weight, are not watched.
    """

    def __init__(self, start: int, config: RunConfig) -> None:
        self.objective = config.objective
        gated = find_push_term(config.objective.push).gated and config.objective.lambda_det > 0
        self.watching = gated and dist.get_rank() == 0
        self.acted = self.warned = False
        self.steps, self.highest = 0, 0.0
        log = Path(config.out) / FILE
        if self.watching and start and log.exists():
            for step, values in read_metrics(log):
                if step <= start:
                    self.note(values)

    def see(self, metrics: dict[str, float]) -> None:
        """Take note of a step that has just ended."""
        if not self.watching:
            return
        self.note(metrics)
        if self.steps == PATIENCE:
            self.warn()

    def end(self) -> None:
        """At the end of a run that was too short for its patience, warn all the same."""
        if self.watching and self.steps:
            self.warn()

    def note(self, metrics: dict[str, float]) -> None:
        """Count a step."""
        self.steps += 1
        self.acted = self.acted or metrics["above_mu"] > 0
        self.highest = max(self.highest, metrics["s_short"])

    def warn(self) -> None:
        """Say once that h > 0 has not happened."""
        if self.acted or self.warned:
            return
        self.warned = True
        print(
            f"warning: in {self.steps} steps no sample's shortcut answer was above objective.mu = {self.objective.mu} "
            f"(highest mean s {self.highest:.3f}), so push {self.objective.push} has done nothing yet; lower mu, or "
            "train the 2D-only model first.",
            flush=True,
        )
