"""Scores of all finished runs of an ablation, per seed and per sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.ablation.plan import Plan, Run, read_score_file
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.scoring import headline, score_records
from w2r2_ds.training.checkpoint.manifest import MANIFEST, newest, read_manifest
from w2r2_ds.utils.files.json_io import check_fields, read_jsonl

logger = logging.getLogger(__name__)

EQUAL = 1e-9
"""Largest difference of a metric and the mean of its scores per sample; both are sums of the same numbers."""


@dataclass(frozen=True)
class SampleScores:
    """Scores of single samples, whose mean is the metric.

    Attributes:
        ids: sample ids.
        scenes: scene of each sample.
        values: ``[samples]`` float64.
    """

    ids: tuple[str, ...]
    scenes: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Score:
    """A metric of one run.

    Attributes:
        value: the metric, a fraction, or on its own scale.
        samples: scores per sample; None if the metric is not their mean, as BLEU, or cannot be computed per sample.
    """

    value: float
    samples: SampleScores | None


RunScores = dict[str, Score]
"""``EVALUATION PROTOCOL METRIC`` -> score."""


def read_results(plan: Plan, metrics: tuple[str, ...] = ()) -> dict[str, dict[int, RunScores]]:
    """Arm name -> seed -> scores of the finished evaluations of trained runs.

    Args:
        plan: the ablation.
        metrics: parts of metric names; only metrics that contain one of them are read. Empty for all.

    Raises:
        ValueError: a score file or a manifest cannot be read or lacks hashes, no metric has one of the parts, or two
            runs have other data or were trained from other weights.
    """
    results: dict[str, dict[int, RunScores]] = {arm.name: {} for arm in plan.arms}
    found: set[str] = set()
    first: dict[str, tuple[Path, Any]] = {}
    for run in plan.runs:
        checkpoint = newest(run.folder)
        if checkpoint is None or plan.needs_training(run):
            continue
        check_same_training(first, run, checkpoint)
        check_same_models(first, run, checkpoint)
        scores: RunScores = {}
        for name in plan.evaluations:
            if (evaluated := read_score_file(run, name)) is not None:
                file, content = evaluated
                check_same_evaluation(first, name, file, content)
                scores |= read_scores(file, name, content["protocols"], metrics, found)
        if scores:
            results[run.arm.name][run.seed] = scores
    if metrics and found and not any(results.values()):
        raise ValueError(
            f"--metrics {' '.join(metrics)}: no metric contains this; they are {', '.join(sorted(found))}."
        )
    return results


def check_same_data(first: dict[str, tuple[Path, Any]], use: str, file: Path, data: Any) -> None:
    """Check that runs were trained or evaluated on the same data.

    Args:
        first: use -> first file with it and its data; extended here.
        use: what the data are for, as ``evaluation NAME``.
        file: score file or checkpoint.
        data: digests of the manifests of its data.

    Raises:
        ValueError: the data differ from those of the first file with this use.
    """
    other, expected = first.setdefault(use, (file, data))
    if data != expected:
        raise ValueError(
            f"{file} and {other} have other data ({use}), because a set was prepared again, so the runs are not "
            "comparable; remove the folders of the older runs, and run them again."
        )


def check_same_training(first: dict[str, tuple[Path, Any]], run: Run, checkpoint: Path) -> None:
    """`check_same_data` of the training sets of a run; arms may have training sets of their own.

    Args:
        first: use -> first checkpoint with it and its data; extended here.
        run: the run.
        checkpoint: its newest checkpoint.

    Raises:
        ValueError: as `check_same_data`.
    """
    training = f"training on {run.arm.options.get('data.train', 'data.train')}"
    check_same_data(first, training, checkpoint, _of_manifest(run, checkpoint, "data"))


def check_same_evaluation(
    first: dict[str, tuple[Path, Any]], name: str, file: Path, content: Mapping[str, Any]
) -> None:
    """`check_same_data` of an evaluation.

    Args:
        first: use -> first file with it and its data; extended here.
        name: name of the evaluation.
        file: its score file.
        content: content of the file.

    Raises:
        ValueError: as `check_same_data`, or the file is of an older version.
    """
    remedy = f"remove {file.parent}, and evaluate again"
    check_fields(content, ("data", "protocols"), file, remedy)
    for prepared in content["data"]:
        check_fields(prepared, ("manifest",), file, remedy)
    check_same_data(first, f"evaluation {name}", file, [prepared["manifest"] for prepared in content["data"]])


def check_same_models(first: dict[str, tuple[Path, Any]], run: Run, checkpoint: Path) -> None:
    """Check that runs with the same options of the model were trained from the same weights of VLM and encoder.

    Args:
        first: use -> first checkpoint with it and its fingerprint; extended here.
        run: the run.
        checkpoint: its newest checkpoint.

    Raises:
        ValueError: the model differs from that of the first run with these options.
    """
    fingerprint = _of_manifest(run, checkpoint, "model")
    options = {name: value for name, value in run.arm.options.items() if name.startswith("model.")}
    other, expected = first.setdefault(f"model {options}", (checkpoint, fingerprint))
    if different := [name for name in fingerprint | expected if fingerprint.get(name) != expected.get(name)]:
        raise ValueError(
            f"{checkpoint} and {other} have other models ({', '.join(different)}), because the weights of model.vlm or "
            "model.geometry were replaced between the runs, so the runs are not comparable; remove the folders of the "
            "older runs, and run them again."
        )


def _of_manifest(run: Run, checkpoint: Path, field: str) -> Any:
    """A field of the manifest of a run's checkpoint."""
    manifest = read_manifest(checkpoint)
    check_fields(manifest, (field,), checkpoint / MANIFEST, f"remove {run.folder}, and run it again")
    return manifest[field]


