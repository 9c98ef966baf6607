"""Loader processes: errors of items, of collating and of passing batches on, with unchanged messages and in seconds."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils.data import Dataset

import w2r2_ds
from w2r2_ds.data import reraising_loader
from w2r2_ds.data.reraising_loader import ReraisingDataLoader
from w2r2_ds.data.tasks.parsing import AnswerError


class Failing(Dataset[int]):
    """A data set with one item: the result of a function that may raise."""

    def __init__(self, error: Callable[[], Any]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.error()


def not_utf8() -> None:
    b"caf\xc3".decode()


def not_json() -> None:
    json.loads("{")


def not_an_integer() -> None:
    TypeAdapter(int).validate_python("x")


def of_two_lines() -> None:
    raise ValueError("frame.jpg is broken:\nValueError: bad header\n")


def answer() -> None:
    raise AnswerError("it is not an integer")


def empty() -> None:
    raise ValueError


def returned() -> None:
    return None


def raise_item(items: list[Any]) -> Any:
    raise ValueError(f"{len(items)} item cannot be collated")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [not_utf8, not_json, not_an_integer, of_two_lines, answer, empty, returned])
def test_errors_of_items_and_of_collating_keep_their_message(error: Callable[[], None], workers: int) -> None:
    with pytest.raises(ValueError) as expected:
        raise_item([error()])
    with pytest.raises(ValueError) as caught:
        next(iter(ReraisingDataLoader(Failing(error), raise_item, num_workers=workers)))
    assert str(caught.value) == str(expected.value)
    assert workers == 0 or "in __getitems__" in str(caught.value.__cause__)


class Items(Dataset[Any]):
    """Two items: a tensor, and the result of a function."""

    def __init__(self, second: Callable[[], Any]) -> None:
        self.second = second

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.second() if index else torch.ones(1000)


def many_tensors() -> list[torch.Tensor]:
    return [torch.ones(1) for _ in range(200)]


def ended_by_bus_error() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGBUS)
    time.sleep(60)


def loader(second: Callable[[], Any]) -> ReraisingDataLoader[list[Any]]:
    return ReraisingDataLoader(Items(second), list, num_workers=1)


def assert_names_options(message: str, cause: str) -> None:
    assert cause in message and "data.workers" in message and "data.prefetch" in message and "\n" not in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize("code", ["No space left on device (28)", "Cannot allocate memory (12)"])
def test_shared_memory_that_cannot_be_allocated(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The worker inherits the replaced function. PyTorch's own loader would wait for ever."""
    share = torch.UntypedStorage._share_fd_cpu_

    def fail(storage: Any) -> Any:
        if storage.nbytes() < 800:
            return share(storage)
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {code}")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)
    with pytest.raises(ValueError) as caught:
        list(loader(many_tensors))
    assert_names_options(str(caught.value), "/dev/shm")
    assert code in str(caught.value) and "in _to_shared_memory" in str(caught.value.__cause__)


@pytest.fixture
def open_files() -> Any:
    """Function that lowers the limit of open files, so that this process can open only a number of further ones."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(spare: int) -> None:
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        free = [number for number in range(2000) if number not in used]  # descriptors must be below the limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spare", [100, 3], ids=["in the worker", "at the start of the worker"])
def test_no_file_descriptor_is_left(open_files: Callable[[int], None], spare: int) -> None:
    """A batch of 200 tensors needs 200 descriptors in the worker, and a worker a few in the main process."""
    open_files(spare)
    with pytest.raises(ValueError) as caught:
        list(loader(many_tensors))
    assert_names_options(str(caught.value), "open files")


@pytest.mark.timeout(60)
def test_no_file_descriptor_is_left_in_the_main_process(open_files: Callable[[int], None]) -> None:
    batches = iter(loader(many_tensors))
    assert torch.equal(next(batches)[0], torch.ones(1000))
    open_files(40)  # after the worker has started
    with pytest.raises(ValueError) as caught:
        next(batches)
    assert_names_options(str(caught.value), "open files")


def test_the_thread_that_pins_batches_reports_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pin_memory` of PyTorch needs a GPU, so it is replaced; so is the function that opens the descriptors."""

    def no_descriptors(pickled: bytes) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(reraising_loader, "pin_memory", lambda batch: ("pinned", batch))
    good, bad = (reraising_loader._to_shared_memory([torch.ones(3), *many_tensors()]) for _ in range(2))
    assert isinstance(good, reraising_loader._SharedBatch) and isinstance(bad, reraising_loader._SharedBatch)
    name, batch = good.pin_memory()
    assert name == "pinned" and torch.equal(batch[0], torch.ones(3))
    monkeypatch.setattr(reraising_loader.ForkingPickler, "loads", no_descriptors)
    name, error = bad.pin_memory()
    assert isinstance(error, reraising_loader._WorkerError)
    assert_names_options(error.message, "open files")


@pytest.mark.timeout(60)
def test_a_bus_error_of_a_worker_that_the_main_process_waits_for() -> None:
    batches = iter(loader(ended_by_bus_error))
    next(batches)
    with pytest.raises(ValueError) as caught:
        next(batches)
    assert_names_options(str(caught.value), "bus error")


@pytest.mark.timeout(60)
def test_a_bus_error_of_a_worker_while_the_main_process_computes() -> None:
    """PyTorch raises the error where the main process is, not in `next`."""
    batches = iter(loader(ended_by_bus_error))
    next(batches)
    with pytest.raises(ValueError) as caught:
        time.sleep(50)
    assert_names_options(str(caught.value), "bus error")


@pytest.mark.timeout(60)
def test_a_killed_worker_is_not_a_user_error() -> None:
    """The kernel kills processes when memory is short; another launch may succeed."""
    with pytest.raises(RuntimeError, match=r"Killed|exited unexpectedly"):
        list(loader(lambda: os.kill(os.getpid(), signal.SIGKILL)))


SMALL = """
import torch
from w2r2_ds.data.reraising_loader import ReraisingDataLoader
try:
    list(ReraisingDataLoader([torch.ones(2**20)], list, num_workers=1))
except ValueError as error:
    print("ValueError", error)
"""


@pytest.mark.timeout(120)
def test_a_full_dev_shm() -> None:
    """In a private /dev/shm of 256 KiB, which needs root."""
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    private = ["unshare", "-m", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("a private /dev/shm cannot be mounted here: needs root")
    command = [*private, f'{mount} && exec "$0" -c "$1"', sys.executable, SMALL]
    root = Path(w2r2_ds.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.stdout.startswith("ValueError"), done.stderr[-2000:]
    assert_names_options(done.stdout.strip(), "/dev/shm")


def test_every_loader_of_the_package_reports_errors_of_its_workers() -> None:
    package = Path(w2r2_ds.__file__).parent
    users = {str(path.relative_to(package)) for path in package.rglob("*.py") if " DataLoader(" in path.read_text()}
    assert users <= {"bench/hf_baseline/hf_trainer.py"}
