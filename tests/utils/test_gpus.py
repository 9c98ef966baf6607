"""CUDA_VISIBLE_DEVICES that hides GPUs, with injected answers of torch and an injected /dev."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fork_server import environment
from w2r2_ds.bench import harness
from w2r2_ds.demo import run as demo_run
from w2r2_ds.training.deepspeed import process_group
from w2r2_ds.utils import gpus
from w2r2_ds.utils.distributed import RankInfo, gloo_process_group
from w2r2_ds.utils.gpus import VISIBLE, check_gpus


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Function `machine(present, visible)`: the number of GPUs of the machine, and of those that torch finds."""

    def make(present: int, visible: int) -> None:
        for index in range(present):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(gpus, "DEVICES", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)

    return make


@pytest.mark.parametrize("named", ["7", "", "-1", "GPU-unknown", "no number"])
def test_a_variable_that_names_no_gpu(machine: object, named: str) -> None:
    machine(4, 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=VISIBLE) as caught:
        check_gpus(1, {VISIBLE: named})
    assert repr(named) in str(caught.value) and "DS_ACCELERATOR=cpu" in str(caught.value)


def test_a_variable_that_names_fewer_gpus_than_ranks(machine: object) -> None:
    machine(4, 2)  # type: ignore[operator]
    check_gpus(2, {VISIBLE: "0,1"})
    with pytest.raises(ValueError, match=rf"4 ranks .*{VISIBLE} is '0,1'.* 2 GPU"):
        check_gpus(4, {VISIBLE: "0,1"})
    with pytest.raises(ValueError, match=r"3 ranks .* 2 GPU"):
        check_gpus(3, {})


def test_a_torch_that_finds_no_gpu_of_the_machine(machine: object) -> None:
    machine(1, 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"torch {torch.__version__.partition('+')[0]}"):
        check_gpus(1, {})


def test_the_cpu(machine: object) -> None:
    """A machine without GPUs, where DeepSpeed's launcher sets the variable too; and the explicit choice of the CPU."""
    machine(0, 0)  # type: ignore[operator]
    check_gpus(2, {VISIBLE: "0,1"})
    machine(4, 0)  # type: ignore[operator]
    check_gpus(2, {VISIBLE: "", "DS_ACCELERATOR": "cpu"})


def test_every_command_that_uses_a_gpu_checks_first(machine: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation and feature caches (`gloo_process_group`), benchmarks and the demo."""
    machine(4, 0)  # type: ignore[operator]
    monkeypatch.setenv(VISIBLE, "7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # restored afterwards
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=VISIBLE):
        process_group.init_process_group()
    with pytest.raises(ValueError, match=VISIBLE), gloo_process_group(RankInfo()):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match=VISIBLE):
        harness.find_device()
    with pytest.raises(ValueError, match=VISIBLE):
        demo_run.run_demo()


def test_a_command_ends_with_one_line() -> None:
    program = f"""
import sys, tempfile, torch
from pathlib import Path
from w2r2_ds.utils import gpus
gpus.DEVICES = Path(tempfile.mkdtemp())
(gpus.DEVICES / "nvidia0").touch()
from w2r2_ds.commands import main
torch.cuda.is_available = lambda: False
sys.exit(main({["bench", "kernels"]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment() | {VISIBLE: "7"}, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("w2r2 bench: ") and VISIBLE in line
