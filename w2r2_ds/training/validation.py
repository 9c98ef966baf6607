"""Validation during training: the `Validation` protocol, and the best step so far.

The implementation that generates and scores answers is evaluation/validator.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.checkpoint.resume import best_until
from w2r2_ds.utils.distributed import is_rank_zero

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

METRIC_PREFIX = "val/"

logger = logging.getLogger(__name__)


class Validation(Protocol):
    """Generates answers to a fixed set of validation samples and scores them.

    Attributes:
        best_by: name of the metric that decides which checkpoint is best; higher is better.
        about: everything besides the weights that a value depends on (samples, longest answer). Values with another
            `about` are not compared.
    """

    best_by: str
    about: str

    def measure(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """Scores, the same on every rank. Collective; random state and training mode are restored."""
        ...


MakeValidation = Callable[[RunConfig, VlmFrontend, torch.device], Validation]
"""Called on every rank, without collectives; raises ValueError for errors that the user can correct."""


class BestSoFar:
    """Runs the validation and stores the step with the highest value; of equal values, the earlier step.

    Args:
        validation: gives the values.
        resumed: the checkpoint that the run resumed from, None for a fresh run.
    """

    def __init__(self, validation: Validation, resumed: Path | None) -> None:
        self.validation = validation
        self.best = best_until(resumed) if resumed else None
        self._before = self.best
        if self.best and (self.best["metric"], self.best["about"]) != (validation.best_by, validation.about):
            logger.info("validation: the saved best has another metric or other samples and is ignored: %s", self.best)
            self.best = None

    def measure(self, engine: DeepSpeedEngine, step: int) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Validate after `step`.

        Returns:
            Metrics to log; and what to save with a checkpoint if this step is the best so far, else None.
        """
        started = time.perf_counter()
        scores = self.validation.measure(engine)
        seconds = time.perf_counter() - started
        metrics = {METRIC_PREFIX + name: score for name, score in scores.items()} | {f"{METRIC_PREFIX}seconds": seconds}
        metric = self.validation.best_by
        if metric not in scores:  # it could be computed when the run started, so this is no reason to stop the run
            if is_rank_zero():
                logger.warning("%s could not be computed after step %d; the best step does not change", metric, step)
            return metrics, None
        value, best = scores[metric], self.best
        self._before = best
        better = best is None or value > best["value"]
        if best is None or better:
            self.best = best = {"metric": metric, "value": value, "step": step, "about": self.validation.about}
        comparison = "the best so far" if better else f"best {best['value']:.4g} after step {best['step']}"
        logger.info("validation after step %d: %s %.4g, %s, in %.1f s", step, metric, value, comparison, seconds)
        return metrics, best if better else None

    def not_saved(self) -> None:
        """Return to the previous best: the checkpoint of the new one could not be written."""
        self.best = self._before


def draw_subset(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of `wanted` of the `available` samples (all of them if fewer), the same for every world size."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted]


@dataclass(frozen=True)
class RankSubset:
    """The samples that one rank processes: as many whole batches as every other rank, since all run the same forwards.

    Attributes:
        indices: into the subset; its first samples are repeated until the batches are full.
        once: per index, False for a repetition, which must not count.
    """

    indices: list[int]
    once: list[bool]


def rank_subset(count: int, micro_batch: int, rank: int, world_size: int) -> RankSubset:
    """Batches ``rank, rank + world_size, ...`` of `count` samples; the content of a batch depends on no rank."""
    padded = -(-count // (world_size * micro_batch)) * world_size * micro_batch
    mine = [index for index in range(padded) if index // micro_batch % world_size == rank]
    return RankSubset([index % count for index in mine], [index < count for index in mine])
