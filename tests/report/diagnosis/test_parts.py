"""Parts of a report from the files of a diagnosis: the numbers of tables and plots are those of the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagnosis_files import TASK, causality, cues, table1, write_diagnoses
from w2r2_ds.report.diagnosis.attention import attention_part
from w2r2_ds.report.diagnosis.causality import WIDEST, causality_part
from w2r2_ds.report.diagnosis.cues import cue_parts
from w2r2_ds.report.diagnosis.feature_map import feature_part
from w2r2_ds.report.diagnosis.parts import measure_cell
from w2r2_ds.report.scores import Cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diagnosis")
    write_diagnoses(path, ["a", "b"])
    return path


def content(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{part}-{TASK}.json").read_text())
    return found


def test_slopes_of_every_number_with_intervals() -> None:
    found = causality(0.5)
    measures = found["interventions"]["scale"]["numbers"]
    part = causality_part({"task": TASK, "causality": found})
    assert part is not None and part.title == TASK  # prediction files have no data
    (plot,) = part.plots
    trace, paired = plot.figure.data
    assert paired.name == "geometry of the paired room (camera)" and list(paired.y) == list(trace.y)
    assert paired.x[0] > trace.x[0]  # beside each other
    assert list(trace.text) == ["x", "y", "z", "size_x", "size_y", "size_z"]
    np.testing.assert_allclose(trace.y[:2], 0.5, atol=0.02)
    assert list(trace.y[2:]) == [0.0] * 4
    slope = measures["x"]["slope"]
    assert trace.y[0] + trace.error_y.array[0] == pytest.approx(slope["high"])
    assert trace.y[0] - trace.error_y.arrayminus[0] == pytest.approx(slope["low"])
    table, _, removed, replaced = part.tables
    assert dict(removed.rows)["frame with the target, 4+"] == [
        Cell("10"),
        Cell("0.50", "[0.45, 0.55]"),
        Cell("20.0", "[15.0, 25.0]"),
    ]
    rows = dict(table.rows)
    assert table.columns == ["slope", "correlation", "follows", "answers"]
    assert rows["x"][0] == measure_cell(slope) and rows["x"][3] == Cell(str(measures["x"]["rows"]))
    assert rows["z"][1] == Cell("") and rows["centre"][0] == Cell("")  # no correlation of a constant, no slope
    assert dict(replaced.rows)["geometry removed"] == [Cell("30.0", "[25.0, 35.0]")]
    assert "turned room" in part.note and "camera" in part.note


def test_intervals_of_few_answers_do_not_flatten_the_plot() -> None:
    found = causality()
    found["interventions"]["scale"]["numbers"]["x"]["slope"] = {"value": 0.5, "low": -40.0, "high": 60.0}
    found["interventions"]["scale"]["numbers"]["y"]["slope"] = {"value": 0.4, "low": None, "high": None}
    part = causality_part({"task": TASK, "causality": found})
    assert part is not None
    figure = part.plots[0].figure
    assert tuple(figure.layout.yaxis.range) == WIDEST
    assert figure.data[0].error_y.array[1] == figure.data[0].error_y.arrayminus[1] == 0


def test_an_encoder_without_interventions_has_the_replaced_geometry_only() -> None:
    found = causality() | {"interventions": {}}
    del found["paired"], found["removed_frame"]  # as in files of earlier versions
    part = causality_part({"task": TASK, "causality": found})
    assert part is not None and not part.plots and [table.title for table in part.tables] == ["Replaced geometry"]
    assert causality_part({"task": TASK}) is None


def test_shifted_splits_are_compared_with_the_others() -> None:
    named = [{"task": TASK, "data": [{"path": f"prepared/{name}"}]} for name in ("val", "val_camera")]
    iid, shifted = named[0] | table1(0.6, 0.2), named[1] | table1(0.3, 0.1) | {"cues": cues()}
    assert cue_parts([iid]) == []
    every, own = cue_parts([iid, shifted])
    rows = dict(every.tables[0].rows)
    assert [cell.value for cell in rows["val"]] == ["60.0", "20.0", "", ""]
    assert [cell.value for cell in rows["val_camera"]] == ["30.0", "10.0", "20.0", "70.0"]
    shares = dict(own.tables[0].rows)
    assert [cell.value for cell in shares["2D only"]] == ["10.0", "70.0", "20.0"] * 2


def test_the_feature_map_has_all_tokens_and_measures(folder: Path) -> None:
    found = content(folder, "features")
    part = feature_part(found)
    plot, layers = (each.figure for each in part.plots)
    assert [trace.name for trace in plot.data] == ["2D", "3D", "fused"]
    for trace, cloud in zip(plot.data, ("2d", "3d", "fused"), strict=True):
        np.testing.assert_allclose(np.stack([trace.x, trace.y], 1), found["points"][cloud], atol=1e-4)
    assert {trace.name: list(trace.y) for trace in layers.data}["CKA"] == [each["cka"] for each in found["layers"]]
    clouds, by_layer = part.tables
    ratio = found["clouds"]["2d_3d"]["norm_ratio"]
    assert dict(clouds.rows)["2D to 3D"][4] == Cell(f"{ratio:.2f}") and len(by_layer.rows) == 4
    constant = dict(found, clouds={"2d_3d": dict.fromkeys(found["clouds"]["2d_3d"])}, layers=[])
    (only,) = feature_part(constant).tables
    assert only.rows == [("2D to 3D", [Cell("")] * 5)]


def test_attention_per_layer_and_heat_maps(folder: Path) -> None:
    found = content(folder, "attention")
    part = attention_part(found, folder)
    target, share = (plot.figure for plot in part.plots)
    for figure, name in ((target, "target_mass"), (share, "visual_share")):
        expected = {
            label: found["passes"][p]["summary"][name] for label, p in (("2D only", "2d_only"), ("2D + 3D", "fused"))
        }
        assert {trace.name: list(trace.y) for trace in figure.data} == expected
    assert target.layout.shapes[0].y0 == found["passes"]["fused"]["summary"]["target_area"]
    assert dict(part.tables[0].rows)["anchor on the target, %"] == [Cell("0.0"), Cell("100.0")]
    assert [picture.caption.split(".")[0] for picture in part.pictures] == ["a", "b"] and not part.problem
    assert part.pictures[0].uri.startswith("data:image/jpeg;base64,") and part.pictures[0].width == 484
    assert "0.70 m" in part.pictures[0].caption and " m off" not in part.pictures[1].caption  # it has no pose


@pytest.mark.parametrize("path", ["missing.png", "../outside.png", "attention-scanrefer.json"])
def test_other_files_are_no_heat_maps(folder: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    (folder.parent / "outside.png").write_bytes((folder / f"attention-{TASK}" / "000.png").read_bytes())
    found = content(folder, "attention") | {"pictures": {"a": path}}
    with caplog.at_level(logging.WARNING):
        part = attention_part(found, folder)
    assert not part.pictures and path in part.problem and path in caplog.text and part.tables
