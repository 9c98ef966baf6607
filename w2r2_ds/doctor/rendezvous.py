"""Ranks meet at a key-value store before any collective: who is missing is known by name, nothing waits for ever."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from w2r2_ds.doctor.place import Place, allocated_hosts
from w2r2_ds.doctor.timeouts import bounded, brief
from w2r2_ds.utils.sanitize import message

EVERY = 0.05
"""Seconds between looks for many keys."""
NOTICE = 50.0
"""Seconds after which ranks that are still to come are named; torch's import may take them longer."""


class Unreachable(Exception):
    """There is no store where it should be; the text is a sentence."""


class Meeting:
    """Rank 0 holds the store (or torchrun's agent does), every rank writes under names of its own.

    Args:
        place: of this process.
        seconds: to reach the store.

    Raises:
        Unreachable: rank 0 is not there in that time, or its port is taken.
    """

    def __init__(self, place: Place, seconds: float) -> None:
        from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

        self.place = place

        def reach() -> Store:
            store = TCPStore(
                place.address,
                place.port,
                is_master=place.rank == 0 and not place.hosted,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
            return PrefixStore("w2r2-doctor", store)

        try:
            self.store = bounded(reach, seconds + 2)
        except Exception as error:  # torch's and the operating system's; a place that cannot be reached has many
            where = f"{place.address}, port {place.port}"
            if place.rank == 0:
                other = "submit the job again" if os.environ.get("SLURM_JOB_ID") else "start with another MASTER_PORT"
                raise Unreachable(
                    f"rank 0 cannot listen at {where} ({brief(error)}); another run may have this port: {other}."
                ) from None
            raise Unreachable(
                f"rank 0 cannot be reached at {where} within {seconds:.0f} s ({brief(error)}); look whether its "
                "node is up and whether a firewall or a wrong interface lies between."
            ) from None

    def say(self, name: str, value: Any) -> None:
        """Write a value of this rank, as JSON.

        Raises:
            ConnectionError: the store is gone.
        """
        try:
            self.store.set(f"{name}/{self.place.rank}", json.dumps(value))
        except RuntimeError as error:  # DistNetworkError and its like
            raise ConnectionError(f"{name} could not be said: {brief(error)}") from None

    def hear(self, name: str, rank: int, seconds: float) -> Any:
        """What a rank says under a name.

        Raises:
            TimeoutError: nothing in that time.
        """
        key = f"{name}/{rank}"
        try:
            self.store.wait([key], timedelta(seconds=max(0.01, seconds)))
        except Exception as error:  # DistStoreError for a time that is over, and for a store that is gone
            raise TimeoutError(f"rank {rank} did not say {name}: {brief(error)}") from None
        return self._get(key)

    def said(self, name: str, rank: int) -> bool:
        """Whether a rank has said something under a name.

        Raises:
            ConnectionError: the store is gone.
        """
        try:
            return bool(self.store.check([f"{name}/{rank}"]))
        except RuntimeError as error:
            raise ConnectionError(f"{name} could not be asked for: {brief(error)}") from None

    def gather(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What ranks say under a name, of those that do so in that time.

        Raises:
            ConnectionError: the store is gone.
        """
        end = time.monotonic() + seconds
        waiting, found = list(ranks), {}
        while True:
            for rank in list(waiting):
                if self.said(name, rank):
                    found[rank] = self._get(f"{name}/{rank}")
                    waiting.remove(rank)
            if not waiting or time.monotonic() > end:
                return found
            time.sleep(EVERY)

    def _get(self, key: str) -> Any:
        try:
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise ConnectionError(f"{key} could not be read: {brief(error)}") from None


class Coming:
    """Rank 0 looks who comes, in a thread beside its own checks, so that it knows when the last one came.

    Args:
        meeting: where they come.
        seconds: to wait for them.
    """

    def __init__(self, meeting: Meeting, seconds: float) -> None:
        self._here: dict[int, Any] = {}
        self._when = 0.0
        self._lost: ConnectionError | None = None

        def look() -> None:
            ranks = range(meeting.place.world)
            try:
                self._here = meeting.gather("here", ranks, min(NOTICE, seconds))
                if seconds > NOTICE and len(self._here) < len(ranks):
                    self._notice(ranks)
                    self._here |= meeting.gather("here", ranks, seconds - NOTICE)
            except ConnectionError as error:
                self._lost = error
            self._when = time.monotonic()

        self._thread = threading.Thread(target=look, daemon=True)
        self._thread.start()

    def _notice(self, ranks: Iterable[int]) -> None:
        """Say within a minute who is late: it may be slow, and may never come."""
        hosts = {rank: each["host"] for rank, each in self._here.items()}
        late = [rank for rank in ranks if rank not in self._here]
        (sentence,) = missing_sentences(late, hosts, allocated_hosts(), NOTICE)
        print(message(f"doctor: still waiting: {sentence}"), flush=True)

    def result(self) -> tuple[dict[int, Any], float]:
        """What each rank said as it came, and the reading of the monotonic clock when the last did, or was given up.

        Raises:
            ConnectionError: the store is gone.
        """
        self._thread.join()
        if self._lost is not None:
            raise self._lost
        return self._here, self._when


def missing_sentences(missing: list[int], hosts: dict[int, str], allocated: list[str], seconds: float) -> list[str]:
    """Who did not come, by node where the scheduler's list or the ranks before and after tell it.

    Args:
        missing: ranks.
        hosts: of the ranks that came.
        allocated: all nodes of the job, empty if unknown.
        seconds: waited, from the start of rank 0.
    """
    if not missing:
        return []
    ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    absent = [host for host in allocated if host not in hosts.values()]
    where = f"{', '.join(absent)}: " if absent else ""
    return [
        f"{where}{ranks} did not come within {seconds:.0f} s (there are {_short(hosts)}); look whether the node is up "
        "and starts Python, or leave it out (sbatch --exclude)."
    ]


def _short(hosts: dict[int, str]) -> str:
    names = sorted(set(hosts.values()))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
