"""One scene's samples on disk while a data set is being prepared, and all scenes' put together.

A shard is ``SCENE.samples.parquet``, ``SCENE.frames.parquet`` and, written last, ``SCENE.json``: the key of what it was
made of, the number in the annotation file of every sample, and what was dropped. So a preparation that was killed goes
on with the scenes that lack one, and its result does not depend on which process made which scene when.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2r2_ds.data.dataset import FRAME_SCHEMA, SAMPLE_SCHEMA, tables
from w2r2_ds.data.tasks.base import Dropped, Outcomes
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils import atomic_io


@dataclass(frozen=True)
class Numbered:
    """Something dropped, with its number in the annotation file."""

    number: int
    dropped: Dropped


def write_shard(folder: Path, scene_id: str, key: str, outcomes: Outcomes, lost: int, root: Path) -> None:
    """Write what became of one scene's items; `lost` of its frames have no valid pose."""
    made = [(number, outcome) for number, outcome in outcomes if isinstance(outcome, Sample)]
    samples, frames = tables((sample for _, sample in made), root)
    for name, table in (("samples", samples), ("frames", frames)):
        with atomic_io.replacing(folder / f"{scene_id}.{name}.parquet") as aside:
            pq.write_table(table, aside, compression="zstd")
    dropped = [{"number": number, **asdict(each)} for number, each in outcomes if isinstance(each, Dropped)]
    record = {"key": key, "numbers": [number for number, _ in made], "dropped": dropped, "lost": lost}
    atomic_io.replace(folder / f"{scene_id}.json", json.dumps(record))


def has_shard(folder: Path, scene_id: str, key: str) -> bool:
    """Whether this scene was finished from just these inputs, and its tables are whole (a full disk cuts them)."""
    record = _record(folder, scene_id)
    if record is None or record.get("key") != key:
        return False
    try:
        for name in ("samples", "frames"):
            pq.read_metadata(folder / f"{scene_id}.{name}.parquet")
    except (OSError, pa.ArrowException):
        return False
    return True


def assemble(folder: Path, scene_ids: Sequence[str]) -> tuple[pa.Table, pa.Table, list[Numbered], int]:
    """All shards in one: samples by their numbers, frames by scene, what was dropped, frames without a valid pose."""
    samples, frames, numbers, dropped, offset, lost = [], [], [], [], 0, 0
    for scene_id in scene_ids:
        record = _record(folder, scene_id)
        assert record is not None, "only finished scenes are put together"
        shard = pq.read_table(folder / f"{scene_id}.samples.parquet")
        samples.append(_shifted(shard, offset))
        frames.append(pq.read_table(folder / f"{scene_id}.frames.parquet"))
        offset += len(frames[-1])
        numbers += record["numbers"]
        lost += record["lost"]
        for each in record["dropped"]:
            number = each.pop("number")
            dropped.append(Numbered(number, Dropped(**each)))
    order = np.argsort(np.array(numbers, dtype=np.int64), kind="stable")
    whole = pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *samples]).take(pa.array(order))
    posed = pa.concat_tables([FRAME_SCHEMA.empty_table(), *frames])
    return whole.combine_chunks(), posed.combine_chunks(), dropped, lost


def write_dropped(path: Path, dropped: Iterable[Numbered]) -> None:
    """One line of JSON per dropped item, in the order of the annotations."""
    with open(path, "w", encoding="utf-8") as file:
        for each in sorted(dropped, key=lambda each: each.number):
            file.write(json.dumps(asdict(each.dropped)) + "\n")


def _shifted(table: pa.Table, offset: int) -> pa.Table:
    """The samples with the numbers of their frames counted on from `offset`."""
    column = table.schema.get_field_index("frames")
    lists = table.column(column).combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], SAMPLE_SCHEMA.field("frames").type)
    shifted = pa.ListArray.from_arrays(lists.offsets, pa.array(np.asarray(lists.values) + offset, pa.int64()))
    return table.set_column(column, SAMPLE_SCHEMA.field("frames"), shifted)


def _record(folder: Path, scene_id: str) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / f"{scene_id}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
