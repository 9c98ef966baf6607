"""A checkpoint's files as one rank writes and reads them, DeepSpeed's shards among them.

Written: through `durable`, and a full disk is remembered, not raised. DeepSpeed's save holds barriers, so a rank that
left it early would leave the others waiting for ever; all ranks compare notes once it is through.

Read: never as a program. A pickle can name any function to be called while it is read; DeepSpeed reads its shards with
`torch.load(weights_only=False)`, which would call it. Here every read takes tensors, plain containers and the few
classes of `allowed`, whatever the caller asks for (TORCH_FORCE_WEIGHTS_ONLY_LOAD, torch/serialization.py).
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.atomic_io import Digest, Writer

ENGINE = "engine"
FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""DeepSpeed puts them beside its shards; they read pickles as programs, and trainable.safetensors needs none."""


class Part:
    """What one rank writes of a checkpoint.

    Attributes:
        folder: of the whole checkpoint.
        files: digest by name below `folder`.
        failure: the first, as a sentence without its full stop; the rank goes on after it, in step with the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Digest] = {}
        self.failure: str | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Note an OSError instead of raising it."""
        try:
            yield
        except OSError as error:
            where = f"rank {dist.get_rank()} on {socket.gethostname()}"
            self.failure = self.failure or f"{where}: {error.filename}: {error.strerror} (errno {error.errno})"

    def write(self, name: str, write: Callable[[Writer], object]) -> None:
        """Write one file; `write` fills it."""
        with self.attempt():
            with atomic_io.writing(self.folder / name) as writer:
                write(writer)
            self.files[name] = writer.digest

    def save(self, name: str, state: Any) -> None:
        """Write one file with `torch.save`."""
        self.write(name, lambda writer: torch.save(state, writer))  # type: ignore[arg-type]


class Shards(CheckpointEngine):  # type: ignore[misc]
    """What DeepSpeed writes and reads its shards with (deepspeed/runtime/checkpoint_engine).

    Args:
        part: where they belong; not needed to read.
        kept: names of the model's tensors that are stored. Below ZeRO-3 DeepSpeed leaves out what is frozen by its
            first name only, so that an output head tied to the frozen embedding would be stored whole.
    """

    def __init__(self, part: Part | None = None, kept: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.name = "w2r2_ds"
        self.part, self.kept = part, kept

    def create(self, info: Any) -> None:
        """Nothing to do before a save."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        assert self.part is not None
        with self.part.attempt():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a shard."""
        assert self.part is not None
        if isinstance(module := state_dict.get("module"), dict):
            module = {name: tensor for name, tensor in module.items() if name in self.kept}
            state_dict = {**state_dict, "module": module}
        self.part.save(Path(path).relative_to(self.part.folder).as_posix(), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a shard."""
        return load(Path(path), map_location or "cpu")

    def commit(self, info: Any) -> bool:
        """Whether all is well is found out later."""
        return True


def save_shards(engine: Any, part: Part, step: int) -> None:
    """DeepSpeed's own save into ``part.folder/engine``; every rank calls it, and none leaves it early."""
    kept = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    kept |= {name for name, _ in engine.module.named_buffers()}
    engine.checkpoint_engine = Shards(part, frozenset(kept))
    with part.attempt():
        try:
            # DeepSpeed keeps rank 0's client state only below ZeRO-3; every rank's random state is a file of its own.
            engine.save_checkpoint(
                str(part.folder),
                tag=ENGINE,
                client_state={"step": step},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        except OSError:
            # It copies scripts (rank 0) and NVMe swap files without our writer, just before these two.
            if engine._optimizer_has_ckpt_event_epilogue():
                engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
            raise
    if dist.get_rank() == 0:
        for name in RECOVERY_SCRIPTS:
            (part.folder / name).unlink(missing_ok=True)


def allowed() -> Any:
    """Allow the classes that DeepSpeed's shards hold besides tensors and containers; none does anything when made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # `safe_globals` forgets on leaving what an enclosing one had allowed as well.
    return safe_globals([each for each in classes if each not in get_safe_globals()])


@contextmanager
def safe_loading() -> Iterator[None]:
    """Every `torch.load` inside reads data only, DeepSpeed's own as well."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with allowed():
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load(file: Path, map_location: Any = "cpu") -> Any:
    """Read a file of `torch.save` as data.

    Raises:
        ValueError: it names something to be run, or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            zipped = is_zipfile(opened)
        if not zipped:
            raise ValueError(f"{file} is no file of torch.save; it is cut or damaged.")
        with safe_loading():
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        refuse_programs(file)
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())[:200]}).") from error
    except (OSError, RuntimeError, EOFError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{file}: cannot be read ({said[:200]}); copy the checkpoint again.") from error


def refuse_programs(*files: Path) -> None:
    """Look through files of `torch.save`, without reading them, for names of what a load would have to call.

    Raises:
        ValueError: names the file and what it would run.
    """
    with allowed():
        for file in files:
            try:
                unsafe = sorted(get_unsafe_globals_in_checkpoint(str(file)))
            except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                raise ValueError(f"{file} is no file of torch.save ({' '.join(str(error).split())[:200]}).") from error
            if unsafe:
                raise ValueError(
                    f"{file} wants to run {', '.join(unsafe)}; a checkpoint is data and never run: do not "
                    "trust where it came from."
                )
