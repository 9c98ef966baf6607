"""A prepared data set on disk: one folder per task and split, written by ``launchers/prepare.py``.

samples.parquet   one row per sample; its frames are rows of the next file
frames.parquet    one row per posed image: path relative to the data root, camera to axis-aligned world
manifest.json     what it was made of, and what was left out (``data/prepare/pipeline.py``); written last

Images are referenced, never copied. Both tables open with ``datasets.load_dataset("parquet", ...)`` too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2r2_ds.types.sample import Labelled, Reference, Sample, Target
from w2r2_ds.utils.sanitize import CONTROL

VERSION = 1
"""Of the two schemas and the manifest; raised whenever an older folder can no longer be read."""

ROWS = 1024
"""Samples that are read at once where all are looked at."""

_TASK = re.compile(r"[a-z0-9_]{1,40}")
SAMPLES, FRAMES, MANIFEST = "samples.parquet", "frames.parquet", "manifest.json"

_NUMBERS = pa.list_(pa.float64())
_TARGET = pa.struct(
    [
        ("box", _NUMBERS),
        ("object_id", pa.int64()),
        ("object_name", pa.string()),
        ("group", pa.string()),
        ("group_nyu40", pa.string()),
        ("scannet_class", pa.int64()),
        ("ann_id", pa.string()),
        ("described", _NUMBERS),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("scene_id", pa.string()),
        ("frames", pa.list_(pa.int64())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("what", pa.list_(pa.int64(), 2)),
        ("target", _TARGET),
        ("references", pa.list_(pa.struct([("text", pa.string()), ("words", pa.list_(pa.string()))]))),
        ("objects", pa.list_(pa.struct([("label", pa.string()), ("box", _NUMBERS)]))),
    ]
)
FRAME_SCHEMA = pa.schema([("path", pa.string()), ("cam_to_world", pa.list_(pa.float64(), 16))])


class PreparedSet(Sequence[Sample]):
    """The samples of a prepared folder, made when asked for.

    Args:
        folder: what ``launchers/prepare.py`` wrote for one task and split.
        root: data root that the frames' paths are relative to.

    Raises:
        ValueError: a file is missing, truncated or of another version, or a frame's path leaves the root.
    """

    def __init__(self, folder: Path | str, root: Path | str) -> None:
        self.folder, self.root = Path(folder), Path(root)
        self.manifest = read_manifest(self.folder)
        self._samples = _read(self.folder / SAMPLES, SAMPLE_SCHEMA)
        frames = _read(self.folder / FRAMES, FRAME_SCHEMA)
        for column in ("id", "task", "scene_id"):
            _check_names(self._samples[column].to_pylist(), self.folder / SAMPLES, column)
        self._files = [self.root / _inside(path, self.folder / FRAMES) for path in frames["path"].to_pylist()]
        poses = frames["cam_to_world"].combine_chunks()
        self._poses = np.asarray(poses.flatten()).reshape(-1, 4, 4)
        expected = self.manifest["counts"]["samples"]
        if len(self._samples) != expected:
            raise ValueError(
                f"{self.folder / SAMPLES} has {len(self._samples)} rows, but {MANIFEST} counts {expected}; "
                "prepare the data set again."
            )

    @property
    def task(self) -> str:
        """Which task the samples belong to."""
        return str(self.manifest["task"])

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of options, inputs and tables."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        (row,) = self._samples.slice(index % len(self), 1).to_pylist()
        return self._sample(row)

    def __iter__(self) -> Iterator[Sample]:
        # Rows of many samples at once: what looks at all samples at start does so on every rank.
        for batch in self._samples.to_batches(max_chunksize=ROWS):
            yield from map(self._sample, batch.to_pylist())

    def _sample(self, row: dict[str, Any]) -> Sample:
        frames = row["frames"]
        if frames and not 0 <= min(frames) <= max(frames) < len(self._files):
            raise ValueError(
                f"{self.folder / SAMPLES}: sample {row['id']} names a frame that {FRAMES} does not have; "
                "prepare the data set again."
            )
        begin, end = row["what"]
        return Sample(
            id=row["id"],
            task=row["task"],
            scene_id=row["scene_id"],
            frames=tuple(self._files[i] for i in frames),
            cam_to_world=self._poses[frames],
            question=row["question"],
            answer=row["answer"],
            target=_target(row["target"]),
            kind=row["kind"],
            what=(begin, end),
            references=tuple(Reference(r["text"], tuple(r["words"])) for r in row["references"]),
            objects=tuple(Labelled(o["label"], np.array(o["box"])) for o in row["objects"]),
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: there is none, it is not readable, or it is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["version"], manifest["task"], manifest["counts"]["samples"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no prepared data set ({MANIFEST} is missing); run launchers/prepare.py, or correct "
            "data.root, data.train or data.val."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error!r}); prepare the data set again.") from None
    if not isinstance(found[1], str) or not _TASK.fullmatch(found[1]):  # it becomes part of files' names
        raise ValueError(f"{path}: task {found[1]!r} is no name of small letters; prepare the data set again.")
    if found[0] != VERSION:
        raise ValueError(
            f"{path} is of version {found[0]!r}, this program reads {VERSION}; prepare the data set again."
        )
    return dict(manifest)


def tables(samples: Iterable[Sample], root: Path | str) -> tuple[pa.Table, pa.Table]:
    """The two tables of some samples.

    Args:
        samples: with frames below `root`.
        root: data root.

    Raises:
        ValueError: a frame lies outside `root`.
    """
    root = Path(root)
    numbers: dict[Path, int] = {}
    poses: list[np.ndarray] = []
    rows = []
    for sample in samples:
        for path, pose in zip(sample.frames, sample.cam_to_world, strict=True):
            if numbers.setdefault(path, len(numbers)) == len(poses):
                poses.append(pose)
        rows.append(_row(sample, [numbers[path] for path in sample.frames]))
    try:
        paths = [path.relative_to(root).as_posix() for path in numbers]
    except ValueError as error:
        raise ValueError(f"A frame lies outside the data root: {error}.") from None
    frames = [{"path": path, "cam_to_world": pose.ravel()} for path, pose in zip(paths, poses, strict=True)]
    return pa.Table.from_pylist(rows, SAMPLE_SCHEMA), pa.Table.from_pylist(frames, FRAME_SCHEMA)


def write_tables(folder: Path, samples: pa.Table, frames: pa.Table) -> None:
    """Write both tables into an existing folder; the manifest is the caller's, and last."""
    pq.write_table(samples, folder / SAMPLES, compression="zstd")
    pq.write_table(frames, folder / FRAMES, compression="zstd")


