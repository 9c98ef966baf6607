"""docs/research/measurements.md shows the reports in docs/measured/, one per benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from docs_scripts import DOCS, docs_script
from w2r2_ds.commands.bench import BENCHMARKS


@pytest.fixture(scope="module")
def measured() -> Any:
    """docs/scripts/measured.py."""
    return docs_script("measured")


def test_the_docs_contain_every_report(measured: Any) -> None:
    text = (DOCS / "research" / "measurements.md").read_text()
    reports = measured.read()
    # Without a GPU, `bring_up` measures nothing that is worth a table.
    assert [report["name"] for report in reports] == [name for name in BENCHMARKS if name != "bring_up"]
    for report in reports:
        assert measured.section(report) in text, f"{report['name']}: run docs/scripts/measured.py again"


def test_a_missing_value_is_an_empty_cell(measured: Any) -> None:
    rows = [{"case": "a", "seconds": 2.0, "q1": 1.0, "q3": 3.0}, {"case": "b", "peak_mib": 1234.5}]
    assert measured.table({"rows": rows}).splitlines() == [
        "| case | seconds | peak_mib |",
        "| --- | --- | --- |",
        "| a | 2 (1 .. 3) |  |",
        "| b |  | 1,234 |",
    ]
