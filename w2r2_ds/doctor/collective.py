"""An all-reduce as training does it: the sum is right, and how fast it is."""

from __future__ import annotations

import time
from datetime import timedelta

from w2r2_ds.doctor.rendezvous import Meeting
from w2r2_ds.doctor.result import CheckResult

BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
ROUNDS = 3
SLOW = 1e9
"""Bytes per second between nodes below which NCCL most likely talks over the wrong network."""


def check_all_reduce(meeting: Meeting, backend: str, nodes: int, seconds: float) -> CheckResult:
    """Every rank calls it at once, in a thread that is left behind where it hangs.

    Args:
        meeting: whose store the ranks meet at again.
        backend: nccl or gloo.
        nodes: among which the ranks are.
        seconds: after which each operation gives up.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    place = meeting.place
    outcome = CheckResult(shown={"communication": backend})
    device = torch.device(f"cuda:{place.local_rank}" if backend == "nccl" else "cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=PrefixStore("all-reduce", meeting.store),
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=seconds),
    )
    size = BYTES[backend] // 4
    values = torch.full((size,), float(place.rank + 1), device=device)
    dist.all_reduce(values)
    expected = place.world * (place.world + 1) / 2
    differing = int((values != expected).sum())
    if differing:
        outcome.wrong.append(
            f"an all-reduce over {backend} gives wrong sums here ({differing} of {size} numbers, {values[0].item()} "
            f"instead of {expected}); the network or a GPU alters data: leave this node out and have it looked at."
        )
    dist.barrier()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if backend == "nccl":
        torch.cuda.synchronize()
    per_round = (time.perf_counter() - started) / ROUNDS
    # Every rank sends and receives 2 (n - 1) / n of the data in the best algorithm.
    rate = 2 * (place.world - 1) / place.world * BYTES[backend] / per_round
    outcome.shown["all-reduce"] = f"{BYTES[backend] >> 20} MiB in {per_round * 1e3:.1f} ms, {rate / 1e9:.2f} GB/s"
    if backend == "nccl" and nodes > 1 and rate < SLOW:
        outcome.warnings.append(
            f"the all-reduce runs at {rate / 1e9:.2f} GB/s; NCCL may have taken a slow network: look with "
            "NCCL_DEBUG=INFO which, and at NCCL_SOCKET_IFNAME and NCCL_IB_HCA."
        )
    return outcome
