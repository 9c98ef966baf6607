"""Run the commands of an ablation on this machine, several runs at once."""

from __future__ import annotations

import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from w2r2_ds.diagnostics.ablation.commands import Devices, Step, remaining_steps
from w2r2_ds.diagnostics.ablation.plan import Plan, Run
from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.training.fault_tolerance.exit_codes import TERMINATED
from w2r2_ds.utils.files.output_folder import make_folder

logger = logging.getLogger(__name__)

LOG = "log.txt"
STOP_SECONDS = 120.0
"""Seconds that interrupted commands have to write their checkpoint before they are killed."""
TAIL = 5
"""Lines of a failed command's log that are repeated."""


@dataclass(frozen=True)
class Failure:
    """A run that did not finish.

    Attributes:
        run: the run.
        step: name of the failed command: ``train`` or ``evaluate``.
        exit_code: its exit code.
        log: file with its output.
    """

    run: Run
    step: str
    exit_code: int
    log: Path

    def __str__(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n    ".join([f"{self.run.name}: {self.step} ended with {self.exit_code}; {self.log}", *lines])


@dataclass
class LocalRunner:
    """Runs commands on the devices of this machine; a failed run does not stop the others.

    Attributes:
        plan: the ablation.
        devices: devices of one run each; as many runs at once.
    """

    plan: Plan
    devices: Sequence[Devices]
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _ports: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, runs: Sequence[Run]) -> list[Failure]:
        """Run all unfinished runs; returns those that failed.

        Ctrl-C or SIGTERM stops all commands, training with a checkpoint; the exception is raised again.
        """
        free: queue.SimpleQueue[Devices] = queue.SimpleQueue()
        for devices in self.devices:
            free.put(devices)

        def finish(run: Run) -> Failure | None:
            devices = free.get()
            try:
                return self._finish(run, devices)
            finally:
                free.put(devices)

        failures, done = [], 0
        previous = signal.signal(signal.SIGTERM, _exit_terminated)
        pool = ThreadPoolExecutor(len(self.devices))
        try:
            for future in as_completed([pool.submit(finish, run) for run in runs]):
                failure, done = future.result(), done + 1
                logger.info("%d of %d runs are done", done, len(runs))
                if failure is not None:
                    logger.error("%s", failure)
                    failures.append(failure)
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            signal.signal(signal.SIGTERM, previous)
        order = {run.folder: index for index, run in enumerate(runs)}
        return sorted(failures, key=lambda failure: order[failure.run.folder])

    def _finish(self, run: Run, devices: Devices) -> Failure | None:
        """Run the remaining commands of a run one after the other, up to the first that fails."""
        make_folder(run.folder)
        for step in remaining_steps(self.plan, run, devices, self._port):
            if self._stopped.is_set():
                return None
            started = time.perf_counter()
            logger.info("%s: %s", run.name, step.name)
            code = self._execute(step, devices, run.folder / LOG)
            if code:
                return Failure(run, step.name, code, run.folder / LOG)
            logger.info("%s: %s took %.0f s", run.name, step.name, time.perf_counter() - started)
        return None

    def _execute(self, step: Step, devices: Devices, log: Path) -> int:
        """Run a command with its output appended to a log file; returns its exit code."""
        # "python" is this interpreter, with its packages; other programs are searched on PATH. The tensors of small
        # models gain nothing from a second thread, and several runs share the cores.
        program = sys.executable if step.words[0] == "python" else step.words[0]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **devices.environment, "PYTHONUNBUFFERED": "1"}
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(step.words)}\n".encode())
            output.flush()
            with self._lock:
                if self._stopped.is_set():
                    return TERMINATED
                # In a group of its own: `_stop` signals the launcher and all its ranks.
                process = subprocess.Popen(
                    [program, *step.words[1:]],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._processes.add(process)
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        return code

    def _stop(self) -> None:
        """Send SIGINT to all running commands and wait for all their processes; no new command starts."""
        with self._lock:
            self._stopped.set()
            running = list(self._processes)
        for process in running:
            _signal_group(process.pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        # The launcher may end before its ranks, which are still writing their checkpoint.
        while any(_signal_group(process.pid, 0) for process in running):
            if time.monotonic() > deadline:
                for process in running:
                    _signal_group(process.pid, signal.SIGKILL)
                break
            time.sleep(0.1)

    def _port(self) -> int:
        """A free port that no other run of this ablation was given."""
        with self._lock:
            port = free_port()
            while port in self._ports:
                port = free_port()
            self._ports.add(port)
            return port


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group, 0 only tests it; returns whether it has processes."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _exit_terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def local_devices(ranks: int, jobs: int, gpus: Sequence[str], cores: int) -> list[Devices]:
    """Devices of the runs: every run has `ranks` GPUs, or `ranks` cores of a machine without GPUs.

    Args:
        ranks: ranks per run.
        jobs: most runs at once; 0 for as many as fit.
        gpus: names of the visible GPUs, as in CUDA_VISIBLE_DEVICES.
        cores: number of cores that this process may use.

    Raises:
        ValueError: a number is too small, or there are fewer GPUs than ranks, or than `jobs` runs need.
    """
    if ranks < 1 or jobs < 0:
        raise ValueError(f"--ranks is {ranks} and --jobs {jobs}; they must be at least 1 and 0.")
    if not gpus:
        return [Devices(ranks) for _ in range(jobs or max(1, cores // ranks))]
    fitting = len(gpus) // ranks
    if fitting < max(1, jobs):
        needed = max(1, jobs) * ranks
        raise ValueError(f"--ranks {ranks} and --jobs {jobs} need {needed} GPUs, but {len(gpus)} are visible.")
    return [Devices(ranks, ",".join(gpus[i * ranks : (i + 1) * ranks])) for i in range(jobs or fitting)]
