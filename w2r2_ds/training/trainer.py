"""The training loop, readable top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

from w2r2_ds.config.io import save_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.answer_tokens import require_digit_slots
from w2r2_ds.data.loader import (
    checked,
    digests,
    grouping,
    load_mixture,
    make_processor,
    refuse_drawn_frames,
    train_loader,
)
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.validate import check_frames, check_texts, describe_frames
from w2r2_ds.features.lookup import flush
from w2r2_ds.kernels.select import describe, resolve_dtype
from w2r2_ds.models.build import VlmFrontend, build_model, load_frontend
from w2r2_ds.models.feature_identity import open_cache
from w2r2_ds.models.lora import trainable_table
from w2r2_ds.models.qwen2_5_vl.packed_attention import use_scene_split
from w2r2_ds.models.vggt.loading import locate, read_config
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.training.cache_stats import cache_use, describe_cache
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.checkpoint.resume import find_start, resume, take_over
from w2r2_ds.training.checkpoint.save import Content, save_checkpoint
from w2r2_ds.training.decode_gap import DecodeGap
from w2r2_ds.training.deepspeed.config import load_ds_config, resolve_ds_config
from w2r2_ds.training.deepspeed.engine import make_engine, trained_groups
from w2r2_ds.training.deepspeed.hpz import common_ranks_per_machine
from w2r2_ds.training.deepspeed.launch import collective_timeout
from w2r2_ds.training.fault_tolerance.activity import Activity
from w2r2_ds.training.fault_tolerance.exit_codes import DONE
from w2r2_ds.training.fault_tolerance.hang_detector import Limits
from w2r2_ds.training.fault_tolerance.signals import StopSignals
from w2r2_ds.training.fault_tolerance.watchdog import Watchdog
from w2r2_ds.training.hinge_monitor import HingeMonitor
from w2r2_ds.training.metrics import MetricsLogger
from w2r2_ds.training.reduce import global_weight, group_norms, reduce_stats
from w2r2_ds.training.throughput import Throughput, matrix_rate
from w2r2_ds.training.validation import BestSoFar, MakeValidation
from w2r2_ds.types.batch import Batch
from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.rng import rng_state, set_rng_state


@dataclass
class Run:
    """What the loop needs, set up once."""

    config: RunConfig
    engine: Any
    loader: Any
    device: torch.device
    accumulation: int
    start: int
    groups: dict[str, list[torch.nn.Parameter]]
    gap: DecodeGap | None
    best: BestSoFar | None
    data: list[str]
    fence: OwnershipToken
    checkpoint: Path | None
    speed: Throughput
    activity: Activity = field(default_factory=Activity)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        code: of training/fault_tolerance/exit_codes.py: `DONE`, or what a signal asked for.
        checkpoint: the newest one of the run, None if there is none.
    """

    code: int
    checkpoint: Path | None


def train(
    config: RunConfig, ds_path: str, make_validation: MakeValidation, signals: StopSignals | None = None
) -> TrainResult:
    """Train a configuration under a DeepSpeed JSON, to the end or until `signals` ask to stop.

    Every rank calls it, after `join_ranks`. `make_validation` is called where `train.eval_every` asks.

    Raises:
        ValueError: data, weights, configuration or DeepSpeed JSON do not fit, before the first step; or the last
            checkpoint could not be written.
        FloatingPointError: a loss is not finite; raised on all ranks before the update.
    """
    signals = signals or StopSignals()
    with Watchdog(Limits(config.train.hang_seconds)) as watchdog:
        signals.join(collective_timeout(config.train.hang_seconds))
        run = set_up(config, ds_path, make_validation)
        run.activity = watchdog.activity
        run.activity.follow("step", run.engine.module)
        run.activity.follow("geometry", run.engine.module.model.geometry)
        watchdog.loop()
        outcome = loop(run, signals)
        flush()
        return outcome


