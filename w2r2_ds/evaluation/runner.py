"""Evaluate a checkpoint or an exported adapter: predictions as JSONL, scores as JSON.

One process or several (``torchrun``, ``deepspeed``), killed and started again or not: the predictions are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from w2r2_ds.config.io import load_config as load_run_config
from w2r2_ds.config.io import relocated
from w2r2_ds.config.schema import DataConfig, RunConfig
from w2r2_ds.convert.peft_adapter import ADAPTER_CARD, adapter_config, load_adapter
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.data.processor import Features
from w2r2_ds.data.validate import check_frames, check_texts
from w2r2_ds.evaluation import generate
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.resumable import Parts, Selection, line_of, share, write_records
from w2r2_ds.evaluation.scoring import choose_protocols, read_boxes, score_records
from w2r2_ds.evaluation.shuffle import SEED, ShuffledGeometry, pair_scenes
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.models.build import VlmFrontend, build_model, fingerprint, load_frontend
from w2r2_ds.models.feature_identity import open_cache
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.manifest import TENSORS, find_checkpoint
from w2r2_ds.training.checkpoint.weights import load_trainable
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import RankInfo, barrier, raise_on_all_ranks
from w2r2_ds.utils.file_lock import locked
from w2r2_ds.utils.parallel import set_num_threads
from w2r2_ds.utils.progress import progress

GEOMETRY = (*generate.GEOMETRY, "shuffle")
"""`shuffle` is the fused pass with another scene's geometry (``shuffle.py``)."""


def load_model(
    path: Path, root: str | Path | None = None, vlm: str | None = None, geometry_path: str | None = None
) -> tuple[RunConfig, W2R2, VlmFrontend]:
    """Model and configuration of a run, a checkpoint or an exported adapter.

    Args:
        path: of one of them.
        root: where the data lie now; where they lay in training without it.
        vlm: present directory or hub id of the video LLM; None for that of training.
        geometry_path: present directory or hub id of the geometry encoder; None for that of training.

    Raises:
        ValueError: the checkpoint is missing, or it belongs to other models.
    """
    config = run_config(path, root, vlm, geometry_path)
    return config, trained_model(path, config), load_frontend(config.model)


def trained_model(path: Path, config: RunConfig) -> W2R2:
    """The model alone, of ``run_config``'s configuration; errors as ``load_model``'s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / ADAPTER_CARD).is_file():
        model = load_adapter(path, config, device)
    else:
        model = build_model(config.model, device, config.train.seed)
        load_trainable(find_checkpoint(path), model)
    return model.to(device).eval()


def run_config(
    path: Path, root: str | Path | None = None, vlm: str | None = None, geometry_path: str | None = None
) -> RunConfig:
    """The configuration alone; arguments and errors as ``load_model``'s."""
    if (path / ADAPTER_CARD).is_file():
        return relocated(adapter_config(path), root, vlm, geometry_path)
    return relocated(load_run_config(find_checkpoint(path) / "config.yaml"), root, vlm, geometry_path)


def evaluate(
    path: Path,
    out: Path,
    geometry: str = "fused",
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
) -> dict[str, Any]:
    """Answer a validation set greedily and score it.

    Args:
        path: run, checkpoint or exported adapter.
        out: folder for ``predictions-TASK-GEOMETRY.jsonl`` and ``scores-TASK-GEOMETRY.json``.
        geometry: one of ``GEOMETRY``.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
        limit: number of samples, 0 for all.
        task: which of the run's validation sets; not needed if all are of one task.
        data: a prepared folder instead of the run's own.
        protocols: how to score; the task's default without any (``score.choose_protocols``).
        proposals: file of detected boxes, for ``scanrefer/vgllm_refined``.
        root: where the data lie now; where they lay in training without it.
        vlm: present directory or hub id of the video LLM; None for that of training.
        geometry_path: present directory or hub id of the geometry encoder; None for that of training.
        ranks: this process among others, which have been joined; alone without it.

    Returns:
        The scores, as written; nothing on ranks but the first.
    """
    for option, value, least in (
        ("limit", limit, 0),
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"--{option} is {value}; it must be at least {least}.")
    if geometry not in GEOMETRY:
        raise ValueError(f"--geometry is {geometry!r}; it is one of {', '.join(GEOMETRY)}.")
    ranks = ranks or RankInfo()
    config = run_config(path, root, vlm, geometry_path)
    sets = find_sets(config.data, task, data)
    task = sets[0].task
    whole = all_samples(sets)
    samples = Selection(whole, range(min(limit or len(whole), len(whole))))
    if not samples:
        raise ValueError(f"{sets[0].folder} holds no samples.")
    # What is wrong with the scoring must not wait for the answers.
    boxes = read_boxes(proposals)
    names = choose_protocols(protocols, [record_of(samples[0], None)], boxes is not None)
    if geometry == "shuffle":
        pair_scenes([sample.scene_id for sample in whole if sample.frames])
    check_frames(samples, ranks.rank, ranks.world_size)
    with evaluation_lock(out, f"{task}-{geometry}", ranks):
        frontend = with_cache(load_frontend(config.model), config)
        check_texts(samples, make_processor(frontend, config.data), ranks.rank, ranks.world_size, False)

        model, described = trained_model(path, config), describe_sets(sets)
        set_num_threads(ranks, model.base.config.get_text_config().hidden_size)
        run = {
            "weights": _trained_weights(path),
            "model": fingerprint(model),
            "dtype": str(resolve_dtype(config.model.dtype)),
            "data": [each["manifest"] for each in described],
            "geometry": geometry,
            "max_new_tokens": max_new_tokens,
            **{field: getattr(config.data, field) for field in ("frame_width", "visual", "video_fps")},
            **({"shuffle_seed": SEED} if geometry == "shuffle" else {}),
        }
        parts = Parts(out / f"parts-{task}-{geometry}", run)
        answerer = Answerer(model, frontend, config.data, geometry, whole, batch_size, max_new_tokens)
        answer_share(answerer, samples, parts, ranks)
        barrier()
        if ranks.rank:
            return {}

        records = parts.merge([sample.id for sample in samples])
        write_records(out / f"predictions-{task}-{geometry}.jsonl", records)
        scores = {
            "task": task,
            "geometry": geometry,
            "checkpoint": str(path),
            "data": described,
            "samples": len(records),
            "of": len(whole),
            "max_new_tokens": max_new_tokens,
            "protocols": score_records(records, names, boxes),
        }
        (out / f"scores-{task}-{geometry}.json").write_text(json.dumps(scores, indent=2) + "\n")
        parts.remove()
    return scores


