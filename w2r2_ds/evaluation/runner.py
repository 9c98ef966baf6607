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
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.validate import check_frames, check_geometry_files, check_sample_texts
from w2r2_ds.evaluation import generate
from w2r2_ds.evaluation.conditions import Condition, SampleProcessor, find_condition
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.loading import run_config, trained_model, trained_weights_sha256, with_cache
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Proposals
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.resumable import (
    PartialAnswers,
    Selection,
    is_finished,
    read_records,
    record_line,
    unanswered,
    write_records,
)
from w2r2_ds.evaluation.scoring import (
    are_annotated,
    check_scorable,
    choose_protocols,
    log_limits,
    read_boxes,
    score_records,
)
from w2r2_ds.evaluation.shuffle import pair_scenes
from w2r2_ds.kernels.select import describe_attention, resolve_dtype
from w2r2_ds.models.build import VlmFrontend, fingerprint, load_frontend, plugin_code
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import RankInfo, barrier, raise_on_all_ranks
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.file_lock import locked
from w2r2_ds.utils.files.hashing import file_sha256
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.files.output_folder import check_writable
from w2r2_ds.utils.parallel import set_num_threads
from w2r2_ds.utils.progress import progress
from w2r2_ds.utils.source_hash import source_sha256

logger = logging.getLogger(__name__)

LoadModel = Callable[[Path, RunConfig], W2R2]
"""`trained_model`, or a function that keeps the model for several evaluations."""


def evaluate(
    path: Path,
    out: Path,
    geometry: str | Condition = "fused",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    limit: int = 0,
    *,
    task: str | None = None,
    data: Path | None = None,
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    root: str | Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    ranks: RankInfo | None = None,
    reuse: bool = False,
    load: LoadModel | None = None,
) -> dict[str, Any]:
    """Generate greedy answers to a validation set and score them.

    Args:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder for ``predictions-TASK-GEOMETRY.jsonl`` and ``scores-TASK-GEOMETRY.json``.
        geometry: name of one of ``CONDITIONS``, or a condition.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        limit: number of samples, the first ones; 0 for all.
        task: task whose validation sets are evaluated; None if all sets of the run are of one task.
        data: prepared folder instead of the run's own sets.
        protocols: names of scoring protocols; the task's default if empty (`choose_protocols`).
        proposals: file of detected boxes, for ``scanrefer/vgllm_refined``.
        root: data root on this machine; None for the one of training.
        vlm: directory or hub id of the VLM on this machine; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder on this machine; None for the one of training.
        ranks: rank and number of the processes, in a process group; None for a single process.
        reuse: keep the answers of a finished evaluation with equal inputs and weights, of as many samples or more; they
            are scored again if the score file lacks a protocol, or if the protocol needs detected boxes.
        load: loads the model; None for `trained_model`.

    Returns:
        Content of the score file (docs/reference/metrics/index.md); empty on ranks other than 0.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used; before the first answer if possible.
    """
    check_generation_options(limit, batch_size, max_new_tokens)
    condition = find_condition(geometry) if isinstance(geometry, str) else geometry
    check_writable(out)
    ranks = ranks or RankInfo()
    config = run_config(path, root, vlm, geometry_path)
    logger.info("%s", describe_attention(config.model.attention, resolve_dtype(config.model.dtype)))
    sets = find_sets(config.data, task, data)
    whole, samples = _select_samples(sets, limit)
    boxes = read_boxes(proposals)
    # Errors in protocols, scenes, frames and texts are raised before hours of generation. A record without an answer
    # has all fields that decide which protocols can score it.
    unanswered_records = [record_of(sample, None) for sample in samples]
    is_scored = are_annotated(unanswered_records)
    protocol_names = choose_protocols(protocols, unanswered_records, boxes is not None) if is_scored else []
    check_scorable(unanswered_records, protocol_names, boxes)
    if condition.name == "shuffle":  # raises ValueError for a single room; the pairs themselves are made by Answerer
        pair_scenes([sample.scene_id for sample in whole if sample.frames])
    name = f"{sets[0].task}-{condition.name}"
    described = describe_sets(sets)
    run = _run_identity(path, config, described, condition, max_new_tokens)
    predictions, score_file = out / f"predictions-{name}.jsonl", out / f"scores-{name}.json"
    if reuse and is_finished(score_file, predictions, run, len(samples)):
        logger.info("reusing %s", predictions)
        return {} if ranks.rank else _reused_scores(score_file, predictions, protocol_names, boxes)
    check_frames(samples, ranks.rank, ranks.world_size)
    with evaluation_lock(out, name, ranks):
        frontend = with_cache(load_frontend(config.model), config)
        check_geometry_files(samples, config.model.geometry.name, frontend.geometry, ranks.rank, ranks.world_size)
        check_sample_texts(
            samples, make_processor(frontend, config.data), ranks.rank, ranks.world_size, with_answer=False
        )
        model = (load or trained_model)(path, config)
        set_num_threads(ranks, model.base.config.get_text_config().hidden_size)
        partial = PartialAnswers(out / f"parts-{name}", run)
        answerer = Answerer(model, frontend, config.data, condition, whole, batch_size, max_new_tokens)
        answer_remaining(answerer, samples, partial, ranks)
        barrier()  # rank 0 merges after all ranks have written their answers
        if ranks.rank:
            return {}
        records = partial.merge([sample.id for sample in samples])
        write_records(predictions, records)
        scores = {
            "task": sets[0].task,
            "geometry": condition.name,
            "checkpoint": str(path),
            "data": described,
            "samples": len(records),
            "of": len(whole),
            "max_new_tokens": max_new_tokens,
            "sha256": file_sha256(predictions),
            "run": run,
            "notes": preparation_notes(whole, config.data.root),
            "protocols": score_records(records, protocol_names, boxes) if is_scored else {},
        }
        log_limits(scores, is_scored, predictions)
        atomic_io.replace(score_file, json.dumps(scores, indent=2) + "\n")
        # The saved answers are deleted last: if scoring fails, the same command finds all of them and only scores.
        partial.remove()
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


