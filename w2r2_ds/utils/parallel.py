"""Work that is done scene by scene, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
SHOWN = 10
"""Sentences of a list of problems that are printed; the rest is counted."""


def run_all(call: Callable[..., _Result], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[_Result]:
    """What a function returns for each of many arguments, as soon as it is there, in no order.

    Args:
        call: of a module, so that it can be sent; errors it raises come through.
        arguments: of each call.
        workers: processes; 1 works in this one.

    Raises:
        ValueError: a process died.
    """
    workers = min(workers, len(arguments))
    if workers <= 1:
        yield from (call(*each) for each in arguments)
        return
    # Not forked from here: a child of a process that has threads may hang. The server imports torch once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([call.__module__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(call, *each) for each in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"One of {workers} processes died (is there memory for so many? --workers gives fewer); what was done "
                "is kept, so run it again."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def listed(head: str, sentences: Sequence[str]) -> str:
    """A headline, the first sentences below it, and how many more there are."""
    more = [f"... and {len(sentences) - SHOWN} more"] if len(sentences) > SHOWN else []
    return "\n  ".join([f"{head}:", *sentences[:SHOWN], *more])
