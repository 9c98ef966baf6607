"""Where the ranks' states and the verdict are pinned: a key-value store of rank 0, apart from training's own."""

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

VERDICT = "verdict"
REACHED = timedelta(seconds=30)
"""To connect at the start."""


class HeartbeatStore:
    """Collective to make; afterwards each call is one exchange with rank 0's machine, which may block when it is gone.

    Raises:
        ValueError: rank 0 cannot listen, or a rank cannot reach it.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store: Store
        if self.world == 1:  # nobody else to talk to: no network
            self.store = HashStore()
            self._clear()
            return
        host, port = os.environ["MASTER_ADDR"], [0]
        with raise_on_all_ranks():
            if self.rank == 0:
                server = TCPStore(host, 0, None, True, REACHED, wait_for_workers=False)
                self.store, port = server, [server.port]
                self._clear()
        dist.broadcast_object_list(port, src=0)
        with raise_on_all_ranks():
            if self.rank != 0:
                try:
                    self.store = TCPStore(host, port[0], None, False, REACHED, wait_for_workers=False)
                except dist.DistError as error:
                    raise ValueError(
                        f"rank {self.rank} cannot reach rank 0's watchdog at {host}, port {port[0]} "
                        f"({' '.join(str(error).split())[:200]}); ranks must reach any port of that machine."
                    ) from error

    def _clear(self) -> None:
        """Every key is there from the start, so that no read waits for one."""
        self.store.set(VERDICT, "")
        for rank in range(self.world):
            self.store.set(f"state/{rank}", json.dumps(asdict(State())))

    def post(self, state: State) -> None:
        """Pin this rank's state."""
        self.store.set(f"state/{self.rank}", json.dumps(asdict(state)))

    def states(self) -> list[State]:
        """All ranks' states."""
        return [State(**json.loads(self.store.get(f"state/{rank}"))) for rank in range(self.world)]

    def decide(self, verdict: Diagnosis | None) -> None:
        """Pin the verdict; None says that every rank has left, and ends by itself."""
        self.store.set(VERDICT, json.dumps(None if verdict is None else asdict(verdict)))

    def verdict(self) -> Sequence[Diagnosis | None]:
        """Nothing while there is none, else what was decided."""
        raw = self.store.get(VERDICT)
        if not raw:
            return []
        read = json.loads(raw)
        return [None if read is None else Diagnosis(**read)]
