"""Untrusted data (recipes, prepared sets, frames, meshes, archives) runs no code and cannot leave the data root."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trimesh
from PIL import Image

from prepared_sets import SCENE_FILE, write_prepared
from w2r2_ds.config.io import from_tree, load_config
from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.images import check_frame, frame_size, load_frame
from w2r2_ds.data.prepare.manifest import file_hash
from w2r2_ds.data.prepare.scannet_boxes import _read_vertices
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.cameras import depth_size
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.numpy_unpickler import load_numpy_pickle
from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.data.validate import check_frames
from w2r2_ds.evaluation.datasets import find_sets
from w2r2_ds.evaluation.predictions.rescore import score_file

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
"""A file that PIL reads as an image with Ghostscript."""


@pytest.fixture
def evil_recipe(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that creates the marker file, which is returned, when it is imported."""
    (tmp_path / "evil_recipe.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom w2r2_ds.config.schema import DataConfig\nclass Data(DataConfig): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("evil_recipe", None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {class_path: evil_recipe.Data, init_args: {root: x}}", "data.class_path"),
        ("data.class_path: evil_recipe.Data", "data.class_path"),
        ("data: evil_recipe.Data", "data"),
        ("data: {train: [{class_path: evil_recipe.Data}]}", "data.train[0]"),
        ("data: {train: [evil_recipe.Data]}", "data.train[0]"),
        ("data: OTHER", "data"),
        ("config: OTHER", "config"),
        ("data: !!python/object/apply:os.system ['true']", "YAML"),
        ('data: {val: \'[{"class_path": "evil_recipe.Data"}]\'}', "data.val"),
        ("data: {val: '- class_path: evil_recipe.Data'}", "data.val"),
        ("data.val: '[evil_recipe.Data]'", "data.val"),
        ("data: {<<: {val: '[evil_recipe.Data]'}}", "data.val"),
        ("data: {val: [[evil_recipe.Data]]}", "data.val[0]"),
        ("data: {val+: evil_recipe.Data}", "data.val+"),
        ("a: &a [*a]", "a"),
        ("a: &a {b: *a}", "a"),
        ("data: &a {root: *a}", "data.root"),
        ("objective: {push_term: &a {name: *a}}", "objective.push_term"),
        ("a: " + "[" * 2000, "YAML"),
        ("a: 2020-99-99", "YAML"),
        ("[evil_recipe.Data]", "list"),
    ],
)
def test_a_recipe_runs_no_code(text: str, named: str, tmp_path: Path, evil_recipe: Path) -> None:
    """Also the config.yaml of an untrusted run, which evaluation and export read with the same function."""
    (tmp_path / "other.yaml").write_text("a-line-of-another-file: 1\n")
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("OTHER", str(tmp_path / "other.yaml")) + "\n")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    error = str(caught.value)
    assert str(path) in error and named in error and "a-line-of-another-file" not in error
    assert not evil_recipe.exists() and "evil_recipe" not in sys.modules


@pytest.mark.parametrize("tree", [{"data": {"val": "[evil_recipe.Data]"}}, {"data": "evil_recipe.Data"}, ["x"], None])
def test_the_configuration_of_a_model_card_runs_no_code(tree: Any, evil_recipe: Path) -> None:
    with pytest.raises(ValueError, match="card"):
        from_tree(tree, "card")
    assert not evil_recipe.exists() and "evil_recipe" not in sys.modules


@pytest.mark.parametrize("name", ["pipe", "-", "/dev/fd/N", "file://FOLDER/config.yaml", "none.yaml", "FOLDER"])
def test_a_recipe_must_be_a_regular_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a pipe would block, or consume it."""
    text = "out: runs/x\n"
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    os.mkfifo("pipe")
    held = os.open("pipe", os.O_RDWR)  # so that opening it does not wait
    os.write(held, text.encode())
    with pytest.raises(ValueError, match="regular file"):
        load_config(name.replace("FOLDER", str(tmp_path)).replace("N", str(read)))
    os.close(read)
    os.close(held)


def test_a_recipe_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand ~ in `--config=~/recipe.yaml`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("out: runs/home\n")
    assert load_config(overrides=["--config=~/config.yaml"]).out == "runs/home"


def with_first(file: Path, column: str, value: Any) -> None:
    """Replace the first value of a column."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0][column] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/etc/passwd", "leaves the data root"),
        ("../outside.png", "leaves the data root"),
        ("posed_images/../../outside.png", "leaves the data root"),
        ("a\x00b.png", "contains a control character"),
        ("a\x1b[31m.png", "contains a control character"),
    ],
)
def test_a_frame_stays_below_the_data_root(path: str, sentence: str, samples: Any, tmp_path: Path) -> None:
    root = samples[0].frames[0].parent
    write_prepared(tmp_path, samples, root)
    with_first(tmp_path / SCENE_FILE, "frames", [path, *(each.name for each in samples[0].frames[1:])])
    with pytest.raises(ValueError, match=sentence) as caught:
        PreparedSet(tmp_path, root)
    assert "\x1b" not in str(caught.value) and "\x00" not in str(caught.value)


