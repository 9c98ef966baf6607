"""Attention anchors: how much attention the target gets in every layer, the anchored boxes, and heat maps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from plotly.graph_objects import Figure

from w2r2_ds.diagnostics.attention.anchors import PASSES
from w2r2_ds.report.collect import title_of
from w2r2_ds.report.data_uri import jpeg_uri
from w2r2_ds.report.diagnosis.parts import (
    FUSED_COLOR,
    ZERO_COLOR,
    HeatMap,
    Part,
    Plot,
    add_guide,
    number_cell,
    per_layer,
)
from w2r2_ds.report.scores import Cell, ScoreTable

logger = logging.getLogger(__name__)

PASS_STYLES = {"2d_only": ("2D only", ZERO_COLOR), "fused": ("2D + 3D", FUSED_COLOR)}
"""Pass -> label and colour."""
PICTURES = 6
"""Most heat maps of a file."""
QUALITY = 80
"""JPEG quality of the heat maps."""


def attention_part(diagnosis: Mapping[str, Any], folder: Path) -> Part:
    """Measures of both passes, attention per layer, and heat maps.

    Args:
        diagnosis: content of a file ``attention-TASK.json``.
        folder: folder of the file, to which the paths of its heat maps are relative.
    """
    summaries = {name: diagnosis["passes"][name]["summary"] for name in PASSES}
    note = f"{summaries[PASSES[0]]['samples']} samples, {diagnosis['not_in_view']} others with the target in no frame. "
    note += f"Both passes have the same anchor in {100 * diagnosis['same_anchor']:.0f} % of the samples."
    columns = [PASS_STYLES[name][0] for name in PASSES]
    table = ScoreTable("Anchors and their boxes", columns, _rows(summaries), "")
    target = _lines(summaries, "target_mass")
    add_guide(target, summaries[PASSES[0]]["target_area"], "uniform attention")
    plots = [
        Plot("Attention to visual tokens: share on the target", target),
        Plot("Share of the attention that goes to visual tokens", _lines(summaries, "visual_share")),
    ]
    records = {name: {record["sample"]: record for record in diagnosis["passes"][name]["records"]} for name in PASSES}
    shown = list(diagnosis["pictures"].items())[:PICTURES]
    maps, problem = [], ""
    try:
        for sample, path in shown:
            maps.append(_heat_map(folder, path, sample, {name: records[name][sample] for name in PASSES}))
    except ValueError as error:  # the results may have been copied without pictures
        logger.warning("no heat maps: %s", error)
        problem = f"No heat maps: {error}"
    return Part(title_of(diagnosis), [table], plots, maps, note, problem)


def _rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """Label and values of every measure, in both passes."""
    percent = {
        "anchor on the target, %": "on_target",
        "area of the target, %": "target_area",
        "anchored box, acc@0.25, %": "acc25",
    }
    meters = {"anchored box, mean IoU": "s", "anchored box, median distance, m": "distance"}
    rows = [(label, [number_cell(100 * summaries[p][name], 1) for p in PASSES]) for label, name in percent.items()]
    return rows + [(label, [number_cell(summaries[p][name]) for p in PASSES]) for label, name in meters.items()]


def _lines(summaries: Mapping[str, Mapping[str, Any]], measure: str) -> Figure:
    """A measure over the decoder layers, a line per pass."""
    values = {PASS_STYLES[name][0]: summaries[name][measure] for name in PASSES}
    return per_layer(values, dict(PASS_STYLES.values()), "share")


def _heat_map(folder: Path, path: str, sample: str, records: Mapping[str, Mapping[str, Any]]) -> HeatMap:
    """One heat map as a JPEG: a row per pass, see ``diagnostics/attention/heat_maps.py``.

    Raises:
        ValueError: it is not a PNG file below `folder`.
    """
    file = (folder / path).resolve()
    # A results file of others must not put other pictures of this machine into a page that is sent around.
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"the heat map {path} is not in {folder}.")
    try:
        with Image.open(file, formats=("PNG",)) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the heat map {file} cannot be read ({error}).") from None
    uri = jpeg_uri(picture, QUALITY)
    anchors = ", ".join(f"{PASS_STYLES[name][0]} {_anchor(record)}" for name, record in records.items())
    return HeatMap(f"{sample}. Anchor: {anchors}", uri, picture.width, picture.height)


def _anchor(record: Mapping[str, Any]) -> str:
    """Frame of an anchor, whether it is on the target, and the distance of its box."""
    place = "on the target" if record["on_target"] else "beside the target"
    distance = record["distance"]
    far = "" if distance is None or not math.isfinite(distance) else f", box {distance:.2f} m off"
    return f"in frame {record['frame']} {place}{far}"
