"""Fault scenarios: inject one fault per launch, resume after each, and compare the final run with the reference run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fault_runs import Launch, run_to_end
from runs import read_metrics
from w2r2_ds.training.checkpoint.manifest import DAMAGED, PARTIAL, newest_complete, step_folders, verify

NOT_EXACT = ("samples_per_s", "tokens_per_s", "step_s", "memory_gib", "data_s", "tflops", "mfu")
"""Metrics of time and memory. All other metrics must be bitwise equal."""


@dataclass(frozen=True)
class Fault:
    """A fault that is injected into one launch of a job, from outside, in a rank's process or into files before it.

    Attributes:
        name: row of the fault matrix; empty if the launch only has the damage done by `before`.
        codes: allowed exit codes of a rank.
        inject: called while the ranks run; returns False if a rank ended before the fault could be injected.
        in_process: rank -> arguments of `inject_in_process.install`.
        logged: strings that must occur in the log of at least one rank.
        before: called with the run folder before the launch, to damage its files.
        damage_name: row of the fault matrix for `before`.
        name_suffix: called with the run folder after the launch; its result is appended to `name`.
        may_miss: the run may finish before the fault is injected. Then the fault is not counted and the scenario ends.
    """

    name: str
    codes: tuple[int, ...]
    inject: Callable[[Launch], bool] = lambda launch: True
    in_process: dict[int, dict[str, Any]] | None = None
    logged: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda out: None
    damage_name: str = ""
    name_suffix: Callable[[Path], str] = lambda out: ""
    may_miss: bool = False


@dataclass
class Row:
    """A row of the fault matrix.

    Attributes:
        fault: name of the fault.
        injected: number of injections.
        restarts: number of launches that the fault ended, each followed by a resume with the same command.
        equal: whether final weights, random states and metrics are bitwise equal to the reference run's.
        ended: seconds from each fault to the end of all ranks; empty if the run continued.
    """

    fault: str
    injected: int = 0
    restarts: int = 0
    equal: bool = False
    ended: list[float] = field(default_factory=list)


def run_with_faults(out: Path, command: list[str], faults: Sequence[Fault]) -> list[Row]:
    """Launch the command once per fault, then resume it without faults to the end; returns one row per fault name.

    Raises:
        AssertionError: an exit code that the fault does not allow, a missing log entry, a lost or partial checkpoint.
    """
    rows: dict[str, Row] = {}
    codes = [1]
    for fault in faults:
        fault.before(out)
        step = newest_step(out)
        with Launch(out, command, fault.in_process) as launch:
            injected = fault.inject(launch)
            codes = launch.wait()
            if fault.may_miss and not any(codes):
                break
            assert injected, f"{fault.name}: a rank ended before the fault\n{launch.output()}"
            shown = f"{fault.name}: {codes}\n{launch.output()}"
            assert set(codes) <= set(fault.codes), shown
            for word in fault.logged:
                assert any(word in launch.text(rank) for rank in range(len(codes))), f"{word!r} is not logged: {shown}"
            for name in filter(None, (fault.damage_name, fault.name and fault.name + fault.name_suffix(out))):
                rows.setdefault(name, Row(name)).injected += 1
            if any(codes):
                row = rows[fault.name + fault.name_suffix(out)]
                row.restarts += 1
                row.ended.append(launch.seconds_to_end())
        assert_no_partial_checkpoint(out)
        assert newest_step(out) >= step, f"{fault.name} lost a checkpoint"
    if any(codes):
        run_to_end(out, command)
    return list(rows.values())


def newest_step(out: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    path, _ = newest_complete(out)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def assert_no_partial_checkpoint(out: Path) -> None:
    """Assert that no step folder is newer than the newest complete checkpoint: saves are atomic under SIGKILL."""
    _, damaged = newest_complete(out)
    assert not damaged, damaged


def assert_equals_reference(out: Path, expected: Path, renamed_checkpoints: int = 0) -> None:
    """Assert bitwise equal final weights, random states of both ranks and metrics, and no additional files.

    Args:
        out: run folder of the run with faults.
        expected: run folder of the reference run.
        renamed_checkpoints: number of checkpoints that the test damaged; the run renames each.
    """
    (last, path), *_ = step_folders(out).items()
    (wanted, other), *_ = step_folders(expected).items()
    assert last == wanted
    mine, theirs = load_file(path / "trainable.safetensors"), load_file(other / "trainable.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "weights differ from the reference run's"
    for file in sorted(other.glob("rng-*.pt")):
        a, b = (torch.load(each / file.name, weights_only=True) for each in (path, other))
        assert torch.equal(a["cpu"], b["cpu"]), f"random state differs: {file.name}"
    assert exact(out) == exact(expected)
    for checkpoint in step_folders(out).values():
        assert verify(checkpoint) is None, verify(checkpoint)
    assert (out / "checkpoints" / "latest").read_text().strip() == path.name
    names = sorted(each.name for each in (out / "checkpoints").iterdir())
    damaged = [name for name in names if DAMAGED in name]
    assert len(damaged) == renamed_checkpoints, names
    expected_names = sorted([*(each.name for each in (expected / "checkpoints").iterdir()), *damaged])
    assert names == expected_names, "files differ from the reference run's"
    assert not list(out.glob(f"*{PARTIAL}")), sorted(out.iterdir())


def exact(out: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without `NOT_EXACT`."""
    return [{name: value for name, value in line.items() if name not in NOT_EXACT} for line in read_metrics(out)]


def record_rows(record: Callable[[str, object], None], rows: Sequence[Row]) -> None:
    """Write rows to pytest's report (`--junitxml`) for tests/faults/matrix.py. Call it after all assertions."""
    for row in rows:
        row.equal = True
        record("fault", json.dumps(asdict(row)))