@dataclass(frozen=True)
class Answerer:
    """A model and how it is asked.

    Attributes:
        model, front: of ``load_model``.
        data: the run's data configuration.
        geometry: one of ``GEOMETRY``.
        whole: the whole data set, among whose scenes `shuffle` pairs.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
    """

    model: W2R2
    frontend: VlmFrontend
    data: DataConfig
    geometry: str
    whole: Sequence[Sample]
    batch_size: int
    max_new_tokens: int

    def records(self, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        """One record per sample, in order.

        Raises:
            ValueError: a sample cannot be read, or there is only one scene to shuffle.
        """
        processor: Callable[[Sample, bool], Features] = make_processor(self.frontend, self.data)
        if self.geometry == "shuffle":
            processor = ShuffledGeometry(make_processor(replace(self.frontend, cache=None), self.data), self.whole)
        loader = prompt_loader(samples, self.frontend, self.data, self.batch_size, processor)
        made = generate.generate_answers(
            self.model,
            loader,
            self.frontend.tokenizer,
            "zero" if self.geometry == "zero" else "fused",
            self.max_new_tokens,
            self.data.video_fps,
        )
        for sample, (identity, tokens, text) in zip(samples, made, strict=True):
            assert identity == sample.id, "answers come in the order of the samples"
            yield record_of(sample, text, tokens)


def with_cache(frontend: VlmFrontend, config: RunConfig) -> VlmFrontend:
    """The run's feature cache, where it lies on this machine; here none is begun."""
    return replace(
        frontend,
        cache=open_cache(config.data, config.model) if config.data.cache and Path(config.data.cache).is_dir() else None,
    )


@contextmanager
def evaluation_lock(out: Path, name: str, ranks: RankInfo) -> Iterator[None]:
    """Only one evaluation of this task and geometry at a time writes to `out`; others use other files.

    Args:
        out: folder of the results.
        name: task and geometry, which all file names contain.
        ranks: rank 0 holds the lock; all ranks raise if it cannot.

    Raises:
        ValueError: another process holds the lock.
    """
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if ranks.rank == 0:
                what = f"{out}: {name} is being evaluated"
                stack.enter_context(locked(out / f"{name}.lock", what, "give --out another folder"))
        yield


def answer_share(answerer: Answerer, samples: Sequence[Sample], parts: Parts, ranks: RankInfo) -> None:
    """Answer what is left of a rank's share into its part; what is finished survives the process."""
    left = share([sample.id for sample in samples], parts.read(), ranks.rank, ranks.world_size)
    label = f"answers ({answerer.geometry})" + (f", rank 0 of {ranks.world_size}" if ranks.world_size > 1 else "")
    quiet = ranks.rank > 0 or not left
    with parts.writer(ranks.rank) as file, progress(label, len(left), quiet, Console(stderr=True)) as advance:
        for record in answerer.records(Selection(samples, left)):
            file.write(line_of(record))
            file.flush()
            advance()


def _trained_weights(path: Path) -> str:
    """SHA-256 of what was trained."""
    files = sorted(path.glob("*.safetensors")) if (path / ADAPTER_CARD).is_file() else [find_checkpoint(path) / TENSORS]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
