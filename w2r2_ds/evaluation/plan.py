"""Prepare an evaluation without its model: samples, protocols, the identity of the answers, and all checks.

Errors in options, data and texts are raised here, before the model is loaded and before hours of generation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.loader import make_processor
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.validate import check_frames, check_geometry_files, check_sample_texts
from w2r2_ds.evaluation.conditions import Condition
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.loading import run_config, trained_weights_sha256, with_cache
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import Proposals
from w2r2_ds.evaluation.resumable import Selection, is_finished
from w2r2_ds.evaluation.scoring import are_annotated, check_scorable, choose_protocols, read_boxes
from w2r2_ds.evaluation.shuffle import pair_scenes
from w2r2_ds.kernels.select import describe_attention, resolve_dtype
from w2r2_ds.models.build import VlmFrontend, fingerprint, load_frontend, plugin_code
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.files.output_folder import check_writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation whose options and data are checked.

    Attributes:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder of the results.
        options: options of the evaluation.
        config: configuration of the run.
        condition: inputs of the model.
        task: task of the samples.
        data: ``path`` of each data set and SHA-256 of its ``manifest``.
        whole: all samples of the data.
        samples: the first ones of them, which are answered.
        protocols: names of the scoring protocols; None if the samples have no annotated answers (a test split).
        boxes: detected boxes; None without a file of them.
        run: hashes and options that an answer depends on.
        frontend: tokenizer and vision specification of the VLM; None if the answers of a finished evaluation are
            reused.
    """

    path: Path
    out: Path
    options: EvaluationOptions
    config: RunConfig
    condition: Condition
    task: str
    data: Sequence[Mapping[str, Any]]
    whole: Mixture
    samples: Selection
    protocols: Sequence[str] | None
    boxes: Proposals | None
    run: Mapping[str, Any]
    frontend: VlmFrontend | None

    @property
    def name(self) -> str:
        """Part of the names of all files."""
        return f"{self.task}-{self.condition.name}"

    @property
    def predictions(self) -> Path:
        """File of the answers."""
        return self.out / f"predictions-{self.name}.jsonl"

    @property
    def score_file(self) -> Path:
        """File of the scores."""
        return self.out / f"scores-{self.name}.json"


def plan_evaluation(path: Path, out: Path, options: EvaluationOptions, ranks: RankInfo | None = None) -> EvaluationPlan:
    """Find the samples and check everything that can be checked without the model.

    Args:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder of the results.
        options: options of the evaluation.
        ranks: rank and number of the processes; each checks a part of the samples. None for a single process.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used.
    """
    condition = options.condition
    check_writable(out)
    config = run_config(path, options.root, options.vlm, options.geometry_path)
    logger.info("%s", describe_attention(config.model.attention, resolve_dtype(config.model.dtype)))
    sets = find_sets(config.data, options.task, options.data)
    whole, samples = _select_samples(sets, options.limit)
    boxes = read_boxes(options.proposals)
    protocols = _protocols(options, samples, boxes)
    if condition.name == "shuffle":  # raises ValueError for a single room; the pairs themselves are made by Answerer
        pair_scenes([sample.scene_id for sample in whole if sample.frames])
    data = describe_sets(sets)
    run = _run_identity(path, config, data, condition, options.max_new_tokens)
    plan = EvaluationPlan(
        path, out, options, config, condition, sets[0].task, data, whole, samples, protocols, boxes, run, frontend=None
    )
    if options.reuse and is_finished(plan.score_file, plan.predictions, run, len(samples)):
        return plan
    return replace(plan, frontend=_checked_frontend(config, samples, ranks or RankInfo()))


def _select_samples(sets: list[PreparedSet], limit: int) -> tuple[Mixture, Selection]:
    """All samples of the sets, and the first `limit` of them (0 for all).

    Raises:
        ValueError: there are no samples, or two samples have the same id.
    """
    whole = all_samples(sets)
    if not whole:
        raise ValueError(f"{sets[0].folder} has no samples.")
    return whole, Selection(whole, range(min(limit or len(whole), len(whole))))


def _protocols(options: EvaluationOptions, samples: Selection, boxes: Proposals | None) -> list[str] | None:
    """Names of the protocols that score the samples; None if the samples have no annotated answers."""
    # A record without an answer has all fields that decide which protocols can score it.
    records = [record_of(sample, None) for sample in samples]
    is_scored = are_annotated(records)
    names = choose_protocols(options.protocols, records, boxes is not None) if is_scored else []
    check_scorable(records, names, boxes)
    return names if is_scored else None


def _run_identity(
    path: Path,
    config: RunConfig,
    data: Sequence[Mapping[str, Any]],
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
        "data": [prepared["manifest"] for prepared in data],
        "geometry": condition.name,
        "max_new_tokens": max_new_tokens,
        **{field: getattr(config.data, field) for field in ("frame_width", "frame_fit", "visual", "video_fps")},
        **condition.options,
    }


def _checked_frontend(config: RunConfig, samples: Selection, ranks: RankInfo) -> VlmFrontend:
    """The VLM's frontend, with which frames, geometry files and texts of the samples are checked."""
    check_frames(samples, ranks.rank, ranks.world_size)
    frontend = with_cache(load_frontend(config.model), config)
    check_geometry_files(samples, config.model.geometry.name, frontend.geometry, ranks.rank, ranks.world_size)
    processor = make_processor(frontend, config.data)
    check_sample_texts(samples, processor, ranks.rank, ranks.world_size, with_answer=False)
    return frontend
