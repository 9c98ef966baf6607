"""Read what a report shows: the configuration, metrics, evaluations and diagnoses of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.config.io import config_text, load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.metrics import METRICS_FILE, read_metrics
from w2r2_ds.utils.files.json_io import read_json_object, read_jsonl

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
SCORES, PREDICTIONS, DIAGNOSES = "scores-*.json", "predictions-*.jsonl", "diagnosis-*.json"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        file: score file.
        task: name of the task.
        geometry: ``fused``, ``zero`` (2D only) or ``shuffle``.
        data: prepared folders whose samples were answered.
        protocols: protocol -> result.
        samples: number of answered samples.
        of: number of samples of the data.
    """

    file: Path
    task: str
    geometry: str
    data: tuple[str, ...]
    protocols: dict[str, dict[str, Any]]
    samples: int
    of: int

    @property
    def predictions(self) -> Path:
        """File of the answers."""
        return self.file.with_name(self.file.name.replace("scores-", "predictions-", 1)).with_suffix(".jsonl")

    def records(self) -> dict[str, dict[str, Any]]:
        """Sample id -> answer record; empty if the file of the answers is missing."""
        if not self.predictions.is_file():
            return {}
        return {str(record["id"]): record for _, record in read_jsonl(self.predictions)}


@dataclass(frozen=True)
class EvaluationGroup:
    """Evaluations of one task and data set, with different geometry.

    Attributes:
        task: name of the task.
        data: prepared folders.
        by_geometry: ``fused``, ``zero``, ``shuffle`` -> evaluation; the newest of each.
    """

    task: str
    data: tuple[str, ...]
    by_geometry: dict[str, Evaluation]


@dataclass(frozen=True)
class RunData:
    """Everything that the report shows of a run.

    Attributes:
        name: name of the run in the report, unique.
        folder: folder of the run.
        config: its configuration.
        metrics: step and values of every line of metrics.jsonl.
        groups: evaluations.
        diagnoses: contents of the files of ``w2r2 diagnose``.
    """

    name: str
    folder: Path
    config: RunConfig
    metrics: list[tuple[int, dict[str, float]]]
    groups: list[EvaluationGroup]
    diagnoses: list[dict[str, Any]]

    @property
    def config_text(self) -> str:
        """The configuration as YAML."""
        return config_text(self.config)


def read_run(folder: Path, name: str, results: Sequence[Path] = ()) -> RunData:
    """Read a run.

    Args:
        folder: folder of the run.
        name: its name in the report.
        results: folders with score, prediction and diagnosis files, searched with all folders below; the run's folder
            if empty.

    Raises:
        ValueError: the folder is not that of a run, a folder of results does not exist, or a file cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not the folder of a run ({CONFIG} is missing).")
    for each in results:
        if not each.is_dir():
            raise ValueError(f"--results: the folder {each} does not exist.")
    searched = list(results) or [folder]
    metrics = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    files = [file for each in searched for file in sorted(each.rglob(DIAGNOSES))]
    return RunData(
        name,
        folder,
        load_config(folder / CONFIG),
        metrics,
        group_evaluations([file for each in searched for file in sorted(each.rglob(SCORES))]),
        [read_json_object(file) for file in files],
    )


def group_evaluations(files: Sequence[Path]) -> list[EvaluationGroup]:
    """Group score files by task and data set; of two with the same geometry, the newer one is kept."""
    groups: dict[tuple[str, tuple[str, ...]], EvaluationGroup] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        evaluation = read_evaluation(file)
        key = (evaluation.task, evaluation.data)
        group = groups.setdefault(key, EvaluationGroup(*key, {}))
        if replaced := group.by_geometry.get(evaluation.geometry):
            logger.warning("%s is not shown: %s is newer", replaced.file, file)
        group.by_geometry[evaluation.geometry] = evaluation
    return [groups[key] for key in sorted(groups)]


def read_evaluation(file: Path) -> Evaluation:
    """Read a score file of ``w2r2 evaluate``.

    Raises:
        ValueError: it cannot be read, or a field is missing.
    """
    scores = read_json_object(file)
    try:
        data = tuple(str(each["path"]) for each in scores["data"])
        numbers = int(scores["samples"]), int(scores["of"])
        return Evaluation(file, str(scores["task"]), str(scores["geometry"]), data, scores["protocols"], *numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a score file of w2r2 evaluate ({error!r}).") from None


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names of runs: the last part of each folder, or as many parts as make the names different."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("--run names the same folder twice.")
