"""The checks of a node and of a rank, and `run_checks`, which runs them with a time limit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.doctor.checks import data, environment, gpu, host, settings
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief, call_with_timeout
from w2r2_ds.utils.distributed import RankInfo

SECONDS = 30.0
"""Time limit of one check. A file system that takes longer is too slow for training."""

Checks = dict[str, Callable[[], CheckResult]]


@dataclass(frozen=True)
class DoctorRequest:
    """Parsed command line of the doctor.

    Attributes:
        config: configuration of the run; None to check only the machine.
        ds_path: path of the DeepSpeed JSON; empty for none.
        files: paths of the recipe and the DeepSpeed JSON, as given on the command line.
        command_error: message about an invalid command line or recipe; empty if it is valid.
    """

    config: RunConfig | None
    ds_path: str
    files: list[str]
    command_error: str = ""


def node_checks(request: DoctorRequest, ranks: RankInfo) -> Checks:
    """Checks that local rank 0 runs for its node. Only rank 0 checks the settings, which are the same on all ranks."""
    config = request.config
    workers = config.data.workers if config else 0  # without a run there are no loader workers
    temporary = Path(tempfile.gettempdir())
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or temporary)
    checks: Checks = {
        "versions": lambda: environment.check_versions(settings.needed_packages(config)),
        "code": lambda: environment.check_code(request.files),
        "open files": lambda: host.check_open_files(workers),
        "TMPDIR": lambda: host.check_folder("TMPDIR", temporary, host.SPARE, "training"),
        "extensions": lambda: host.check_folder("TORCH_EXTENSIONS_DIR", extensions, host.SPARE, "a compiled extension"),
        "GPU health": gpu.check_health,
    }
    if config is not None:
        checks["out"] = lambda: host.check_folder(
            "out", Path(config.out), host.SPARE + host.missing_checkpoint_bytes(config), "the run"
        )
        if not config.demo.enabled:  # the demo creates its data and models
            checks["data"] = lambda: data.check_data(config, ranks.local_world_size)
            checks["weights"] = lambda: data.check_weights(config.model)
        if ranks.rank == 0:
            checks["settings"] = lambda: settings.check_settings(config, request.ds_path, ranks.world_size)
    return checks


def rank_checks(request: DoctorRequest, ranks: RankInfo) -> Checks:
    """Checks of every rank: its GPU, precision, attention and kernels."""
    return {
        "device": lambda: gpu.check_device(ranks.local_rank),
        "precision": lambda: settings.check_precision(request.config),
    }


def run_checks(checks: Checks) -> dict[str, CheckResult]:
    """Run checks one after the other; an exception or a time-out is an error in the result of its check."""
    results: dict[str, CheckResult] = {}
    for name, check in checks.items():
        try:
            results[name] = call_with_timeout(check, SECONDS)
        except TimeoutError as error:
            message = f"check {name}: {error}; a file system or driver of this node hangs or is very slow."
            results[name] = CheckResult(errors=[message])
        except Exception as error:  # a broken library may raise any type
            results[name] = CheckResult(errors=[f"check {name} failed ({brief(error)})."])
    return results