def _row(sample: Sample, frames: list[int]) -> dict[str, Any]:
    target = sample.target
    return {
        "id": sample.id,
        "task": sample.task,
        "scene_id": sample.scene_id,
        "frames": frames,
        "question": sample.question,
        "answer": sample.answer,
        "kind": sample.kind,
        "what": list(sample.what),
        "target": None if target is None else vars(target),
        "references": [{"text": r.text, "words": list(r.words)} for r in sample.references],
        "objects": [{"label": o.label, "box": o.box} for o in sample.objects],
    }


def _target(row: dict[str, Any] | None) -> Target | None:
    if row is None:
        return None
    described = None if row["described"] is None else np.array(row["described"])
    return Target(**{**row, "box": np.array(row["box"]), "described": described})


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is missing or not whole ({error}); prepare the data set again.") from None
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has other columns than this program writes; prepare the data set again.")
    for name in table.column_names:
        nulls = table[name].null_count
        if nulls and name != "target":  # a question about no object has none
            raise ValueError(f"{path}: {nulls} of {len(table)} rows have no {name!r}; prepare the data set again.")
    return table


def _check_names(values: Sequence[str], file: Path, column: str) -> None:
    """Refuse names that cannot stand in a message or a log; a search in all of them at once, since there are many."""
    if CONTROL.search("".join(values)):
        name = next(value for value in values if CONTROL.search(value))
        raise ValueError(f"{file}: {column} {name!r} holds a control character; prepare the data set again.")


def _inside(path: str, file: Path) -> str:
    """A relative path that does not climb; links below the root are the user's own."""
    pure = PurePosixPath(path)
    if CONTROL.search(path):
        raise ValueError(f"{file}: path {path!r} holds a control character; prepare the data set again.")
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{file}: path {path!r} leaves the data root; prepare the data set again.")
    return path
