"""The training loop. The run is built in `build.py`; the forward pass is in `step.py`."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.features.lookup import flush_writes
from w2r2_ds.training.build import Run, build_run
from w2r2_ds.training.cache_stats import cache_use
from w2r2_ds.training.checkpoint.save import CheckpointInfo, save_checkpoint
from w2r2_ds.training.deepspeed.gradient_norms import group_norms
from w2r2_ds.training.deepspeed.process_group import collective_timeout
from w2r2_ds.training.fault_tolerance.exit_codes import DONE
from w2r2_ds.training.fault_tolerance.hang_detector import Limits
from w2r2_ds.training.fault_tolerance.signals import StopSignals
from w2r2_ds.training.fault_tolerance.watchdog import Watchdog
from w2r2_ds.training.hinge_monitor import HingeMonitor
from w2r2_ds.training.metrics import MetricsLogger
from w2r2_ds.training.reduce import global_weight, reduce_stats
from w2r2_ds.training.validation import MakeValidation
from w2r2_ds.types.batch import Batch
from w2r2_ds.utils.rng import rng_state, set_rng_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run that ended without an exception.

    Attributes:
        exit_code: one of training/fault_tolerance/exit_codes.py: `DONE`, or that of a signal.
        checkpoint: newest checkpoint of the run, None if there is none.
    """

    exit_code: int
    checkpoint: Path | None


def train(
    config: RunConfig, ds_path: str, make_validation: MakeValidation, signals: StopSignals | None = None
) -> TrainResult:
    """Train until the last step or until a signal to stop. Collective, after `init_process_group`.

    Args:
        config: run configuration.
        ds_path: path of the DeepSpeed JSON.
        make_validation: builds the validation, if `train.eval_every` or `train.samples_every` is not 0.
        signals: an entered `StopSignals`; by default signals keep their usual effect.

    Raises:
        ValueError: before the first step, data, weights, configuration or DeepSpeed JSON do not fit; or the last
            checkpoint could not be written.
        FloatingPointError: a loss or a gradient norm is not finite; raised on all ranks before the update.
    """
    signals = signals or StopSignals()
    with Watchdog(Limits(config.train.hang_seconds)) as watchdog:
        signals.join(collective_timeout(config.train.hang_seconds))
        # The watchdog runs already: if a rank fails while it loads, it stops all ranks. Hangs are detected from
        # `start_hang_detection` on only, because loading has long pauses without progress.
        run = build_run(config, ds_path, make_validation)
        run.activity = watchdog.activity
        run.activity.follow("step", run.engine.module)
        run.activity.follow("geometry", run.engine.module.model.geometry)
        watchdog.start_hang_detection()
        result = train_steps(run, signals)
        flush_writes()
        return result


def train_steps(run: Run, signals: StopSignals) -> TrainResult:
    """The loop over optimizer steps. Collective."""
    config, activity = run.config, run.activity
    batches = iter(run.loader)
    hinge_monitor = HingeMonitor(run.start_step, config, run.engine.module.push_term)
    with MetricsLogger(
        Path(config.out), config.train.steps, config.train.trackers, dist.get_rank(), config.train.samples_every > 0
    ) as metrics_logger:
        checkpointer = Checkpointer(run, metrics_logger)
        metrics_logger.start(run.start_step)
        metrics: dict[str, float] = {}
        for step in range(run.start_step, config.train.steps):
            activity.set_phase("step boundary")
            # The signal flags are reduced over ranks: all stop at the same step, or none.
            if code := signals.agreed():
                if checkpointer.step != step:  # unless the previous iteration has saved this step
                    checkpointer.save(CheckpointInfo(step, metrics, run.data_digests))
                return TrainResult(code, checkpointer.checkpoint)

            activity.set_phase("data", step + 1)
            started = time.perf_counter()
            # All micro-batches of the step are loaded first: the loss of each is divided by the total weight of all.
            micro_batches = [next(batches) for _ in range(run.gradient_accumulation_steps)]
            loaded = time.perf_counter()
            if step == run.start_step:
                activity.set_phase("dry run")
                dry_run(run, max(micro_batches, key=lambda batch: batch.input_ids.numel()))
            metrics = train_step(run, micro_batches, step)
            metrics |= run.throughput(micro_batches, time.perf_counter() - started) | {"data_s": loaded - started}
            metrics |= cache_use(micro_batches)
            hinge_monitor.update(metrics)
            measured, best = measure(run, step + 1)
            metrics |= measured
            draw_samples(run, step + 1, metrics_logger)
            activity.set_phase("log")
            # Before the save, which syncs metrics.jsonl: every saved step has its line.
            metrics_logger.log(step + 1, metrics)
            if best is not None or due(step + 1, config.train.save_every, config):
                saved = checkpointer.save(CheckpointInfo(step + 1, metrics, run.data_digests, best))
                if not saved and best is not None and run.validator is not None:
                    run.validator.not_saved()
    hinge_monitor.finish()
    checkpointer.check_final_checkpoint(config.train.steps)
    return TrainResult(DONE, checkpointer.checkpoint)


