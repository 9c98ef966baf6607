"""Checks of a node's disks (free space, write, fsync), limit of open files and shared memory."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

from w2r2_ds.config.schema import DataConfig, RunConfig
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief
from w2r2_ds.training.checkpoint.manifest import DAMAGED
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.json_io import read_json
from w2r2_ds.utils.files.output_folder import existing_parent

GIB = 2**30
SPARE = GIB
"""Free space in bytes for logs, temporary files and compiled kernels."""
TEST_FILE_BYTES = 2**20
BYTES_PER_PARAMETER = 20
"""Bytes of a checkpoint per trained parameter: the parameter twice (safetensors and DeepSpeed, up to 4 bytes each), a
float32 master copy, and two Adam moments."""
OPEN_FILES, OPEN_FILES_PER_WORKER = 256, 64
"""Open files of a rank, and in addition per data loader worker (every shared tensor is an open file)."""
USUAL_FILES = 1024
"""Usual limit of open files. A limit that may be too low is a warning; if it is also below this number, an error."""


def check_folder(name: str, path: Path, needed: int, purpose: str) -> CheckResult:
    """Check that files can be written in a folder (or its nearest existing parent), and that `needed` bytes are free.

    Messages contain `name`, the option or environment variable of the folder, and `purpose`, which needs the space.
    """
    folder = existing_parent(path)
    try:
        free = shutil.disk_usage(folder).free
        write_and_read(folder)
    except OSError as error:
        return CheckResult(
            info={name: f"{path} (cannot be written)"},
            errors=[
                f"{name}: {folder} cannot be written ({brief(error)}); correct its permissions or its file system, or "
                "use another folder."
            ],
        )
    result = CheckResult(info={name: f"{path}, {free / GIB:.1f} GiB free"})
    if free < needed:
        result.errors.append(
            f"{name}: {folder} has {free / GIB:.1f} GiB free, {purpose} needs about {needed / GIB:.1f}; make room, or "
            "use another folder."
        )
    return result


def write_and_read(folder: Path) -> None:
    """Write a file, fsync it and its folder, read the file and remove it. Raises OSError if a step fails."""
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(TEST_FILE_BYTES)
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        atomic_io.sync(folder)
        if path.read_bytes() != content:
            raise OSError("a file does not contain the bytes that were written to it")
    finally:
        path.unlink(missing_ok=True)


def missing_checkpoint_bytes(config: RunConfig) -> int:
    """Disk space in bytes for the checkpoints that the run has not written yet; 0 if model sizes are unknown.

    A resumed run already has most of its checkpoints. At least one is always missing, because a new checkpoint is
    written before the oldest one is deleted.
    """
    one = checkpoint_bytes(config)
    existing = 0
    for folder, names, files in os.walk(Path(config.out) / "checkpoints"):
        # Do not count damaged checkpoints, which are kept besides `keep_last`: os.walk skips names that are removed.
        names[:] = [name for name in names if DAMAGED not in name]
        existing += sum(os.lstat(os.path.join(folder, file)).st_size for file in files)
    # `keep_last` checkpoints, the best one, and the one that is being written.
    return max(one, (config.train.keep_last + 2) * one - existing)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: LoRA on every decoder layer, geometry merger and fusion; 0 if model sizes are unknown.

    Raises:
        ValueError: `model.fusion` is not registered, or does not support the language model's width.
    """
    import torch

    from w2r2_ds.models.flops import num_lora_parameters
    from w2r2_ds.models.fusion import make_fusion
    from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS
    from w2r2_ds.models.merger import make_merger

    model, geometry = config.model, config.model.geometry
    if geometry.path and not Path(geometry.path).is_dir():  # a hub id, which `read_spec` would download
        return 0
    try:
        tree = read_json(Path(model.vlm) / "config.json")
        text = tree.get("text_config", tree)
        spec = GEOMETRY_ENCODERS.find(geometry.name).read_spec(geometry)
        parameters, hidden = num_lora_parameters(text, model.lora_rank), text["hidden_size"]
    except (KeyError, ValueError):  # unreadable files are errors of `check_weights`
        return 0
    with torch.device("meta"):  # shapes only
        branch = [make_merger(spec, hidden, model.merger_hidden), make_fusion(model.fusion, hidden)]
    parameters += sum(parameter.numel() for module in branch for parameter in module.parameters())
    return BYTES_PER_PARAMETER * parameters


def check_open_files(workers: int) -> CheckResult:
    """Check the limit of open files for `data.workers`."""
    result = CheckResult()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    result.info["open files"] = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < files:
        advice = f"run ulimit -n {files} before the start (in slurm/cluster.env on a cluster)"
        if hard != resource.RLIM_INFINITY and hard < files:
            advice = f"ask the administrator to raise the hard limit {hard}"
        (result.errors if soft < USUAL_FILES else result.warnings).append(
            f"a process may open {soft} files, a rank with data.workers {workers} may need {files}; {advice}, or lower "
            "data.workers."
        )
    return result


def check_shared_memory(result: CheckResult, batch: int, config: DataConfig, ranks: int) -> None:
    """Check the size of the shared memory for the micro-batches of `batch` bytes that a node's ranks prefetch."""
    from w2r2_ds.data import shared_memory

    folder = shared_memory.SHM
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    needed = shared_memory.needed_bytes(batch, config.workers, config.prefetch, ranks)
    result.info["shared memory"] = f"{size / GIB:.1f} GiB in {folder}, training needs {needed / GIB:.2f}"
    if size < needed:
        result.errors.append(
            f"{folder} has {size / GIB:.2f} GiB, but {ranks} rank(s) with data.workers {config.workers}, data.prefetch "
            f"{config.prefetch} and train.micro_batch (frames and cached features of {batch / 2**20:.0f} MiB) need "
            f"{needed / GIB:.2f}; enlarge it (docker: --shm-size {-(-needed // GIB)}g), or lower them."
        )
