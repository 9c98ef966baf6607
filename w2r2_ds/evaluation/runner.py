"""Evaluate a checkpoint or an exported adapter: write predictions as JSON Lines and scores as JSON.

The predictions depend neither on the number of processes (``torchrun``, ``deepspeed``) nor on interruptions
(``resumable.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import DataConfig, RunConfig
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.evaluation import generate
from w2r2_ds.evaluation.conditions import Condition, SampleProcessor
from w2r2_ds.evaluation.loading import LoadOnce, trained_model
from w2r2_ds.evaluation.options import EvaluationOptions, check_evaluation_names
from w2r2_ds.evaluation.plan import EvaluationPlan, plan_evaluation
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Proposals
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.resumable import (
    PartialAnswers,
    Selection,
    read_records,
    record_line,
    unanswered,
    write_records,
)
from w2r2_ds.evaluation.scoring import log_limits, score_records
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import RankInfo, barrier, raise_on_all_ranks
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.file_lock import locked
from w2r2_ds.utils.files.hashing import file_sha256
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.parallel import set_num_threads
from w2r2_ds.utils.progress import progress
from w2r2_ds.utils.source_hash import source_sha256

logger = logging.getLogger(__name__)

LoadModel = Callable[[Path, RunConfig], W2R2]
"""`trained_model`, or a function that keeps the model for several evaluations."""


def evaluate(
    path: Path,
    out: Path,
    options: EvaluationOptions | None = None,
    *,
    ranks: RankInfo | None = None,
    load: LoadModel | None = None,
) -> dict[str, Any]:
    """Generate greedy answers to a validation set and score them.

    Args:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder for ``predictions-TASK-GEOMETRY.jsonl`` and ``scores-TASK-GEOMETRY.json``.
        options: options of the evaluation; None for the defaults.
        ranks: rank and number of the processes, in a process group; None for a single process.
        load: loads the model; None for `trained_model`.

    Returns:
        Content of the score file (docs/reference/metrics/index.md); empty on ranks other than 0.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used; before the first answer if possible.
    """
    return run_evaluation(plan_evaluation(path, out, options or EvaluationOptions(), ranks), ranks, load)


def run_evaluation(
    plan: EvaluationPlan, ranks: RankInfo | None = None, load: LoadModel | None = None
) -> dict[str, Any]:
    """Answer and score the samples of a planned evaluation; arguments and result are those of `evaluate`."""
    ranks = ranks or RankInfo()
    if plan.frontend is None:
        logger.info("reusing %s", plan.predictions)
        if ranks.rank:
            return {}
        return _reused_scores(plan.score_file, plan.predictions, plan.protocols or (), plan.boxes)
    with evaluation_lock(plan.out, plan.name, ranks):
        model = (load or trained_model)(plan.path, plan.config)
        set_num_threads(ranks, model.base.config.get_text_config().hidden_size)
        partial = PartialAnswers(plan.out / f"parts-{plan.name}", plan.run)
        sizes = plan.options.batch_size, plan.options.max_new_tokens
        answerer = Answerer(model, plan.frontend, plan.config.data, plan.condition, plan.whole, *sizes)
        answer_remaining(answerer, plan.samples, partial, ranks)
        barrier()  # rank 0 merges after all ranks have written their answers
        if ranks.rank:
            return {}
        scores = _write_results(plan, partial.merge([sample.id for sample in plan.samples]))
        # The saved answers are deleted last: if scoring fails, the same command finds all of them and only scores.
        partial.remove()
    return scores


def evaluate_all(
    path: Path, out: Path, evaluations: Mapping[str, EvaluationOptions], ranks: RankInfo | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model several times and load it once.

    All evaluations are checked before the first one starts.

    Args:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder; the results of an evaluation are in its subfolder of this name.
        evaluations: name -> options; all of the same VLM and geometry encoder.
        ranks: rank and number of the processes, in a process group; None for a single process.

    Returns:
        Name -> content of the score file; empty on ranks other than 0.

    Raises:
        ValueError: a name is not the name of a folder, or an evaluation cannot be done; the message names it.
    """
    check_evaluation_names(evaluations)
    plans, scores, load = {}, {}, LoadOnce()
    for name, options in evaluations.items():
        with _named(name):
            plans[name] = plan_evaluation(path, out / name, options, ranks)
    for name, plan in plans.items():
        logger.info("evaluation %s", name)
        with _named(name):
            scores[name] = run_evaluation(plan, ranks, load)
    return {} if ranks is not None and ranks.rank else scores


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Add the name of an evaluation to an error of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"evaluation {name}: {error}") from error
    except Exception as error:
        error.add_note(f"in the evaluation {name}")  # a traceback prints it
        raise


