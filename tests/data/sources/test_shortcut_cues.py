"""Reader of the cues of a shifted split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2r2_ds.data.sources.shortcut_cues import ShortcutCue, cues_file, read_cues, write_cues

BOX = [0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def moved(distance: float) -> list[float]:
    return [distance, *BOX[1:]]


def entry(**changes: Any) -> dict[str, Any]:
    frames = [
        {"frame": 3, "area": 20.0, "camera": moved(1.0), "world": moved(2.0)},
        {"frame": 7, "area": 50.0, "camera": moved(3.0), "world": moved(4.0)},
    ]
    fields = {
        "id": "scene5000_04|1|chair|0",
        "paired_id": "scene5000_00|1|chair|0",
        "shift": "camera",
        "scene_id": "scene5000_04",
        "object_id": 1,
        "parameters": {"camera_drop": 0.5, "prior": "color"},
        "truth": BOX,
        "paired_truth": BOX,
        "frames": frames,
    }
    return fields | changes


def written(root: Path, *entries: dict[str, Any]) -> Path:
    path = cues_file(root, "val_camera")
    path.parent.mkdir()
    write_cues(path, entries)
    return path


def test_cues_by_frame_and_of_the_frame_that_shows_the_object_largest(tmp_path: Path) -> None:
    path = written(tmp_path, entry(), entry(id="other", frames=[]))
    assert path.name == "scanrefer_val_camera.jsonl"
    cues = read_cues(path)
    assert list(cues) == ["scene5000_04|1|chair|0", "other"]
    cue = cues["scene5000_04|1|chair|0"]
    assert isinstance(cue, ShortcutCue)
    assert cue.parameters == {"camera_drop": 0.5, "prior": "color"}

    def first(box: np.ndarray | None) -> float | None:
        return None if box is None else float(box[0])

    assert [first(cue.camera_box(frame)) for frame in (3, 7, 4)] == [1.0, 3.0, None]
    assert [first(cue.world_box(frames)) for frames in (None, [3], [3, 7, 9], [4])] == [4.0, 2.0, 4.0, None]
    assert cues["other"].world_box() is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"truth": BOX[:6]}, "truth"),
        ({"paired_truth": [*BOX[:8], float("nan")]}, "paired_truth"),
        ({"frames": [{"frame": 3, "area": 1.0, "camera": BOX}]}, "frames"),
        ({"object_id": "chair"}, "object_id"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = written(tmp_path, entry(), entry(id="second", **changes))
    with pytest.raises(ValueError, match=rf"line 2: field '{field}"):
        read_cues(path)


def test_a_repeated_id_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: id 'scene5000_04\|1\|chair\|0' is repeated"):
        read_cues(written(tmp_path, entry(), entry()))
    with pytest.raises(ValueError, match=r"absent.jsonl does not exist.*--shift"):
        read_cues(tmp_path / "absent.jsonl")
