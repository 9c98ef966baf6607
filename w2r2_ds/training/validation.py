"""Validation while training, as the loop sees it: what measures (evaluation/validator.py), which step was best."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.checkpoint.resume import best_until
from w2r2_ds.utils.distributed import is_rank_zero

logger = logging.getLogger(__name__)

PREFIX = "val/"


class Validation(Protocol):
    """Answers a fixed set of validation samples and scores the answers.

    Attributes:
        best_by: the metric that decides, one of those of `measure`; the higher, the better.
        about: what a value depends on besides the weights (samples, longest answer); others are not compared with it.
    """

    best_by: str
    about: str

    def measure(self, engine: Any) -> dict[str, float]:
        """Scores, the same on every rank; every rank calls it. Random state and training mode are left as they are."""
        ...


MakeValidation = Callable[[RunConfig, VlmFrontend, torch.device], Validation]
"""Called on every rank, without collectives; what the user can mend is a ValueError here, not after many steps."""


class BestSoFar:
    """Which step had the highest value; a tie keeps the earlier.

    Args:
        validation: says by what.
        resumed: the checkpoint that the run goes on from, None for a fresh run.
    """

    def __init__(self, validation: Validation, resumed: Path | None) -> None:
        self.validation = validation
        self.best = best_until(resumed) if resumed else None
        self._before = self.best
        if self.best and (self.best["metric"], self.best["about"]) != (validation.best_by, validation.about):
            logger.info(
                "validation: the best so far was of another metric or other samples (%s); starting over", self.best
            )
            self.best = None

    def measure(self, engine: Any, step: int) -> tuple[dict[str, float], dict[str, Any] | None]:
        """What to log of a validation after `step`; and what to save with a checkpoint, if it is the best so far."""
        started = time.perf_counter()
        scores = self.validation.measure(engine)
        seconds = time.perf_counter() - started
        logged = {PREFIX + name: score for name, score in scores.items()} | {f"{PREFIX}seconds": seconds}
        metric = self.validation.best_by
        if metric not in scores:  # it was there when the run began: not worth the run
            if is_rank_zero():
                logger.warning("%s could not be computed after step %d; the best stays as it is.", metric, step)
            return logged, None
        value, best = scores[metric], self.best
        self._before = best
        better = best is None or value > best["value"]
        if best is None or better:
            self.best = best = {"metric": metric, "value": value, "step": step, "about": self.validation.about}
        comparison = "the best so far" if better else f"best {best['value']:.4g} after step {best['step']}"
        logger.info("validation after step %d: %s %.4g, %s, in %.1f s", step, metric, value, comparison, seconds)
        return logged, best if better else None

    def not_saved(self) -> None:
        """The best so far could not be saved: the one before it, which was, is still the best."""
        self.best = self._before


def draw(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of `wanted` of the `available` samples (all of them if fewer), the same for every world size."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted]


@dataclass(frozen=True)
class Share:
    """What one rank goes through: as many whole batches as every other rank, for all must make as many passes.

    Attributes:
        indices: into the part; the part is repeated from its front until the batches are whole.
        once: per index, False where it is such a repetition and must not count.
    """

    indices: list[int]
    once: list[bool]


def share(count: int, micro_batch: int, rank: int, world_size: int) -> Share:
    """The batches ``rank, rank + world_size, ...`` of a part of `count` samples; no rank changes what a batch holds."""
    whole = -(-count // (world_size * micro_batch)) * world_size * micro_batch
    mine = [index for index in range(whole) if index // micro_batch % world_size == rank]
    return Share([index % count for index in mine], [index < count for index in mine])
