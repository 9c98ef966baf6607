"""Read what a report shows: the configuration, metrics, evaluations and diagnoses of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2r2_ds.config.io import config_text, load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.metrics import METRICS_FILE, read_metrics
from w2r2_ds.utils.files.hashing import json_sha256
from w2r2_ds.utils.files.json_io import read_json_object, read_jsonl

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
SCORES, PREDICTIONS, DIAGNOSES = "scores-*.json", "predictions-*.jsonl", "diagnosis-*.json"
FEATURES, ATTENTION = "features-*.json", "attention-*.json"
COMPARED = ("weights", "model", "dtype", "data", "max_new_tokens", "frame_width", "frame_fit", "visual", "video_fps")
"""Fields of ``run`` in a score file that do not depend on the geometry."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        file: score file.
        task: name of the task.
        geometry: ``fused``, ``zero`` (2D only) or ``shuffle``.
        data: prepared folders whose samples were answered.
        run: hashes of the weights, the model and the data, and options of generation.
        checkpoint: what was evaluated.
        protocols: protocol -> result.
        samples: number of answered samples.
        of: number of samples of the data.
    """

    file: Path
    task: str
    geometry: str
    data: tuple[str, ...]
    run: dict[str, Any]
    checkpoint: str
    protocols: dict[str, dict[str, Any]]
    samples: int
    of: int

    @property
    def compared(self) -> str:
        """What evaluations of different geometry must have in common to be compared: weights, model, data, options."""
        return json_sha256([self.task, self.data, {name: self.run.get(name) for name in COMPARED}])

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
    """Evaluations of the same weights on the same data, with different geometry.

    Attributes:
        title: task and data; also the weights if others were evaluated on them.
        task: name of the task.
        data: prepared folders.
        by_geometry: ``fused``, ``zero``, ``shuffle`` -> evaluation; the newest of each.
    """

    title: str
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
        features: files of its option ``--features``, with their contents.
        attention: files of its option ``--attention``, with their contents.
    """

    name: str
    folder: Path
    config: RunConfig
    metrics: list[tuple[int, dict[str, float]]]
    groups: list[EvaluationGroup]
    diagnoses: list[dict[str, Any]]
    features: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    attention: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)

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
    diagnoses, features, attention = (_contents(searched, pattern) for pattern in (DIAGNOSES, FEATURES, ATTENTION))
    return RunData(
        name,
        folder,
        load_config(folder / CONFIG),
        metrics,
        group_evaluations([file for each in searched for file in sorted(each.rglob(SCORES))]),
        [content for _, content in diagnoses],
        features,
        attention,
    )


def _contents(folders: Sequence[Path], pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    """The JSON files of a pattern in some folders and all below, with their contents.

    Files of the same task and data, such as those of two checkpoints, get the key ``label``: their folder.
    """
    found = []
    by_data: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # task and data -> folder and content of its files
    for folder in folders:
        for file in sorted(folder.rglob(pattern)):
            content = read_json_object(file)
            found.append((file, content))
            paths = [str(each.get("path")) for each in content.get("data") or () if isinstance(each, Mapping)]
            place = Path(folder.name) / file.parent.relative_to(folder)
            by_data.setdefault(str([content.get("task"), paths]), []).append((place.as_posix(), content))
    for same in by_data.values():
        for place_name, content in same if len(same) > 1 else ():
            content["label"] = place_name
    return found


def group_evaluations(files: Sequence[Path]) -> list[EvaluationGroup]:
    """Group score files by task, data, weights and options; of two with the same geometry, the newer one is kept.

    Score files of ``w2r2 evaluate --score_only`` are skipped with a warning: their answers may be of any model.
    """
    groups: dict[str, dict[str, Evaluation]] = {}  # the groups with the oldest files first
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        evaluation = read_evaluation(file)
        if evaluation is None:
            logger.warning("%s is not shown: --score_only does not know which model answered", file)
            continue
        by_geometry = groups.setdefault(evaluation.compared, {})
        if replaced := by_geometry.get(evaluation.geometry):
            logger.warning("%s is not shown: %s is newer", replaced.file, file)
        by_geometry[evaluation.geometry] = evaluation
    titles = Counter(_title(next(iter(group.values()))) for group in groups.values())
    found = []
    for group in groups.values():
        first = next(iter(group.values()))
        title = _title(first)
        if titles[title] > 1:  # such as of two checkpoints
            weights = f"{Path(first.checkpoint).name}, weights {str(first.run['weights'])[:8]}"
            title = f"{title} ({weights}, at most {first.run.get('max_new_tokens')} tokens)"
        found.append(EvaluationGroup(title, first.task, first.data, group))
    return sorted(found, key=lambda group: (group.task, group.data))


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.task}: {', '.join(evaluation.data)}"


def read_evaluation(file: Path) -> Evaluation | None:
    """Read a score file of ``w2r2 evaluate``; None for one of ``--score_only``.

    Raises:
        ValueError: it cannot be read, or a field is missing.
    """
    scores = read_json_object(file)
    if "format" in scores and "checkpoint" not in scores:
        return None
    try:
        return Evaluation(
            file=file,
            task=str(scores["task"]),
            geometry=str(scores["geometry"]),
            data=tuple(str(each["path"]) for each in scores["data"]),
            run={"weights": scores["run"]["weights"], **scores["run"]},
            checkpoint=str(scores["checkpoint"]),
            protocols=scores["protocols"],
            samples=int(scores["samples"]),
            of=int(scores["of"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a score file of w2r2 evaluate ({error!r}).") from None


def title_of(diagnosis: Mapping[str, Any]) -> str:
    """Task and data of a file, and its label if it has one; prediction files may have no data."""
    paths = ", ".join(str(each["path"]) for each in diagnosis.get("data") or ())
    return with_label(f"{diagnosis['task']}: {paths}" if paths else str(diagnosis["task"]), diagnosis)


def with_label(title: str, diagnosis: Mapping[str, Any]) -> str:
    """A title, and in brackets the label that tells files of equal titles apart."""
    return f"{title} ({diagnosis['label']})" if "label" in diagnosis else title


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names of runs: the last part of each folder, or as many parts as make the names different."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("--run names the same folder twice.")
