"""Every file of ds_configs/ trains on two ranks with equal losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import Job, World, read_metrics, run_jobs
from w2r2_ds.training.deepspeed.config import load_ds_config

pytestmark = pytest.mark.distributed

FILES = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
STEPS = 2
OFFLOADED = "recomputed"
"""zero3 with every second decoder layer recomputed, and inputs in host memory."""
WHOLE = "whole tower"
"""zero3 with a whole vision tower on every rank."""


@pytest.fixture(scope="module")
def losses(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Metrics of a few steps with every file, in one launch."""
    folder = tmp_path_factory.mktemp("ds_configs")
    # "auto" would give no partitions, because one machine has all ranks.
    paired = load_ds_config(FILES[0].with_name("zero3_hpz.json"))
    paired["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "zero3_hpz.json").write_text(json.dumps(paired))
    few = {"train__global_batch": 4, "train__micro_batch": 2, "train__save_every": 99, "data__workers": 0}
    less = {f"train__{name}": True for name in ("activation_checkpointing", "offload_activations")}
    runs: list[tuple[str, Path, dict[str, object]]] = [
        (OFFLOADED, FILES[0].with_name("zero3.json"), less | {"train__recompute_every": 2}),
        (WHOLE, FILES[0].with_name("zero3.json"), {"train__shard_vision_tower": False}),
        *((file.stem, file, {}) for file in FILES if file.stem != "zero3_hpz"),
        # Last: DeepSpeed keeps its group of ranks for the rest of the process, and a later engine would use it.
        ("zero3_hpz", folder / "zero3_hpz.json", {}),
    ]
    jobs = [
        Job(
            name,
            ["--deepspeed", str(file), *world.arguments(folder / name, **few, **changes)],
            stop_after=STEPS,
            dry_run=False,
        )
        for name, file, changes in runs
    ]
    reports = run_jobs(2, folder / "jobs", jobs)
    assert {name: [report["error"] for report in ranks] for name, ranks in reports.items()} == {
        job.name: [None, None] for job in jobs
    }
    return {job.name: read_metrics(folder / job.name) for job in jobs}


@pytest.mark.parametrize("name", [*(file.stem for file in FILES), OFFLOADED, WHOLE])
def test_every_file_trains_with_equal_results(losses: dict[str, list[dict[str, Any]]], name: str) -> None:
    """float32 on two ranks: only the order of sums differs between ZeRO-2 and ZeRO-3."""
    # Offloading and recomputation do not change the losses otherwise.
    exact = name in ("zero3_hpz", OFFLOADED, WHOLE)
    assert [line["step"] for line in losses[name]] == list(range(1, STEPS + 1))
    for line, reference in zip(losses[name], losses["zero3"], strict=True):
        for part in ("loss", "align", "push", "grad_norm"):
            assert line[part] == pytest.approx(reference[part], rel=0 if exact else 1e-5, abs=0), (part, line["step"])
    assert losses[name][0]["loss"] != losses[name][-1]["loss"]
