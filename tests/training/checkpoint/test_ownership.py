"""Two launches of one run: the later one writes, the earlier one stops."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from w2r2_ds.training.checkpoint.ownership import INCARNATION, OwnershipLost, OwnershipToken


def test_a_later_launch_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = OwnershipToken.claim(tmp_path)
    first.check()
    second = OwnershipToken.claim(tmp_path)
    second.check()
    assert (first.number, second.number) == (1, 2) and first.token != second.token
    with pytest.raises(
        OwnershipLost, match=r"was taken over by launch 2 \(host \S+, job 17, 20.*launch 1 of 20.* stops"
    ):
        first.check()
    written = json.loads((tmp_path / "checkpoints" / INCARNATION).read_text())
    assert written == second.to_json() and written["job"] == "17"


def test_a_missing_or_unreadable_token_stops_the_writer(tmp_path: Path) -> None:
    token = OwnershipToken.claim(tmp_path)
    (tmp_path / "checkpoints" / INCARNATION).write_text("{")
    with pytest.raises(OwnershipLost, match="is missing or damaged"):
        token.check()
    (tmp_path / "checkpoints" / INCARNATION).unlink()
    with pytest.raises(OwnershipLost, match="is missing or damaged"):
        token.check()


def test_launches_have_their_own_temporary_folders_and_remove_older_ones(tmp_path: Path) -> None:
    first = OwnershipToken.claim(tmp_path)
    mine = first.temporary_folder(30)
    mine.mkdir()
    left = tmp_path / "checkpoints" / "step-000020.partial"  # of an earlier version
    left.mkdir()
    (mine.parent / "latest.01ab.partial").write_text("step")
    first.remove_partial()
    assert mine.exists() and not left.exists() and not (mine.parent / "latest.01ab.partial").exists()
    second = OwnershipToken.claim(tmp_path)
    assert not mine.exists()
    assert second.temporary_folder(30) != first.temporary_folder(30)


def test_an_io_error_does_not_mean_lost_ownership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary failure of a network file system must not end the run."""
    token = OwnershipToken.claim(tmp_path)

    def stale(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale"):
        token.check()
