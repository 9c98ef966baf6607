"""What one rank does for all: it alone reads or writes, and all go on with its result or end with its error."""

from __future__ import annotations

from collections.abc import Callable
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
