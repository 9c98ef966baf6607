"""Files of a checkpoint are read as data; write errors are recorded instead of raised."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.training.checkpoint import deepspeed_io
from w2r2_ds.training.checkpoint.deepspeed_io import (
    FORCE,
    FORCE_OFF,
    RankWriter,
    SafeCheckpointEngine,
    check_safe_pickles,
    load,
    safe_loading,
)
from w2r2_ds.utils.rng import reseed, rng_state, set_rng_state


class Trap:
    """Creates a folder when it is unpickled without restriction."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1, without a process group."""
    monkeypatch.setattr(deepspeed_io.dist, "get_rank", lambda: 1)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file in the form of a shard that creates `tmp_path/ran` when it is unpickled without restriction."""
    file = tmp_path / "shard.pt"
    torch.save({"state": torch.ones(3), "more": Trap(tmp_path / "ran")}, file)
    return file


def test_the_malicious_pickle_runs_code_if_unpickled(trap: Path) -> None:
    """Otherwise the tests below could not fail."""
    torch.load(trap, weights_only=False)
    assert (trap.parent / "ran").is_dir()


def test_code_in_a_file_raises_and_does_not_run(trap: Path) -> None:
    for read in (load, SafeCheckpointEngine().load, check_safe_pickles):
        with pytest.raises(ValueError, match=r"shard\.pt .*posix\.mkdir"):
            read(trap)  # type: ignore[operator]
    with safe_loading(), pytest.raises(Exception, match=r"posix\.mkdir"):
        torch.load(trap, weights_only=False)  # as DeepSpeed calls it
    assert not (trap.parent / "ran").exists()


def test_environment_variables_cannot_allow_code_and_are_restored(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_OFF, "1")
    monkeypatch.delenv(FORCE, raising=False)
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        load(trap)
    assert not (trap.parent / "ran").exists()
    assert os.environ[FORCE_OFF] == "1" and FORCE not in os.environ


def test_the_zero_stage_is_pickled_without_getattr() -> None:
    """On every Python: 3.11.2 pickles members of an enumeration as a call of getattr."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    content = pickle.dumps(ZeroStageEnum.weights)
    assert b"getattr" not in content and pickle.loads(content) is ZeroStageEnum.weights


def test_deepspeeds_own_classes_are_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {"scaler": LossScaler(1.0), "stage": ZeroStageEnum.weights, "where": fragment_address(numel=3, start=4)}
    torch.save(state, tmp_path / "shard.pt")
    check_safe_pickles(tmp_path / "shard.pt")
    with safe_loading():
        load(tmp_path / "shard.pt")
        read = torch.load(tmp_path / "shard.pt", weights_only=False)  # still allowed after one inside
    assert read["stage"] is ZeroStageEnum.weights and read["where"] == state["where"]
    assert read["scaler"].cur_scale == 1.0


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_that_torch_did_not_save_raises(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "shard.pt"
    file.write_bytes(content)
    for read in (load, check_safe_pickles):
        with pytest.raises(ValueError, match=r"shard\.pt"):
            read(file)  # type: ignore[operator]
    file.unlink()
    with pytest.raises(ValueError, match=r"shard\.pt: cannot be read"):
        load(file)


@pytest.mark.usefixtures("alone")
def test_the_first_write_error_is_recorded_and_the_rank_continues(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    engine = SafeCheckpointEngine(writer)
    engine.makedirs(str(tmp_path / "engine"), exist_ok=True)
    engine.save({"weight": torch.ones(3)}, str(tmp_path / "engine" / "one.pt"))
    engine.save({"weight": torch.ones(3)}, str(tmp_path / "nowhere" / "two.pt"))
    engine.save({"weight": torch.ones(3)}, str(tmp_path / "missing" / "three.pt"))
    assert list(writer.files) == ["engine/one.pt"]
    expected = f"rank 1 on {socket.gethostname()}: {tmp_path}/nowhere/two.pt: No such file or directory (errno 2)"
    assert writer.failure == expected
    assert torch.equal(load(tmp_path / "engine" / "one.pt")["weight"], torch.ones(3))


@pytest.mark.usefixtures("alone")
def test_an_error_of_copytree_is_recorded_with_its_cause(tmp_path: Path) -> None:
    """DeepSpeed copies swap files with `shutil.copytree`, whose error has neither `filename` nor `errno`."""
    writer = RankWriter(tmp_path)
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "swap.bin").touch()
    with writer.record_errors():
        shutil.copytree(tmp_path / "swap", tmp_path / "copy", copy_function=fail_to_copy)
    assert writer.failure is not None and writer.failure.startswith(f"rank 1 on {socket.gethostname()}: ")
    assert "swap.bin" in writer.failure and "No space left on device" in writer.failure
    assert "None" not in writer.failure


def fail_to_copy(source: str, target: str) -> None:
    """Raise the error of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_file_system_is_recorded(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("this root may not mount (a container without CAP_SYS_ADMIN)")
    try:
        writer = RankWriter(small)
        writer.save("large.pt", {"weight": torch.ones(100_000)})
        assert writer.failure is not None and writer.failure.endswith("large.pt: No space left on device (errno 28)")
        writer = RankWriter(small)
        (small / "large.pt").unlink()
        writer.save("small.pt", {"weight": torch.ones(1000)})
        assert writer.failure is None
    finally:
        assert os.system(f"umount {small}") == 0


def test_a_random_state_is_restored_or_seeded_by_rank_and_step() -> None:
    before = rng_state()
    first = torch.rand(4)
    set_rng_state(before)
    assert torch.equal(torch.rand(4), first)
    drawn = []
    for rank, step in ((0, 3), (1, 3), (0, 4), (0, 3)):
        reseed(7, rank, step)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[3])
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:3])
    set_rng_state(before)
