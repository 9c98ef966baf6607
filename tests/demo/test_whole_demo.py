"""The whole demo with the weights of the package: geometry is used, and its content counts. Takes minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fork_server import ROOT, environment
from w2r2_ds.demo.results_table import METRICS


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("geometry", ["point_map", "vggt"])
def test_the_pair_grounds_with_geometry_and_does_not_without(tmp_path: Path, geometry: str) -> None:
    """The VGGT has no metric scale and inexact cameras: its pair is weaker."""
    for name in ("launchers", "ds_configs"):  # the demo writes to runs/ in the working directory
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "launchers/demo.py", "--demo.geometry", geometry],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    results = tmp_path / ("runs/demo" if geometry == "point_map" else "runs/demo_vggt")
    scores = {task: first_metric(results, task) for task in METRICS}
    boxes = scores["scanrefer"]
    if geometry == "point_map":
        assert boxes["fused"] >= 0.5 and max(boxes["zero"], boxes["shuffle"]) <= boxes["fused"] / 2
    assert boxes["random"] < boxes["zero"] < boxes["fused"] and boxes["shuffle"] < boxes["fused"]
    assert scores["scan2cap"]["fused"] > scores["scan2cap"]["no_image"]
    assert (results / "report.html").is_file() and "tiny model, synthetic rooms" in done.stdout


def first_metric(folder: Path, task: str) -> dict[str, Any]:
    """Row -> score of all samples by the first metric of the demo's table."""
    cells = json.loads((folder / f"evaluation/diagnosis-{task}.json").read_text())["table1"]["cells"]
    chosen = {"group": "overall", "metric": METRICS[task][0]}
    return {cell["row"]: cell["value"] for cell in cells if chosen.items() <= cell.items()}
