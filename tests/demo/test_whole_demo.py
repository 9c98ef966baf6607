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
def test_the_pair_grounds_with_geometry_and_does_not_without(tmp_path: Path) -> None:
    for name in ("launchers", "ds_configs"):  # the demo writes to runs/ in the working directory
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "launchers/demo.py"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    scores = {task: first_metric(tmp_path, task) for task in METRICS}
    boxes = scores["scanrefer"]
    assert boxes["fused"] >= 0.5
    assert boxes["random"] < boxes["zero"] <= boxes["fused"] / 2
    assert boxes["shuffle"] < boxes["fused"] / 2
    assert scores["scan2cap"]["fused"] > scores["scan2cap"]["no_image"]
    assert (tmp_path / "runs/demo/report.html").is_file() and "tiny model, synthetic rooms" in done.stdout


def first_metric(folder: Path, task: str) -> dict[str, Any]:
    """Row -> score of all samples by the first metric of the demo's table."""
    cells = json.loads((folder / f"runs/demo/evaluation/diagnosis-{task}.json").read_text())["table1"]["cells"]
    chosen = {"group": "overall", "metric": METRICS[task][0]}
    return {cell["row"]: cell["value"] for cell in cells if chosen.items() <= cell.items()}
