"""Two evaluations in one folder: the second raises on all of its ranks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fork_server import start_ranks
from w2r2_ds.evaluation.runner import evaluation_lock
from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.files.file_lock import locked

NAME = "scanrefer-fused"


def enter(rank: int, folder: Path) -> str:
    try:
        with evaluation_lock(folder, NAME, RankInfo(rank, 2)):
            dist.barrier()
            held = (folder / f"{NAME}.lock").is_file()
            dist.barrier()
        return f"went in, locked: {held}"
    except ValueError as error:
        return str(error)


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = []
    for number in range(2):
        results.append(enter(rank, folder))
        dist.barrier()
        if rank == 0 and number == 0:
            (folder / "rejected").touch()
            while (folder / f"{NAME}.lock").exists():
                time.sleep(0.05)
        dist.barrier()  # only rank 0 polls: rank 1 could take rank 0's new lock for the old one
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_a_second_evaluation_raises_on_all_ranks(tmp_path: Path) -> None:
    with locked(tmp_path / f"{NAME}.lock", "other", "wait"):
        ranks = start_ranks(2, Path(__file__), tmp_path, free_port())
        while not (tmp_path / "rejected").exists():
            assert [rank.poll() for rank in ranks] == [None, None], (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
    while None in [rank.poll() for rank in ranks]:
        time.sleep(0.05)
    assert [rank.code for rank in ranks] == [0, 0], (tmp_path / "output.txt").read_text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert f"{tmp_path}: {NAME} is being evaluated by process {os.getpid()} on " in first[0]
    assert first[0].endswith("; wait until it has ended, or pass another --out.")
    assert first[1] == "went in, locked: True"


def test_other_tasks_and_geometries_have_their_own_lock(tmp_path: Path) -> None:
    zero = "scanrefer-zero"
    with (
        evaluation_lock(tmp_path, NAME, RankInfo()),
        evaluation_lock(tmp_path, zero, RankInfo()),
        pytest.raises(ValueError, match="scanrefer-zero is being evaluated"),
        evaluation_lock(tmp_path, zero, RankInfo()),
    ):
        pass
    assert not list(tmp_path.iterdir())
