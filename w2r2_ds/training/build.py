"""Build a run: check configuration and data, load the model, load the checkpoint of a resumed run, make the loader.

All errors that the user can correct are raised here, before the first step, most of them before weights are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

from w2r2_ds.config.io import save_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.answer_tokens import require_digit_tokens
from w2r2_ds.data.batching.scene_pairs import check_two_rooms
from w2r2_ds.data.dataset import check_frames_are_shared, digests, load_mixture
from w2r2_ds.data.frames.geometry_augmentation import check_augmentation, make_augmentation
from w2r2_ds.data.frames.typical_box import TypicalBox, typical_box
from w2r2_ds.data.loader import choose_grouping, make_processor, train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.reraising_loader import ReraisingDataLoader
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.validate import check_frames, check_geometry_files, check_sample_texts, describe_frames
from w2r2_ds.kernels.select import check_attention, check_kernels, describe_attention, resolve_dtype
from w2r2_ds.models.build import VlmFrontend, build_model, load_frontend
from w2r2_ds.models.family import require_row_attention
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.lora import trainable_table
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.push_terms import check_push_term
from w2r2_ds.training.cache_stats import describe_cache
from w2r2_ds.training.checkpoint.compat import check_resumable
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.checkpoint.resume import StartPoint, find_start, resume, take_over
from w2r2_ds.training.decode_gap import DecodeGap
from w2r2_ds.training.deepspeed.config import load_ds_config, resolve_ds_config
from w2r2_ds.training.deepspeed.engine import make_engine
from w2r2_ds.training.deepspeed.hpz import common_ranks_per_machine
from w2r2_ds.training.fault_tolerance.activity import Activity
from w2r2_ds.training.optimizer import trained_groups
from w2r2_ds.training.throughput import Throughput, matrix_rate
from w2r2_ds.training.trackers import check_trackers
from w2r2_ds.training.validation import BestSoFar, MakeValidation, Validation
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import raise_on_all_ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """State of a run, for the training loop.

    Attributes:
        config: run configuration.
        engine: DeepSpeed engine around `W2R2Step`.
        loader: micro-batches of this rank, from step `start_step` on.
        device: device of this rank.
        gradient_accumulation_steps: micro-batches per optimizer step.
        start_step: optimizer steps completed before this launch.
        groups: trained parameters by optimizer group.
        decode_gap: measures the decode gap; None if `objective.decode_gap_every` is 0.
        validator: runs the validation and keeps track of the best step; None if `train.eval_every` is 0.
        drawn: draws validation samples; None if `train.samples_every` is 0.
        data_digests: digests of the training sets, for the checkpoint.
        token: ownership of the run, which allows this launch to write checkpoints.
        checkpoint: checkpoint that the run resumed from; None for a fresh run.
        throughput: counts samples, tokens and FLOPs.
        activity: progress of the main thread, for the watchdog.
    """

    config: RunConfig
    engine: DeepSpeedEngine
    loader: ReraisingDataLoader[Batch]
    device: torch.device
    gradient_accumulation_steps: int
    start_step: int
    groups: dict[str, list[torch.nn.Parameter]]
    decode_gap: DecodeGap | None
    validator: BestSoFar | None
    drawn: Validation | None
    data_digests: list[str]
    token: OwnershipToken
    checkpoint: Path | None
    throughput: Throughput
    activity: Activity = field(default_factory=Activity)


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a run, before weights are loaded.

    Attributes:
        dtype: dtype of weights and activations.
        ds_config: the resolved DeepSpeed configuration.
        frontend: tokenizer, vision sizes and feature cache.
        samples: training mixture.
        device: device of this rank.
        validation: answers, scores and draws validation samples; None if `train.eval_every` and `train.samples_every`
            are 0.
        typical: typical depth and size of the targets; None unless `objective.shortcut_decode` is anchor.
    """

    dtype: torch.dtype
    ds_config: dict[str, Any]
    frontend: VlmFrontend
    samples: Mixture
    device: torch.device
    validation: Validation | None
    typical: TypicalBox | None = None