def _write_results(plan: EvaluationPlan, records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Write the predictions file, score it and write the score file; returns the content of the latter."""
    write_records(plan.predictions, records)
    scores = {
        "task": plan.task,
        "geometry": plan.condition.name,
        "checkpoint": str(plan.path),
        "data": plan.data,
        "samples": len(records),
        "of": len(plan.whole),
        "max_new_tokens": plan.options.max_new_tokens,
        "sha256": file_sha256(plan.predictions),
        "run": plan.run,
        "notes": preparation_notes(plan.whole, plan.config.data.root),
        "protocols": {} if plan.protocols is None else score_records(records, plan.protocols, plan.boxes),
    }
    log_limits(scores, plan.protocols is not None, plan.predictions)
    atomic_io.replace(plan.score_file, json.dumps(scores, indent=2) + "\n")
    return scores


def _reused_scores(
    score_file: Path, predictions: Path, protocols: Sequence[str], boxes: Proposals | None
) -> dict[str, Any]:
    """Content of a score file of finished answers, which are scored again if it lacks a protocol."""
    scores = read_json_object(score_file)
    # Detected boxes and the code of plug-ins are not recorded: they may be others.
    wanted = [name for name in protocols if boxes is not None or name not in scores["protocols"] or _is_plugin(name)]
    if wanted:
        records = read_records(predictions, scores["samples"])
        scores["protocols"] |= score_records(records, wanted, boxes)
        atomic_io.replace(score_file, json.dumps(scores, indent=2) + "\n")
    return scores


def _is_plugin(protocol: str) -> bool:
    """Whether a plug-in defines how a protocol scores."""
    found = find_protocol(protocol)
    return any(source_sha256(part) is not None for part in (found.score, found.inputs, found.record_model))


@dataclass(frozen=True)
class Answerer:
    """A trained model with the options of generation.

    Attributes:
        model: trained model in evaluation mode.
        frontend: tokenizer and vision specification of its VLM.
        data: data configuration of the run.
        condition: inputs of the model.
        whole: all samples of the data, whose scenes ``shuffle`` pairs.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
    """

    model: W2R2
    frontend: VlmFrontend
    data: DataConfig
    condition: Condition
    whole: Sequence[Sample]
    batch_size: int
    max_new_tokens: int

    def records(self, samples: Sequence[Sample]) -> Iterator[AnswerRecord]:
        """Answer the samples; yields one record per sample, in their order.

        Raises:
            ValueError: a sample cannot be read, or ``shuffle`` has fewer than two rooms.
        """
        processor: SampleProcessor = make_processor(self.frontend, self.data)
        if self.condition.processor is not None:
            # Without the feature cache, which would store the features of other inputs as those of this sample.
            without_cache = make_processor(replace(self.frontend, cache=None), self.data)
            processor = self.condition.processor(without_cache, self.frontend.geometry, self.whole)
        self.model.eval()
        device, tokenizer = self.model.base.device, self.frontend.tokenizer
        remaining = iter(samples)
        for batch in prompt_loader(samples, self.frontend, self.data, self.batch_size, processor):
            answers = generate.generate_tokens(
                self.model,
                batch.to(device),
                tokenizer,
                self.condition.geometry,
                self.max_new_tokens,
                self.data.video_fps,
            )
            for sample_id, tokens in zip(batch.ids, answers, strict=True):
                sample = next(remaining)
                assert sample_id == sample.id, "the loader keeps the order of the samples"
                yield record_of(sample, tokenizer.decode(tokens, skip_special_tokens=True), tokens)


@contextmanager
def evaluation_lock(out: Path, name: str, ranks: RankInfo) -> Iterator[None]:
    """Lock one task and geometry in `out` while the block runs; other tasks and geometries write other files.

    Args:
        out: folder of the results.
        name: ``TASK-GEOMETRY``, part of all file names.
        ranks: rank and number of the processes; rank 0 holds the lock, and all ranks raise if it cannot acquire it.

    Raises:
        ValueError: another process holds the lock.
    """
    with ExitStack() as stack:
        # Without it, the other ranks would wait for rank 0 in the next collective.
        with raise_on_all_ranks():
            if ranks.rank == 0:
                busy = f"{out}: {name} is being evaluated"
                stack.enter_context(locked(out / f"{name}.lock", busy, "pass another --out"))
        yield


def answer_remaining(answerer: Answerer, samples: Sequence[Sample], partial: PartialAnswers, ranks: RankInfo) -> None:
    """Answer this rank's samples that have no saved answer; saves each batch as soon as it is answered."""
    remaining = unanswered([sample.id for sample in samples], partial.read(), ranks.rank, ranks.world_size)
    label = f"answers ({answerer.condition.name})" + (f", rank 0 of {ranks.world_size}" if ranks.world_size > 1 else "")
    quiet = ranks.rank > 0 or not remaining
    with partial.writer(ranks.rank) as file, progress(label, len(remaining), quiet) as advance:
        for record in answerer.records(Selection(samples, remaining)):
            file.write(record_line(record))
            file.flush()
            advance()
