"""Run the steps of a stage and record its first losses, mean losses over its course, evaluations and time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

FIRST = 3
"""Steps whose losses are recorded, to compare a repetition with."""


class StageRecord:
    """Losses, evaluations and time of a stage.

    Args:
        name: name of the stage.
        every: steps between two lines of the log; their mean losses become the curve.
    """

    def __init__(self, name: str, every: int = 50) -> None:
        self.name, self.every = name, every
        self.first: list[dict[str, float]] = []
        self.curve: list[dict[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._begin = time.monotonic()

    def run(
        self,
        step: Callable[[int], dict[str, float]],
        steps: int,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        eval_every: int = 1,
    ) -> None:
        """Run a stage, and add the losses of its steps and its evaluations.

        Args:
            step: one step: its number, from 0 -> its losses.
            steps: number of steps.
            evaluate: an evaluation; None for none.
            eval_every: steps between two evaluations.
        """
        for number in range(steps):
            self.add(number, step(number))
            if evaluate is not None and (number + 1) % eval_every == 0:
                self.add_scores(number + 1, evaluate())

    def add(self, step: int, losses: dict[str, float]) -> None:
        """Add the losses of step number `step`, from 0."""
        if step < FIRST:
            self.first.append(losses)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if (step + 1) % self.every == 0:
            means = {name: round(value / self.every, 4) for name, value in self._sums.items()}
            self._sums = {}
            self.curve.append({"step": step + 1, **means})
            logger.info("%s: step %d, %.0f s, %s", self.name, step + 1, time.monotonic() - self._begin, means)

    def add_scores(self, step: int, scores: dict[str, Any]) -> None:
        """Add an evaluation after `step` steps."""
        self.curve.append({"step": step, "scores": scores})
        logger.info("%s: after %d steps: %s", self.name, step, scores)

    def as_json(self) -> dict[str, Any]:
        """The record, with the seconds since it was made."""
        return {"seconds": round(time.monotonic() - self._begin), "first_losses": self.first, "curve": self.curve}