def test_links_of_the_user_are_followed(samples: Any, tmp_path: Path) -> None:
    """docs/guides/own-dataset.md: a folder may be a link to another disk. A prepared table cannot create links."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "posed_images").symlink_to(samples[0].frames[0].parent)
    linked = [
        replace(each, frames=tuple(tmp_path / "root" / "posed_images" / path.name for path in each.frames))
        for each in samples
    ]
    write_prepared(tmp_path / "set", linked, tmp_path / "root")
    assert check_frames(PreparedSet(tmp_path / "set", tmp_path / "root")) == sum(len(each.frames) for each in samples)


@pytest.mark.parametrize("column", ["id", "scene_id", "task"])
def test_names_from_a_table_are_printed_on_one_line(column: str, samples: Any, tmp_path: Path) -> None:
    root = samples[0].frames[0].parent
    write_prepared(tmp_path, samples, root)
    with_first(tmp_path / SCENE_FILE, column, "x\nstep 5  loss 0.0")
    with pytest.raises(ValueError, match=rf"{column} 'x\\nstep 5  loss 0.0' contains a control character"):
        PreparedSet(tmp_path, root)


@pytest.mark.parametrize("task", ["../../x", "scan/refer", "/tmp/x", "", "a\nb", 3, None])
def test_a_task_name_cannot_be_a_path(task: Any, samples: Any, tmp_path: Path, data_config: Any) -> None:
    """An evaluation writes predictions-TASK-GEOMETRY.jsonl and removes parts-TASK-GEOMETRY."""
    write_prepared(tmp_path, samples, samples[0].frames[0].parent, task=task)
    config = data_config(root=str(samples[0].frames[0].parent))
    with pytest.raises(ValueError, match=r"manifest.json: task .* is not a name of small letters"):
        find_sets(config, data=tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", "a b", "", "..", "a\n", "scene0000_00\x00", "s" * 101])
def test_a_scene_id_cannot_be_a_path(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not made of letters, digits and underscores only"):
        check_scene_id(name)


def test_an_untrusted_prediction_cannot_forge_a_line(tmp_path: Path) -> None:
    file = tmp_path / "predictions-x.jsonl"
    file.write_text(json.dumps({"id": "a\nscores: 1.0", "task": "scanqa", "scene_id": "s", "text": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: field 'id': .*'a\\nscores: 1.0'"):
        score_file(file)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """List of the programs that PIL starts; it must stay empty."""
    calls: list[Any] = []

    def fail(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise OSError("started")

    monkeypatch.setattr("subprocess.Popen", fail)
    monkeypatch.setattr("subprocess.check_call", fail)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    yield calls
    assert not calls


def test_an_image_cannot_start_a_program(tmp_path: Path, started: list[Any]) -> None:
    """PIL detects PostScript by content, not by file name, and calls Ghostscript for it."""
    path = tmp_path / "00000.jpg"
    path.write_bytes(EPS)
    frame = Frame(0, path, path, np.eye(4))
    for read, value in ((load_frame, path), (frame_size, path), (load_depth, frame)):
        with pytest.raises(ValueError, match=r"00000\.jpg"):
            read(value)  # type: ignore[operator]
    for size in (check_frame, depth_size):
        with pytest.raises(ValueError, match=r"00000\.jpg"):
            size(path)


def test_a_mesh_cannot_open_other_files(tmp_path: Path) -> None:
    """A PLY file can name a texture file, which a reader may open."""
    Image.new("RGB", (4, 4)).save(tmp_path / "texture.png")
    content = trimesh.creation.box().export(file_type="ply")
    path = tmp_path / "scene.ply"
    path.write_bytes(content.replace(b"\nelement", b"\ncomment TextureFile texture.png\nelement", 1))
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    vertices = _read_vertices(path)
    watching = False
    assert len(vertices) == 8 and str(path) in opened
    assert not [name for name in opened if name.endswith("texture.png")]


def test_names_in_a_pickle_are_quoted_on_one_line(tmp_path: Path, mark: Path, payload: Any) -> None:
    path = tmp_path / "infos.pkl"
    path.write_bytes(b"\x80\x04\x8c\x0aos\x1b[2J\r\x85.x\x8c\x06system\x93.")
    with pytest.raises(ValueError) as caught:
        load_numpy_pickle(path)
    assert all(char.isprintable() for char in str(caught.value))
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="nothing of it was run"):
        load_numpy_pickle(path)
    assert not mark.exists()


def test_an_array_with_a_pickle_is_not_read(tmp_path: Path, payload: Any, mark: Path) -> None:
    from w2r2_ds.data.sources.scannet import read_instances

    path = tmp_path / "scene0000_00_aligned_bbox.npy"
    for content in (np.array([payload], dtype=object), {"a": np.array([payload], dtype=object)}):
        file = io.BytesIO()
        if isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content, allow_pickle=True)
        path.write_bytes(file.getvalue())
        with pytest.raises(ValueError, match=r"aligned_bbox.npy (is not a readable array|must hold numbers)"):
            read_instances(path)
    assert not mark.exists() and file_hash(path) != "missing"