def loop(run: Run, signals: StopSignals) -> TrainResult:
    """The steps of a run."""
    config, at = run.config, run.activity.at
    batches = checked(run.loader)
    saved, checkpoint = run.start, run.checkpoint
    metrics: dict[str, float] = {}
    hinge = HingeMonitor(run.start, config)
    trackers = [name for name in ("wandb", "tensorboard") if getattr(config.train, name)]
    logger = MetricsLogger(Path(config.out), config.train.steps, trackers, dist.get_rank())
    with logger:
        logger.start(run.start)
        for step in range(run.start, config.train.steps):
            at("step boundary")
            if code := signals.agreed():
                at("save")
                if saved != step:
                    logger.sync()
                    content = Content(step, metrics, run.data)
                    checkpoint = save_checkpoint(run.engine, config, content, run.fence) or checkpoint
                return TrainResult(code, checkpoint)
            at("data", step + 1)
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(run.accumulation)]
            loaded = time.perf_counter()
            if step == run.start:
                at("dry run")
                dry_run(run, max(micro_batches, key=lambda batch: batch.input_ids.numel()))
            metrics = train_step(run, micro_batches, step)
            metrics |= run.speed(micro_batches, time.perf_counter() - started) | {"data_s": loaded - started}
            metrics |= cache_use(micro_batches)
            if run.gap is not None and (step + 1) % config.objective.gap_every == 0:
                at("decode gap")
                metrics |= run.gap.measure(run.engine)
            hinge.see(metrics)
            best = None
            if run.best is not None and due(step + 1, config.train.eval_every, config):
                at("validation")
                scores, best = run.best.measure(run.engine, step + 1)
                metrics |= scores
            at("log")
            logger.log(step + 1, metrics)
            if best is not None or due(step + 1, config.train.save_every, config):
                at("save")
                logger.sync()
                written = save_checkpoint(run.engine, config, Content(step + 1, metrics, run.data, best), run.fence)
                if written is not None:  # else the disk is full, say: the run goes on, and the next save may succeed
                    saved, checkpoint = step + 1, written
                elif best is not None and run.best is not None:
                    run.best.not_saved()
    hinge.end()
    if saved != config.train.steps:
        raise unsaved(config, saved, checkpoint)
    return TrainResult(DONE, checkpoint)


def unsaved(config: RunConfig, saved: int, checkpoint: Path | None) -> ValueError:
    """What to say where the last checkpoint of a run could not be written."""
    newest = f"the newest checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
    return ValueError(
        f"the checkpoint after the last step, {config.train.steps}, could not be written: the weights of the last "
        f"{config.train.steps - saved} step(s) are lost and {newest}; make room and go on with --resume auto."
    )


def due(done: int, every: int, config: RunConfig) -> bool:
    """Whether something is done after `done` steps: every so many, and after the last."""
    return done % every == 0 or done == config.train.steps


