"""The demo's last output: scores of every task with and without geometry, from the files of ``w2r2 diagnose``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from w2r2_ds.diagnostics.causality.measures import CENTRE
from w2r2_ds.diagnostics.table1 import OVERALL

CAPTION = "tiny model, synthetic rooms"
METRICS = {"scanrefer": ("acc@0.25", "acc@0.5"), "scan2cap": ("CIDEr@0.5", "ROUGE-L@0.5"), "scanqa": ("EM", "ROUGE-L")}
"""Task -> the two metrics in the table."""


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One section per task: a row per set of answers, with two metrics and their intervals.

    Args:
        results: contents of ``diagnosis-TASK.json``; the first protocol of each is shown.
    """
    table = Table(title=CAPTION, title_style="bold")
    for column in ("task", "answers", "samples", "score", "score", "parsed"):
        table.add_column(column, justify="left" if column in ("task", "answers") else "right")
    for result in results:
        rows, cells = result["table1"]["rows"], result["table1"]["cells"]
        protocol = cells[0]["protocol"]
        metrics = METRICS[result["task"]]
        own = {
            (cell["row"], cell["metric"]): cell
            for cell in cells
            if cell["protocol"] == protocol and cell["group"] == OVERALL
        }
        table.add_section()
        table.add_row(
            f"[bold]{result['task']}", "", f"[bold]{result['scenes']} rooms", *(f"[bold]{m}" for m in metrics)
        )
        for row in rows:
            scores = [_score(own[row["row"], metric]) for metric in metrics]
            samples = str(own[row["row"], metrics[0]]["samples"])
            label = row["label"].partition(",")[0]  # of a random guess, without the number of draws
            table.add_row("", label, samples, *scores, f"{row['parsed'][protocol]:.1%}")
    return table


def parsed_share(results: Sequence[Mapping[str, Any]]) -> float:
    """Smallest share of answers with all inputs that can be parsed, over the tasks."""
    first = [result["table1"]["rows"][0] for result in results]  # the row `fused`
    return min(share for row in first for share in row["parsed"].values())


def causality_line(results: Sequence[Mapping[str, Any]]) -> str:
    """Shares of boxes that follow a change of the geometry while the pixels stay; empty if none was measured."""
    shares = []
    for result in results:
        for kind, measures in result.get("causality", {}).get("interventions", {}).items():
            follows = measures["numbers"][CENTRE]["follows"]["value"]
            if follows is not None:
                shares.append(f"{kind} {follows:.0%}")
    return f"boxes that follow the geometry while the pixels stay: {', '.join(shares)}" if shares else ""


def _score(cell: Mapping[str, Any]) -> str:
    """``57.6 [52.1, 63.0]``: score and 95 % interval over rooms, times 100."""
    if cell["value"] is None:
        return "n/a"
    interval = "" if cell["low"] is None else rf" \[{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return f"{100 * cell['value']:.1f}{interval}"
