"""A fault scenario: faults one after the other, a restart after each, and assertions about the final run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fault_runs import Start, undisturbed
from runs import read_metrics
from w2r2_ds.training.checkpoint.manifest import DAMAGED, PARTIAL, newest_complete, step_folders, verify

NOT_EXACT = ("samples_per_s", "tokens_per_s", "step_s", "memory_gib", "data_s", "tflops", "mfu")
"""Times and sizes in a line of metrics; everything else is equal to the last bit."""


@dataclass(frozen=True)
class Fault:
    """Something that happens once to one start of a job.

    Attributes:
        name: its row in the fault matrix; empty where nothing happens but what is `found`.
        codes: exit codes that a rank may end with.
        act: done from outside while the ranks run; says whether it came in time.
        inside: by rank, arguments of `fault_inside.install`.
        logged: words that a rank must have written.
        before: done before the start, to what the last start left.
        found: name of what `before` did, a row of its own.
        when: from what was left, words to add to the name.
        late: whether it may come when the run is done; then it does not count, and no further fault comes.
    """

    name: str
    codes: tuple[int, ...]
    act: Callable[[Start], bool] = lambda start: True
    inside: dict[int, dict[str, Any]] | None = None
    logged: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda out: None
    found: str = ""
    when: Callable[[Path], str] = lambda out: ""
    late: bool = False


@dataclass
class Row:
    """A row of the fault matrix.

    Attributes:
        fault: what happened.
        injected: how often.
        restarts: starts of the same command that were needed after it, beyond the first.
        equal: whether weights, random states and metrics at the end are those of an undisturbed run.
        ended: seconds from each fault until all ranks had ended; empty where the run went on.
    """

    fault: str
    injected: int = 0
    restarts: int = 0
    equal: bool = False
    ended: list[float] = field(default_factory=list)


def suffer(out: Path, command: list[str], faults: Sequence[Fault]) -> list[Row]:
    """Let each fault happen to a start of its own, then let the run end; rows by the faults' names.

    Raises:
        AssertionError: a start ended otherwise than its fault allows, or left something torn.
    """
    rows: dict[str, Row] = {}
    codes = [1]
    for fault in faults:
        fault.before(out)
        step = newest_step(out)
        with Start(out, command, fault.inside) as start:
            happened = fault.act(start)
            codes = start.wait()
            if fault.late and not any(codes):
                break
            assert happened, f"{fault.name}: the run ended before\n{start.output()}"
            shown = f"{fault.name}: {codes}\n{start.output()}"
            assert set(codes) <= set(fault.codes), shown
            for word in fault.logged:
                assert any(word in start.text(rank) for rank in range(len(codes))), f"{word!r} is not logged: {shown}"
            for name in filter(None, (fault.found, fault.name and fault.name + fault.when(out))):
                rows.setdefault(name, Row(name)).injected += 1
            if any(codes):
                row = rows[fault.name + fault.when(out)]
                row.restarts += 1
                row.ended.append(start.seconds_to_end())
        assert_nothing_torn(out)
        assert newest_step(out) >= step, f"{fault.name} lost a checkpoint"
    if any(codes):
        undisturbed(out, command)
    return list(rows.values())


def newest_step(out: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    path, _ = newest_complete(out)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def assert_nothing_torn(out: Path) -> None:
    """Assert that every step folder above the newest complete checkpoint is complete: a kill leaves no partial one."""
    _, damaged = newest_complete(out)
    assert not damaged, damaged


def assert_as_undisturbed(out: Path, expected: Path, rename_damaged: int = 0) -> None:
    """Equal to the last bit: the final weights, both ranks' random states, every line of metrics; nothing lies about.

    Args:
        out: the run that faults happened to.
        expected: the run that none happened to.
        rename_damaged: damaged checkpoints that the test itself made, which the run has renamed.
    """
    (last, path), *_ = step_folders(out).items()
    (wanted, other), *_ = step_folders(expected).items()
    assert last == wanted
    mine, theirs = load_file(path / "trainable.safetensors"), load_file(other / "trainable.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "other weights than the undisturbed run's"
    for file in sorted(other.glob("rng-*.pt")):
        a, b = (torch.load(each / file.name, weights_only=True) for each in (path, other))
        assert torch.equal(a["cpu"], b["cpu"]), f"another random state: {file.name}"
    assert exact(out) == exact(expected)
    for checkpoint in step_folders(out).values():
        assert verify(checkpoint) is None, verify(checkpoint)
    assert (out / "checkpoints" / "latest").read_text().strip() == path.name
    names = sorted(each.name for each in (out / "checkpoints").iterdir())
    damaged = [name for name in names if DAMAGED in name]
    assert len(damaged) == rename_damaged, names
    expected_names = sorted([*(each.name for each in (expected / "checkpoints").iterdir()), *damaged])
    assert names == expected_names, "other files than an undisturbed run's"
    assert not list(out.glob(f"*{PARTIAL}")), sorted(out.iterdir())


def exact(out: Path) -> list[dict[str, float]]:
    """The lines of metrics without times and sizes."""
    return [{name: value for name, value in line.items() if name not in NOT_EXACT} for line in read_metrics(out)]


def note(record: Callable[[str, object], None], rows: Sequence[Row]) -> None:
    """Into the report of the test run (`--junitxml`), where tests/faults/matrix.py finds it; after all assertions."""
    for row in rows:
        row.equal = True
        record("fault", json.dumps(asdict(row)))
