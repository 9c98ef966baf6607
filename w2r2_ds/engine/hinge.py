"""Warns of a run in which the hinge never acts: then every h-gated push term trains as `none` does."""

from __future__ import annotations

import torch.distributed as dist

from w2r2_ds.config import RunConfig

PATIENCE = 100
"""Optimizer steps without a sample above mu after which to warn, once."""


class HingeWatch:
    """Looks at ``above_mu`` of every step; rank 0 speaks.

    Args:
        start: step that the run goes on from.
        config: of the run.
    """

    def __init__(self, start: int, config: RunConfig) -> None:
        self.start, self.objective = start, config.objective
        self.acted = self.warned = False
        self.steps = self.highest = 0.0

    def see(self, step: int, metrics: dict[str, float]) -> None:
        """Take note of a step."""
        self.steps = step - self.start
        self.acted = self.acted or metrics["above_mu"] > 0
        self.highest = max(self.highest, metrics["s_short"])
        if self.steps == PATIENCE:
            self.warn()

    def end(self) -> None:
        """At the end of the run, warn if it was too short to have been warned of."""
        self.warn()

    def warn(self) -> None:
        """Say once that h > 0 has not happened."""
        if self.acted or self.warned or not self.steps or dist.get_rank() != 0:
            return
        self.warned = True
        print(
            f"warning: in {self.steps:.0f} steps no sample's shortcut answer was above objective.mu = "
            f"{self.objective.mu} (highest mean s {self.highest:.3f}), so push {self.objective.push} may have done "
            "nothing; lower mu, or train the 2D-only model first.",
            flush=True,
        )
