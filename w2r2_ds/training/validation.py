"""Validation during training: the `Validation` interface, and the best step so far.

Its implementation, which generates and scores answers, is in evaluation/validator.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.checkpoint.resume import best_until
from w2r2_ds.utils.distributed import is_rank_zero

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

METRIC_PREFIX = "val/"
"""Prefix of the names of logged validation metrics."""

logger = logging.getLogger(__name__)


class Validation(Protocol):
    """Generates answers to a fixed set of validation samples, and scores or draws them.

    Attributes:
        best_by: name of the metric that decides which checkpoint is best; higher is better.
        about: digest of all that a value depends on besides the weights (samples, longest answer). Values with
            different `about` are not compared.
    """

    best_by: str
    about: str

    def measure(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """Scores by metric, the same on every rank. Collective; random state and training mode are restored."""
        ...

    def draw(self, engine: DeepSpeedEngine, title: str, answered: bool) -> Image.Image | None:
        """Picture of a few samples with their answers, on rank 0; None on the others. Collective, as `measure`.

        Args:
            engine: the engine.
            title: first line of the picture.
            answered: `measure` was called with the same weights, and its answers are drawn.
        """
        ...


MakeValidation = Callable[[RunConfig, VlmFrontend, torch.device], Validation]
"""(run configuration, frontend, device) -> validation. Called on every rank, without collectives; raises ValueError for
errors that the user can correct."""


class BestSoFar:
    """Runs the validation and keeps track of the step with the highest value; of equal values, the earlier step.

    Args:
        validation: computes the values.
        resumed: checkpoint that the run resumed from, None for a fresh run.
    """

    def __init__(self, validation: Validation, resumed: Path | None) -> None:
        self.validation = validation
        self.best = best_until(resumed) if resumed else None
        self._previous = self.best
        if self.best and (self.best["metric"], self.best["about"]) != (validation.best_by, validation.about):
            logger.info("validation: the saved best has another metric or other samples and is ignored: %s", self.best)
            self.best = None

    def measure(self, engine: DeepSpeedEngine, step: int) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Validate after `step`. Collective.

        Returns:
            Metrics to log; and, if this step is the best so far, its metric and value for the manifest, else None.
        """
        started = time.perf_counter()
        scores = self.validation.measure(engine)
        seconds = time.perf_counter() - started
        metrics = {METRIC_PREFIX + name: score for name, score in scores.items()} | {f"{METRIC_PREFIX}seconds": seconds}
        metric = self.validation.best_by
        if metric not in scores:  # the metric was checked before the first step: do not stop the run now
            if is_rank_zero():
                logger.warning("%s could not be computed after step %d; the best step does not change", metric, step)
            return metrics, None
        value, best = scores[metric], self.best
        self._previous = best
        better = best is None or value > best["value"]
        if best is None or better:
            self.best = best = {"metric": metric, "value": value, "step": step, "about": self.validation.about}
        comparison = "the best so far" if better else f"best {best['value']:.4g} after step {best['step']}"
        logger.info("validation after step %d: %s %.4g, %s, in %.1f s", step, metric, value, comparison, seconds)
        return metrics, best if better else None

    def not_saved(self) -> None:
        """Return to the previous best: the checkpoint of the new one could not be written."""
        self.best = self._previous


def draw_subset(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of `wanted` random samples of `available` ones (all if fewer); the same for every world size."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted]


@dataclass(frozen=True)
class RankSubset:
    """The samples of one rank. Every rank has the same number of whole batches, so that all run the same forwards.

    Attributes:
        indices: indices into the subset; its first samples are repeated until the batches are full.
        once: for every index, False if it is a repetition, which must not be counted.
    """

    indices: list[int]
    once: list[bool]


def rank_subset(count: int, micro_batch: int, rank: int, world_size: int) -> RankSubset:
    """Batches ``rank, rank + world_size, ...`` of `count` samples; the content of a batch does not depend on ranks."""
    padded = -(-count // (world_size * micro_batch)) * world_size * micro_batch
    mine = [index for index in range(padded) if index // micro_batch % world_size == rank]
    return RankSubset([index % count for index in mine], [index < count for index in mine])
