"""Manifest: complete and damaged checkpoints, the newest one, pruning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from damaged_files import flip_bit
from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    TENSORS,
    delete,
    expired_checkpoints,
    find_checkpoint,
    has_checkpoint,
    newest_complete,
    read_manifest,
    rename_damaged,
    step_folder,
    step_folders,
    verify,
    write_manifest,
    write_pointer,
)
from w2r2_ds.utils.files import atomic_io

CONTENT = {TENSORS: b"tensors" * 100, "engine/shard.pt": b"shard" * 100, "config.yaml": b"seed: 0\n", "rng-0.pt": b"r"}


def saved(run: Path, step: int) -> Path:
    """A complete checkpoint with arbitrary content."""
    path = step_folder(run, step)
    (path / "engine").mkdir(parents=True)
    for name, content in CONTENT.items():
        (path / name).write_bytes(content)
    description = {"step": step, "world_size": 1, "metrics": {"loss": 0.1}, "incarnation": 1}
    write_manifest(path, description, {name: atomic_io.digest(path / name) for name in CONTENT})
    return path


def test_a_complete_checkpoint_verifies(tmp_path: Path) -> None:
    path = saved(tmp_path, 30)
    assert verify(path) is None
    (path / "evaluation").mkdir()  # evaluate.py writes there
    assert verify(path) is None
    assert read_manifest(path)["step"] == 30


@pytest.mark.parametrize("name", CONTENT)
def test_a_flipped_bit_is_reported_with_the_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 30)
    flip_bit(path / name, len(CONTENT[name]) // 2)
    assert str(path / name) in str(verify(path)) and "it is damaged." in str(verify(path))
    assert verify(path, deep=False) is None


@pytest.mark.parametrize("name", CONTENT)
def test_a_truncated_or_missing_file_is_reported_with_its_size(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 30)
    size = len(CONTENT[name])
    os.truncate(path / name, size - 1)
    for deep in (True, False):
        assert f"{path / name} has {size - 1} bytes, {MANIFEST} states {size}" in str(verify(path, deep))
    (path / name).unlink()
    assert f"{path / name} cannot be read" in str(verify(path, deep=False))


@pytest.mark.slow
def test_every_flipped_bit_of_the_manifest_is_detected(tmp_path: Path) -> None:
    path = saved(tmp_path, 30)
    whole = (path / MANIFEST).read_bytes()
    for at in range(len(whole)):
        flip_bit(path / MANIFEST, at)
        if json_or_none(path / MANIFEST) != json.loads(whole):  # not if one whitespace became another
            assert str(path / MANIFEST) in str(verify(path)), at
        (path / MANIFEST).write_bytes(whole)
    os.truncate(path / MANIFEST, len(whole) // 2)
    assert str(path / MANIFEST) in str(verify(path))


def json_or_none(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def test_the_newest_complete_checkpoint_is_found_and_damaged_ones_reported(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) == (None, {})
    paths = [saved(tmp_path, step) for step in (10, 20, 30, 1_000_000)]
    write_pointer(tmp_path / "checkpoints" / LATEST, paths[0])
    (tmp_path / "checkpoints" / "step-9000000.0123.partial").mkdir()
    assert newest_complete(tmp_path) == (paths[3], {})
    flip_bit(paths[3] / "engine" / "shard.pt", 7)
    (paths[2] / MANIFEST).unlink()
    found, damaged = newest_complete(tmp_path)
    assert found == paths[1] and list(damaged) == [paths[3], paths[2]]
    assert "shard.pt has SHA-256" in damaged[paths[3]] and MANIFEST in damaged[paths[2]]
    for path in paths[:2]:
        flip_bit(path / TENSORS, 0)
    found, damaged = newest_complete(tmp_path)
    assert found is None and list(damaged) == paths[::-1]


def test_damaged_checkpoints_are_renamed_and_never_overwrite_each_other(tmp_path: Path) -> None:
    names = [rename_damaged(saved(tmp_path, 30)).name for _ in range(3)]
    assert names == ["step-000030.damaged", "step-000030.damaged-2", "step-000030.damaged-3"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names and not step_folders(tmp_path)


def test_a_checkpoint_is_found_by_run_pointer_or_folder(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    old, new = saved(tmp_path, 10), saved(tmp_path, 20)
    folder = tmp_path / "checkpoints"
    assert has_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path) == new  # killed before `latest` was first written
    write_pointer(folder / LATEST, old)
    write_pointer(folder / BEST, new)
    assert find_checkpoint(tmp_path) == find_checkpoint(folder / LATEST) == old
    assert find_checkpoint(folder / BEST) == find_checkpoint(new) == new
    write_pointer(folder / LATEST, step_folder(tmp_path, 15))
    assert find_checkpoint(tmp_path) == new
    os.truncate(new / TENSORS, 3)
    with pytest.raises(ValueError, match=r"trainable.safetensors has 3 bytes.* copy the checkpoint again"):
        find_checkpoint(new)
    assert find_checkpoint(tmp_path) == old


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in (10, 20, 30, 40, 1_000_000)]
    assert expired_checkpoints(tmp_path, 2) == paths[2::-1]
    write_pointer(tmp_path / "checkpoints" / BEST, paths[1])
    assert expired_checkpoints(tmp_path, 2) == [paths[2], paths[0]]
    assert expired_checkpoints(tmp_path, 5) == []


def test_an_interrupted_deletion_is_incomplete_and_finished_later(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in (10, 20, 30)]
    (paths[0] / MANIFEST).unlink()
    (
        paths[2] / MANIFEST
    ).unlink()  # incomplete, and newer than the newest complete one: reported by a resume, not deleted
    assert expired_checkpoints(tmp_path, 2) == [paths[0]]
    delete(paths[1])
    assert not paths[1].exists()


def test_a_damaged_best_pointer_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [saved(tmp_path, step) for step in (10, 20, 30)]
    (paths[0].parent / BEST).write_text("step-00002p\n")
    assert expired_checkpoints(tmp_path, 1) == [paths[1], paths[0]]
    assert "step-00002p" in caplog.text


@pytest.mark.parametrize("name", ["../elsewhere", "/step-000010", "step-000010/..", ""])
def test_a_pointer_must_name_a_step_folder(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 10)
    (tmp_path / "checkpoints" / LATEST).write_text(name)
    with pytest.raises(ValueError, match=LATEST):
        find_checkpoint(tmp_path)


def test_a_copy_without_optimizer_shards_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    (path / "engine" / "shard.pt").unlink()
    (path / "rng-0.pt").unlink()
    assert find_checkpoint(path) == path and verify(path) is not None
    (path / TENSORS).write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{TENSORS} has 3 bytes"):
        find_checkpoint(path)
