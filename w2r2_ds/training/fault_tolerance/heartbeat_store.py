"""Key-value store of heartbeats and the diagnosis: a TCPStore on rank 0, separate from the process group's store."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from w2r2_ds.training.fault_tolerance.hang_detector import Diagnosis, State
from w2r2_ds.utils.distributed import raise_on_all_ranks

DIAGNOSIS = "diagnosis"
CONNECT_TIMEOUT = timedelta(seconds=30)


class HeartbeatStore:
    """Heartbeats of all ranks and the diagnosis, readable and writable by every rank.

    Construction is collective. Afterwards each call is an exchange with rank 0's machine, and may block if it died.

    Raises:
        ValueError: rank 0 cannot listen on a port, or a rank cannot reach it.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store: Store
        if self.world_size == 1:  # no network needed
            self.store = HashStore()
            self._initialize()
            return
        host, port = os.environ["MASTER_ADDR"], [0]
        with raise_on_all_ranks():
            if self.rank == 0:
                # Port 0: the system chooses a free one, which is broadcast below. Rank 0 must not wait here for clients
                # (`wait_for_workers`): they connect only after the broadcast.
                server = TCPStore(host, 0, None, True, CONNECT_TIMEOUT, wait_for_workers=False)
                self.store, port = server, [server.port]
                self._initialize()
        dist.broadcast_object_list(port, src=0)
        with raise_on_all_ranks():
            if self.rank != 0:
                try:
                    self.store = TCPStore(host, port[0], None, False, CONNECT_TIMEOUT, wait_for_workers=False)
                except dist.DistError as error:
                    raise ValueError(
                        f"rank {self.rank} cannot reach rank 0's watchdog at {host}, port {port[0]} "
                        f"({' '.join(str(error).split())[:200]}); ranks must reach any port of that machine."
                    ) from error

    def _initialize(self) -> None:
        """Set every key: `get` of a missing key would block."""
        self.store.set(DIAGNOSIS, "")
        for rank in range(self.world_size):
            self.store.set(f"state/{rank}", json.dumps(asdict(State())))

    def put_state(self, state: State) -> None:
        """Store this rank's heartbeat."""
        self.store.set(f"state/{self.rank}", json.dumps(asdict(state)))

    def states(self) -> list[State]:
        """Last heartbeats of all ranks."""
        return [State(**json.loads(self.store.get(f"state/{rank}"))) for rank in range(self.world_size)]

    def put_diagnosis(self, diagnosis: Diagnosis | None) -> None:
        """Store the diagnosis; None if every rank has left or is about to end."""
        self.store.set(DIAGNOSIS, json.dumps(None if diagnosis is None else asdict(diagnosis)))

    def diagnosis(self) -> Sequence[Diagnosis | None]:
        """The stored diagnosis as the only element; empty while none is stored."""
        raw = self.store.get(DIAGNOSIS)
        if not raw:
            return []
        found = json.loads(raw)
        return [None if found is None else Diagnosis(**found)]
