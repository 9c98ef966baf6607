"""Validation during training: greedy answers of the fused pass to a fixed subset of data.val, scored per task.

The scores are named ``task/metric``. The metrics are those of each task's default protocol (``Protocol.metrics``,
``extra_metrics``), and ``parsed``. Scores of a subset differ from those of the whole set, above all CIDEr
(docs/reference/metrics/).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.validate import check_depth, check_frames, check_sample_texts
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.evaluation.protocols.registry import find_protocol, number_at
from w2r2_ds.evaluation.scoring import default_protocol, score_records
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.validation import draw_subset, rank_subset
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.files.hashing import json_sha256

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class AnswerValidation:
    """Generates and scores answers; the implementation of ``training.validation.Validation`` for ``w2r2 train``.

    Args:
        config: run configuration; data.val and train.{eval_samples, eval_max_new_tokens, best_by, micro_batch, seed}
            are used.
        frontend: tokenizer and vision specification of the VLM.
        device: device of the model.

    Raises:
        ValueError: there are no samples, a frame file or a text cannot be used, the samples have no metric
            ``train.best_by``, or a package that a score needs is not installed.
    """

    def __init__(self, config: RunConfig, frontend: VlmFrontend, device: torch.device) -> None:
        rank, world_size, wanted = dist.get_rank(), dist.get_world_size(), config.train.eval_samples
        available = load_mixture(config.data, "val")
        if not len(available):
            raise ValueError("data.val has no samples; prepare a validation set, or set train.eval_every to 0.")
        # The same samples on every rank and in every launch of the run, so that scores of steps are comparable.
        self.samples = [available[index] for index in draw_subset(len(available), wanted, config.train.seed)]
        if hidden := [sample.id for sample in self.samples if not sample.is_annotated]:
            raise ValueError(
                f"data.val: {len(hidden)} of {len(self.samples)} samples have no annotated answers (a test split), the "
                f"first is {hidden[0]!r}; validate on another split, or set train.eval_every to 0."
            )
        check_frames(self.samples, rank, world_size)
        check_depth(self.samples, config.model.geometry.name, frontend.geometry, rank, world_size)
        check_sample_texts(self.samples, make_processor(frontend, config.data), rank, world_size, with_answer=False)
        self.max_new_tokens, self.tokenizer, self.device = config.train.eval_max_new_tokens, frontend.tokenizer, device
        self.about = f"{len(self.samples)} samples {samples_sha256(self.samples)}, {self.max_new_tokens} tokens"
        first = available[0]
        default = f"{first.task}/{default_protocol(record_of(first, None)).best_by}"
        self.best_by = config.train.best_by or default
        if rank == 0:
            self.check_scores()
            fewer = f" (data.val has fewer than train.eval_samples {wanted})" if len(available) < wanted else ""
            for note in preparation_notes(available, config.data.root):
                logger.warning("validation: %s", note)
            logger.info("validation: %d samples%s, best by %s", len(self.samples), fewer, self.best_by)
        self.subset = rank_subset(len(self.samples), config.train.micro_batch, rank, world_size)
        own = [self.samples[index] for index in self.subset.indices]
        self.loader = prompt_loader(own, frontend, config.data, config.train.micro_batch)

    @torch.no_grad()
    def measure(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """Scores of the current model, ``task/metric`` -> value, the same on every rank. Collective."""
        engine.eval()
        answers = [
            ids
            for batch in self.loader
            for ids in engine(batch.to(self.device), mode="generate", max_new_tokens=self.max_new_tokens)
        ]
        engine.train()
        # Under ZeRO-3 every forward is collective, so all ranks run the same number of batches: `rank_subset` repeats
        # samples to fill the last batches, and `once` is False for the answers to repeated ones.
        own = {
            index: record_of(self.samples[index], self.tokenizer.decode(ids, skip_special_tokens=True), ids)
            for index, once, ids in zip(self.subset.indices, self.subset.once, answers, strict=True)
            if once
        }
        gathered: list[dict[int, AnswerRecord]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        records = {index: record for part in gathered for index, record in part.items()}
        assert len(records) == len(self.samples), "every sample is answered once"
        scores: list[dict[str, float]] = [{}]
        # Only rank 0 scores: METEOR and the PTB tokenizer start Java processes of 1 GB each.
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                # In the order of the subset: sums do not depend on the number of ranks.
                scores = [computed(score([records[index] for index in sorted(records)]))]
        dist.broadcast_object_list(scores)
        return scores[0]

    def check_scores(self) -> None:
        """Score the labels in place of answers, so that a missing package is an error before the first step.

        Raises:
            ValueError: a package is not installed, or `best_by` is not among the scores or cannot be computed.
        """
        # Labels have all metrics that answers have: whether a score can be computed depends on data and packages only.
        scores = score([record_of(sample, sample.answer) for sample in self.samples])
        if scores.get(self.best_by) is not None:
            return
        known = ", ".join(computed(scores))
        if self.best_by in scores:
            raise ValueError(
                f"train.best_by {self.best_by} cannot be computed here; install Java (METEOR and the PTB tokenizer are "
                f"Java programs), or name one of {known}."
            )
        raise ValueError(
            f"train.best_by {self.best_by} is not among the scores of these {len(self.samples)} validation samples; "
            f"name one of {known}, or raise train.eval_samples if a task is missing."
        )


def samples_sha256(samples: Sequence[Sample]) -> str:
    """SHA-256 (12 hex digits) of ids, questions and frame names; scores of other samples are not compared."""
    content = [[sample.task, sample.id, sample.question, *(path.name for path in sample.frames)] for sample in samples]
    return json_sha256(content)[:12]


def score(records: Sequence[AnswerRecord]) -> dict[str, float | None]:
    """Scores of records of one or several tasks, each by its default protocol.

    Returns:
        ``task/metric`` -> value, None if it could not be computed. The metrics are ``metrics`` and ``extra_metrics`` of
        the protocol, and ``parsed``.
    """
    scores: dict[str, float | None] = {}
    for task in dict.fromkeys(record["task"] for record in records):
        for name, result in score_records([record for record in records if record["task"] == task]).items():
            protocol = find_protocol(name)
            extra = {metric: number_at(result, path) for metric, path in protocol.extra_metrics.items()}
            values = {**protocol.printed(result), "parsed": result["parsed"], **extra}
            scores |= {f"{task}/{metric}": value for metric, value in values.items()}
    return scores


def computed(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The scores that are not None."""
    return {name: value for name, value in scores.items() if value is not None}
