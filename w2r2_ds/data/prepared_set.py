"""Prepared data sets on disk: one folder per task and split, with one Parquet file per scene.

    SCENE.parquet     one row per sample of that scene (image files are referenced, not copied)
    skipped.jsonl     annotations without a sample, with the reason
    manifest.json     options, inputs and counts; written last, so a folder without it is incomplete

The order of the samples is that of their annotations in the annotation file (column `number`), across scenes.
``datasets.load_dataset("parquet", data_files="FOLDER/*.parquet")`` also opens the files, ordered by scene.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2r2_ds.types.sample import LabeledBox, Reference, Sample, Target
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.hashing import json_sha256
from w2r2_ds.utils.sanitize import CONTROL

VERSION = 6
"""Version of the schema and the manifest; increase it when older folders can no longer be read."""

CHUNK = 1024
"""Number of samples that are decoded at once when iterating over a data set."""
READERS = 16
"""Number of concurrent reads of files; they hide the latency of a network file system."""

_TASK = re.compile(r"[a-z0-9_]{1,40}")
MANIFEST = "manifest.json"

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
        ("number", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("scene_id", pa.string()),
        ("frames", pa.list_(pa.string())),
        ("cam_to_world", pa.list_(pa.list_(pa.float64(), 16))),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("box_format", pa.string()),
        ("what", pa.list_(pa.int64(), 2)),
        ("target", _TARGET),
        ("references", pa.list_(pa.struct([("text", pa.string()), ("words", pa.list_(pa.string()))]))),
        ("objects", pa.list_(pa.struct([("label", pa.string()), ("box", _NUMBERS)]))),
    ]
)
_COMPACT_SCHEMA = pa.schema(
    [
        pa.field("frames", pa.list_(pa.int64())) if field.name == "frames" else field
        for field in SAMPLE_SCHEMA
        if field.name != "cam_to_world"
    ]
)
"""Schema in memory: `frames` are indices into the data set's distinct frames; each frame has its pose once."""


