"""A prepared folder gives back the samples that were written, and refuses what is not whole."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from w2r2_ds.data import dataset
from w2r2_ds.data.dataset import PreparedSet, tables, write_tables
from w2r2_ds.types.sample import Labelled, Reference, Sample, Target

BOX = np.array([0.1, -2.0, 0.7, 1.2, 0.9, 1.6, 0.0, 0.0, 0.0])


def make(root: Path) -> list[Sample]:
    """One sample of every kind; the first two share a frame."""
    poses = np.random.default_rng(0).normal(size=(3, 4, 4))
    frames = tuple(root / "posed_images" / "scene0000_00" / f"{i:05d}.jpg" for i in range(3))
    target = Target(BOX, 4, "office chair", "multiple", "unique", 3, "2", BOX[:6] + 0.125)
    first = Sample("a", "scanrefer", "scene0000_00", frames[:2], poses[:2], "Where?\n", "there", target, what=(0, 5))
    caption = Sample(
        id="b",
        task="scan2cap",
        scene_id="scene0000_00",
        frames=frames[:0:-1],
        cam_to_world=poses[:0:-1],
        question="What?",
        answer="A chair.",
        kind="caption",
        references=(Reference("a chair.", ("a", "chair", ".")), Reference("très bien")),
    )
    none = Sample("c", "detection", "s", (), np.zeros((0, 4, 4)), "?", "[]", objects=(Labelled("chair", BOX),))
    return [first, caption, none]


def write(folder: Path, root: Path) -> list[Sample]:
    """Write them as launchers/prepare.py does."""
    folder.mkdir(parents=True)
    samples = make(root)
    write_tables(folder, *tables(samples, root))
    manifest = {"version": dataset.VERSION, "task": "scanrefer", "counts": {"samples": len(samples)}}
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest))
    return samples


def assert_same(one: Any, other: Any) -> None:
    """Equal records, arrays bit by bit."""
    assert type(one) is type(other)
    for each in fields(one):
        mine, yours = getattr(one, each.name), getattr(other, each.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, yours)
        elif isinstance(mine, Target | Labelled):
            assert_same(mine, yours)
        elif each.name == "objects":
            for a, b in zip(mine, yours, strict=True):
                assert_same(a, b)
        else:
            assert mine == yours


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    samples = write(tmp_path / "set", tmp_path)
    read = PreparedSet(tmp_path / "set", tmp_path)
    assert len(read) == 3 and read.task == "scanrefer"
    for one, other in zip(samples, read, strict=True):
        assert_same(one, other)
    assert_same(read[-1], samples[2])
    assert len(pq.read_table(tmp_path / "set" / dataset.FRAMES)) == 3, "every frame once"


def test_another_root_moves_the_frames(tmp_path: Path) -> None:
    write(tmp_path / "set", tmp_path)
    assert PreparedSet(tmp_path / "set", "/elsewhere")[0].frames[0].parts[1] == "elsewhere"


def test_the_tables_open_with_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="installed by the extra dev")
    samples = write(tmp_path / "set", tmp_path)
    files = str(tmp_path / "set" / dataset.SAMPLES)
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["question"][:] == [sample.question for sample in samples]


def test_a_frame_outside_the_root_is_refused(tmp_path: Path) -> None:
    stray = replace(make(tmp_path)[0], frames=(tmp_path.parent / "x.jpg", tmp_path / "y.jpg"))
    with pytest.raises(ValueError, match="outside the data root"):
        tables([stray], tmp_path)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "posed_images/../../x.jpg"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    write(tmp_path / "set", tmp_path)
    file = tmp_path / "set" / dataset.FRAMES
    table = pq.read_table(file).to_pydict()
    table["path"][1] = path
    pq.write_table(dataset.pa.table(table, schema=dataset.FRAME_SCHEMA), file)
    with pytest.raises(ValueError, match=r"frames\.parquet: path .* leaves the data root"):
        PreparedSet(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("name", [dataset.SAMPLES, dataset.FRAMES])
def test_a_truncated_table_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "set", tmp_path)
    file = tmp_path / "set" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} is missing or not whole"):
        PreparedSet(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("column", ["question", "frames"])
def test_an_empty_field_is_named(tmp_path: Path, column: str) -> None:
    write(tmp_path / "set", tmp_path)
    file = tmp_path / "set" / dataset.SAMPLES
    table = pq.read_table(file)
    rows = [{**row, column: None} if row["id"] == "c" else row for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(ValueError, match=rf"samples\.parquet: 1 of 3 rows have no '{column}'"):
        PreparedSet(tmp_path / "set", tmp_path)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(ValueError, match="holds no prepared data set"):
        PreparedSet(folder, tmp_path)
    write(folder, tmp_path)
    manifest = folder / dataset.MANIFEST
    for change, message in (
        ({"counts": {"samples": 7}}, "has 3 rows"),
        ({"version": 99}, "is of version 99"),
        ({"counts": {}}, "not readable"),
    ):
        written = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match=message):
            PreparedSet(folder, tmp_path)
        manifest.write_text(json.dumps(written))
    pq.write_table(pq.read_table(folder / dataset.FRAMES).slice(0, 1), folder / dataset.FRAMES)
    with pytest.raises(ValueError, match="names a frame that"):
        PreparedSet(folder, tmp_path)[0]
