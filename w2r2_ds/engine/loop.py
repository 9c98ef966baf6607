"""The training loop, readable top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from transformers import get_cosine_schedule_with_warmup
from transformers.integrations import HfDeepSpeedConfig

from w2r2_ds.config import RunConfig, save_config
from w2r2_ds.data.check import check_frames, check_texts, describe_frames
from w2r2_ds.data.collate import Batch
from w2r2_ds.data.loading import checked, digests, load_mixture, make_processor, train_loader
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.slots import require_digit_slots, token_tables
from w2r2_ds.engine.checkpoint import Content, save_checkpoint
from w2r2_ds.engine.deepspeed import load_ds_config, resolve_ds_config
from w2r2_ds.engine.fence import Fence
from w2r2_ds.engine.gap import DecodeGap
from w2r2_ds.engine.gradients import group_norms
from w2r2_ds.engine.hinge import HingeWatch
from w2r2_ds.engine.metrics import MetricsLogger
from w2r2_ds.engine.resume import find_start, resume, take_over
from w2r2_ds.engine.step import W2R2Step
from w2r2_ds.engine.together import together
from w2r2_ds.engine.validation import BestSoFar, MakeValidation
from w2r2_ds.geometry.loading import locate, read_config
from w2r2_ds.models.build import Front, build_model, load_front, resolve_dtype, trainable
from w2r2_ds.models.lora import trainable_table
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.push import find_reading
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.objective.w2r2 import LOSS_PARTS, STATS, sample_weights


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
    fence: Fence
    checkpoint: Path | None


def train(config: RunConfig, ds_path: str, make_validation: MakeValidation) -> Path:
    """Train a configuration under a DeepSpeed JSON; returns the last checkpoint's folder.

    Every rank calls it, after `deepspeed.init_distributed`. `make_validation` is called where `train.eval_every` asks.

    Raises:
        ValueError: data, weights, configuration or DeepSpeed JSON do not fit, before the first step.
        FloatingPointError: a loss is not finite; raised on all ranks before the update.
    """
    run = set_up(config, ds_path, make_validation)
    batches = checked(run.loader)
    checkpoint = run.checkpoint or Path(config.out)
    logger = MetricsLogger(
        Path(config.out), config.train.steps, config.train.wandb, config.train.tensorboard, dist.get_rank()
    )
    hinge = HingeWatch(run.start, config)
    with logger:
        logger.start(run.start)
        for step in range(run.start, config.train.steps):
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(run.accumulation)]
            run.engine.module.optimizer_step = step
            if step == run.start:
                dry_run(run, max(micro_batches, key=lambda batch: batch.input_ids.numel()))
            metrics = train_step(run, micro_batches)
            metrics |= throughput(micro_batches, time.perf_counter() - started)
            if run.gap is not None and (step + 1) % config.objective.gap_every == 0:
                metrics |= run.gap.measure(run.engine)
            hinge.see(metrics)
            best = None
            if run.best is not None and due(step + 1, config.train.eval_every, config):
                scores, best = run.best.measure(run.engine, step + 1)
                metrics |= scores
            logger.log(step + 1, metrics)
            if best is not None or due(step + 1, config.train.save_every, config):
                content = Content(step + 1, metrics, run.data, best)
                checkpoint = save_checkpoint(run.engine, config, content, run.fence) or checkpoint
    hinge.end()
    return checkpoint


def due(done: int, every: int, config: RunConfig) -> bool:
    """Whether something is done after `done` steps: every so many, and after the last."""
    return done % every == 0 or done == config.train.steps


def train_step(run: Run, micro_batches: list[Batch]) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns the global means of the statistics."""
    engine, reduction = run.engine, run.config.objective.reduction
    total = global_weight(micro_batches, reduction, run.device)
    # DeepSpeed divides by accumulation steps and ranks; the loss is a sum over samples divided by the global weight.
    scale = run.accumulation * dist.get_world_size() / total
    stats = []
    for batch in micro_batches:
        loss, sample_stats = engine(batch.to(run.device))
        engine.backward(loss * scale)
        stats.append(sample_stats)
        if len(stats) == len(micro_batches):
            # Before the last step() call, which updates the weights.
            metrics = reduce_stats(torch.cat(stats), micro_batches, reduction, total)
            metrics |= group_norms(run.groups, run.device)
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


