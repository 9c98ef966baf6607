"""Save a checkpoint: trained tensors, DeepSpeed's optimizer shards, random states, and a manifest.

RUN/checkpoints/step-000030/trainable.safetensors   LoRA, merger and fusion, whole tensors, for evaluation and export
                            engine/                 DeepSpeed's shards: the same weights, optimizer states, schedule
                            rng-RANK.pt             random state of every rank
                            config.yaml             the resolved configuration
                            checkpoint.json         the manifest (training/checkpoint/manifest.py); written last

Order of publication: write to a temporary folder that only this launch uses, fsync every file, write the manifest,
rename the folder; then update `latest`, then `best`, then delete old checkpoints. After a crash at any point there is a
complete checkpoint, the old or the new one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import save

from w2r2_ds.config.io import config_text
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.kernels.saved_selection import kernels_to_manifest
from w2r2_ds.models.build import trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.deepspeed_io import ENGINE, RankWriter, save_shards
from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    LATEST,
    PARTIAL,
    TENSORS,
    delete,
    expired_checkpoints,
    step_folder,
    step_folders,
    write_manifest,
    write_pointer,
)
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.checkpoint.weights import gather_trainable
from w2r2_ds.utils import plugins
from w2r2_ds.utils.distributed import on_rank_zero
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.atomic_io import Digest
from w2r2_ds.utils.rng import rng_state
from w2r2_ds.utils.versions import versions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

OPTIMIZER_BYTES = 12
"""Bytes of AdamW's state per trained parameter: a float32 master copy and two float32 moments."""
RANK_ALLOWANCE = 100_000
"""Allowed bytes per rank for its random state and DeepSpeed's settings."""
TENSOR_ALLOWANCE = 2_000
"""Allowed bytes per rank and trained tensor for its name, shape and padding."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """State of the run that the manifest records.

    Attributes:
        step: number of completed optimizer steps.
        metrics: metrics of that step.
        data: digests of the training sets (`data.loader.digests`).
        best: metric and value of the validation, if it is the best so far; then `best` is updated too.
    """

    step: int
    metrics: Mapping[str, float]
    data: Sequence[str]
    best: Mapping[str, Any] | None = None


def save_checkpoint(
    engine: DeepSpeedEngine, config: RunConfig, info: CheckpointInfo, token: OwnershipToken
) -> Path | None:
    """Save a checkpoint. Collective.

    Args:
        engine: engine around `W2R2Step`.
        config: run configuration, saved with the checkpoint.
        info: state of the run, for the manifest.
        token: ownership of the run, checked before every publication.

    Returns:
        Folder of the checkpoint; or None if a rank could not write (a full disk). Then a warning is logged, the
        temporary folder is removed, and older checkpoints are unchanged, so the run can continue.

    Raises:
        OwnershipLost: a newer launch of this run has taken over; on every rank.
    """
    temporary = token.temporary_folder(info.step)
    on_rank_zero(token.check)  # raises on all ranks
    writer = RankWriter(temporary)
    if dist.get_rank() == 0:
        with writer.record_errors():
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / ENGINE).mkdir(parents=True)
    dist.barrier()  # the folder exists on every rank
    # From here to `gather_results` write errors are recorded, not raised: every collective below needs all ranks.
    writer.save(f"rng-{dist.get_rank()}.pt", rng_state())
    save_shards(engine, writer, info.step)
    tensors = gather_trainable(engine.module.model)
    if dist.get_rank() == 0:
        writer.write(TENSORS, lambda file: file.write(save(tensors)))
        writer.write("config.yaml", lambda file: file.write(config_text(config).encode()))
    # All ranks agree: the checkpoint is published only if every file of every rank is written and fsynced.
    files, failures = gather_results(writer)
    if not failures:
        check_size(files, engine.module.model)
        description = build_manifest(engine, config, info, token)
        failures = on_rank_zero(lambda: publish(config, description, files, token, temporary))
    if failures:
        discard(config, info.step, failures, token, temporary)
        return None
    return step_folder(config.out, info.step)


def gather_results(writer: RankWriter) -> tuple[dict[str, Digest], list[str]]:
    """Files that all ranks have written, and the failures of all ranks; the same on every rank. Collective."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (writer.files, writer.failure))
    files = {name: digest for written, _ in results for name, digest in written.items()}
    return files, [failure for _, failure in results if failure is not None]


