"""ScanRefer's boxes computed from a small mesh whose numbers can be checked by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_scene import ALIGN, SCENE, write_scene
from w2r2_ds.commands.prepare import main
from w2r2_ds.data.prepare.scannet_boxes import write_boxes
from w2r2_ds.data.sources.scannet import load_scene

VERTICES = np.array(
    [
        [0, 0, 0],  # segment 10: objects 0
        [1, 2, 3],
        [0.5, -1, 1],  # segment 20: objects 0 and 1, so 1 has it
        [2, 1, 0],  # segment 30: object 1
        [9, 9, 9],  # segment 40: of no object
        [0.5, -1, 1],  # segment 20 again: merging equal vertices would shift all that follow
        [4, 4, 4],  # segment 50: object 3
        [5, 6, 7],
    ],
    dtype=np.float32,
)
SEGMENTS = [10, 10, 20, 30, 40, 20, 50, 50]
GROUPS = [
    {"objectId": 3, "label": "closet wall", "segments": [50]},
    {"objectId": 0, "label": "office chair", "segments": [10, 20]},
    {"objectId": 1, "label": "misc", "segments": [30, 20, 20]},
    {"objectId": 2, "label": "lamp", "segments": [77]},  # no vertex
]
# ALIGN maps (x, y, z) to (0.5 - y, x - 2, z + 0.25).
ROWS = np.array(
    [
        [-0.5, -1.5, 1.75, 2, 1, 3, 5, 0],  # (0.5, -2, 0.25) and (-1.5, -1, 3.25)
        [0.5, -0.75, 0.75, 2, 1.5, 1, 0, 1],  # (1.5, -1.5, 1.25) and (-0.5, 0, 0.25); "misc" is in no table
        [0, 0, 0, 0, 0, 0, 0, 0],
        [-4.5, 2.5, 5.75, 2, 1, 3, 1, 3],  # (-3.5, 2, 4.25) and (-5.5, 3, 7.25)
    ]
)
TABLE = "raw_category\tnyu40id\tnyu40class\noffice chair\t5\tchair\ncloset wall\t1\twall\nlamp\t35\tlamp\n"


def write_mesh(path: Path, vertices: np.ndarray, binary: bool) -> None:
    """Write a mesh in ScanNet's format: coordinates, colours, triangles."""
    header = f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\nelement vertex {len(vertices)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz")
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "alpha"))
    header += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    faces = [(0, 1, 2), (0, 1, 3)]  # most vertices are in no triangle
    if binary:
        rows = np.zeros(len(vertices), dtype=[("xyz", "<f4", 3), ("rgba", "u1", 4)])
        rows["xyz"] = vertices
        triangles = np.array([(3, face) for face in faces], dtype=[("n", "u1"), ("v", "<i4", 3)])
        path.write_bytes(header.encode() + rows.tobytes() + triangles.tobytes())
    else:
        lines = [" ".join(str(value) for value in vertex) + " 0 0 0 255" for vertex in vertices]
        path.write_text(header + "\n".join([*lines, *(f"3 {a} {b} {c}" for a, b, c in faces)]) + "\n")


def files(root: Path) -> dict[str, Path]:
    folder = root / "scans" / SCENE
    return {
        "mesh": folder / f"{SCENE}_vh_clean_2.ply",
        "segments": folder / f"{SCENE}_vh_clean_2.0.010000.segs.json",
        "groups": folder / f"{SCENE}.aggregation.json",
        "description": folder / f"{SCENE}.txt",
        "labels": root / "scannetv2-labels.combined.tsv",
        "boxes": root / "scannet_data" / f"{SCENE}_aligned_bbox.npy",
    }


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A data root with all ScanNet files of one scene."""
    write_scene(tmp_path)
    paths = files(tmp_path)
    write_mesh(paths["mesh"], VERTICES, binary=True)
    paths["segments"].write_text(json.dumps({"sceneId": SCENE, "segIndices": SEGMENTS}))
    paths["groups"].write_text(json.dumps({"sceneId": SCENE, "segGroups": GROUPS}))
    paths["labels"].write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize("binary", [True, False])
def test_boxes_by_hand(scan: Path, binary: bool) -> None:
    np.testing.assert_array_equal(VERTICES[1] @ ALIGN[:3, :3].T + ALIGN[:3, 3], [-1.5, -1, 3.25])
    write_mesh(files(scan)["mesh"], VERTICES, binary)
    findings = write_boxes(scan, SCENE)
    path = files(scan)["boxes"]
    np.testing.assert_array_equal(np.load(path), ROWS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    examples = [finding.example for finding in findings]
    assert examples == [f"{SCENE}: segment 77 of object 2", f"{SCENE}: object 1 (misc)", f"{SCENE}: object 2 (lamp)"]
    instances = load_scene(scan, SCENE).instances
    assert sorted(instances) == [0, 1, 3]
    np.testing.assert_array_equal(instances[0].box, ROWS[0, :6])


def test_the_annotation_of_the_fine_mesh_is_not_read(scan: Path) -> None:
    """ScanNet's download has both files; the segment ids of the fine mesh name other vertices."""
    paths = files(scan)
    fine = paths["groups"].with_name(f"{SCENE}_vh_clean.aggregation.json")
    fine.write_text(json.dumps({"segGroups": [{"objectId": 5, "label": "lamp", "segments": [50]}]}))
    write_boxes(scan, SCENE)
    np.testing.assert_array_equal(np.load(paths["boxes"]), ROWS)
    paths["groups"].unlink()
    with pytest.raises(ValueError, match=rf"{SCENE}\.aggregation\.json does not exist.*{re.escape(fine.name)}"):
        write_boxes(scan, SCENE)


