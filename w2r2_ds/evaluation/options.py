"""Options of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2r2_ds.evaluation.conditions import Condition, find_condition


@dataclass(frozen=True)
class EvaluationOptions:
    """Which samples are answered with which inputs, and how the answers are scored.

    Attributes:
        geometry: name of one of ``CONDITIONS``, or a condition.
        task: task whose validation sets are evaluated; None if all sets of the run are of one task.
        data: prepared folder instead of the run's own sets.
        limit: number of samples, the first ones; 0 for all.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        protocols: names of scoring protocols; the task's default if empty (`choose_protocols`).
        proposals: file of detected boxes, for ``scanrefer/vgllm_refined``.
        root: data root on this machine; None for the one of training.
        vlm: directory or hub id of the VLM on this machine; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder on this machine; None for the one of training.
        reuse: keep the answers of a finished evaluation with equal inputs and weights, of as many samples or more; they
            are scored again if the score file lacks a protocol, or if the protocol needs detected boxes.

    Raises:
        ValueError: a number is too small.
    """

    geometry: str | Condition = "fused"
    task: str | None = None
    data: Path | None = None
    limit: int = 0
    batch_size: int = 8
    max_new_tokens: int = 128
    protocols: Sequence[str] = ()
    proposals: Path | None = None
    root: str | Path | None = None
    vlm: str | None = None
    geometry_path: str | None = None
    reuse: bool = False

    def __post_init__(self) -> None:
        for option, minimum in (("limit", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            if (value := getattr(self, option)) < minimum:
                raise ValueError(f"--{option} is {value}; it must be at least {minimum}.")

    @property
    def condition(self) -> Condition:
        """The condition that `geometry` names; raises ValueError if there is none of this name."""
        return find_condition(self.geometry) if isinstance(self.geometry, str) else self.geometry


def check_evaluation_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that cannot be the name of a folder."""
    for name in names:
        if not re.fullmatch(r"[\w.+=-]+", name, flags=re.ASCII) or name.startswith("."):
            raise ValueError(f"--evaluations: {name!r} is the name of a folder; use letters, digits, - and _.")