def global_weight(micro_batches: list[Batch], reduction: str, device: torch.device) -> float:
    """Samples (or answer tokens) of the optimizer step over all ranks and micro-batches."""
    weight = sum(sample_weights(batch, reduction).sum() for batch in micro_batches)
    total = torch.as_tensor(weight, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def reduce_stats(stats: torch.Tensor, micro_batches: list[Batch], reduction: str, total: float) -> dict[str, float]:
    """Weighted global means of ``[samples, len(STATS)]``; stops all ranks if any loss is not finite.

    Raises:
        FloatingPointError: names the samples, on every rank.
    """
    weights = torch.cat([sample_weights(batch, reduction) for batch in micro_batches]).to(stats.device)
    finite = torch.isfinite(stats[:, 0])
    # What is in the loss is weighed as the loss is; everything else counts per sample.
    by_loss = torch.tensor([name in LOSS_PARTS for name in STATS], device=stats.device)
    values = stats.double()
    sums = torch.where(by_loss, (values * weights[:, None]).sum(0), values.sum(0))
    count = torch.tensor([float(len(stats))], dtype=torch.float64, device=stats.device)
    packed = torch.cat([sums, count, (~finite).sum()[None].double()])
    dist.all_reduce(packed)
    *totals, samples, bad = packed.tolist()
    if bad:
        ids = [identity for batch in micro_batches for identity in batch.ids]
        mine = [identity for identity, good in zip(ids, finite.tolist(), strict=True) if not good]
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        named = [identity for rank in everyone for identity in rank]
        raise FloatingPointError(f"The loss is not finite; stopped before the update. Samples: {', '.join(named)}.")
    return {name: value / (total if name in LOSS_PARTS else samples) for name, value in zip(STATS, totals, strict=True)}


def dry_run(run: Run, batch: Batch) -> None:
    """One forward and backward with zero weight, so that an out-of-memory shows before an hour is lost.

    Gradients of weight 0 leave the accumulated ones as they are; the random state is put back.
    """
    random_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state() if run.device.type == "cuda" else None
    loss, stats = run.engine(batch.to(run.device))
    reduce_stats(stats, [batch], "sample", float(len(batch.ids)))
    run.engine.backward(loss * 0.0)
    torch.set_rng_state(random_state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state)


def throughput(micro_batches: list[Batch], seconds: float) -> dict[str, float]:
    """Samples and tokens per second over all ranks, every rank taken to be as full as this one."""
    world = dist.get_world_size()
    samples = sum(len(batch.ids) for batch in micro_batches) * world
    tokens = sum(int(batch.attention_mask.sum()) for batch in micro_batches) * world
    return {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds, "step_s": seconds}


def set_up(config: RunConfig, ds_path: str, make_validation: MakeValidation) -> Run:
    """Everything that can fail for a reason the user can mend happens here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    begin = find_start(config)
    with together():  # what only one node lacks stops all of them
        dtype = resolve_dtype(config.model.dtype)
        ds_config = resolve_ds_config(
            load_ds_config(ds_path),
            path=ds_path,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world,
            bf16=dtype == torch.bfloat16,
        )
        if begin.universal:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
        front = load_front(config.model)
        read_config(locate(config.model.vggt))
        check_objective(config, front)
        samples = load_mixture(config.data, "train")
        processor = make_processor(front, config.data)
        if rank == 0:
            print(f"training samples: {len(samples)}, {samples.epoch_size} in an epoch", flush=True)
        check_frames(samples, rank, world)
        check_texts(samples, processor, rank, world)
        if rank == 0:
            print(describe_frames(samples, processor), flush=True)
        device = torch.device(get_accelerator().current_device_name())
        validation = make_validation(config, front, device) if config.train.eval_every else None
    # transformers partitions the weights while it loads them as long as this object lives.
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config.get("zero_optimization", {}).get("stage") == 3 else None
    model = build_model(config.model, device, config.train.seed)
    if rank == 0:
        print(trainable_table({"vlm": model.vlm} | model.geometry_modules()), flush=True)
    engine = make_engine(model, front, config, ds_config, device)
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
    )
    loader = train_loader(samples, front, config.data, sampler, config.objective.shortcut_decode == "greedy")
    gap = DecodeGap(samples, front, config, device) if config.objective.gap_every else None
    best = BestSoFar(validation, begin.checkpoint) if validation is not None else None
    accumulation = engine.gradient_accumulation_steps()
    groups = trained_groups(model)
    return Run(config, engine, loader, device, accumulation, start, groups, gap, best, data, fence, begin.checkpoint)


def check_objective(config: RunConfig, front: Front) -> None:
    """Refuse, before weights are loaded, a push term that is none, or one that this tokenizer cannot serve."""
    if find_reading(config.objective.push).boxes:
        require_digit_slots(front.tokenizer, f"objective.push {config.objective.push}")
    if config.objective.shortcut_decode == "teacher":
        require_digit_slots(front.tokenizer, "objective.shortcut_decode teacher")
    if config.objective.gap_every:
        require_digit_slots(front.tokenizer, "objective.gap_every")


def make_engine(model: W2R2, front: Front, config: RunConfig, ds_config: dict[str, Any], device: torch.device) -> Any:
    """Wrap the step in DeepSpeed, with AdamW and a cosine schedule over two parameter groups."""
    decoder_layer = type(model.base.model.language_model.layers[0])
    rows = model.base.config.get_text_config().vocab_size
    scorer = Scorer(token_tables(front.tokenizer, rows).to(device), front.tokenizer, config.objective)
    step = W2R2Step(model, config, scorer)
    step.train()
    if config.train.activation_checkpointing:
        options = {"use_reentrant": False, "context_fn": step.checkpoint_contexts}
        model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Decoder layers are gathered whole; DeepSpeed then needs their input to require grad.
    model.base.enable_input_require_grads()
    if find_reading(config.objective.push).blocked:  # a leaf with two graphs would reduce its gradients twice
        set_z3_leaf_modules(model, [decoder_layer])
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.train.weight_decay)
    steps = config.train.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.train.warmup * steps), steps)
    engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    return engine


def trained_groups(model: W2R2) -> dict[str, list[torch.nn.Parameter]]:
    """LoRA, and geometry (merger and fusion); none is empty, which would break DeepSpeed."""
    geometry = [parameter for module in model.geometry_modules().values() for parameter in module.parameters()]
    groups = {"lora": list(trainable(model.vlm).values()), "geometry": geometry}
    assert all(groups.values()), "both groups train"
    return groups


def parameter_groups(model: W2R2, config: RunConfig) -> list[dict[str, Any]]:
    """The trained groups with a learning rate each."""
    rates = {"lora": config.train.lr, "geometry": config.train.merger_lr}
    return [{"params": parameters, "lr": rates[name]} for name, parameters in trained_groups(model).items()]