def build_run(config: RunConfig, ds_path: str, make_validation: MakeValidation) -> Run:
    """Build the model, engine and loader of a run, fresh or resumed. Collective.

    Args:
        config: run configuration.
        ds_path: path of the DeepSpeed JSON.
        make_validation: builds the validation, if `train.eval_every` or `train.samples_every` is not 0.

    Raises:
        ValueError: data, weights, configuration, DeepSpeed JSON or checkpoint do not fit; on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Collectives stay outside `raise_on_all_ranks`: a rank that failed in its block would not take part in them.
    start_point, local_size = find_start(config), common_ranks_per_machine(world_size)
    with raise_on_all_ranks():  # a file may be missing on one machine only
        inputs = check_inputs(config, ds_path, start_point, local_size, make_validation)
    rate = matrix_rate(inputs.device, inputs.dtype)  # before the model fills the device
    logger.info("peak matrix rate %.3g TFLOP/s (%s); mfu is relative to it", rate / 1e12, inputs.dtype)
    # ZeRO-3 trap: transformers finds this object by a weak reference, and partitions weights while it loads them only
    # as long as the object is alive. Without it every rank would hold the whole model.
    zero3 = inputs.ds_config.get("zero_optimization", {}).get("stage") == 3
    keep_alive = HfDeepSpeedConfig(inputs.ds_config) if zero3 else None
    model = load_model(config, inputs, start_point)
    engine = make_engine(model, inputs.frontend, config, inputs.ds_config, inputs.device, ds_path=ds_path)
    del keep_alive
    # The model is built with the same seed on all ranks. From here on ranks draw different dropout masks.
    torch.manual_seed(config.train.seed + rank)
    data_digests = digests(inputs.samples)
    start_step = resume(engine, start_point, config) if start_point.checkpoint else 0
    # Not earlier: if `resume` raises, the run must stay with its previous owner.
    token = take_over(config, start_point)
    if rank == 0:
        save_config(config, Path(config.out) / "config.yaml")
    return Run(
        config=config,
        engine=engine,
        loader=make_loader(config, inputs, start_step),
        device=inputs.device,
        gradient_accumulation_steps=engine.gradient_accumulation_steps(),
        start_step=start_step,
        groups=trained_groups(model),
        decode_gap=make_decode_gap(config, inputs),
        validator=make_validator(config, inputs, start_point),
        drawn=inputs.validation if config.train.samples_every else None,
        data_digests=data_digests,
        token=token,
        checkpoint=start_point.checkpoint,
        throughput=Throughput(model, engine.module.push_term, rate),
    )


def check_inputs(
    config: RunConfig, ds_path: str, start_point: StartPoint, local_size: int, make_validation: MakeValidation
) -> Inputs:
    """Read and check all inputs except the weights. No collectives, so that an error of one rank can be raised on all.

    Args:
        config: run configuration.
        ds_path: path of the DeepSpeed JSON.
        start_point: checkpoint that the run starts from.
        local_size: ranks per machine, from `common_ranks_per_machine`.
        make_validation: builds the validation, if `train.eval_every` or `train.samples_every` is not 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check_trackers(config.train.trackers)
    dtype = resolve_dtype(config.model.dtype)
    check_kernels(config.model.kernels)
    check_attention(config.model.attention, dtype)
    ds_config = resolve_ds_config(
        load_ds_config(ds_path),
        path=ds_path,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        world_size=world_size,
        bf16=dtype == torch.bfloat16,
        local_size=local_size,
    )
    if start_point.needs_conversion:  # another number of ranks: DeepSpeed loads its universal format
        ds_config.setdefault("checkpoint", {})["load_universal"] = True
    frontend = load_frontend(config.model)
    frontend = replace(frontend, cache=open_cache(config.data, config.model))
    samples = load_mixture(config.data, "train")
    check_objective(config, frontend, samples)
    if start_point.checkpoint is not None:
        zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        check_resumable(start_point.checkpoint, config, zero_stage, digests(samples))
    check_frames_are_shared(samples, config.data.questions_per_scene)
    processor = make_processor(frontend, config.data)
    logger.info("%s", describe_attention(config.model.attention, dtype))
    logger.info("training samples: %d, %d in an epoch", len(samples), samples.epoch_size)
    # Each rank checks a part of the samples; an error of one rank is raised on all (`raise_on_all_ranks`).
    check_frames(samples, rank, world_size)
    check_geometry_files(samples, config.model.geometry.name, frontend.geometry, rank, world_size)
    check_augmentation(config.data.geometry_augmentation, frontend.geometry, samples)
    check_sample_texts(samples, processor, rank, world_size, augmentation=config.data.geometry_augmentation)
    if rank == 0:
        logger.info("%s", describe_frames(samples, processor))
        for note in preparation_notes(samples, config.data.root):
            logger.warning("training: %s", note)
        if frontend.cache is not None:
            logger.info("%s", describe_cache(frontend.cache.store))
    device = torch.device(get_accelerator().current_device_name())
    validated = config.train.eval_every or config.train.samples_every
    validation = make_validation(config, frontend, device) if validated else None
    typical = typical_box(samples) if config.objective.shortcut_decode == "anchor" else None
    if typical is not None and rank == 0:
        logger.info("%s", typical.describe())
    return Inputs(dtype, ds_config, frontend, samples, device, validation, typical)


