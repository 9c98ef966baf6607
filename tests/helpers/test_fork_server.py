"""The fork server: exit codes of forked ranks, and the end of the others when one fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fork_server import fork_ranks


def work(folder: Path) -> None:
    """Entry point of a rank: rank 0 does the action that is the folder's name; rank 1 sleeps."""
    if os.environ["RANK"] == "1":
        time.sleep(600)
    print(folder.name, os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"], flush=True)
    if folder.name == "raises":
        raise ValueError("wrong")
    if folder.name == "exits":
        sys.exit(75)
    if folder.name == "dies":
        os.abort()
    if folder.name == "waits":
        time.sleep(600)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "ranks", "timeout", "status"),
    [("ends", 1, 60, 0), ("raises", 2, 60, 1), ("exits", 2, 60, 75), ("dies", 2, 60, -6), ("waits", 2, 1, -9)],
)
def test_fork_ranks_returns_the_exit_code_of_the_first_failed_rank(
    tmp_path: Path, name: str, ranks: int, timeout: int, status: int
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert fork_ranks(ranks, Path(__file__), folder, 1, timeout) == status
    printed = (folder / "output.txt").read_text()
    assert printed.startswith(f"{name} {ranks} 1\n") or name == "waits"  # killed, possibly before it printed
    assert ("ValueError: wrong" in printed) == (name == "raises")
