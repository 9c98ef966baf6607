"""Training runs with questions packed by scene against unpacked runs with the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import packed_runs
from packed_runs import QUESTIONS_PER_SCENE, STEPS
from runs import MICRO_BATCH, World, read_metrics, run_ranks
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.data.dataset import load_mixture


def run_on(ranks: int, world: World, folder: Path) -> Path:
    (folder / "world").write_text(str(world.folder))
    run_ranks(ranks, Path(packed_runs.__file__), folder)
    return folder


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs on one rank."""
    return run_on(1, world, tmp_path_factory.mktemp("packed_batches"))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def test_a_packed_run_equals_the_unpacked_run(runs: Path) -> None:
    """Over several updates, also packed without shared prefixes; tolerance for float32 sums in another order."""
    expected = losses(runs / "apart")
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    for name in ("packed_batches", "plain"):
        assert losses(runs / name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.nightly
def test_two_ranks_equal_one(runs: Path, world: World, tmp_path: Path) -> None:
    assert losses(run_on(2, world, tmp_path) / "packed_batches") == pytest.approx(
        losses(runs / "packed_batches"), rel=1e-5
    )


def test_the_batches_are_scene_groups(runs: Path, world: World) -> None:
    """11 samples have two frame sets (6 and 5): per epoch two full groups of four, and the remainders."""
    config = load_config(DEMO_RECIPE, world.arguments(runs))
    frames = {sample.id: sample.frames for sample in load_mixture(config.data, "train")}
    sequences: list[Any] = json.loads((runs / "report.json").read_text())["sequences"]
    packed, apart, plain = (sequences[n * 2 * STEPS : (n + 1) * 2 * STEPS] for n in range(3))
    assert QUESTIONS_PER_SCENE == MICRO_BATCH and all(
        number == 1 and len(ids) == QUESTIONS_PER_SCENE for ids, number in packed
    )
    assert [ids for ids, _ in packed] == [ids for ids, _ in apart] == [ids for ids, _ in plain]
    assert all(number == QUESTIONS_PER_SCENE for _, number in apart) and all(number == 1 for _, number in plain)
    stream = [each for ids, _ in packed for each in ids]
    assert sorted(stream[:11]) == sorted(stream[11:22]) == sorted(frames)
    assert sum(len({frames[each] for each in ids}) == 1 for ids, _ in packed) >= 4


def test_throughput_counts_computed_tokens(runs: Path) -> None:
    packed, apart = (read_metrics(runs / name)[0] for name in ("packed_batches", "apart"))
    tokens = [
        line["tokens_per_s"] * line["step_s"] / line["samples_per_s"] / line["step_s"] for line in (packed, apart)
    ]
    assert tokens[0] < tokens[1]


def test_a_resumed_run_keeps_its_order(runs: Path) -> None:
    (error,) = json.loads((runs / "report.json").read_text())["errors"]
    assert "data.questions_per_scene = 4, now it is 2" in error
