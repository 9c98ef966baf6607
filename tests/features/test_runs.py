"""Runs with and without the feature cache are bitwise equal: cold, warm, and with other hits on each rank."""

from __future__ import annotations

from typing import Any

import pytest

from runs import ZERO3, Job, World, read_metrics, run_jobs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ONE_FILE = 8000 / 2**30
"""Size limit in GiB, too small for the 2D features of both rooms."""
LOSSES = ("loss", "align", "det", "push", "above_mu", "s_short", "s_fused")
EXACT = (*LOSSES, "grad_norm", "grad_norm_lora", "grad_norm_geometry", "geometry_norm")
BOTH: dict[str, object] = {"data__cached_features": "geometry+2d"}


@pytest.fixture(scope="module")
def metrics(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Logged metrics of runs under ZeRO-3 on two ranks; the first run has no cache."""
    folder = tmp_path_factory.mktemp("cached")
    cache, small = folder / "cache", folder / "small"

    def job(name: str, **changes: object) -> Job:
        arguments = ["--deepspeed", str(ZERO3), *world.arguments(folder / name, train__steps=2, **changes)]
        return Job(name, arguments, dry_run=False)

    jobs = [
        job("none"),
        job("cold", data__cache=cache, **BOTH),
        job("warm", data__cache=cache, data__workers=1, **BOTH),
        job("differing", data__cache=small, data__cache_gib=ONE_FILE, **BOTH),
    ]
    reports = run_jobs(2, folder / "both", jobs)
    assert all(report["error"] is None for ranks in reports.values() for report in ranks)
    printed = (folder / "both" / "output.txt").read_text()
    assert printed.count("is full: raise data.cache_gib") == 2, "once per rank"
    assert printed.count(f"feature cache {cache}: ") == 2, "once per run"
    return {each.name: read_metrics(folder / each.name) for each in jobs}


@pytest.mark.parametrize("name", ["cold", "warm", "differing"])
def test_losses_and_gradients_with_cache_are_bit_equal(metrics: dict[str, list[dict[str, Any]]], name: str) -> None:
    """In float32 on the CPU, where 2D features do not depend on the other samples of a batch."""
    assert len(metrics[name]) == 2
    for line, plain in zip(metrics[name], metrics["none"], strict=True):
        for value in EXACT:
            assert line[value] == plain[value], f"{value} of step {line['step']}"


def test_hits_and_size_are_logged(metrics: dict[str, list[dict[str, Any]]]) -> None:
    assert "cache_hits" not in metrics["none"][0]
    assert [line["cache_hits"] for line in metrics["cold"]] == [0, 1]
    assert [line["cache_hits"] for line in metrics["warm"]] == [1, 1]
    sizes = [metrics[name][-1]["cache_gib"] * 2**30 for name in ("cold", "warm")]
    assert 20_000 < sizes[0] == sizes[1] < 40_000  # two rooms
    hits = [line["cache_hits"] for line in metrics["differing"]]
    assert hits[0] == 0 < hits[1] < 0.5  # one room's 2D features
    assert 0 < metrics["differing"][-1]["cache_gib"] <= ONE_FILE
