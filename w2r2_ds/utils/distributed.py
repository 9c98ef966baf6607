"""What one rank does for all: it alone reads or writes, and all go on with its result or end with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_rank_zero(compute: Callable[[], Result]) -> Result:
    """Run something on rank 0 and give its result, which must pickle, to every rank; every rank calls it.

    Without a process group it just runs.

    Raises:
        ValueError: what rank 0 raised, on every rank. Another exception is raised as it is on rank 0, and as a
            RuntimeError on the others.
    """
    if not dist.is_initialized():
        return compute()
    failure: Exception | None = None
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = compute()
        except Exception as error:
            failure = error
            outcome[1] = error if isinstance(error, ValueError) else RuntimeError(f"rank 0 failed: {error!r}")
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def say(text: str) -> None:
    """A line of rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; where it fails on some, it fails on all. The block itself must hold no collective.

    Without a process group the block runs as if this were not here.

    Raises:
        ValueError: the sentence of the lowest rank that failed, the same on all ranks. A rank that failed with
            another exception, which is no user's mistake, raises that one.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not dist.is_initialized():
            raise
        failure = error
    if not dist.is_initialized():
        return
    sentence = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
    sentences: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(sentences, sentence)
    if failure is not None and not isinstance(failure, ValueError):
        raise failure
    for said in sentences:
        if said is not None:
            raise ValueError(said) from failure
