"""Choice of the checkpoint to resume from, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from damaged_files import flip_bit
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.checkpoint import resume
from w2r2_ds.training.checkpoint.manifest import TENSORS, step_folder, step_folders, write_manifest
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.checkpoint.resume import StartPoint, find_start, take_over
from w2r2_ds.training.fault_tolerance.exit_codes import RetryableError
from w2r2_ds.utils.files import atomic_io


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, without a process group."""
    monkeypatch.setattr(resume.dist, "get_world_size", lambda: 2)


def saved(run: Path, step: int, **changes: Any) -> Path:
    """A complete checkpoint, with the files that these tests read."""
    path = step_folder(run, step)
    path.mkdir(parents=True)
    (path / TENSORS).write_bytes(b"tensors")
    torch.save({"cpu": torch.arange(5)}, path / "rng-0.pt")
    files = {file.name: atomic_io.digest(file) for file in path.iterdir()}
    description = {"step": step, "incarnation": 1, "world_size": 2, "zero_stage": 3, "best": None}
    write_manifest(path, description | changes, files)
    return path


def configured(run: Path, mode: Any = "auto") -> RunConfig:
    return RunConfig(out=str(run), resume=mode)


def test_a_fresh_run_starts_at_the_beginning(tmp_path: Path) -> None:
    for mode in ("auto", "none"):
        assert find_start(configured(tmp_path, mode)) == StartPoint()
    OwnershipToken.claim(tmp_path)  # killed before its first checkpoint
    assert find_start(configured(tmp_path, "none")) == StartPoint()


def test_existing_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    with pytest.raises(ValueError, match=r"--resume auto .*--out"):
        find_start(configured(tmp_path, "none"))


def test_damaged_checkpoints_are_renamed_once_the_run_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = saved(tmp_path, 10), saved(tmp_path, 20)
    flip_bit(cut / TENSORS, 3)
    start = find_start(configured(tmp_path))
    assert start.checkpoint == whole and not start.needs_conversion
    assert f"{cut / TENSORS} has SHA-256" in caplog.text
    assert list(step_folders(tmp_path)) == [20, 10]  # nothing is renamed before all checks have passed
    token = take_over(configured(tmp_path), start)
    assert token.number == 1 and list(step_folders(tmp_path)) == [10]
    assert (cut.with_name(cut.name + ".damaged") / TENSORS).is_file()


def test_a_run_without_a_complete_checkpoint_is_rejected(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    flip_bit(path / TENSORS, 3)
    with pytest.raises(ValueError, match=rf"no checkpoint of .* .*{TENSORS} has SHA-256"):
        find_start(configured(tmp_path))


def test_another_number_of_ranks_needs_zero(tmp_path: Path) -> None:
    saved(tmp_path, 10, world_size=4)
    assert find_start(configured(tmp_path)).needs_conversion
    saved(tmp_path, 20, world_size=4, zero_stage=0)
    with pytest.raises(ValueError, match=r"was written by 4 rank\(s\) without ZeRO, .* for 2; start as many"):
        find_start(configured(tmp_path))


def test_the_kernels_of_the_manifest_are_passed_on(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    assert find_start(configured(tmp_path)).kernels is None
    kernels = {"names": ["swiglu"], "device": "GPU A", "torch": "2.13.0"}
    saved(tmp_path, 20, kernels=kernels)
    assert find_start(configured(tmp_path)).kernels == kernels


def test_an_unwritable_output_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"run.*: cannot be written \(.*\); .*--out"):
        take_over(configured(tmp_path / "run"), StartPoint())


def test_a_checkpoint_that_an_older_launch_saves_meanwhile_ends_the_newer_one(tmp_path: Path) -> None:
    """The older launch still runs on a node without network, and loses ownership only at the claim."""
    saved(tmp_path, 10)
    start = find_start(configured(tmp_path))
    saved(tmp_path, 20)
    with pytest.raises(RetryableError, match=r"another process of .* has saved a checkpoint"):
        take_over(configured(tmp_path), start)
    again = find_start(configured(tmp_path))
    assert again.checkpoint is not None and again.checkpoint.name == "step-000020"
    assert take_over(configured(tmp_path), again).number == 2
