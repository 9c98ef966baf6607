"""Checks that need all ranks: connection, shared `out` folder, all-reduce; and the gathering of their reports."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from w2r2_ds.doctor.result import CheckResult, RankReport
from w2r2_ds.doctor.timeouts import brief, call_with_timeout
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.files.output_folder import existing_parent

CONNECT_SECONDS = 240.0
"""Time-out until all ranks have connected; importing torch from a slow network file system takes minutes."""
COLLECTIVE_SECONDS = 60.0
"""Time-out of a collective, including the start of NCCL."""
BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
ROUNDS = 3
SLOW = 1e9
"""Bytes per second between nodes below which NCCL probably uses the wrong network."""


def connect(ranks: RankInfo, host: str) -> None:
    """Initialise the default process group with gloo.

    Raises:
        TimeoutError: ranks are missing; the message lists them and the nodes that connected.
        DistError: rank 0 is unreachable, or its port is in use.
    """
    end = time.monotonic() + CONNECT_SECONDS
    # The store is hosted by torchrun's agent, with other launchers by rank 0. Every rank writes its host to the store
    # before `init_process_group`, whose error message has only the number of missing ranks.
    hosts_store = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    tcp_store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts_store,
        timeout=timedelta(seconds=CONNECT_SECONDS),
        wait_for_workers=False,
    )
    store = PrefixStore("doctor", tcp_store)
    store.set(f"host of rank {ranks.rank}", host)
    hosts: dict[int, str] = {}
    for rank in range(ranks.world_size):
        key = f"host of rank {rank}"
        while not (connected := store.check([key])) and time.monotonic() < end:
            time.sleep(0.1)
        if connected:
            hosts[rank] = store.get(key).decode()
    missing = [str(rank) for rank in range(ranks.world_size) if rank not in hosts]
    if missing:
        raise TimeoutError(
            f"rank(s) {', '.join(missing)} did not connect within {CONNECT_SECONDS:.0f} s; connected are the nodes "
            f"{', '.join(sorted(set(hosts.values())))}"
        )
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def gather_reports(report: RankReport) -> list[RankReport]:
    """Gather the reports of all ranks on every rank. Raises RuntimeError with the ranks that do not respond."""
    dist.monitored_barrier(timeout=timedelta(seconds=2 * COLLECTIVE_SECONDS), wait_all_ranks=True)
    reports = [report] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def check_shared_folder(name: str, path: Path) -> CheckResult:
    """Check that `path` (option `name`) is one folder on all nodes: rank 0 creates a file, all ranks check it."""
    result = CheckResult()
    folder, created = existing_parent(path), [""]
    if dist.get_rank() == 0:
        created = [f".doctor-{secrets.token_hex(8)}"]
        try:
            (folder / created[0]).touch()
        except OSError:  # reported by the check of this folder on rank 0's node
            created = [""]
    dist.broadcast_object_list(created)
    marker = folder / created[0]
    if not marker.exists():
        result.errors.append(
            f"{name}: {folder} is not the same folder as on the node of rank 0; put {name} on a shared file system."
        )
    dist.barrier()  # before the file is removed
    if dist.get_rank() == 0 and created[0]:
        marker.unlink(missing_ok=True)
    return result


def check_all_reduce(ranks: RankInfo, use_gpu: bool, nodes: int) -> CheckResult:
    """Check sums and bandwidth of an all-reduce: over NCCL if all ranks have `use_gpu`, else over gloo."""
    usable = [False] * ranks.world_size
    dist.all_gather_object(usable, use_gpu)
    backend = "nccl" if all(usable) else "gloo"
    try:
        # Shorter than the time-out of the process group, after which NCCL ends the whole process.
        return call_with_timeout(lambda: _all_reduce(ranks, backend, nodes), COLLECTIVE_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        variable = f"{backend.upper()}_SOCKET_IFNAME"
        return CheckResult(
            errors=[
                f"the all-reduce over {backend} failed ({brief(error)}); check the nodes of this launch, firewalls "
                f"between them, and {variable}."
            ]
        )


def _all_reduce(ranks: RankInfo, backend: str, nodes: int) -> CheckResult:
    result = CheckResult(info={"communication": backend})
    device = torch.device(f"cuda:{ranks.local_rank}" if backend == "nccl" else "cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    # A new group: if it fails, the default group can still gather the reports.
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=2 * COLLECTIVE_SECONDS))
    size = BYTES[backend] // 4
    values = torch.full((size,), float(ranks.rank + 1), device=device)
    dist.all_reduce(values, group=group)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    wrong = int((values != expected).sum())
    if wrong:
        result.errors.append(
            f"an all-reduce over {backend} gives wrong sums ({wrong} of {size} numbers, {values[0].item()} instead of "
            f"{expected}); the network or a GPU corrupts data: exclude this node and have it repaired."
        )
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values, group=group)
    if backend == "nccl":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / ROUNDS
    # A ring all-reduce sends and receives 2 (n - 1) / n of the data per rank.
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * BYTES[backend] / seconds
    result.info["all-reduce"] = f"{BYTES[backend] >> 20} MiB in {seconds * 1e3:.1f} ms, {rate / 1e9:.2f} GB/s"
    if backend == "nccl" and nodes > 1 and rate < SLOW:
        result.warnings.append(
            f"the all-reduce runs at {rate / 1e9:.2f} GB/s; NCCL may use a slow network: see NCCL_DEBUG=INFO, "
            "NCCL_SOCKET_IFNAME and NCCL_IB_HCA."
        )
    return result
