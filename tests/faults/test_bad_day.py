"""Runs with a different fault in every launch: kills, NaN losses, repeated signals, damaged checkpoint files."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import FAILED, KILLED, LOST, REQUEUE, TERMINATED, Launch, arguments
from inject_from_outside import cut, damage, flip_a_bit, kill_after, signal_storm
from runs import World
from scenario import Fault, assert_equals_reference, record_rows, run_with_faults

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
FORWARD, BACKWARD = "kill -9 in forward", "kill -9 in backward"
NAN, FLIPPED, TORN = "NaN in one rank", "bit flipped in a checkpoint", "checkpoint file cut"
POWER = "kill -9 of both ranks between saves"
USR1, EARLY, TERM = "SIGUSR1 storm", "SIGUSR1 storm from the set-up on", "SIGTERM storm"


def kill(kind: str, rank: int, call: int) -> Fault:
    name = {"forward": FORWARD, "backward": BACKWARD}[kind]
    return Fault(name, (KILLED, LOST), in_process={rank: {"kind": kind, "call": call}})


def nan_loss(rank: int, call: int) -> Fault:
    """A NaN loss in one launch only, as from a bit flip in memory."""
    return Fault(NAN, (FAILED,), in_process={rank: {"kind": "nan", "call": call}}, logged=("The loss is not finite",))


def test_different_faults_in_consecutive_launches(
    world: World, reference_run: Path, tmp_path: Path, record_property: Record
) -> None:
    """Forward 1 is the dry run's; then each optimizer step has two."""
    out = tmp_path / "run"
    flipped = damage("engine/*optim_states.pt", flip_a_bit)
    day = [
        signal_storm(signal.SIGUSR1, REQUEUE, USR1),
        kill("forward", rank=1, call=4),
        kill("backward", rank=0, call=4),
        nan_loss(rank=1, call=2),
        Fault("", (0,), before=flipped, damage_name=FLIPPED, logged=("optim_states.pt has SHA-256",)),
    ]
    rows = run_with_faults(out, arguments(world, out), day)
    assert_equals_reference(out, reference_run, renamed_checkpoints=1)
    record_rows(record_property, rows)


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_kills_at_other_moments(
    world: World, reference_run: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    """Before the first checkpoint (dry run, first step), and in the second micro-batch of a step."""
    out = tmp_path / "run"
    day = [kill(kind, rank, call) for kind in ("forward", "backward") for call in (1, 2, 3, 5)]
    rows = run_with_faults(out, arguments(world, out), [*day, nan_loss(rank, 1), nan_loss(rank, 3)])
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)


@pytest.mark.nightly
def test_repeated_signals(world: World, reference_run: Path, tmp_path: Path, record_property: Record) -> None:
    """The first and third storm begin while the models are loaded, before anything can be saved."""

    def data_loaded(launch: Launch) -> bool:
        return "training samples" in launch.text(0)

    out = tmp_path / "run"
    day = [
        signal_storm(signal.SIGUSR1, REQUEUE, EARLY, data_loaded),
        signal_storm(signal.SIGTERM, TERMINATED, TERM),
        signal_storm(signal.SIGUSR1, REQUEUE, EARLY, data_loaded),
    ]
    rows = run_with_faults(out, arguments(world, out), day)
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)


@pytest.mark.nightly
def test_damage_to_each_file_of_a_checkpoint_is_detected(
    world: World, reference_run: Path, tmp_path: Path, record_property: Record
) -> None:
    """Each launch has a damaged newest checkpoint: it repeats that step, trains one more and is killed."""
    out = tmp_path / "run"
    damages = [
        (TORN, damage("engine/*model_states.pt", cut), "model_states.pt has"),
        (FLIPPED, damage("rng-1.pt", flip_a_bit), "rng-1.pt has SHA-256"),
        (TORN, damage("checkpoint.json", cut), "checkpoint.json is not valid JSON"),
        (FLIPPED, damage("trainable.safetensors", flip_a_bit), "trainable.safetensors has SHA-256"),
    ]
    day = [Fault(POWER, (KILLED,), kill_after(2))]
    for damage_name, before, logged in damages[:-1]:
        day.append(Fault(POWER, (KILLED,), kill_after(2), before=before, damage_name=damage_name, logged=(logged,)))
    damage_name, before, logged = damages[-1]
    day.append(Fault("", (0,), before=before, damage_name=damage_name, logged=(logged,)))
    rows = run_with_faults(out, arguments(world, out), day)
    assert_equals_reference(out, reference_run, renamed_checkpoints=len(damages))
    record_rows(record_property, rows)
