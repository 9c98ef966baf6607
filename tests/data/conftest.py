"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_scene import write_scene
from room_fixtures import many_rooms, rooms

__all__ = ["many_rooms", "rooms"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Data root with one hand-made scene and ScanNet's label table."""
    write_scene(tmp_path)
    header = "id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class"
    rows = ["chair\tchair", "office chair\tchair", "table\ttable", "refrigerator\trefridgerator", "lamp\tlamp"]
    lines = [f"{i}\t{row.split(chr(9))[0]}\tx\t1\t5\t1\tx\t{row.split(chr(9))[1]}" for i, row in enumerate(rows)]
    (tmp_path / "scannetv2-labels.combined.tsv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path
