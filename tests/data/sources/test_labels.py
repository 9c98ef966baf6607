"""ScanNet's label table, and the groups unique and multiple by both sets of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_scene import SCENE
from w2r2_ds.data.sources.annotations import Description
from w2r2_ds.data.sources.labels import (
    LABELS_FILE,
    SCANNET_CLASSES,
    nyu40_class,
    read_labels,
    scannet_class,
    unique_or_multiple,
)

HEADER = "id\traw_category\tnyu40id\tnyu40class\n"


def table(folder: Path, content: str | bytes) -> Path:
    (folder / LABELS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_reads_the_label_table(root: Path) -> None:
    labels = read_labels(root)
    assert labels["office chair"] == (5, "chair")
    assert labels["refrigerator"] == (5, "refridgerator")  # the fixture's numbers are all 5


def test_quotes_are_literal_and_the_last_row_wins(tmp_path: Path) -> None:
    content = HEADER + '1\t12" board\t30\twhiteboard\r\n2\tbook\t23\tbooks\n3\tbook\t40\totherprop\n\n'
    with pytest.raises(ValueError, match="line 5: field 'raw_category' is missing or empty"):
        read_labels(table(tmp_path, content))
    labels = read_labels(table(tmp_path, content[:-1]))
    assert labels == {'12" board': (30, "whiteboard"), "book": (40, "otherprop")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 has no column 'raw_category'"),
        ("id\traw_category\tnyu40id\n", "line 1 has no column 'nyu40class'"),
        ("id\traw_category\tnyu40class\n", "line 1 has no column 'nyu40id'"),
        (HEADER, "has a header, but no rows"),
        (HEADER + "1\tchair\t5\tchair\n2\tta", "line 3: field 'nyu40id' is missing or empty"),
        (HEADER + "1\tchair\t5\t \n", "line 2: field 'nyu40class' is missing or empty"),
        (HEADER + "1\tchair\tfive\tchair\n", "line 2: field 'nyu40id' is 'five', no number"),
        (HEADER.encode() + b"1\tch\xe9ir\t5\tchair\n", "line 2 is not UTF-8 "),
    ],
)
def test_a_broken_table_raises_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{LABELS_FILE}.*{message}"):
        read_labels(table(tmp_path, content))


def test_a_missing_table_raises_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{LABELS_FILE} does not exist; .*ScanNet's table of labels"):
        read_labels(tmp_path)


def test_groups_by_both_rules() -> None:
    def annotated(object_id: int, name: str, scene: str = SCENE) -> Description:
        return Description(
            scene_id=scene,
            object_id=object_id,
            object_name=name,
            ann_id="0",
            description="x",
            token=("x",),
            location="here",
        )

    labels = {
        "chair": (5, "chair"),
        "office chair": (5, "chair"),
        "table": (7, "table"),
        "refrigerator": (24, "refridgerator"),
        "lamp": (35, "lamp"),
    }
    annotations = [
        annotated(3, "chair"),
        annotated(5, "office_chair"),
        annotated(7, "table"),
        annotated(7, "table"),  # a second sentence about the same object changes nothing
        annotated(8, "refrigerator"),
        annotated(9, "what_is_it"),
        annotated(3, "lamp", "scene0001_00"),
    ]
    by_name = unique_or_multiple(annotations, labels, scannet_class)
    # Both spellings of refrigerator are one class; lamps and unknown names are "others".
    assert {key for key, group in by_name.items() if group == "multiple"} == {(SCENE, 3), (SCENE, 5)}
    assert by_name[SCENE, 7] == by_name["scene0001_00", 3] == "unique"
    by_number = unique_or_multiple(annotations, labels, nyu40_class)
    assert {key for key, group in by_number.items() if group == "multiple"} == {(SCENE, 3), (SCENE, 5)}


@pytest.mark.parametrize("spelling", ["refridgerator", "refrigerator"])
def test_both_spellings_of_refrigerator(spelling: str) -> None:
    labels = {"fridge": (24, spelling)}
    assert scannet_class("fridge", labels) == SCANNET_CLASSES.index("refrigerator")
