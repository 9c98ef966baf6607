"""Write and read one rank's files of a checkpoint, DeepSpeed's shards included.

Writing: DeepSpeed's save contains barriers, so if a rank raised in the middle of it, the others would wait forever.
Write errors (a full disk) are therefore recorded, and exchanged between ranks after the save.

Reading: DeepSpeed reads its shards with ``torch.load(weights_only=False)``, which calls any function that a crafted
pickle refers to. Here every read is restricted to tensors, built-in containers and the few classes of
`allow_shard_classes`. `safe_loading` sets TORCH_FORCE_WEIGHTS_ONLY_LOAD, so this also holds for DeepSpeed's own calls.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.atomic_io import Digest, Writer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ENGINE = "engine"
"""Folder of DeepSpeed's shards in a checkpoint; DeepSpeed's tag."""
FORCE, FORCE_OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""Scripts that DeepSpeed copies beside its shards; deleted, because they unpickle without restriction."""


def _reduce_stage(stage: ZeroStageEnum) -> tuple[type[ZeroStageEnum], tuple[int]]:
    return ZeroStageEnum, (stage.value,)


# DeepSpeed's shards have the ZeRO stage. Python 3.11.2 would pickle it as a call of getattr, which no read allows.
copyreg.pickle(ZeroStageEnum, _reduce_stage)


class RankWriter:
    """Writes one rank's files of a checkpoint.

    Attributes:
        folder: the temporary folder of the checkpoint.
        files: digest of every written file, keyed by its path below `folder`.
        failure: message of the first write error: rank, host, file, cause. None without one. The rank continues after
            an error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Digest] = {}
        self.failure: str | None = None

    @contextmanager
    def record_errors(self) -> Iterator[None]:
        """Record an OSError instead of raising it."""
        try:
            yield
        except OSError as error:
            source = f"rank {dist.get_rank()} on {socket.gethostname()}"
            # shutil.copytree, which DeepSpeed calls, raises an OSError whose message has all causes.
            cause = f"{error.filename}: {error.strerror} (errno {error.errno})" if error.strerror else str(error)
            self.failure = self.failure or f"{source}: {cause}"

    def write(self, name: str, write: Callable[[Writer], object]) -> None:
        """Write, fsync and hash one file.

        Args:
            name: path below `folder`.
            write: writes the content to the file object that it gets.
        """
        with self.record_errors():
            with atomic_io.writing(self.folder / name) as writer:
                write(writer)
            self.files[name] = writer.digest

    def save(self, name: str, state: Any) -> None:
        """Write one file with `torch.save`."""
        self.write(name, lambda writer: torch.save(state, writer))  # type: ignore[arg-type]


class SafeCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed checkpoint engine that writes with a `RankWriter` and reads data only.

    Args:
        writer: writes the files; not needed to read.
        saved_names: names of the module's tensors to save. With ZeRO stages 0 to 2, DeepSpeed drops a frozen tensor
            under one of its names only, so an LM head that is tied to the frozen embedding would be saved whole.
    """

    def __init__(self, writer: RankWriter | None = None, saved_names: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.name = "w2r2_ds"
        self.writer, self.saved_names = writer, saved_names

    def create(self, info: Any) -> None:
        """No-op; required by the interface."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        assert self.writer is not None
        with self.writer.record_errors():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a shard."""
        assert self.writer is not None
        # Trained parameters and buffers only; frozen weights are loaded from `model.vlm` on resume.
        if isinstance(module := state_dict.get("module"), dict):
            module = {name: tensor for name, tensor in module.items() if name in self.saved_names}
            state_dict = {**state_dict, "module": module}
        self.writer.save(Path(path).relative_to(self.writer.folder).as_posix(), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a shard."""
        return load(Path(path), map_location or "cpu")

    def commit(self, info: Any) -> bool:
        """No-op, always True; `gather_results` exchanges the write errors of all ranks after the save."""
        return True


def save_shards(engine: DeepSpeedEngine, writer: RankWriter, step: int) -> None:
    """Save DeepSpeed's shards into ``writer.folder/engine``. Collective: no rank leaves it early.

    Args:
        engine: engine around `W2R2Step`.
        writer: records files and write errors of this rank.
        step: number of completed optimizer steps.
    """
    saved_names = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    saved_names |= {name for name, _ in engine.module.named_buffers()}
    engine.checkpoint_engine = SafeCheckpointEngine(writer, frozenset(saved_names))
    with writer.record_errors():
        try:
            # Random states are in files of their own: under ZeRO-3 DeepSpeed saves the client_state of rank 0 only.
            engine.save_checkpoint(
                str(writer.folder),
                tag=ENGINE,
                client_state={"step": step},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        except OSError:
            # DeepSpeed copies its scripts (rank 0) and swap files (NVMe offload) without our checkpoint engine. An
            # error there skips the end of its save, an epilogue and a barrier. Both run here, because the other ranks
            # wait in the barrier.
            if engine._optimizer_has_ckpt_event_epilogue():
                engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
            raise
    if dist.get_rank() == 0:
        for name in RECOVERY_SCRIPTS:
            (writer.folder / name).unlink(missing_ok=True)


def allow_shard_classes() -> AbstractContextManager[None]:
    """Context in which `torch.load` also allows the classes in DeepSpeed's shards; none of them has side effects."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # On leaving, `safe_globals` also removes classes that an enclosing context had allowed; so add the new ones only.
    return safe_globals([cls for cls in classes if cls not in get_safe_globals()])


@contextmanager
def safe_loading() -> Iterator[None]:
    """Context in which every `torch.load`, also inside DeepSpeed, loads data and calls no pickled function."""
    # torch.load reads these variables at every call. FORCE_OFF is removed: with both set, torch raises an error.
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_OFF)}
    os.environ[FORCE] = "1"
    try:
        with allow_shard_classes():
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load(file: Path, map_location: Any = "cpu") -> Any:
    """Load a `torch.save` file without calling any function in it.

    Raises:
        ValueError: the file contains code to run, is damaged or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            zipped = is_zipfile(opened)
        if not zipped:
            # torch would fall back to its old format, a bare pickle stream.
            raise ValueError(f"{file} is not a torch.save file; it is truncated or damaged.")
        with safe_loading():
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        check_safe_pickles(file)  # raises a clearer message if the file contains code
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())[:200]}).") from error
    except (OSError, RuntimeError, EOFError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{file}: cannot be read ({cause[:200]}); copy the checkpoint again.") from error


def check_safe_pickles(*files: Path) -> None:
    """Scan `torch.save` files, without loading them, for functions that loading would call.

    Raises:
        ValueError: a file contains such functions; the message has both. Or it is not a `torch.save` file.
    """
    with allow_shard_classes():
        for file in files:
            try:
                unsafe = sorted(get_unsafe_globals_in_checkpoint(str(file)))
            except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                cause = " ".join(str(error).split())
                raise ValueError(f"{file} is not a torch.save file ({cause[:200]}).") from error
            if unsafe:
                raise ValueError(
                    f"{file} contains code to run ({', '.join(unsafe)}); a checkpoint is data and is never executed: "
                    "do not trust its source."
                )
