"""One run with a different fault at every start; each fault at other moments too with `-m nightly`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import FAILED, KILLED, LOST, REQUEUE, TERMINATED, Start, arguments
from inject_from_outside import cut, damage, flip_a_bit, kill_after, storm
from runs import World
from scenario import Fault, assert_as_undisturbed, note, suffer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
FORWARD, BACKWARD = "kill -9 in forward", "kill -9 in backward"
NAN, FLIPPED, TORN = "NaN in one rank", "bit flipped in a checkpoint", "checkpoint file cut"
POWER = "kill -9 of both ranks between saves"
USR1, EARLY, TERM = "SIGUSR1 storm", "SIGUSR1 storm from the set-up on", "SIGTERM storm"


def kill(kind: str, rank: int, call: int) -> Fault:
    name = {"forward": FORWARD, "backward": BACKWARD}[kind]
    return Fault(name, (KILLED, LOST), inside={rank: {"kind": kind, "call": call}})


def nan(rank: int, call: int) -> Fault:
    """In a loss; a bit that flipped in memory. It does not come again."""
    return Fault(NAN, (FAILED,), inside={rank: {"kind": "nan", "call": call}}, logged=("The loss is not finite",))


def test_a_bad_day(world: World, calm: Path, tmp_path: Path, record_property: Record) -> None:
    """Forwards are counted from the start: 1 is the dry run's, then two to a step."""
    out = tmp_path / "run"
    flipped = damage("engine/*optim_states.pt", flip_a_bit)
    day = [
        storm(signal.SIGUSR1, REQUEUE, USR1),
        kill("forward", rank=1, call=4),
        kill("backward", rank=0, call=4),
        nan(rank=1, call=2),
        Fault("", (0,), before=flipped, found=FLIPPED, logged=("optim_states.pt has SHA-256",)),
    ]
    rows = suffer(out, arguments(world, out), day)
    assert_as_undisturbed(out, calm, rename_damaged=1)
    note(record_property, rows)


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_kills_at_other_moments(world: World, calm: Path, tmp_path: Path, rank: int, record_property: Record) -> None:
    """Before anything is saved (the dry run, the first step), and in the second micro-batch of a step."""
    out = tmp_path / "run"
    day = [kill(kind, rank, call) for kind in ("forward", "backward") for call in (1, 2, 3, 5)]
    rows = suffer(out, arguments(world, out), [*day, nan(rank, 1), nan(rank, 3)])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)


@pytest.mark.nightly
def test_repeated_signals(world: World, calm: Path, tmp_path: Path, record_property: Record) -> None:
    """Also while the models load, when there is nothing to save yet."""

    def sets_up(start: Start) -> bool:
        return "training samples" in start.text(0)

    out = tmp_path / "run"
    day = [
        storm(signal.SIGUSR1, REQUEUE, EARLY, sets_up),
        storm(signal.SIGTERM, TERMINATED, TERM),
        storm(signal.SIGUSR1, REQUEUE, EARLY, sets_up),
    ]
    rows = suffer(out, arguments(world, out), day)
    assert_as_undisturbed(out, calm)
    note(record_property, rows)


@pytest.mark.nightly
def test_every_file_of_a_checkpoint_is_checked(
    world: World, calm: Path, tmp_path: Path, record_property: Record
) -> None:
    """Each start finds the newest checkpoint damaged, redoes its step, does one more, and loses its power."""
    out = tmp_path / "run"
    damages = [
        (TORN, damage("engine/*model_states.pt", cut), "model_states.pt has"),
        (FLIPPED, damage("rng-1.pt", flip_a_bit), "rng-1.pt has SHA-256"),
        (TORN, damage("checkpoint.json", cut), "checkpoint.json is not valid JSON"),
        (FLIPPED, damage("trainable.safetensors", flip_a_bit), "trainable.safetensors has SHA-256"),
    ]
    day = [Fault(POWER, (KILLED,), kill_after(2))]
    for found, before, logged in damages[:-1]:
        day.append(Fault(POWER, (KILLED,), kill_after(2), before=before, found=found, logged=(logged,)))
    found, before, logged = damages[-1]
    day.append(Fault("", (0,), before=before, found=found, logged=(logged,)))
    rows = suffer(out, arguments(world, out), day)
    assert_as_undisturbed(out, calm, rename_damaged=len(damages))
    note(record_property, rows)