def check_generation_options(limit: int, batch_size: int, max_new_tokens: int) -> None:
    """Raise ValueError for a negative limit, or another number below 1."""
    minima = {"limit": (limit, 0), "batch_size": (batch_size, 1), "max_new_tokens": (max_new_tokens, 1)}
    for option, (value, minimum) in minima.items():
        if value < minimum:
            raise ValueError(f"--{option} is {value}; it must be at least {minimum}.")


def _select_samples(sets: list[PreparedSet], limit: int) -> tuple[Mixture, Selection]:
    """All samples of the sets, and the first `limit` of them (0 for all).

    Raises:
        ValueError: there are no samples, or two samples have the same id.
    """
    whole = all_samples(sets)
    if not whole:
        raise ValueError(f"{sets[0].folder} has no samples.")
    return whole, Selection(whole, range(min(limit or len(whole), len(whole))))


def _run_identity(
    path: Path,
    config: RunConfig,
    described: Sequence[Mapping[str, Any]],
    condition: Condition,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Hashes and options that an answer depends on; saved answers of a run with other values are not reused.

    The code of plug-ins is among them if they define a part of the model.

    Not among them: `limit`, because each answer depends on its own sample only, and `batch_size`, which changes the
    last bits of logits only.
    """
    code = plugin_code(config.model)
    return {
        "weights": trained_weights_sha256(path),
        "model": fingerprint(config.model),
        **({"code": code} if code else {}),
        "dtype": str(resolve_dtype(config.model.dtype)),
        "data": [prepared["manifest"] for prepared in described],
        "geometry": condition.name,
        "max_new_tokens": max_new_tokens,
        **{field: getattr(config.data, field) for field in ("frame_width", "frame_fit", "visual", "video_fps")},
        **condition.options,
    }


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
