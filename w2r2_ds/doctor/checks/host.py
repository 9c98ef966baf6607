"""Checks of a node's disks (free space, write, fsync), limit of open files and shared memory."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief
from w2r2_ds.training.checkpoint.manifest import DAMAGED
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.json_io import read_json

GIB = 2**30
SPARE = GIB
"""Free space in bytes for logs, temporary files and compiled kernels."""
PROBE = 2**20
"""Size of the test file in bytes."""
BYTES_PER_WEIGHT = 20
"""Bytes of a checkpoint per trained weight: the weight twice (safetensors and DeepSpeed, up to 4 bytes each), a float32
master copy, and two Adam moments."""
SHM = Path("/dev/shm")
SHM_PER_BATCH = 128 * 2**20
"""Bytes of a micro-batch in shared memory: about ten frames as inputs of VGGT and of the vision tower."""
FILES, FILES_PER_WORKER = 256, 64
"""Open files of a rank, and in addition per data loader worker (every shared tensor is an open file)."""
USUAL_FILES = 1024
"""Usual limit of open files. A limit that may be too low is a warning; if it is also below this number, an error."""


def check_folder(name: str, path: Path, needed: int, purpose: str) -> CheckResult:
    """Check that files can be written in a folder (or its nearest existing parent), and its free space.

    Args:
        name: option or environment variable of the folder, for messages: out, TMPDIR, TORCH_EXTENSIONS_DIR.
        path: path of the folder.
        needed: required free space in bytes.
        purpose: what the space is for, as the subject of a sentence.
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


def existing_parent(path: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_and_read(folder: Path) -> None:
    """Write a file, fsync it and its folder, read the file and remove it. Raises OSError if a step fails."""
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(PROBE)
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
        names[:] = [name for name in names if DAMAGED not in name]  # skipped by os.walk: kept in addition
        existing += sum(os.lstat(os.path.join(folder, file)).st_size for file in files)
    # `keep_last` checkpoints, the best one, and the one that is being written.
    return max(one, (config.train.keep_last + 2) * one - existing)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: LoRA on every decoder layer, and the geometry merger; 0 if model sizes are unknown."""
    from w2r2_ds.models.geometry_encoder import GEOMETRY_ENCODERS

    model, geometry = config.model, config.model.geometry
    if geometry.path and not Path(geometry.path).is_dir():  # a hub id, which `read_spec` would download
        return 0
    try:
        tree = read_json(Path(model.vlm) / "config.json")
        text = tree.get("text_config", tree)
        features = GEOMETRY_ENCODERS.find(geometry.name).read_spec(geometry).feature_dim
        weights = lora_weights(text, model.lora_rank)
        weights += merger_weights(features, text["hidden_size"], model.merger_hidden)
    except (KeyError, ValueError):  # unreadable files are errors of `check_weights`
        return 0
    return BYTES_PER_WEIGHT * weights


def lora_weights(text: dict[str, Any], rank: int) -> int:
    """Number of LoRA weights on the seven projections of every decoder layer: rank x (inputs + outputs) each."""
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    queries, keys = heads * head, text["num_key_value_heads"] * head
    widths = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)  # q o, k v, gate up down
    return int(text["num_hidden_layers"]) * rank * int(widths)


def merger_weights(features: int, hidden: int, merger_hidden: int) -> int:
    """Number of weights of the geometry merger: norm, and two linear layers over 2 x 2 merged features."""
    return features + (4 * features + 1) * merger_hidden + (merger_hidden + 1) * hidden


def check_limits(workers: int, prefetch: int, ranks: int) -> CheckResult:
    """Check the limit of open files and the shared memory for `data.workers`, `data.prefetch` and the node's ranks."""
    result = CheckResult()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = FILES + FILES_PER_WORKER * workers
    result.info["open files"] = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < files:
        (result.errors if soft < USUAL_FILES else result.warnings).append(
            f"a process may open {soft} files, a rank with data.workers {workers} may need {files}; run "
            f"ulimit -n {files} before the start (in slurm/cluster.env on a cluster), or lower data.workers."
        )
    size = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
    needed = SHM_PER_BATCH * prefetch * workers * ranks
    result.info["shared memory"] = f"{size / GIB:.1f} GiB in {SHM}"
    if size < needed:
        result.errors.append(
            f"{SHM} has {size / GIB:.2f} GiB, but {ranks} rank(s) with data.workers {workers} and data.prefetch "
            f"{prefetch} need {needed / GIB:.2f}; enlarge it (docker: --shm-size {-(-needed // GIB)}g), or lower them."
        )
    return result