def read_scores(
    file: Path, name: str, results: Mapping[str, Any], metrics: tuple[str, ...], found: set[str]
) -> RunScores:
    """Scores of one evaluation of a run.

    Args:
        file: score file.
        name: name of the evaluation.
        results: ``protocols`` of the file.
        metrics: as for `read_results`.
        found: the names of all metrics are added to it.
    """
    scores: RunScores = {}
    wanted: dict[str, dict[str, float]] = {}
    for protocol, result in results.items():
        for full, value in headline({protocol: result}).items():
            found.add(f"{name} {full}")
            if value is not None and (not metrics or any(part in f"{name} {full}" for part in metrics)):
                wanted.setdefault(protocol, {})[full.removeprefix(f"{protocol} ")] = value
    for protocol, values in wanted.items():
        samples = sample_scores(file, protocol, values)
        for metric, value in values.items():
            scores[f"{name} {protocol} {metric}"] = Score(value, samples.get(metric))
    return scores


def predictions_file(file: Path) -> Path:
    """File of the answers of a score file."""
    return file.with_name(file.name.replace("scores-", "predictions-", 1)).with_suffix(".jsonl")


def sample_scores(file: Path, protocol: str, values: Mapping[str, float]) -> dict[str, SampleScores]:
    """Metric -> scores per sample, for those metrics that are their mean.

    The predictions beside the score file are scored again.

    Args:
        file: score file, ``scores-TASK-GEOMETRY.json``.
        protocol: full name of the protocol.
        values: metric -> value in the score file.

    Raises:
        ValueError: the predictions have another score than the score file.
    """
    item_terms = find_protocol(protocol).item_terms
    if item_terms is None:
        return {}
    predictions = predictions_file(file)
    records = [record for _, record in read_jsonl(predictions)]
    try:
        terms = item_terms(score_records(records, [protocol], items=True)[protocol])
    except ValueError as error:  # such as a protocol that needs detected boxes, which the score file does not name
        logger.warning("%s: no scores per sample (%s)", predictions, error)
        return {}
    ids = tuple(record["id"] for record in records)
    scenes = tuple(record["scene_id"] for record in records)
    result = {}
    for metric, value in values.items():
        sums = [term.sums.get(metric, (0.0, 0.0)) for term in terms]
        if any(denominator != 1.0 for _, denominator in sums):  # not a mean: BLEU, or F1 of detections
            continue
        array = np.array([numerator for numerator, _ in sums], dtype=np.float64)
        if abs(array.mean() - value) > EQUAL:
            raise ValueError(
                f"{file} has {metric} {value}, but the answers in {predictions} have {array.mean()}; evaluate again."
            )
        result[metric] = SampleScores(ids, scenes, array)
    return result