@pytest.mark.parametrize("prefix", ["", "scannet."])
def test_the_segments_file_of_the_annotation_is_compared(scan: Path, prefix: str) -> None:
    paths = files(scan)
    content = {"segGroups": GROUPS, "segmentsFile": prefix + paths["segments"].name}
    paths["groups"].write_text(json.dumps(content))
    write_boxes(scan, SCENE)
    np.testing.assert_array_equal(np.load(paths["boxes"]), ROWS)
    for other in (f"{SCENE}_vh_clean.segs.json", paths["segments"].name.replace(SCENE, "scene0005_00")):
        paths["groups"].write_text(json.dumps({**content, "segmentsFile": prefix + other}))
        with pytest.raises(
            ValueError, match=rf"'segmentsFile' is {re.escape(prefix + other)}.*{paths['segments'].name}"
        ):
            write_boxes(scan, SCENE)


def test_an_object_that_is_listed_twice_has_two_boxes(scan: Path) -> None:
    """ScanRefer's code gives the vertices to the later one, and a row of zeros to the other."""
    twice = {**GROUPS[0], "objectId": 8}
    files(scan)["groups"].write_text(json.dumps({"segGroups": [*GROUPS, twice]}))
    findings = [each for each in write_boxes(scan, SCENE) if "listed again" in each.kind]
    assert [each.example for each in findings] == [f"{SCENE}: object 3 (closet wall)"]
    rows = np.load(files(scan)["boxes"])
    np.testing.assert_array_equal(rows[:4], ROWS)
    np.testing.assert_array_equal(rows[4], [*ROWS[3, :7], 8])


def test_a_flat_object_has_no_box_and_does_not_block_the_others(scan: Path) -> None:
    flat = {"objectId": 9, "label": "sheet", "segments": [40]}  # one vertex
    files(scan)["groups"].write_text(json.dumps({"segGroups": [*GROUPS, flat]}))
    (finding,) = [each for each in write_boxes(scan, SCENE) if "flat" in each.kind]
    assert finding.example == f"{SCENE}: object 9 (sheet) of the size [0.0, 0.0, 0.0]"
    np.testing.assert_array_equal(np.load(files(scan)["boxes"]), [*ROWS, [0] * 8])


@pytest.mark.parametrize("missing", ["mesh", "segments", "groups", "description", "labels"])
def test_a_missing_file_raises_with_its_name(scan: Path, missing: str) -> None:
    path = files(scan)[missing]
    path.unlink()
    before = files(scan)["boxes"].read_bytes()
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*does not exist") as caught:
        write_boxes(scan, SCENE)
    assert missing == "description" or "download script fetches" in str(caught.value)
    assert files(scan)["boxes"].read_bytes() == before


def group(**changes: Any) -> str:
    return json.dumps({"segGroups": [{**GROUPS[0], **changes}]})


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        ("groups", "{}", "field 'segGroups'"),
        ("groups", '{"segGroups": [{"obj', "copy it again"),
        ("groups", '{"segGroups": [7]}', "field 'segGroups[0]'"),
        ("groups", group(objectId="3"), "field 'segGroups[0].objectId'"),
        ("groups", group(label=None), "field 'segGroups[0].label'"),
        ("groups", group(segments=["x"]), "field 'segGroups[0].segments[0]'"),
        ("groups", json.dumps({"segGroups": GROUPS[:1] * 2}), "field 'segGroups[1].objectId'"),
        ("groups", group(segments=[40]), f"no object of {SCENE} has a box (flat objects"),
        ("groups", group(segments=[77]), f"no object of {SCENE} has a box (segment ids that no vertex has; objects"),
        (
            "segments",
            json.dumps({"segIndices": SEGMENTS[:-1]}),
            f"has 7 segIndices, but {SCENE}_vh_clean_2.ply 8 vertices",
        ),
        (
            "segments",
            json.dumps({"segIndices": [1.5] * 8}),
            "field 'segIndices[0]'",
        ),
        ("segments", "[]", f"{SCENE}_vh_clean_2.0.010000.segs.json"),
        ("mesh", "", "is no readable mesh"),
        ("mesh", "ply\nformat ascii 1.0\nelement vertex 8\n", "is no readable mesh"),
        ("mesh", "solid x", "is no readable mesh"),
        ("description", "sceneType = Lobby", "there is no line 'axisAlignment = 16 numbers'"),
    ],
)
def test_a_broken_file_raises_with_its_name(scan: Path, which: str, content: str, message: str) -> None:
    files(scan)[which].write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_boxes(scan, SCENE)
    assert f"scans/{SCENE}/{SCENE}" in str(caught.value)


def test_a_cut_mesh_is_rejected(scan: Path) -> None:
    path = files(scan)["mesh"]
    whole = path.read_bytes()
    header = whole.index(b"end_header\n") + 11
    for length in (header // 2, header, header + 16 * 5, header + 16 * 5 + 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"_vh_clean_2\.ply"):
            write_boxes(scan, SCENE)


def test_an_unsafe_scene_id_is_rejected(scan: Path) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        write_boxes(scan, "../up")


def test_the_command_prints_one_line_per_kind(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["boxes", "--root", str(scan), "--overwrite", "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()[-4:]
    assert printed[0].startswith(f"{scan / 'scannet_data'}: wrote the boxes of 1 scenes")
    assert [line.split()[0] for line in printed[1:]] == ["1", "1", "1"]
    assert printed[3].endswith(f"such as {SCENE}: object 2 (lamp)")
