"""Find the frames of a scene in its folder, under the file names of the usual extractors of ScanNet's ``.sens`` files.

===================== ========================== ====================== =========================================
colour                depth                      pose                   written by
===================== ========================== ====================== =========================================
00000.jpg             00000.png                  00000.txt              EmbodiedScan's and VG-LLM's ``posed_images``
frame-000000.color.jpg frame-000000.depth.png    frame-000000.pose.txt  ScanNet's SensReader in C++
color/0.jpg           depth/0.png                pose/0.txt             ScanNet's SensReader in Python, 25k frames
===================== ========================== ====================== =========================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTRINSIC_FILES = ("intrinsic.txt", "intrinsic/intrinsic_color.txt", "intrinsics_color.txt", "_info.txt")
"""Names of the intrinsics of the colour images, below the scene's folder; the first that exists is read."""
DEPTH_INTRINSIC_FILES = (
    *("depth_intrinsic.txt", "intrinsic/intrinsic_depth.txt", "intrinsics_depth.txt", "_info.txt"),
)
"""The same of the depth images."""
FOLDERS = ("color", "depth", "pose", "intrinsic")
"""Folders in a scene's folder of frames."""
SHOWN_NAMES = 5
"""Maximum number of file names in an error message."""


@dataclass(frozen=True)
class FrameFiles:
    """Files of one frame; None for a file that does not exist.

    Attributes:
        index: frame number in the file names.
        color: colour image.
        depth: depth image.
        pose: text file of the camera pose.
    """

    index: int
    color: Path | None = None
    depth: Path | None = None
    pose: Path | None = None


@dataclass(frozen=True)
class _Layout:
    """Names of the files of a frame, as regular expressions whose first group is the frame number."""

    example: str
    color: str
    depth: str
    pose: str


_LAYOUTS = (
    _Layout("00000.jpg", r"(\d+)\.jpe?g", r"(\d+)\.(?:png|pgm)", r"(\d+)\.txt"),
    _Layout(
        "frame-000000.color.jpg",
        r"frame-(\d+)\.color\.(?:jpe?g|png)",
        r"frame-(\d+)\.depth\.(?:png|pgm)",
        r"frame-(\d+)\.pose\.txt",
    ),
    _Layout("color/0.jpg", r"color/(\d+)\.(?:jpe?g|png)", r"depth/(\d+)\.(?:png|pgm)", r"pose/(\d+)\.txt"),
)


def find_frames(folder: Path) -> list[FrameFiles]:
    """Frames of a scene by ascending number. A frame exists if any of its files does.

    Raises:
        ValueError: the folder is missing or unreadable, it has colour images under no known name or under the names of
            two extractors, or two files have the same frame number.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist; extract the scene's images and poses, or correct data.root (or --root)"
        )
    names = sorted(list_names(folder))
    layouts = [layout for layout in _LAYOUTS if _numbered(folder, names, layout.color)]
    if len(layouts) > 1:
        examples = " and ".join(layout.example for layout in layouts)
        raise ValueError(f"{folder} has colour images named like {examples}; keep the files of one extractor")
    if not layouts:
        *first, last = (layout.example for layout in _LAYOUTS)
        beside = f"it holds {', '.join(names[:SHOWN_NAMES])}" if names else "it is empty"
        more = f" and {len(names) - SHOWN_NAMES} more files" if len(names) > SHOWN_NAMES else ""
        raise ValueError(
            f"{folder} has no colour images named like {', '.join(first)} or {last}; {beside}{more}. Extract the "
            "scene's frames again, or rename the files"
        )
    color, depth, pose = (
        _numbered(folder, names, kind) for kind in (layouts[0].color, layouts[0].depth, layouts[0].pose)
    )
    return [FrameFiles(i, color.get(i), depth.get(i), pose.get(i)) for i in sorted({*color, *depth, *pose})]


def intrinsic_file(folder: Path, candidates: tuple[str, ...]) -> Path:
    """The first of the candidates that exists below the folder, else the first one."""
    paths = [folder / name for name in candidates]
    return next((path for path in paths if path.is_file()), paths[0])


def list_names(folder: Path) -> Iterator[str]:
    """Names of the files of a scene, relative to its folder of frames.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        for path in folder.iterdir():
            if path.name in FOLDERS and path.is_dir():
                yield from (f"{path.name}/{file.name}" for file in path.iterdir())
            else:
                yield path.name
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}); correct its permissions or the disk") from None


def _numbered(folder: Path, names: list[str], pattern: str) -> dict[int, Path]:
    """Frame number -> file, for the names that match a pattern."""
    found: dict[int, Path] = {}
    compiled = re.compile(pattern, re.IGNORECASE | re.ASCII)
    for name in names:
        match = compiled.fullmatch(name)
        if match is None:
            continue
        index = int(match[1])
        if index in found:
            raise ValueError(f"{folder}: {found[index].name} and {name} have the same frame number; remove one")
        found[index] = folder / name
    return found


def scene_folder(color: Path) -> Path:
    """The folder of a scene's frames that a colour image is in: ``SCENE/00000.jpg`` or ``SCENE/color/0.jpg``."""
    return color.parent.parent if color.parent.name in FOLDERS else color.parent
