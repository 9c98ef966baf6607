"""Diagnosis of a model, or of prediction files: answers under all conditions, Table 1, causality, the results file.

OUT/diagnosis-TASK.json             results; docs/guides/diagnose.md describes its keys
    predictions-TASK-CONDITION.jsonl   answers, the files of ``w2r2 evaluate``; finished ones are reused
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import DataConfig, RunConfig
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepared_set import PreparedSet, read_manifest
from w2r2_ds.diagnostics.causality.paired_rooms import find_pairs
from w2r2_ds.diagnostics.causality.results import answer_interventions, causality_results
from w2r2_ds.diagnostics.random_guess import Label, most_frequent, random_guesses, read_labels, training_labels
from w2r2_ds.diagnostics.row_cues import cue_results, cues_of
from w2r2_ds.diagnostics.table1 import Row, make_table
from w2r2_ds.evaluation.conditions import Condition, find_condition
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.loading import LoadOnce, run_config
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.evaluation.predictions.rescore import load_records
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.evaluation.resumable import read_records
from w2r2_ds.evaluation.runner import evaluate
from w2r2_ds.evaluation.scoring import are_annotated, choose_protocols, read_boxes
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.types.sample import Sample, room_of
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.files import atomic_io

logger = logging.getLogger(__name__)

LABELS = {"fused": "2D + 3D", "zero": "2D only", "shuffle": "shuffled geometry", "no_image": "no image"}
"""Condition of the evaluation -> label of its row, in the order of the table."""
RANDOM, FREQUENT = "random", "frequent"
"""Names of the rows of guesses."""
NOT_ANNOTATED = "samples have no annotated answers (a test split), so there is nothing to compare answers with."


@dataclass(frozen=True)
class DiagnosisOptions:
    """Guesses, intervals and interventions of a diagnosis.

    Attributes:
        draws: draws of the random guess.
        resamples: resamples of the bootstrap.
        seed: seed of both.
        causality: whether to answer with changed geometry, and measure how far answers follow it.
        causality_limit: number of samples for this, the first ones; 0 for all.
        paired: prepared folders of shifted splits, whose geometry is another intervention.
    """

    draws: int = 20
    resamples: int = 2000
    seed: int = 0
    causality: bool = True
    causality_limit: int = 200
    paired: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for name, minimum in (
            ("draws", 1),
            ("resamples", 100),
            ("seed", 0),
            ("causality_limit", 0),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.paired and not self.causality:
            raise ValueError("--paired is an intervention, but --causality is false; omit one of the two.")


@dataclass(frozen=True)
class ModelAnswers:
    """Answers of a model to the samples of one task.

    Attributes:
        path: folder of a run, a checkpoint, an exported adapter or an imported VG-LLM.
        out: folder of the answers.
        evaluation: task, data and options of generation.
        ranks: rank and number of the processes.
        load: loads the model.
    """

    path: Path
    out: Path
    evaluation: EvaluationOptions
    ranks: RankInfo
    load: LoadOnce

    def records(self, condition: Condition, count: int) -> list[AnswerRecord]:
        """Answer the first `count` samples under a condition; returns their records, on rank 0 only."""
        options = replace(self.evaluation, geometry=condition, limit=count, reuse=True)
        scores = evaluate(self.path, self.out, options, ranks=self.ranks, load=self.load)
        return read_records(_file(self.out, scores["task"], condition.name), count) if scores else []


def diagnose_model(
    path: Path, out: Path, evaluation: EvaluationOptions, options: DiagnosisOptions, ranks: RankInfo | None = None
) -> list[dict[str, Any]]:
    """Table 1 and causality of a model, for one task or all tasks of its validation sets.

    Writes ``diagnosis-TASK.json``.

    Args:
        path: folder of a run, a checkpoint, an exported adapter or an imported VG-LLM.
        out: folder of the results and the answers.
        evaluation: data, options of generation and protocols; without task and data, all tasks of ``data.val``. Its
            geometry is replaced by every condition in turn, and finished answers are reused.
        options: draws, resamples and interventions.
        ranks: rank and number of the processes, in a process group; None for a single process.

    Returns:
        Content of the results files, one per task; empty on ranks other than 0.

    Raises:
        ValueError: as `evaluate`, or the samples have no annotated answers.
    """
    config = run_config(path, evaluation.root, evaluation.vlm, evaluation.geometry_path)
    one = evaluation.task is not None or evaluation.data is not None
    ranks, load, results = ranks or RankInfo(), LoadOnce(), []
    for task in [evaluation.task] if one else tasks_of(config.data):
        answers = ModelAnswers(path, out, replace(evaluation, task=task), ranks, load)
        results.append(_diagnose_task(answers, config, options))
    return [result for result in results if result is not None]


def _diagnose_task(model: ModelAnswers, config: RunConfig, options: DiagnosisOptions) -> dict[str, Any] | None:
    """Answer the samples of one task under all conditions and compare the answers; None on ranks other than 0."""
    sets = find_sets(config.data, model.evaluation.task, model.evaluation.data)
    task, whole = sets[0].task, all_samples(sets)
    if not all(sample.is_annotated for sample in whole):  # before hours of generation
        raise ValueError(f"{sets[0].folder}: {NOT_ANNOTATED}")
    count = min(model.evaluation.limit or len(whole), len(whole))
    first = whole[: min(options.causality_limit or count, count)]  # the samples of the interventions
    pairs = find_pairs(config.data, options.paired, first)
    not_evaluated: dict[str, str] = {}
    if len({room_of(sample.scene_id) for sample in whole if sample.frames}) < 2:
        not_evaluated["shuffle"] = "there is no other room whose geometry could replace a scene's own"
    answers = {each: model.records(find_condition(each), count) for each in LABELS if each not in not_evaluated}
    after = None
    if options.causality:
        box_format = whole[0].box_format if whole[0].kind == "grounding" else None
        spec, answer = geometry_spec(config.model.geometry), partial(model.records, count=len(first))
        after = answer_interventions(spec, box_format, pairs, answer)
    if model.ranks.rank:
        return None
    rows = [Row(each, LABELS[each], [answers[each]], str(_file(model.out, task, each))) for each in answers]
    about: dict[str, Any] = {"checkpoint": str(model.path), "max_new_tokens": model.evaluation.max_new_tokens}
    if after is not None:
        about["causality"] = causality_results(answers, after, first, options.resamples, options.seed)
    source = AnswerSource(sets, whole, training_labels(config.data, task), about, not_evaluated)
    return _finish(rows, source, model.evaluation, options, model.out)


def diagnose_files(
    files: Mapping[str, Path], format_name: str, out: Path, evaluation: EvaluationOptions, options: DiagnosisOptions
) -> dict[str, Any]:
    """Table 1 of prediction files, of this or another project; writes ``diagnosis-TASK.json``.

    Args:
        files: label of a row -> its predictions file.
        format_name: format of the files: ``ours``, ``vgllm`` or ``video3dllm``.
        out: folder of the results.
        evaluation: protocols, proposals and limit; the task that the answers must be of, None for any; the prepared
            folder of the items (``data``, relative to the working directory or ``root``), required for files of other
            projects. Without it, there is no random guess.
        options: draws and resamples.

    Raises:
        ValueError: as `score_file`; the files have other samples; or they have no annotated answers.
    """
    if reserved := files.keys() & {RANDOM, FREQUENT}:
        raise ValueError(f"--predictions has the label {min(reserved)!r}, which is the name of a row of guesses.")
    rows: list[Row] = []
    sets: list[PreparedSet] = []
    root = None if evaluation.root is None else Path(evaluation.root)
    for label, file in files.items():
        records, _, sets = load_records(
            file,
            format_name,
            evaluation.data,
            root,
            evaluation.task,
            evaluation.protocols,
            evaluation.proposals is not None,
        )
        rows.append(Row(label, label, [records[: evaluation.limit or len(records)]], str(file)))
    about = {"files": {label: str(file) for label, file in files.items()}, "format": format_name}
    source = AnswerSource(sets, all_samples(sets) if sets else None, [], about, {})
    return _finish(rows, source, evaluation, options, out)


def _file(out: Path, task: str, condition: str) -> Path:
    """The predictions file of an evaluation."""
    return out / f"predictions-{task}-{condition}.jsonl"


def tasks_of(config: DataConfig) -> list[str]:
    """Tasks of the sets of ``data.val``, in their order.

    Raises:
        ValueError: there are no sets.
    """
    tasks = [str(read_manifest(Path(config.root) / source.path)["task"]) for source in config.val]
    if not tasks:
        raise ValueError("data.val is empty; pass a prepared folder with --data.")
    return list(dict.fromkeys(tasks))


@dataclass(frozen=True)
class AnswerSource:
    """Where the answers of a diagnosis come from.

    Attributes:
        sets: data sets of the samples; may be empty.
        whole: all samples of the sets; None without sets.
        train: labels of the training sets; empty to draw guesses from the evaluated set itself.
        about: the model or the files, for the results.
        not_evaluated: row -> why it is not evaluated.
    """

    sets: list[PreparedSet]
    whole: Mixture | None
    train: list[Label]
    about: Mapping[str, Any]
    not_evaluated: Mapping[str, str]


def _finish(
    rows: list[Row], source: AnswerSource, evaluation: EvaluationOptions, options: DiagnosisOptions, out: Path
) -> dict[str, Any]:
    """Add the rows of guesses, score all rows and write the results file.

    Args:
        rows: rows of the answers.
        source: where the answers come from.
        evaluation: protocols and detected boxes.
        options: draws, resamples and seed.
        out: folder of the results.
    """
    records = rows[0].draws[0]
    if not are_annotated(records):
        raise ValueError(f"{rows[0].predictions}: {NOT_ANNOTATED}")
    boxes = read_boxes(evaluation.proposals)
    guesses, guessed_from, reason = _guess_rows(records, source.whole, source.train, options)
    not_evaluated = {**source.not_evaluated, **({RANDOM: reason} if reason else {})}
    task = str(records[0]["task"])
    protocols = choose_protocols(evaluation.protocols, records, boxes is not None)
    result = {
        "task": task,
        **source.about,
        "data": describe_sets(source.sets),
        "samples": len(records),
        "scenes": len({record["scene_id"] for record in records}),
        "seed": options.seed,
        "resamples": options.resamples,
        "confidence": 0.95,
        "guessed_from": guessed_from,
        "not_evaluated": not_evaluated,
        "table1": make_table([*rows, *guesses], protocols, boxes, options.resamples, options.seed),
    }
    if cues := cues_of(source.sets):
        assert source.whole is not None, "there are sets"
        samples = source.whole[: len(records)]
        result["cues"] = cue_results([*rows, *guesses], samples, cues, options.resamples, options.seed)
    file = out / f"diagnosis-{task}.json"
    atomic_io.replace(file, json.dumps(result, indent=2, allow_nan=False) + "\n")
    logger.info("results: %s", file)
    return result


def _guess_rows(
    records: Sequence[AnswerRecord], whole: Sequence[Sample] | None, train: list[Label], options: DiagnosisOptions
) -> tuple[list[Row], str, str]:
    """Rows of guesses, the labels that they are drawn from, and why there are none (empty if there are)."""
    if whole is None:
        return [], "", "the labels of other samples are not in the files; pass their prepared folder with --data"
    # A guess from the training labels knows what the model could have learned; other labels are second best.
    sources = [("labels of the training sets", train)] if train else []
    sources.append(("labels of other scenes of the evaluated set", read_labels(whole)))
    reasons = []
    for source, labels in sources:
        try:
            drawn = random_guesses(records, labels, options.draws, options.seed)
        except ValueError as error:
            reasons.append(f"{source}: {error}")
            continue
        rows = [Row(RANDOM, f"random guess, mean of {options.draws}", drawn)]
        frequent = most_frequent(labels)
        if records[0].get("form") is None and frequent is not None:
            repeated = [{**record, "text": frequent, "tokens": []} for record in records]
            rows.append(Row(FREQUENT, "most frequent label", [repeated]))
        return rows, source, ""
    return [], "", "; ".join(reasons)
