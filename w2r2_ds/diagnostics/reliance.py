"""Diagnosis of a model, or of prediction files: answers under all conditions, Table 1, causality, the results file.

OUT/diagnosis-TASK.json             results; docs/guides/diagnose.md describes its keys
    predictions-TASK-CONDITION.jsonl   answers, the files of ``w2r2 evaluate``; finished ones are reused
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from w2r2_ds.evaluation.loading import run_config, trained_model
from w2r2_ds.evaluation.predictions.rescore import load_records
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.evaluation.resumable import read_records
from w2r2_ds.evaluation.runner import evaluate
from w2r2_ds.evaluation.scoring import are_annotated, choose_protocols, read_boxes
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.w2r2 import W2R2
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
    """Options that do not depend on the source of the answers.

    Attributes:
        protocols: names of scoring protocols; the task's default if empty.
        proposals: file of detected boxes, for protocols that need them.
        limit: number of samples, the first ones; 0 for all.
        draws: draws of the random guess.
        resamples: resamples of the bootstrap.
        seed: seed of both.
        causality: whether to answer with changed geometry, and measure how far answers follow it.
        causality_limit: number of samples for this, the first ones; 0 for all.
        paired: prepared folders of shifted splits, whose geometry is another intervention.
    """

    protocols: Sequence[str] = ()
    proposals: Path | None = None
    limit: int = 0
    draws: int = 20
    resamples: int = 2000
    seed: int = 0
    causality: bool = True
    causality_limit: int = 200
    paired: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for name, minimum in (
            ("limit", 0),
            ("draws", 1),
            ("resamples", 100),
            ("seed", 0),
            ("causality_limit", 0),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.paired and not self.causality:
            raise ValueError("--paired is an intervention, but --causality is false; omit one of the two.")


class LoadOnce:
    """Loads a trained model at the first call and keeps it for the following evaluations."""

    def __init__(self) -> None:
        self.model: W2R2 | None = None

    def __call__(self, path: Path, config: RunConfig) -> W2R2:
        """The model of `path`; every call must be of the same one."""
        if self.model is None:
            self.model = trained_model(path, config)
        return self.model


def diagnose_model(
    path: Path,
    out: Path,
    options: DiagnosisOptions,
    *,
    task: str | None = None,
    data: Path | None = None,
    root: Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    ranks: RankInfo | None = None,
) -> list[dict[str, Any]]:
    """Table 1 and causality of a model, for one task or all tasks of its validation sets.

    Writes ``diagnosis-TASK.json``.

    Args:
        path: folder of a run, a checkpoint, an exported adapter or an imported VG-LLM.
        out: folder of the results and the answers.
        options: protocols, number of samples, draws and resamples.
        task: name of the task; None for all tasks of ``data.val``.
        data: prepared folder instead of the run's own sets.
        root: data root on this machine; None for the one of training.
        vlm: directory or hub id of the VLM on this machine; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder on this machine; None for the one of training.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        ranks: rank and number of the processes, in a process group; None for a single process.

    Returns:
        Content of the results files, one per task; empty on ranks other than 0.

    Raises:
        ValueError: as `evaluate`, or the samples have no annotated answers.
    """
    ranks, load = ranks or RankInfo(), LoadOnce()
    config = run_config(path, root, vlm, geometry_path)
    results = []
    for name in [task] if task or data else tasks_of(config.data):
        sets = find_sets(config.data, name, data)
        whole = all_samples(sets)
        if not all(sample.is_annotated for sample in whole):  # before hours of generation
            raise ValueError(f"{sets[0].folder}: {NOT_ANNOTATED}")
        count = min(options.limit or len(whole), len(whole))
        first = whole[: min(options.causality_limit or count, count)]  # the samples of the interventions
        pairs = find_pairs(config.data, options.paired, first)
        answer = partial(
            _answers,
            out,
            sets[0].task,
            partial(
                evaluate,
                path,
                out,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                task=name,
                data=data,
                protocols=options.protocols,
                proposals=options.proposals,
                root=root,
                vlm=vlm,
                geometry_path=geometry_path,
                ranks=ranks,
                reuse=True,
                load=load,
            ),
        )
        not_evaluated: dict[str, str] = {}
        if len({room_of(sample.scene_id) for sample in whole if sample.frames}) < 2:
            not_evaluated["shuffle"] = "there is no other room whose geometry could replace a scene's own"
        answers = {each: answer(find_condition(each), count) for each in LABELS if each not in not_evaluated}
        box_format = whole[0].box_format if whole[0].kind == "grounding" else None
        if options.causality:
            spec, fewer = geometry_spec(config.model.geometry), partial(answer, count=len(first))
            after = answer_interventions(spec, box_format, pairs, fewer)
        if ranks.rank:
            continue
        rows = [Row(each, LABELS[each], [answers[each]], str(_file(out, sets[0].task, each))) for each in answers]
        about: dict[str, Any] = {"checkpoint": str(path), "max_new_tokens": max_new_tokens}
        if options.causality:
            about["causality"] = causality_results(answers, after, first, options.resamples, options.seed)
        train = training_labels(config.data, sets[0].task)
        results.append(_finish(rows, sets, whole, train, options, out, about, not_evaluated))
    return results


def diagnose_files(
    files: Mapping[str, Path],
    format_name: str,
    out: Path,
    options: DiagnosisOptions,
    *,
    task: str | None = None,
    data: Path | None = None,
    root: Path | None = None,
) -> dict[str, Any]:
    """Table 1 of prediction files, of this or another project; writes ``diagnosis-TASK.json``.

    Args:
        files: label of a row -> its predictions file.
        format_name: format of the files: ``ours``, ``vgllm`` or ``video3dllm``.
        out: folder of the results.
        options: as for `diagnose_model`.
        task: task that the answers must be of; None for any.
        data: prepared folder of the items; required for files of other projects. Without it, there is no random guess.
        root: data root that `data` may be relative to.

    Raises:
        ValueError: as `score_file`; the files have other samples; or they have no annotated answers.
    """
    if reserved := files.keys() & {RANDOM, FREQUENT}:
        raise ValueError(f"--predictions has the label {min(reserved)!r}, which is the name of a row of guesses.")
    rows: list[Row] = []
    sets: list[PreparedSet] = []
    for label, file in files.items():
        records, _, sets = load_records(
            file, format_name, data, root, task, options.protocols, options.proposals is not None
        )
        rows.append(Row(label, label, [records[: options.limit or len(records)]], str(file)))
    whole = all_samples(sets) if sets else None
    about = {"files": {label: str(file) for label, file in files.items()}, "format": format_name}
    return _finish(rows, sets, whole, [], options, out, about, {})


def _file(out: Path, task: str, condition: str) -> Path:
    """The predictions file of an evaluation."""
    return out / f"predictions-{task}-{condition}.jsonl"


def _answers(
    out: Path, task: str, evaluate_one: Callable[..., dict[str, Any]], condition: Condition, count: int
) -> list[AnswerRecord]:
    """Evaluate the first `count` samples under a condition; returns their records, on rank 0 only."""
    scores = evaluate_one(condition, limit=count)
    return read_records(_file(out, task, condition.name), count) if scores else []


def tasks_of(config: DataConfig) -> list[str]:
    """Tasks of the sets of ``data.val``, in their order.

    Raises:
        ValueError: there are no sets.
    """
    tasks = [str(read_manifest(Path(config.root) / source.path)["task"]) for source in config.val]
    if not tasks:
        raise ValueError("data.val is empty; pass a prepared folder with --data.")
    return list(dict.fromkeys(tasks))


def _finish(
    rows: list[Row],
    sets: list[PreparedSet],
    whole: Mixture | None,
    train: list[Label],
    options: DiagnosisOptions,
    out: Path,
    about: Mapping[str, Any],
    not_evaluated: dict[str, str],
) -> dict[str, Any]:
    """Add the rows of guesses, score all rows and write the results file.

    Args:
        rows: rows of the answers.
        sets: data sets of the samples; may be empty.
        whole: all samples of the sets; None without sets.
        train: labels of the training sets; empty to draw from the evaluated set itself.
        options: options of the table.
        out: folder of the results.
        about: source of the answers, for the results.
        not_evaluated: row -> why it is not evaluated; extended here.
    """
    records = rows[0].draws[0]
    if not are_annotated(records):
        raise ValueError(f"{rows[0].predictions}: {NOT_ANNOTATED}")
    boxes = read_boxes(options.proposals)
    guesses, guessed_from, reason = _guess_rows(records, whole, train, options)
    if reason:
        not_evaluated[RANDOM] = reason
    task = str(records[0]["task"])
    protocols = choose_protocols(options.protocols, records, boxes is not None)
    result = {
        "task": task,
        **about,
        "data": describe_sets(sets),
        "samples": len(records),
        "scenes": len({record["scene_id"] for record in records}),
        "seed": options.seed,
        "resamples": options.resamples,
        "confidence": 0.95,
        "guessed_from": guessed_from,
        "not_evaluated": not_evaluated,
        "table1": make_table([*rows, *guesses], protocols, boxes, options.resamples, options.seed),
    }
    if cues := cues_of(sets):
        assert whole is not None, "there are sets"
        samples = whole[: len(records)]
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