def check_objective(config: RunConfig, frontend: VlmFrontend, samples: Iterable[Sample]) -> None:
    """Raise ValueError if the push term is unknown, or an option needs digit tokens, attention weights or scenes.

    Digit tokens depend on the tokenizer, attention weights on the VLM's family, scenes on the training samples.
    """
    term, name = check_push_term(config), f"objective.push_term {config.objective.push_term['name']}"
    if term.needs_boxes:
        require_digit_tokens(frontend.tokenizer, name)
    if term.needs_other_geometry:
        check_two_rooms(samples, name)
    if config.objective.shortcut_decode == "anchor":
        require_row_attention(frontend.family)
    if config.objective.shortcut_decode == "teacher":
        require_digit_tokens(frontend.tokenizer, "objective.shortcut_decode teacher")
    if config.objective.decode_gap_every:
        require_digit_tokens(frontend.tokenizer, "objective.decode_gap_every")


def load_model(config: RunConfig, inputs: Inputs, start_point: StartPoint) -> W2R2:
    """Load the frozen models, add LoRA, merger and fusion, and log the trained parameters."""
    model = build_model(config.model, inputs.device, config.train.seed, start_point.kernels)
    if choose_grouping(config.data) is not None:
        model.family.use_packed_attention(model.base)
    logger.info("%s", trainable_table({"vlm": model.vlm} | model.geometry_modules()))
    return model


def make_loader(config: RunConfig, inputs: Inputs, start: int) -> ReraisingDataLoader[Batch]:
    """Data loader of this rank's micro-batches, from step `start` on."""
    sampler = GlobalBatchSampler(
        mixture=inputs.samples,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        steps=config.train.steps,
        start=start,
        seed=config.train.seed,
        questions_per_scene=config.data.questions_per_scene,
    )
    decode = config.objective.shortcut_decode == "greedy"
    geometry = inputs.frontend.geometry
    augmentation = make_augmentation(config.data.geometry_augmentation, geometry, config.train.seed)
    return train_loader(inputs.samples, inputs.frontend, config.data, sampler, decode, inputs.typical, augmentation)


def make_validator(config: RunConfig, inputs: Inputs, start_point: StartPoint) -> BestSoFar | None:
    """The validation with the best step so far; None if `train.eval_every` is 0."""
    if inputs.validation is None or not config.train.eval_every:
        return None
    return BestSoFar(inputs.validation, start_point.checkpoint)


def make_decode_gap(config: RunConfig, inputs: Inputs) -> DecodeGap | None:
    """The measurement of the decode gap; None if `objective.decode_gap_every` is 0."""
    if not config.objective.decode_gap_every:
        return None
    return DecodeGap(inputs.samples, inputs.frontend, config, inputs.device)
