"""Validation while training: fused greedy answers of a fixed part of data.val, scored by each task's default protocol.

Names are ``task/metric``: those that papers print (``score.headline``), and ``parsed``; for ScanRefer's answers in a
frame's camera also ``mean_iou``. Scores of a subset differ from those of the whole set, most of all CIDEr
(docs/reference/metrics/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.loader import load_mixture, make_processor, prompt_loader
from w2r2_ds.data.validate import check_frames, check_texts
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.registry import find_protocol, number_at
from w2r2_ds.evaluation.scoring import default_protocol, score_records
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.training.validation import draw_subset, rank_subset
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import raise_on_all_ranks

Record = dict[str, Any]


class InTraining:
    """The `engine.validation.Validation` of launchers/train.py.

    Args:
        config: of the run: data.val, train.eval_samples, eval_max_new_tokens, best_by, micro_batch, seed.
        frontend: tokenizer and vision facts.
        device: of the model.

    Raises:
        ValueError: no samples, a frame file or a text that cannot be used, a best_by that these samples do not give, or
            a package that a score needs is not installed.
    """

    def __init__(self, config: RunConfig, frontend: VlmFrontend, device: torch.device) -> None:
        rank, world, wanted = dist.get_rank(), dist.get_world_size(), config.train.eval_samples
        available = load_mixture(config.data, "val")
        if not len(available):
            raise ValueError("data.val holds no samples; prepare a validation set, or give train.eval_every 0.")
        self.samples = [available[index] for index in draw_subset(len(available), wanted, config.train.seed)]
        check_frames(self.samples, rank, world)
        check_texts(self.samples, make_processor(frontend, config.data), rank, world, with_answer=False)
        self.most, self.tokenizer, self.device = config.train.eval_max_new_tokens, frontend.tokenizer, device
        self.about = f"{len(self.samples)} samples {digest(self.samples)}, {self.most} tokens"
        first = available[0]
        best_by = config.train.best_by or f"{first.task}/{default_protocol(record_of(first, None)).best_by}"
        self.best_by = best_by
        if rank == 0:
            self.rehearse()
            fewer = f" (data.val holds fewer than train.eval_samples {wanted})" if len(available) < wanted else ""
            print(f"validation: {len(self.samples)} samples{fewer}, best by {self.best_by}", flush=True)
        self.subset = rank_subset(len(self.samples), config.train.micro_batch, rank, world)
        mine = [self.samples[index] for index in self.subset.indices]
        self.loader = prompt_loader(mine, frontend, config.data, config.train.micro_batch)

    @torch.no_grad()
    def measure(self, engine: Any) -> dict[str, float]:
        """Scores of the model as it is, the same on every rank; every rank calls it."""
        engine.eval()
        answers = [
            ids
            for batch in self.loader
            for ids in engine(batch.to(self.device), mode="generate", max_new_tokens=self.most)
        ]
        engine.train()
        mine = {
            index: record_of(self.samples[index], self.tokenizer.decode(ids, skip_special_tokens=True), ids)
            for index, once, ids in zip(self.subset.indices, self.subset.once, answers, strict=True)
            if once
        }
        everyone: list[dict[int, Record]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        records = {index: record for rank in everyone for index, record in rank.items()}
        assert len(records) == len(self.samples), "every sample is answered once"
        found: list[dict[str, float]] = [{}]
        with (
            raise_on_all_ranks()
        ):  # METEOR and the PTB tokenizer are processes of Java: once per run, not once per rank
            if dist.get_rank() == 0:
                found = [computed(score([records[index] for index in sorted(records)]))]
        dist.broadcast_object_list(found)
        return found[0]

    def rehearse(self) -> None:
        """Score the labels, so that what is missing is found before the first step.

        Raises:
            ValueError: a package is not installed, or `best_by` is not among the scores.
        """
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
            f"train.best_by {self.best_by} is none of the scores of these {len(self.samples)} validation samples; name "
            f"one of {known}, or raise train.eval_samples where a task is missing."
        )


def digest(samples: Sequence[Sample]) -> str:
    """Short hash of what is asked: values of other questions or frames are not compared."""
    asked = [[each.task, each.id, each.question, *(path.name for path in each.frames)] for each in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def score(records: Sequence[Record]) -> dict[str, float | None]:
    """``task/metric`` -> value of records of any tasks; None if it could not be computed.

    The metrics are those of each task's default protocol (``metrics`` and ``extra_metrics``), and ``parsed``.
    """
    found: dict[str, float | None] = {}
    for task in dict.fromkeys(record["task"] for record in records):
        for name, result in score_records([record for record in records if record["task"] == task]).items():
            protocol = find_protocol(name)
            extra = {metric: number_at(result, path) for metric, path in protocol.extra_metrics.items()}
            numbers = {**protocol.printed(result), "parsed": result["parsed"], **extra}
            found |= {f"{task}/{metric}": value for metric, value in numbers.items()}
    return found


def computed(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers."""
    return {name: value for name, value in scores.items() if value is not None}
