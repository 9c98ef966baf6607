"""A failure that only one rank sees stops all ranks, so that none waits in a collective for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def together() -> Iterator[None]:
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
