"""The demo's table, from results made by hand."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from w2r2_ds.demo.results_table import CAPTION, METRICS, causality_line, parsed_share, results_table

ROWS = {"fused": 0.6, "zero": 0.1, "random": 0.03}


def result(task: str, parsed: float = 1.0) -> dict[str, Any]:
    """What ``w2r2 diagnose`` writes, with the keys that the table reads."""
    cells = [
        {"protocol": f"{task}/p", "group": group, "metric": metric, "row": row, "value": value, "samples": 40}
        | {"low": None if metric == METRICS[task][1] else value / 2, "high": value * 1.5}
        for group in ("overall", "unique")
        for metric in METRICS[task]
        for row, value in ROWS.items()
    ]
    rows = [{"row": row, "label": f"label {row}, mean of 20", "parsed": {f"{task}/p": parsed}} for row in ROWS]
    return {"task": task, "scenes": 9, "table1": {"rows": rows, "cells": cells}}


def printed(results: list[dict[str, Any]]) -> str:
    console = Console(width=110, record=True, file=None)
    with console.capture() as captured:
        console.print(results_table(results))
    return captured.get()


def test_every_task_has_its_rows_metrics_and_counts() -> None:
    text = printed([result(task, parsed=0.985) for task in METRICS])
    assert CAPTION in text and "mean of 20" not in text
    lines = [line for line in text.splitlines() if "label fused" in line]
    assert len(lines) == len(METRICS) and all("60.0 [30.0, 90.0]" in line for line in lines)
    assert all(" 40 " in line and "98.5%" in line for line in lines)
    for task, metrics in METRICS.items():
        (header,) = (line for line in text.splitlines() if task in line)
        assert all(metric in header for metric in metrics) and "9 rooms" in header
    assert sum("label random" in line and "3.0 [1.5, 4.5]" in line for line in text.splitlines()) == len(METRICS)


def test_a_score_without_interval_or_value() -> None:
    one = result("scanrefer")
    for cell in one["table1"]["cells"]:
        cell["value"] = None if cell["row"] == "zero" else cell["value"]
    text = printed([one])
    fused, zero = (next(line for line in text.splitlines() if f"label {row}" in line) for row in ("fused", "zero"))
    assert fused.count("60.0") == 2 and fused.count("[") == 1
    assert zero.count("n/a") == 2


def test_the_smallest_share_of_parsed_answers_is_that_with_all_inputs() -> None:
    results = [result("scanrefer", 0.9), result("scanqa", 0.97)]
    results[0]["table1"]["rows"][1]["parsed"] = {"scanrefer/p": 0.2}  # 2D only
    assert parsed_share(results) == 0.9


def test_the_share_that_follows_the_geometry() -> None:
    def measures(value: float | None) -> dict[str, Any]:
        return {"numbers": {"centre": {"follows": {"value": value}}}}

    one, other = result("scanrefer"), result("scanqa")
    assert causality_line([one, other]) == ""
    one["causality"] = {"interventions": {"scale": measures(0.62), "turn": measures(None), "shift": measures(1.0)}}
    other["causality"] = {"interventions": {}}
    line = causality_line([one, other])
    assert "scale 62%" in line and "shift 100%" in line and "turn" not in line
