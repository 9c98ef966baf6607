"""Prepared data sets: samples are read as they were written; incomplete and damaged folders raise errors."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepared_sets import SCENE_FILE, write_prepared
from w2r2_ds.data import prepared_set
from w2r2_ds.data.prepared_set import PreparedSet, write_samples
from w2r2_ds.types.sample import LabeledBox, Reference, Sample, Target

BOX = np.array([0.1, -2.0, 0.7, 1.2, 0.9, 1.6, 0.0, 0.0, 0.0])


def make(root: Path) -> list[Sample]:
    """One sample of every kind and box format; the first two share a frame."""
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
    none = Sample("c", "detection", "s", (), np.zeros((0, 4, 4)), "?", "[]", objects=(LabeledBox("chair", BOX),))
    return [first, caption, replace(none, box_format="world")]


def write(folder: Path, root: Path) -> list[Sample]:
    """Write the samples of `make` as launchers/prepare.py does."""
    samples = make(root)
    write_prepared(folder, samples, root)
    return samples


def assert_same(one: Any, other: Any) -> None:
    """Assert equal records with bit-equal arrays."""
    assert type(one) is type(other)
    for each in fields(one):
        mine, yours = getattr(one, each.name), getattr(other, each.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, yours)
        elif isinstance(mine, Target | LabeledBox):
            assert_same(mine, yours)
        elif each.name == "objects":
            for a, b in zip(mine, yours, strict=True):
                assert_same(a, b)
        else:
            assert mine == yours


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = write(tmp_path / "set", tmp_path)
    read = PreparedSet(tmp_path / "set", tmp_path)
    assert len(read) == 3 and read.task == "scanrefer"
    for one, other in zip(samples, read, strict=True):
        assert_same(one, other)
    assert_same(read[-1], samples[2])
    assert len(read._poses) == 3, "every frame once"


def test_frame_paths_are_relative_to_the_root(tmp_path: Path) -> None:
    write(tmp_path / "set", tmp_path)
    assert PreparedSet(tmp_path / "set", "/elsewhere")[0].frames[0].parts[1] == "elsewhere"


def test_samples_are_ordered_by_their_index(tmp_path: Path) -> None:
    samples = write(tmp_path / "set", tmp_path)
    (tmp_path / "set" / SCENE_FILE).unlink()
    write_samples(tmp_path / "set" / "a.parquet", [(1, samples[1]), (5, samples[0])], tmp_path)
    write_samples(tmp_path / "set" / "b.parquet", [(0, samples[2])], tmp_path)
    for one, other in zip((samples[2], samples[1], samples[0]), PreparedSet(tmp_path / "set", tmp_path), strict=True):
        assert_same(one, other)


def test_files_load_with_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="installed by the extra dev")
    samples = write(tmp_path / "set", tmp_path)
    files = str(tmp_path / "set" / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["question"][:] == [sample.question for sample in samples]
    assert np.array_equal(np.array(table[0]["cam_to_world"]).reshape(-1, 4, 4), samples[0].cam_to_world)


def test_reading_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache folder is needed: no file below the set, the home or the cache variables is opened for writing."""
    samples = write(tmp_path / "set", tmp_path)
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and watching and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            opened.append(str(arguments[0]))
        if event in ("os.mkdir", "os.rename", "os.link", "os.symlink") and watching:
            opened.append(str(arguments[0]))

    watching = True
    sys.addaudithook(watch)
    (tmp_path / "set").chmod(0o500)
    before = sorted(tmp_path.rglob("*"))
    assert len(list(PreparedSet(tmp_path / "set", tmp_path))) == len(samples)
    watching = False
    (tmp_path / "set").chmod(0o700)
    assert opened == [] and sorted(tmp_path.rglob("*")) == before


def test_a_frame_outside_the_root_is_rejected(tmp_path: Path) -> None:
    stray = replace(make(tmp_path)[0], frames=(tmp_path.parent / "x.jpg", tmp_path / "y.jpg"))
    with pytest.raises(ValueError, match="outside of the data root"):
        write_samples(tmp_path / "s.parquet", [(0, stray)], tmp_path)


def changed(file: Path, column: str, value: Any, row: int = 0) -> None:
    """Replace one value in a scene's file."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[row][column] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "posed_images/../../x.jpg"])
def test_a_path_outside_the_root_is_rejected(tmp_path: Path, path: str) -> None:
    write(tmp_path / "set", tmp_path)
    changed(tmp_path / "set" / SCENE_FILE, "frames", ["a.jpg", path])
    with pytest.raises(ValueError, match=rf"{SCENE_FILE}: path .* leaves the data root"):
        PreparedSet(tmp_path / "set", tmp_path)


def test_a_truncated_file_raises_with_its_name(tmp_path: Path) -> None:
    write(tmp_path / "set", tmp_path)
    file = tmp_path / "set" / SCENE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{SCENE_FILE} is missing or truncated"):
        PreparedSet(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("column", ["question", "frames"])
def test_an_empty_field_raises_with_its_name(tmp_path: Path, column: str) -> None:
    write(tmp_path / "set", tmp_path)
    changed(tmp_path / "set" / SCENE_FILE, column, None)
    with pytest.raises(ValueError, match=rf"{SCENE_FILE}: 1 of 3 rows have no '{column}'"):
        PreparedSet(tmp_path / "set", tmp_path)


def test_a_frame_with_two_poses_is_rejected(tmp_path: Path) -> None:
    samples = write(tmp_path / "set", tmp_path)
    changed(tmp_path / "set" / SCENE_FILE, "cam_to_world", [pose.ravel() + 1 for pose in samples[0].cam_to_world])
    with pytest.raises(ValueError, match=f"{SCENE_FILE}: a frame has two poses"):
        PreparedSet(tmp_path / "set", tmp_path)


def test_inconsistent_folders_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(ValueError, match="is not a prepared data set"):
        PreparedSet(folder, tmp_path)
    write(folder, tmp_path)
    manifest = folder / prepared_set.MANIFEST
    for change, message in (
        ({"counts": {"samples": 7}}, "has 3 samples"),
        ({"version": 99}, "has version 99"),
        ({"counts": {}}, "not readable"),
    ):
        written = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match=message):
            PreparedSet(folder, tmp_path)
        manifest.write_text(json.dumps(written))