def check_size(files: Mapping[str, Digest], model: W2R2) -> None:
    """Assert that no frozen weights are stored: they would make a checkpoint of a 3B model about 7 GB larger.

    The limit: trained weights twice (whole and in the shards), their optimizer state, and an allowance.
    """
    # ZeRO-3 trap: a partitioned parameter is empty outside its gather; `ds_numel` is its whole size.
    parameters = [(p.ds_numel if hasattr(p, "ds_numel") else p.numel(), p) for p in trainable(model).values()]
    trained_bytes = sum(count * (2 * p.element_size() + OPTIMIZER_BYTES) for count, p in parameters)
    limit = trained_bytes + dist.get_world_size() * (RANK_ALLOWANCE + TENSOR_ALLOWANCE * len(parameters))
    written = sum(digest.bytes for digest in files.values())
    assert written <= limit, f"a checkpoint of {written} bytes holds more than the {limit} of the trained parameters"


def build_manifest(
    engine: DeepSpeedEngine, config: RunConfig, info: CheckpointInfo, token: OwnershipToken
) -> dict[str, Any]:
    """The manifest without its files, for `write_manifest`."""
    model: W2R2 = engine.module.model
    return {
        "step": info.step,
        "incarnation": token.number,
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "model": model.fingerprint,
        "kernels": kernels_to_manifest(config.model.kernels, model.kernels, engine.device),
        "metrics": dict(info.metrics),
        "best": info.best,
        "data": list(info.data),
        "plugins": {plugin: plugins.SHA256[plugin] for plugin in plugins.IMPORTED},
        "versions": versions(),
    }


def publish(
    config: RunConfig,
    description: Mapping[str, Any],
    files: Mapping[str, Digest],
    token: OwnershipToken,
    temporary: Path,
) -> list[str]:
    """On rank 0: write the manifest, rename the folder, update pointers, delete old checkpoints.

    Ownership is checked before each of these.

    Returns:
        Failures up to the rename. Later failures are logged as a warning only: the checkpoint is complete then.
    """
    writer, final = RankWriter(temporary), step_folder(config.out, description["step"])
    with writer.record_errors():
        # The manifest is the last file, and the rename publishes the folder whole: a reader finds either no folder of
        # this step or a complete one. `move` fsyncs the folders before the rename and their parent after it.
        write_manifest(temporary, description, {**files, **unlisted_files(temporary, files)})
        token.check()
        replace_folder(temporary, final)
    if writer.failure is not None:
        return [writer.failure]
    afterwards = RankWriter(final)
    with afterwards.record_errors():
        # `latest` moves only to a published checkpoint, and old ones are deleted last: one is always complete.
        for name in (LATEST, BEST) if description["best"] is not None else (LATEST,):
            token.check()
            write_pointer(token.folder / name, final)
        for old in expired_checkpoints(config.out, config.train.keep_last):
            token.check()
            delete(old)
    if afterwards.failure is not None:
        logger.warning("%s is saved, but pointers or deletions failed: %s.", final, afterwards.failure)
    return []


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`.

    If `final` exists (renamed by an older launch just after it lost ownership), it is deleted after the rename.
    """
    if not final.exists():
        atomic_io.move(temporary, final)
        return
    # A rename cannot replace a folder that is not empty: move the old one away, and back if the rename fails.
    old = final.with_name(f"{temporary.name.removesuffix(PARTIAL)}.old{PARTIAL}")
    final.rename(old)
    try:
        atomic_io.move(temporary, final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def unlisted_files(folder: Path, files: Mapping[str, Digest]) -> dict[str, Digest]:
    """Sync and hash the files that DeepSpeed wrote without our checkpoint engine: swap files of an NVMe offload."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in files:
            atomic_io.sync(file)
            found[name] = atomic_io.digest(file)
    return found


def discard(config: RunConfig, step: int, failures: Sequence[str], token: OwnershipToken, temporary: Path) -> None:
    """Remove the temporary folder of a failed checkpoint, and warn. Collective."""
    # A newer launch removes the temporary folders of older ones, which is a write error here. Then the check raises.
    on_rank_zero(token.check)
    if dist.get_rank() != 0:
        return
    shutil.rmtree(temporary, ignore_errors=True)
    newest = next((path.name for path in step_folders(config.out).values()), "none")
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    logger.warning(
        "the checkpoint of step %d could not be saved (%s%s); the newest checkpoint is %s.",
        step,
        failures[0],
        more,
        newest,
    )
