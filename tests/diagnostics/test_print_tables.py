"""Printed tables of a diagnosis."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from w2r2_ds.diagnostics.print_tables import print_table1

SCORES = {"fused": 0.6, "zero": 0.1, "shuffle": 0.05}


def test_the_first_row_is_compared_with_every_other_one(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"protocol": "scanrefer/p", "group": "overall", "metric": "acc"}
    estimate = {"low": None, "high": None, "reason": ""}
    cells = [
        {**about, **estimate, "row": row, "value": value, "samples": 8, "scenes": 4} for row, value in SCORES.items()
    ]
    # All pairs, as in the results: also those without the first row.
    differences: list[dict[str, Any]] = [
        {**about, **estimate, "row": first, "minus": second, "value": SCORES[first] - SCORES[second]}
        for first, second in combinations(SCORES, 2)
    ]
    rows = [{"row": row, "label": f"label {row}", "parsed": {"scanrefer/p": 1.0}} for row in SCORES]
    print_table1({"table1": {"rows": rows, "cells": cells, "differences": differences}, "not_evaluated": {}})
    lines = capsys.readouterr().out.splitlines()
    for minus, gain in (("zero", "+50.0"), ("shuffle", "+55.0")):
        (line,) = (line for line in lines if f"label fused minus label {minus}" in line)
        assert gain in line
