"""Curves of a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from html_elements import Elements
from w2r2_ds.report.collect import read_run
from w2r2_ds.report.curves import MAX_POINTS, curve, thinned
from w2r2_ds.report.page import build_page


def test_long_curves_are_means(finished_run: Path) -> None:
    points = [(step, float(step % 3)) for step in range(1, 2 * MAX_POINTS + 2)]
    found = thinned(points)
    assert len(found) <= MAX_POINTS and thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert found[0] == (2.0, 1.0)  # the mean of steps 1, 2, 3
    run = replace(read_run(finished_run, "long"), metrics=[(step, {"loss": value}) for step, value in points])
    assert np.mean(curve([run], "loss").data[0].y) == pytest.approx(1.0, abs=2e-3)
    page = build_page([run], samples=0, rooms=0)
    assert str(MAX_POINTS) in Elements(page).text and len(json.loads(Elements(page).figures)) == 1
