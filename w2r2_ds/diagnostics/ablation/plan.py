"""Runs of an ablation and their folders; which of them are finished.

OUT/ablation.json                    what all runs share (identity.py); a later command with another value is an error
    runs/ARM/seed-S/                 a run of launchers/train.py, and log.txt, the output of its commands
    runs/ARM/seed-S/evaluation/NAME  scores and predictions of launchers/evaluate.py
    results.json, plots.html         the comparison of the arms
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.diagnostics.ablation.grid import Arm, option_words
from w2r2_ds.evaluation.options import check_evaluation_names
from w2r2_ds.training.checkpoint.manifest import is_trained, newest, weights_sha256
from w2r2_ds.utils.files.json_io import read_json_object

EVALUATIONS = {"fused": {"geometry": "fused"}, "zero": {"geometry": "zero"}}
"""Default evaluations of every run: name -> options of launchers/evaluate.py."""
EVALUATION = "evaluation"
"""Folder of a run with a folder per evaluation."""


@dataclass(frozen=True)
class Run:
    """One training run and its evaluations.

    Attributes:
        arm: the arm that it belongs to.
        seed: value of `train.seed`.
        folder: its folder.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Arm and seed, for messages."""
        return f"{self.arm.name} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """An ablation: what is trained and evaluated.

    Attributes:
        out: folder of the ablation.
        train_words: options of launchers/train.py that all runs share, with ``--config``.
        steps: arm name -> number of optimizer steps (`train.steps`).
        arms: arms in the order of the table.
        seeds: seeds of every arm.
        baseline: name of the arm that the others are compared with.
        deepspeed: DeepSpeed JSON.
        evaluations: name -> options of launchers/evaluate.py, without their dashes.
        plugins: files and modules for ``--plugin``.
    """

    out: Path
    train_words: Sequence[str]
    steps: Mapping[str, int]
    arms: Sequence[Arm]
    seeds: Sequence[int]
    baseline: str
    deepspeed: str
    evaluations: Mapping[str, Mapping[str, Any]]
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check names and seeds."""
        names = [arm.name for arm in self.arms]
        if self.baseline not in names:
            raise ValueError(f"--baseline is {self.baseline!r}; the arms are {', '.join(names)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds is {list(self.seeds)}; it must be different numbers, none below 0.")
        check_evaluation_names(self.evaluations)

    @property
    def runs(self) -> list[Run]:
        """All runs, ordered by seed, so that a partial table has all arms."""
        return [
            Run(arm, seed, self.out / "runs" / arm.folder / f"seed-{seed}") for seed in self.seeds for arm in self.arms
        ]

    def words_of_training(self, run: Run) -> list[str]:
        """Options of launchers/train.py, without the DeepSpeed JSON and ``--resume``."""
        own = [*option_words(run.arm.options), f"--train.seed={run.seed}", f"--out={run.folder}"]
        return [*self._plugin_words(), *self.train_words, *own]

    def words_of_evaluations(self, run: Run, names: Iterable[str]) -> list[str]:
        """Options of launchers/evaluate.py for some of the evaluations, which load the model once."""
        options = json.dumps({name: self.evaluations[name] for name in names})
        paths = [f"--checkpoint={run.folder}", f"--out={run.folder / EVALUATION}"]
        # Only `launchers/evaluate.py` knows whether finished files belong to these weights, data and options.
        return [*self._plugin_words(), *paths, f"--evaluations={options}", "--reuse=true"]

    def needs_training(self, run: Run) -> bool:
        """Whether the run has no checkpoint of its last step."""
        return not is_trained(run.folder, self.steps[run.arm.name])

    def missing_evaluations(self, run: Run) -> list[str]:
        """Names of the evaluations of which the run has no scores of its newest checkpoint."""
        return [name for name in self.evaluations if read_score_file(run, name) is None]

    def is_finished(self, run: Run) -> bool:
        """Whether the run is trained and evaluated."""
        return not self.needs_training(run) and not self.missing_evaluations(run)

    def _plugin_words(self) -> list[str]:
        return [f"--plugin={plugin}" for plugin in self.plugins]


def evaluation_folder(run: Run, name: str) -> Path:
    """Folder of one evaluation of a run."""
    return run.folder / EVALUATION / name


def read_score_file(run: Run, name: str) -> tuple[Path, dict[str, Any]] | None:
    """The score file of one evaluation of a run and its content; None if there is none of the newest checkpoint.

    Raises:
        ValueError: there are two.
    """
    checkpoint = newest(run.folder)
    if checkpoint is None:
        return None
    weights = weights_sha256(checkpoint)
    files = sorted(evaluation_folder(run, name).glob("scores-*.json"))
    contents = {file: read_json_object(file) for file in files}
    # Other files: of a checkpoint of fewer steps, or of `w2r2 evaluate --score_only`, which have no weights.
    own = [each for each in contents.items() if (each[1].get("run") or {}).get("weights") == weights]
    if len(own) > 1:
        raise ValueError(f"{own[0][0]} and {own[1][0]} are of the same evaluation; remove one of them.")
    return own[0] if own else None
