"""DataLoader whose worker processes report every error to the main process, also of passing a batch on.

PyTorch passes the tensors of a batch through shared memory. A thread of the worker's queue does that, and prints and
drops a batch for which it fails (/dev/shm is full, no file can be opened), so that the main process would wait for
ever. Here the worker itself moves the tensors to shared memory (`_to_shared_memory`), where an error is caught like one
of loading; the queue passes bytes only.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from w2r2_ds.data.shared_memory import choose_prefetch

T = TypeVar("T")
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
"""Codes of OSError: no file descriptor, no memory, no space in /dev/shm."""
OPEN_FILES = ("open files", "ancdata")
"""Parts of messages about missing file descriptors; ``ancdata`` is that of `recvmsg` in the receiving process."""


@dataclass(frozen=True)
class _WorkerError:
    """Message and traceback of an error in a worker process, sent to the main process in place of a batch."""

    message: str
    traceback: str


class _DisconnectedError(RuntimeError):
    """A worker has closed the connection on which it passes the descriptors of a batch's shared memory."""


@dataclass(frozen=True)
class _SharedBatch:
    """A pickled batch whose tensors are in shared memory."""

    pickled: bytes

    def load(self) -> Any:
        """The batch, or a `_WorkerError` if its shared memory cannot be opened. Can be called once.

        Raises:
            _DisconnectedError: the worker has died, or its thread that passes descriptors has.
        """
        try:
            return ForkingPickler.loads(self.pickled)
        except (OSError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) or getattr(error, "errno", None) in SHORTAGES:
                return _WorkerError(shortage(error), traceback.format_exc())
            raise _DisconnectedError(f"a worker process of the data loader exited unexpectedly ({error!r})") from error

    def pin_memory(self) -> Any:
        """`load`, into pinned memory; the DataLoader calls this method with ``pin_memory=True``."""
        return pin_memory(self.load())


def shortage(cause: object) -> str:
    """Error message for a batch that cannot be passed on."""
    remedy = "free or enlarge /dev/shm (docker: --shm-size)"
    if any(part in str(cause) for part in OPEN_FILES):
        remedy = "raise the limit of open files (ulimit -n)"
    return (
        f"The data loader's worker processes cannot pass a batch to the main process ({cause}); {remedy}, or lower "
        "data.workers or data.prefetch."
    )


class _CollatedItems(Dataset[Any]):
    """Dataset whose items are whole batches, so that errors of loading and of collating are caught in one place."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> Any:
        """The batch of these indices; PyTorch's DataLoader calls this method instead of ``__getitem__``."""
        in_worker = get_worker_info() is not None
        try:
            batch = self.collate([self.dataset[index] for index in indices])
        except ValueError as error:
            if not in_worker:
                raise
            return _WorkerError(str(error), traceback.format_exc())
        return _to_shared_memory(batch) if in_worker else batch


def _to_shared_memory(batch: Any) -> _SharedBatch | _WorkerError:
    try:
        return _SharedBatch(bytes(ForkingPickler.dumps(batch)))
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError if the memory cannot be allocated
        return _WorkerError(shortage(error), traceback.format_exc())


def _identity(batch: Any) -> Any:
    return batch


class ReraisingDataLoader(DataLoader[Any], Generic[T]):
    """DataLoader of batches `T` that raises errors of a worker process as ValueError with their original message.

    PyTorch's DataLoader puts the worker's traceback into the message. For exception classes that cannot be constructed
    from one string, such as UnicodeDecodeError, it raises RuntimeError. Here the error is a ValueError with the
    worker's message (the sample or file, and what to do); the traceback is in ``error.__cause__``. So is an error of
    passing a batch on, and a worker that ends with a bus error, which a full /dev/shm causes.

    Args:
        dataset: samples.
        collate_fn: list of samples -> batch.
        prefetch: batches that each worker prepares ahead; lowered to what the free shared memory can hold.
        batch_bytes: bytes of a batch in shared memory (`shared_memory.batch_bytes`).
        num_workers: worker processes; 0 loads in the main process.
        options: further arguments of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], T],
        prefetch: int = 2,
        batch_bytes: int = 0,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            _CollatedItems(dataset, collate_fn),
            collate_fn=_identity,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            **options,
        )
        self.prefetch, self.batch_bytes = prefetch, batch_bytes

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        batches = self._start()
        while True:
            try:
                batch = next(batches)
                if isinstance(batch, _SharedBatch):
                    batch = batch.load()
            except StopIteration:
                return
            except RuntimeError as error:
                workers = getattr(batches, "_workers", ())
                if any(worker.exitcode == -signal.SIGBUS for worker in workers):
                    raise ValueError(shortage("bus error")) from error
                # A worker without free file descriptors keeps running, but cannot pass them on. A killed worker may
                # close its connection a moment before it counts as dead.
                if isinstance(error, _DisconnectedError) and not wait([each.sentinel for each in workers], timeout=2):
                    raise ValueError(shortage("too many open files in a worker")) from error
                raise
            if isinstance(batch, _WorkerError):
                raise ValueError(batch.message) from RuntimeError(batch.traceback)
            yield batch

    def _start(self) -> Iterator[Any]:
        """Start the worker processes."""
        if self.num_workers and not (self.persistent_workers and self._iterator is not None):
            # Measured here, not earlier: other loaders, such as that of the training during a validation, hold batches.
            self.prefetch_factor = choose_prefetch(self.batch_bytes, self.num_workers, self.prefetch)
        try:
            batches = super().__iter__()
        except OSError as error:
            if error.errno in SHORTAGES:
                raise ValueError(shortage(error)) from error
            raise
        if self.num_workers and threading.current_thread() is threading.main_thread():
            stock = signal.getsignal(signal.SIGCHLD)
            if callable(stock) and not isinstance(stock, _ReportBusErrors):
                signal.signal(signal.SIGCHLD, _ReportBusErrors(stock))
        return batches


class _ReportBusErrors:
    """PyTorch's SIGCHLD handler, which raises RuntimeError in the main process, anywhere, when a worker has died.

    Here it raises ValueError if the worker died of a bus error.
    """

    def __init__(self, stock: Callable[[int, FrameType | None], Any]) -> None:
        self.stock = stock

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.stock(number, frame)
        except RuntimeError as error:
            if "Bus error" in str(error):
                raise ValueError(shortage("bus error")) from error
            raise


def ignore_stop_signals(worker: int) -> None:
    """`worker_init_fn` of every loader: ignore SIGUSR1 and SIGINT, and SIGTERM unless the parent process sent it.

    Slurm sends the signals that stop a run to all processes of a job, and a terminal sends Ctrl-C to all processes of a
    launch. The rank then finishes its step, for which the workers must still load batches. PyTorch stops workers with
    SIGTERM from their parent.
    """
    signal.set_wakeup_fd(-1)  # a forked worker has that of `StopSignals`, and would report its signals to the rank
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report_unless_disconnected
    # A Python signal handler does not get the sender's process id, but `sigwaitinfo` returns it. It needs the signal to
    # be blocked; the thread that waits inherits the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = multiprocessing.parent_process()  # not getppid: that may be Python's fork server
    assert rank is not None, "a loader process has a parent"
    threading.Thread(target=_exit_on_sigterm_from, args=(rank.pid,), daemon=True).start()


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook of a worker: its threads that send a batch need no traceback if the rank has ended meanwhile."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _exit_on_sigterm_from(parent: int) -> None:
    """Wait for a SIGTERM from the process `parent`, then exit; SIGTERM from other processes is dropped."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