def train_step(run: Run, micro_batches: list[Batch], step: int) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns the global means of the statistics."""
    engine, reduction = run.engine, run.config.objective.reduction
    run.activity.at("start of the step")
    total = global_weight(micro_batches, reduction, run.device)
    # DeepSpeed divides by accumulation steps and ranks; the loss is a sum over samples divided by the global weight.
    scale = run.accumulation * dist.get_world_size() / total
    stats = []
    for batch in micro_batches:
        run.activity.at("forward")
        loss, sample_stats = engine(batch.to(run.device), optimizer_step=step)
        run.activity.at("backward")
        engine.backward(loss * scale)
        stats.append(sample_stats)
        if len(stats) == len(micro_batches):
            # Before the last step() call, which updates the weights.
            metrics = reduce_stats(torch.cat(stats), micro_batches, reduction, total)
            metrics |= group_norms(run.groups, run.device)
        run.activity.at("update")
        engine.step()
    norm = engine.get_global_grad_norm()
    parts = [metrics[f"grad_norm_{name}"] for name in run.groups]
    metrics["grad_norm"] = math.hypot(*parts) if norm is None else float(norm)  # DeepSpeed has none without ZeRO
    if not math.isfinite(metrics["grad_norm"]):
        # The norm is global: every rank stops here. ZeRO skipped the update.
        named = ", ".join(identity for batch in micro_batches for identity in batch.ids)
        raise FloatingPointError(
            f"The gradient norm is not finite; stopped. Samples of rank {dist.get_rank()}: {named}."
        )
    for name, rate in zip(("lr", "merger_lr"), engine.get_lr(), strict=True):  # in the order of `parameter_groups`
        metrics[name] = float(rate)
    return metrics


def dry_run(run: Run, batch: Batch) -> None:
    """One forward and backward with zero weight, so that an out-of-memory shows before an hour is lost.

    Gradients of weight 0 leave the accumulated ones as they are; the random state is put back.
    """
    random_state = rng_state()
    loss, stats = run.engine(batch.to(run.device))
    reduce_stats(stats, [batch], "sample", float(len(batch.ids)))
    run.engine.backward(loss * 0.0)
    set_rng_state(random_state)


def set_up(config: RunConfig, ds_path: str, make_validation: MakeValidation) -> Run:
    """Everything that can fail for a reason the user can mend happens here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    begin, local_size = find_start(config), common_ranks_per_machine(world)
    with raise_on_all_ranks():  # what only one node lacks stops all of them
        dtype = resolve_dtype(config.model.dtype)
        chosen = describe(config.model.kernels, config.model.attention, dtype)
        ds_config = resolve_ds_config(
            load_ds_config(ds_path),
            path=ds_path,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world,
            bf16=dtype == torch.bfloat16,
            local_size=local_size,
        )
        if begin.universal:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
        frontend = load_frontend(config.model)
        read_config(locate(config.model.vggt))
        frontend = replace(frontend, cache=open_cache(config.data, config.model))
        check_objective(config, frontend)
        samples = load_mixture(config.data, "train")
        refuse_drawn_frames(samples, config.data.questions_per_scene)
        processor = make_processor(frontend, config.data)
        if rank == 0:
            print(chosen, flush=True)
            print(f"training samples: {len(samples)}, {samples.epoch_size} in an epoch", flush=True)
        check_frames(samples, rank, world)
        check_texts(samples, processor, rank, world)
        if rank == 0:
            print(describe_frames(samples, processor), flush=True)
            if frontend.cache is not None:
                print(describe_cache(frontend.cache.cache), flush=True)
        device = torch.device(get_accelerator().current_device_name())
        validation = make_validation(config, frontend, device) if config.train.eval_every else None
    rate = matrix_rate(device, dtype)  # while the device is empty
    if rank == 0:
        print(f"matrices are multiplied at {rate / 1e12:.3g} TFLOP/s ({dtype}): mfu is relative to it", flush=True)
    # transformers partitions the weights while it loads them as long as this object lives.
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config.get("zero_optimization", {}).get("stage") == 3 else None
    model = build_model(config.model, device, config.train.seed)
    if grouping(config.data) is not None:
        use_scene_split(model.base)
    if rank == 0:
        print(trainable_table({"vlm": model.vlm} | model.geometry_modules()), flush=True)
    engine = make_engine(model, frontend, config, ds_config, device)
    del keep_alive
    # Ranks draw different dropout masks.
    torch.manual_seed(config.train.seed + rank)
    data = digests(samples)
    start = resume(engine, begin, config, data) if begin.checkpoint else 0
    fence = take_over(config, begin)  # not before the resume, which may refuse this configuration
    if rank == 0:
        save_config(config, Path(config.out) / "config.yaml")
    sampler = GlobalBatchSampler(
        mixture=samples,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=world,
        steps=config.train.steps,
        start=start,
        seed=config.train.seed,
        questions_per_scene=config.data.questions_per_scene,
    )
    loader = train_loader(samples, frontend, config.data, sampler, config.objective.shortcut_decode == "greedy")
    gap = DecodeGap(samples, frontend, config, device) if config.objective.gap_every else None
    best = BestSoFar(validation, begin.checkpoint) if validation is not None else None
    accumulation = engine.gradient_accumulation_steps()
    groups = trained_groups(model)
    speed = Throughput(model, find_push_term(config.objective.push), rate)
    return Run(
        config, engine, loader, device, accumulation, start, groups, gap, best, data, fence, begin.checkpoint, speed
    )


def check_objective(config: RunConfig, frontend: VlmFrontend) -> None:
    """Refuse, before weights are loaded, a push term that is none, or one that this tokenizer cannot serve."""
    if find_push_term(config.objective.push).boxes:
        require_digit_slots(frontend.tokenizer, f"objective.push {config.objective.push}")
    if config.objective.shortcut_decode == "teacher":
        require_digit_slots(frontend.tokenizer, "objective.shortcut_decode teacher")
    if config.objective.gap_every:
        require_digit_slots(frontend.tokenizer, "objective.gap_every")
