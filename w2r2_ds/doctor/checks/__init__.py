"""Which checks a rank does on its own, in which order, and within which time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from w2r2_ds.config.schema import DataConfig, RunConfig
from w2r2_ds.doctor import disk, installed, jit_locks, limits, own_code
from w2r2_ds.doctor.checkpoint_size import room_bytes
from w2r2_ds.doctor.checks import data as data_checks
from w2r2_ds.doctor.checks import gpu, settings
from w2r2_ds.doctor.place import Place
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import Alarm, TooLong, bounded, brief

SECONDS = 15.0
"""For one check; a file system that takes longer to answer will not serve a training run."""
GIB = 2**30
SPARE = GIB
"""Bytes of free space beyond what is known to be needed: logs, temporary files, compiled kernels."""

ASK_DRIVER = ("settings", "device", "use")
"""Checks that call into the GPU driver, which may hold Python's lock, so that no thread's time limit works."""

Checks = dict[str, Callable[[], CheckResult]]


@dataclass(frozen=True)
class DoctorRequest:
    """What the doctor is to look at.

    Args:
        config: of the run; None looks at the machine alone.
        ds_path: DeepSpeed JSON, empty for none.
        files: recipe and JSON, as the command line names them.
        refused: the sentence with which the command line or recipe was refused, empty if it was not.
    """

    config: RunConfig | None
    ds_path: str
    files: list[str]
    refused: str = ""


def node_checks(asked: DoctorRequest, place: Place, torch_usable: bool) -> Checks:
    """Checks of a node; rank 0 also looks at what is the same for all.

    Args:
        asked: what for.
        place: of this rank, which leads its node.
        torch_usable: whether torch can be imported; without it, neither weights nor the DeepSpeed JSON are read.
    """
    config = asked.config
    data = config.data if config else DataConfig()
    checks: Checks = {
        "versions": lambda: installed.check_versions(settings.needed_packages(config)),
        "code": lambda: own_code.check_code(asked.files),
        "limits": lambda: limits.check_limits(data.workers if config else 0, data.prefetch, place.local_world),
        "TMPDIR": lambda: disk.check_folder("TMPDIR", Path(tempfile.gettempdir()), SPARE, "training"),
        "extensions": lambda: disk.check_folder("TORCH_EXTENSIONS_DIR", _extensions(), SPARE, "a compiled extension"),
        "locks": jit_locks.check_locks,
        "GPU health": gpu.check_health,
    }
    if config is not None:
        checks["out"] = lambda: check_out(config)
        if config.demo.enabled:
            checks["data"] = lambda: data_checks.demo_makes(config)
        else:
            checks["data"] = lambda: data_checks.check_data(config.data)
            if torch_usable:
                checks["weights"] = lambda: data_checks.check_weights(config.model)
        if place.rank == 0 and torch_usable:
            checks["settings"] = lambda: settings.check_settings(config, asked.ds_path, place.world)
    return checks


def check_out(config: RunConfig) -> CheckResult:
    """The folder of a run, with room for the checkpoints that are not there yet."""
    return disk.check_folder("out", Path(config.out), SPARE + room_bytes(config), "the run, checkpoints and all, still")


def rank_checks(asked: DoctorRequest, place: Place) -> Checks:
    """Checks of every rank: its own GPU, and what it would use."""
    return {
        "device": partial(gpu.check_device, place.local_rank, place.world),
        "use": partial(settings.check_use, asked.config),
    }


def driver_silent(found: dict[str, CheckResult]) -> bool:
    """Whether nvidia-smi is there and told of no GPU: a call into such a driver may hold the whole process for ever."""
    health = found.get("GPU health", CheckResult())
    return bool(health.wrong or health.warnings) and not health.shown


def do_checks(
    checks: Checks, alarm: Alarm, end: float, before: dict[str, CheckResult] | None = None
) -> dict[str, CheckResult]:
    """Do checks one after the other, none longer than its time; a check that fails itself is reported, not raised.

    Args:
        checks: by name.
        alarm: told what is being done.
        end: seconds after the start at which all must be through.
        before: what was found before, on which it depends what can be looked at.
    """
    found: dict[str, CheckResult] = {}
    for name, check in checks.items():
        if name in ASK_DRIVER and driver_silent((before or {}) | found):
            found[name] = CheckResult(warnings=[f"{name} was not looked at, as the GPU driver does not answer."])
            continue
        alarm.now(f"looking at {name}")
        seconds = min(SECONDS, alarm.left(end))
        try:
            found[name] = bounded(check, seconds, alarm.left(end))
        except TooLong as late:
            text = f"looking at {name} had not ended in its time; "
            if late.works:
                found[name] = CheckResult(
                    warnings=[f"{text}this machine is slow or busy: run the doctor again by itself."]
                )
            else:
                found[name] = CheckResult(wrong=[f"{text}a file system or driver hangs: look at it on this node."])
        except Exception as error:  # what broken libraries raise can be anything
            found[name] = CheckResult(
                wrong=[f"{name} cannot be looked at ({brief(error)}); see whether imports are right."]
            )
    return found


def _extensions() -> Path:
    """Where extensions are compiled; without TORCH_EXTENSIONS_DIR each run has a folder of its own below TMPDIR."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else Path(tempfile.gettempdir())