def measure(run: Run, done: int) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Measure the decode gap and validate, if they are due after `done` steps. Collective.

    Returns:
        Metrics to log; and metric and value of the validation if it is the best so far, else None.
    """
    metrics: dict[str, float] = {}
    if run.decode_gap is not None and done % run.config.objective.decode_gap_every == 0:
        run.activity.set_phase("decode gap")
        metrics |= run.decode_gap.measure(run.engine)
    best = None
    if run.validator is not None and due(done, run.config.train.eval_every, run.config):
        run.activity.set_phase("validation")
        scores, best = run.validator.measure(run.engine, done)
        metrics |= scores
    return metrics, best


def draw_samples(run: Run, done: int, metrics_logger: MetricsLogger) -> None:
    """Log a picture of a few validation samples, if it is due after `done` steps. Collective."""
    if run.drawn is None or not due(done, run.config.train.samples_every, run.config):
        return
    run.activity.set_phase("sample pictures")
    validated = run.validator is not None and due(done, run.config.train.eval_every, run.config)
    try:
        picture = run.drawn.draw(run.engine, f"step {done}", answered=validated)
    except ValueError as error:  # raised after the collectives: a frame that has gone must not end the run
        logger.warning("no picture of the samples after step %d: %s", done, error)
        return
    if picture is not None:
        metrics_logger.log_image(done, picture)


def due(done: int, every: int, config: RunConfig) -> bool:
    """Whether a periodic action is due after `done` steps: every `every` steps, and after the last step."""
    return done % every == 0 or done == config.train.steps


class Checkpointer:
    """Saves checkpoints and keeps track of the newest one.

    Attributes:
        step: step of the newest checkpoint; 0 without one.
        checkpoint: folder of the newest checkpoint; None if there is none.
    """

    def __init__(self, run: Run, metrics_logger: MetricsLogger) -> None:
        self.run, self.metrics_logger = run, metrics_logger
        self.step, self.checkpoint = run.start_step, run.checkpoint

    def save(self, info: CheckpointInfo) -> bool:
        """Save a checkpoint; False if it could not be written (full disk), and training continues."""
        self.run.activity.set_phase("save")
        self.metrics_logger.sync()
        path = save_checkpoint(self.run.engine, self.run.config, info, self.run.token)
        if path is None:
            return False
        self.step, self.checkpoint = info.step, path
        return True

    def check_final_checkpoint(self, last: int) -> None:
        """Raise ValueError if the checkpoint after the last step was not written."""
        if self.step != last:
            newest = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
            raise ValueError(
                f"the checkpoint after the last step, {last}, could not be written: the weights of the last "
                f"{last - self.step} step(s) are lost and {newest}; free disk space and continue with --resume auto."
            )


def train_step(run: Run, micro_batches: list[Batch], step: int) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns global means of the statistics. Collective.

    Args:
        run: the run.
        micro_batches: micro-batches of this rank, on the CPU.
        step: number of completed optimizer steps.

    Raises:
        FloatingPointError: a loss or the gradient norm is not finite; raised on all ranks before the update.
    """
    engine, reduction = run.engine, run.config.objective.reduction
    run.activity.set_phase("start of the step")
    total = global_weight(micro_batches, reduction, run.device)
    # Loss scaling. `W2R2Step` returns the *sum* of weighted sample losses. The loss of the optimizer step is this sum
    # over all ranks and micro-batches, divided by their total weight. engine.backward divides by the accumulation
    # steps, and gradients are averaged over ranks: the scale multiplies by both. So the gradient does not depend on how
    # the samples are split into micro-batches and ranks.
    scale = run.gradient_accumulation_steps * dist.get_world_size() / total
    stats = []
    for batch in micro_batches:
        run.activity.set_phase("forward")
        loss, sample_stats = engine(batch.to(run.device), optimizer_step=step)
        run.activity.set_phase("backward")
        engine.backward(loss * scale.to(loss.dtype))
        stats.append(sample_stats)  # stays on the device; copied to the host once per optimizer step
        if len(stats) == len(micro_batches):
            # Before the last engine.step(), which clips the gradients, updates the weights and frees the gradients.
            # Both results are global, so all ranks raise if a loss or the gradient norm is not finite.
            metrics = reduce_stats(torch.cat(stats), micro_batches, reduction, total)
            metrics |= group_norms(engine, run.groups, run.device)
            metrics["grad_norm"] = math.hypot(*(metrics[f"grad_norm_{name}"] for name in run.groups))
            check_gradients(metrics["grad_norm"], micro_batches)
        run.activity.set_phase("update")
        # DeepSpeed counts micro-batches: only the last call of an optimizer step updates the weights.
        engine.step()
    for name, rate in zip(("lr", "merger_lr"), engine.get_lr(), strict=True):  # in the order of `trained_groups`
        metrics[name] = float(rate)
    return metrics


def check_gradients(norm: float, micro_batches: list[Batch]) -> None:
    """Raise FloatingPointError if the global gradient norm is not finite, with the ids of this rank's samples."""
    # DeepSpeed sums squares in float32. Above this limit they overflow, and ZeRO would skip the update without an
    # error. NaN is not below it either.
    if not norm < torch.finfo(torch.float32).max ** 0.5:
        ids = ", ".join(identity for batch in micro_batches for identity in batch.ids)
        raise FloatingPointError(
            f"The gradient norm is not finite; stopped before the update. Samples of rank {dist.get_rank()}: {ids}."
        )


def dry_run(run: Run, batch: Batch) -> None:
    """Forward and backward of one micro-batch with loss weight 0: raises an out-of-memory error before the first step.

    Weights, gradients and the random state do not change: the gradients are zero and ``engine.step()`` is not called.
    New features may be added to the feature cache.

    Args:
        run: the run.
        batch: the micro-batch of the first step with the most tokens, padding included; on the CPU.
    """
    random_state = rng_state()
    loss, stats = run.engine(batch.to(run.device))  # optimizer_step is 0, also in a resumed run
    # Only to raise if the loss is not finite, since 0 * inf would put NaN into the gradients; the means are not used.
    reduce_stats(stats, [batch], "sample", torch.ones((), dtype=torch.float64, device=run.device))
    run.engine.backward(loss * 0.0)
    set_rng_state(random_state)