class PreparedSet(Sequence[Sample]):
    """Samples of a prepared data set, decoded on access.

    All Parquet files are read into one Arrow table at construction; images are not read.

    Args:
        folder: folder that ``launchers/prepare.py`` wrote for one task and split.
        root: data root; frame paths are relative to it.

    Raises:
        ValueError: a file is missing, truncated or of another version, or a frame path leaves the root.
    """

    def __init__(self, folder: Path | str, root: Path | str) -> None:
        self.folder, self.root = Path(folder), Path(root)
        self.manifest = read_manifest(self.folder)
        # Only sets with world coordinates have this option, and not those of before the option.
        self._decimals = int(self.manifest.get("options", {}).get("decimals", 2))
        files = sorted(self.folder.glob("*.parquet"))
        with ThreadPoolExecutor(READERS) as pool:
            scenes = list(pool.map(_read_scene, files))
        # Frame indices of a scene start at 0; shift them to index the frames of all scenes, one scene after the other.
        self._files: list[Path] = []
        tables, poses = [_COMPACT_SCHEMA.empty_table()], [np.empty((0, 4, 4))]
        for table, paths, scene_poses in scenes:
            tables.append(_with_frames(table, table["frames"], offset=len(self._files)))
            self._files += [self.root / path for path in paths]
            poses.append(scene_poses)
        samples = pa.concat_tables(tables)
        # A stable sort keeps the order of several samples of one annotation.
        order = np.argsort(samples["number"].to_numpy(), kind="stable")
        self._samples, self._poses = samples.take(pa.array(order)).combine_chunks(), np.concatenate(poses)
        expected = self.manifest["counts"]["samples"]
        if len(self._samples) != expected:
            raise ValueError(
                f"{self.folder} has {len(self._samples)} samples, but {MANIFEST} counts {expected}; "
                "prepare the data set again."
            )

    @property
    def task(self) -> str:
        """Name of the samples' task."""
        return str(self.manifest["task"])

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has the options, the counts and the hashes of the inputs."""
        return json_sha256(self.manifest)

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
        # Decode many rows at once, which is faster: every rank iterates over all samples when a run starts.
        for batch in self._samples.to_batches(max_chunksize=CHUNK):
            yield from map(self._sample, batch.to_pylist())

    def _sample(self, row: dict[str, Any]) -> Sample:
        frames = row["frames"]
        begin, end = row["what"]
        return Sample(
            id=row["id"],
            task=row["task"],
            scene_id=row["scene_id"],
            frames=tuple(self._files[i] for i in frames),
            cam_to_world=self._poses[np.array(frames, dtype=np.int64)],
            question=row["question"],
            answer=row["answer"],
            target=_target(row["target"]),
            kind=row["kind"],
            box_format=row["box_format"],
            decimals=self._decimals,
            what=(begin, end),
            references=tuple(Reference(r["text"], tuple(r["words"])) for r in row["references"]),
            objects=tuple(LabeledBox(o["label"], np.array(o["box"])) for o in row["objects"]),
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared data set.

    Raises:
        ValueError: the manifest is missing, unreadable or of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
        version, task, _ = manifest["version"], manifest["task"], manifest["counts"]["samples"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is not a prepared data set ({MANIFEST} is missing); run launchers/prepare.py, or correct "
            "data.root, data.train or data.val."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error!r}); prepare the data set again.") from None
    if not isinstance(task, str) or not _TASK.fullmatch(task):  # it becomes part of file names
        raise ValueError(
            f"{path}: task {task!r} is not a name of small letters, digits and _; prepare the data set again."
        )
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}, but this program supports {VERSION}; prepare the data set again."
        )
    return dict(manifest)


def write_samples(
    path: Path, samples: Iterable[tuple[int, Sample]], root: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the samples of one scene atomically.

    Args:
        path: path of the Parquet file.
        samples: (number, sample) pairs of one scene, by ascending number; the number is the position of the sample's
            annotation in the annotation file.
        root: data root; all frames are below it.
        metadata: metadata of the file's schema.

    Raises:
        ValueError: a frame is outside `root`.
        OSError: the disk failed; the file is unchanged.
    """
    rows = [{"number": number, **_row(sample, Path(root))} for number, sample in samples]
    table = pa.Table.from_pylist(rows, SAMPLE_SCHEMA.with_metadata(dict(metadata or {})))
    with atomic_io.replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _row(sample: Sample, root: Path) -> dict[str, Any]:
    """Columns of a sample, except for `number`."""
    target = sample.target
    try:
        frames = [path.relative_to(root).as_posix() for path in sample.frames]
    except ValueError as error:
        raise ValueError(f"A frame is outside of the data root: {error}.") from None
    return {
        "id": sample.id,
        "task": sample.task,
        "scene_id": sample.scene_id,
        "frames": frames,
        "cam_to_world": [pose.ravel() for pose in sample.cam_to_world],
        "question": sample.question,
        "answer": sample.answer,
        "kind": sample.kind,
        "box_format": sample.box_format,
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


def _read_scene(file: Path) -> tuple[pa.Table, list[str], np.ndarray]:
    """Read the samples of one scene, with every frame and pose stored once.

    Returns:
        The samples, whose `frames` are indices; the paths of the distinct frames, relative to the data root; and their
        poses ``[frames, 4, 4]`` float64.
    """
    table = _read_table(file)
    # Encode frame paths as indices (codes) into the distinct paths. np.unique returns the first occurrence of every
    # code, whose pose must equal the poses of all other occurrences.
    frames = table["frames"].combine_chunks()
    encoded = frames.flatten().dictionary_encode()
    codes = np.asarray(encoded.indices)
    poses = np.asarray(table["cam_to_world"].combine_chunks().flatten().flatten()).reshape(-1, 4, 4)
    _, first = np.unique(codes, return_index=True)
    if len(codes) != len(poses) or not np.array_equal(poses[first][codes], poses, equal_nan=True):
        raise ValueError(f"{file}: a frame has two poses, or none; prepare the data set again.")
    paths = [_check_path(path, file) for path in encoded.dictionary.to_pylist()]
    # Offsets are computed from the lengths, because those of a sliced array need not start at 0.
    lengths = np.asarray(frames.value_lengths())
    indices = pa.ListArray.from_arrays(
        np.concatenate([[0], lengths.cumsum()]).astype(np.int32), pa.array(codes, pa.int64())
    )
    compact = _with_frames(table.drop_columns("cam_to_world"), pa.chunked_array([indices]), offset=0)
    return compact, paths, poses[first]


def _read_table(file: Path) -> pa.Table:
    """Read one Parquet file and check its schema and names."""
    try:
        # Not pq.read_table, which accepts a folder and joins its files. One thread per file: `READERS` files are read
        # at once.
        table = pq.ParquetFile(file).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); prepare the data set again.") from None
    if not table.schema.equals(SAMPLE_SCHEMA):
        raise ValueError(f"{file} does not have this version's columns; prepare the data set again.")
    for name in table.column_names:
        nulls = table[name].null_count
        if nulls and name != "target":  # a question about no object has no target
            raise ValueError(f"{file}: {nulls} of {len(table)} rows have no {name!r}; prepare the data set again.")
    for column in ("id", "task", "scene_id"):
        _check_names(table[column].to_pylist(), file, column)
    return table


def _with_frames(table: pa.Table, frames: pa.ChunkedArray, offset: int) -> pa.Table:
    """The samples with the column `frames` replaced by lists of indices, each increased by `offset`."""
    lists = frames.combine_chunks()
    values = pa.array(np.asarray(lists.flatten()) + offset, pa.int64())
    column = pa.ListArray.from_arrays(lists.offsets, values)
    index = table.schema.get_field_index("frames")
    return table.set_column(index, _COMPACT_SCHEMA.field("frames"), column).replace_schema_metadata(None)


def _check_names(values: Sequence[str], file: Path, column: str) -> None:
    """Raise ValueError for a name with a control character, which could forge lines of a message or a log."""
    # One search over all names joined is faster than one per name.
    if CONTROL.search("".join(values)):
        name = next(value for value in values if CONTROL.search(value))
        raise ValueError(f"{file}: {column} {name!r} contains a control character; prepare the data set again.")


def _check_path(path: str, file: Path) -> str:
    """Return a frame path that is relative and stays below the data root (symbolic links there are followed).

    Raises:
        ValueError: the path is absolute, contains ``..`` or a control character.
    """
    pure = PurePosixPath(path)
    if CONTROL.search(path):
        raise ValueError(f"{file}: path {path!r} contains a control character; prepare the data set again.")
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{file}: path {path!r} leaves the data root; prepare the data set again.")
    return path
