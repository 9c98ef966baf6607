"""Validation during training: greedy answers of the fused pass to a fixed subset of data.val, scored or drawn.

The scores are named ``task/metric``. The metrics are those of each task's default protocol (``Protocol.metrics``,
``extra_metrics``), and ``parsed``. Scores of a subset differ from those of the whole set, above all CIDEr
(docs/reference/metrics/).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from PIL import Image

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.reraising_loader import ReraisingDataLoader
from w2r2_ds.data.validate import check_frames, check_geometry_files, check_sample_texts
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.evaluation.protocols.registry import find_protocol, number_at
from w2r2_ds.evaluation.sample_pictures import draw_samples, drawable_samples
from w2r2_ds.evaluation.scoring import default_protocol, score_records
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.validation import draw_subset, rank_subset
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.files.hashing import json_sha256

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class AnswerValidation:
    """Generates and scores answers; the implementation of ``training.validation.Validation`` for ``w2r2 train``.

    Args:
        config: run configuration; data.val and train.{eval_every, eval_samples, eval_max_new_tokens, samples_every,
            best_by, micro_batch, seed} are used.
        frontend: tokenizer and vision specification of the VLM.
        device: device of the model.

    Raises:
        ValueError: there are no samples, a frame file or a text cannot be used, the samples have no metric
            ``train.best_by``, a package that a score needs is not installed, or no sample has boxes to draw.
    """

    def __init__(self, config: RunConfig, frontend: VlmFrontend, device: torch.device) -> None:
        rank, world_size, wanted = dist.get_rank(), dist.get_world_size(), config.train.eval_samples
        available = load_mixture(config.data, "val")
        if not len(available):
            raise ValueError(
                "data.val has no samples; prepare a validation set, or set train.eval_every and train.samples_every "
                "to 0."
            )
        # The same samples on every rank and in every launch of the run, so that scores of steps are comparable.
        self.samples = [available[index] for index in draw_subset(len(available), wanted, config.train.seed)]
        if hidden := [sample.id for sample in self.samples if not sample.is_annotated]:
            raise ValueError(
                f"data.val: {len(hidden)} of {len(self.samples)} samples have no annotated answers (a test split), the "
                f"first is {hidden[0]!r}; validate on another split, or set train.eval_every and train.samples_every "
                "to 0."
            )
        check_frames(self.samples, rank, world_size)
        check_geometry_files(self.samples, config.model.geometry.name, frontend.geometry, rank, world_size)
        check_sample_texts(self.samples, make_processor(frontend, config.data), rank, world_size, with_answer=False)
        self.max_new_tokens, self.tokenizer, self.device = config.train.eval_max_new_tokens, frontend.tokenizer, device
        self.about = f"{len(self.samples)} samples {samples_sha256(self.samples)}, {self.max_new_tokens} tokens"
        first = available[0]
        default = f"{first.task}/{default_protocol(record_of(first, None)).best_by}"
        self.best_by = config.train.best_by or default
        if rank == 0 and config.train.eval_every:
            self.check_scores()
            fewer = f" (data.val has fewer than train.eval_samples {wanted})" if len(available) < wanted else ""
            for note in preparation_notes(available, config.data.root):
                logger.warning("validation: %s", note)
            logger.info("validation: %d samples%s, best by %s", len(self.samples), fewer, self.best_by)
        self.prompts = prompts_of(range(len(self.samples)), self.samples, frontend, config)
        self.records: dict[int, AnswerRecord] = {}
        self.drawn = drawable_samples(self.samples) if config.train.samples_every else []
        self.drawn_prompts = prompts_of(self.drawn, self.samples, frontend, config) if self.drawn else None

    def measure(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """Scores of the current model, ``task/metric`` -> value, the same on every rank. Collective."""
        self.records = records = self._answer(engine, self.prompts)
        assert len(records) == len(self.samples), "every sample is answered once"
        scores: list[dict[str, float]] = [{}]
        # Only rank 0 scores: METEOR and the PTB tokenizer start Java processes of 1 GB each.
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                # In the order of the subset: sums do not depend on the number of ranks.
                scores = [computed(score([records[index] for index in sorted(records)]))]
        dist.broadcast_object_list(scores)
        return scores[0]

    def draw(self, engine: DeepSpeedEngine, title: str, answered: bool) -> Image.Image | None:
        """Picture of a few samples with true and predicted boxes, on rank 0; None on the others. Collective.

        Args:
            engine: the engine.
            title: first line of the picture.
            answered: `measure` was called with the same weights, and its answers are drawn.

        Raises:
            ValueError: a frame cannot be read; on rank 0 only.
        """
        assert self.drawn_prompts is not None, "train.samples_every is not 0"
        records = self.records if answered else self._answer(engine, self.drawn_prompts)
        if dist.get_rank() != 0:
            return None
        samples = [self.samples[index] for index in self.drawn]
        return draw_samples(samples, [records[index] for index in self.drawn], title)

    @torch.no_grad()
    def _answer(self, engine: DeepSpeedEngine, prompts: Prompts) -> dict[int, AnswerRecord]:
        """Index of a sample -> its answer, the same on every rank. Collective."""
        engine.eval()
        answers = [
            ids
            for batch in prompts.loader
            for ids in engine(batch.to(self.device), mode="generate", max_new_tokens=self.max_new_tokens)
        ]
        engine.train()
        own = {
            index: record_of(self.samples[index], self.tokenizer.decode(ids, skip_special_tokens=True), ids)
            for index, once, ids in zip(prompts.indices, prompts.once, answers, strict=True)
            if once
        }
        gathered: list[dict[int, AnswerRecord]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        return {index: record for part in gathered for index, record in part.items()}

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


@dataclass(frozen=True)
class Prompts:
    """Prompts of one rank. Under ZeRO-3 every forward is collective, so all ranks have the same number of batches.

    Attributes:
        indices: indices of the samples; some are repeated to fill the last batches.
        once: for every index, False if it is a repetition, whose answer is dropped.
        loader: batches of the prompts.
    """

    indices: list[int]
    once: list[bool]
    loader: ReraisingDataLoader[Batch]


def prompts_of(chosen: Sequence[int], samples: Sequence[Sample], frontend: VlmFrontend, config: RunConfig) -> Prompts:
    """This rank's prompts of the chosen samples (indices of `samples`)."""
    batch = config.train.micro_batch
    subset = rank_subset(len(chosen), batch, dist.get_rank(), dist.get_world_size())
    indices = [chosen[index] for index in subset.indices]
    return Prompts(indices, subset.once, prompt_loader([samples[i] for i in indices], frontend, config.data, batch))


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
