"""Interleaved runs, ratios, peak memory in a fresh process, and the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from w2r2_ds.bench.harness import Lap, Spread, in_fresh_process, interleave, peak_bytes, time_ratio, timed
from w2r2_ds.bench.report import BenchReport, Criterion

CPU = torch.device("cpu")
MIB = 2**20


def test_interleave_alternates_the_order_and_skips_warmups() -> None:
    calls: list[str] = []

    def case(name: str) -> Any:
        def once() -> Lap:
            calls.append(name)
            return Lap(float(len(calls)))

        return once

    spreads = interleave({"a": case("a"), "b": case("b")}, rounds=2, device=CPU, warmups=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert spreads["a"].seconds == (4.0, 5.0) and spreads["b"].seconds == (3.0, 6.0)
    with pytest.raises(ValueError, match="--rounds is 0"):
        interleave({}, 0, CPU)


def test_a_case_without_a_lap_is_timed_as_a_whole() -> None:
    def work() -> None:
        sum(math.sqrt(i) for i in range(200_000))

    spread = interleave({"work": work}, 1, CPU)["work"]
    lap = Lap()
    with timed(lap, CPU):
        work()
    # The same work, so about the same time; a factor of 20 is more than noise.
    assert lap.total() / 20 < spread.median < lap.total() * 20


def test_ratio_is_the_median_over_rounds() -> None:
    base, case = Spread((1.0, 10.0, 2.0)), Spread((2.0, 20.0, 4.2))
    assert base.median == 2.0 and base.quartiles == (1.5, 6.0)
    # Of the rounds 2, 2 and 2.1; the ratio of the medians would be 2.1.
    assert time_ratio(case, base) == 2.0
    assert Spread((1.0,), peak=2**30).columns() == {"seconds": 1.0, "q1": 1.0, "q3": 1.0, "runs": 1, "peak_gib": 1.0}


def allocate(mib: int) -> dict[str, int]:
    """Runs in a fresh process: allocate memory and free it again."""

    def run() -> None:
        torch.ones(mib * MIB // 4).sum()

    return {"bytes": peak_bytes(run)}


@pytest.mark.distributed
def test_peak_memory_counts_the_call_only() -> None:
    # The allocation, and libraries that the first sum loads.
    assert 96 <= in_fresh_process(allocate, 96)["bytes"] / MIB < 128
    with pytest.raises(RuntimeError, match="no attribute"):
        in_fresh_process(in_fresh_process, "no such function")


def test_report_prints_rounded_and_saves_exact_numbers(tmp_path: Path) -> None:
    criteria = [Criterion("fast", 0.8, 0.9), Criterion("slow", 1.2345678, 0.9)]
    report = BenchReport(
        "name", "title", [{"case": "a", "seconds": 1.2345678}, {"case": "b", "peak": 3}], criteria, ["note"]
    )
    with open(tmp_path / "text", "w") as file:
        report.show(Console(file=file, width=150))
    text = (tmp_path / "text").read_text()
    for expected in ("1.235", "fast: 0.8, at most 0.9: met", "slow: 1.23, at most 0.9: NOT MET", "- note", "torch 2."):
        assert expected in text
    report.save(tmp_path / "new" / "report.json")
    saved = json.loads((tmp_path / "new" / "report.json").read_text())
    assert saved["rows"][0]["seconds"] == 1.2345678
    assert [each["met"] for each in saved["criteria"]] == [True, False]
    assert saved["machine"]["torch"] == torch.__version__ and saved["machine"]["processors"] >= 1
