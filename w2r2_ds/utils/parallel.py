"""Run a function in worker processes; divide the cores of a machine among ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from w2r2_ds.utils import plugins
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.interrupts import defer_interrupts

_Result = TypeVar("_Result")
MAX_LISTED = 10
"""Maximum number of problems in an error message."""
SMALL_MODEL = 512
"""Hidden size up to which one thread is faster than several, because tensors are tiny."""


def run_all(call: Callable[..., _Result], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[_Result]:
    """Call a function in worker processes, once per tuple of arguments, and yield the results in order of completion.

    Args:
        call: a module-level function (it is pickled); its exceptions are raised here.
        arguments: positional arguments of each call.
        workers: number of processes; 1 runs in this process.

    Raises:
        ValueError: a worker process died.
    """
    workers = min(workers, len(arguments))
    if workers <= 1:
        yield from (call(*args) for args in arguments)
        return
    # Not fork: the child of a process with threads may hang. The fork server imports torch once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([call.__module__])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_initialize_worker, initargs=(plugins.IMPORTED,)
    ) as pool:
        try:
            with defer_interrupts():
                futures = [pool.submit(call, *args) for args in arguments]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"One of {workers} worker processes died, perhaps for lack of memory (try fewer --workers). Finished "
                "work is kept; run the same command again."
            ) from None
        finally:  # after an error, do not start the calls that are still queued
            pool.shutdown(wait=True, cancel_futures=True)


def _initialize_worker(imported: list[str]) -> None:
    """Initialise a worker process: one thread, and the plug-ins of its parent."""
    torch.set_num_threads(1)
    plugins.import_missing(imported)


def listed(head: str, problems: Sequence[str]) -> str:
    """Error message: a headline, the first `MAX_LISTED` problems, and the number of the remaining ones."""
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n  ".join([f"{head}:", *problems[:MAX_LISTED], *more])


def threads_per_worker(workers: int, ranks: RankInfo) -> int:
    """Number of threads of each loader process: this machine's cores, divided among the ranks and their workers.

    Args:
        workers: loader processes per rank; with 0, the rank's own process loads.
        ranks: rank of this process, with the number of ranks on this machine.
    """
    return max(1, len(os.sched_getaffinity(0)) // (ranks.local_world_size * max(1, workers)))


def set_num_threads(ranks: RankInfo, hidden_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Divide this machine's cores among its ranks, unless OMP_NUM_THREADS is set.

    A small model uses one thread: on a busy machine, threads that wait for each other make it ten times slower.

    Args:
        ranks: rank of this process, with the number of ranks on this machine.
        hidden_size: hidden size of the model.
        environment: environment variables, for OMP_NUM_THREADS.
    """
    if "OMP_NUM_THREADS" not in environment:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(1 if hidden_size <= SMALL_MODEL else max(1, cores // ranks.local_world_size))
