"""Compatibility with version 1 (the same rooms), no reuse of other versions, no leftovers of killed processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthetic_truth import SCENES
from w2r2_ds.demo.synthetic.write import Written, write_dataset

# Recorded from VERSION 1 for the options of the fixture `rooms`.
WORDS = "3184d86d900e7ed580e4ed45c16ae8179b646e2aceeac9c74dd51bae500bd055"
NUMBERS = "dfe0447dd0b4f68e1b337ab20d29259afbff71ff493e4b0c523a02a383ae9dfc"
IMAGES = ((117.220, 3573.35), (113.472, 3214.55), (120.200, 3257.48))
"""Mean colour level (0 to 255) and mean depth (millimetres) of each scene's images."""


def numbers(path: Path) -> np.ndarray:
    """All numbers of a file of poses, intrinsics, alignment or boxes, as one row."""
    if path.suffix == ".npy":
        return np.load(path).ravel()
    text = path.read_text()
    words = text.partition("axisAlignment = ")[2].partition("\n")[0] or text
    return np.array(words.split(), dtype=np.float64)


def test_rooms_are_those_of_version_1(rooms: Written) -> None:
    """Sentences are equal. Poses and boxes agree to 1e-9, and images in their mean, because CPUs round differently."""
    files = [*sorted((rooms.root / "ScanRefer").iterdir()), rooms.root / "scannetv2-labels.combined.tsv"]
    assert hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() == WORDS
    files = [
        path
        for pattern in ("posed_images/*/*.txt", "scans/*/*.txt", "scannet_data/*.npy")
        for path in sorted(rooms.root.glob(pattern))
    ]
    values = np.round(np.concatenate([numbers(path) for path in files]), 9) + 0.0
    assert hashlib.sha256(values.astype("<f8").tobytes()).hexdigest() == NUMBERS
    for scene, (color, depth) in zip(SCENES, IMAGES, strict=True):
        folder = rooms.root / "posed_images" / scene
        assert mean(folder, "jpg") == pytest.approx(color, abs=0.02)  # levels of 255
        assert mean(folder, "png") == pytest.approx(depth, abs=0.2)  # millimetres


def mean(folder: Path, suffix: str) -> float:
    """Mean over the pixels of all images of a kind."""
    means = []
    for path in sorted(folder.glob(f"*.{suffix}")):
        with Image.open(path) as image:
            means.append(np.asarray(image, dtype=np.float64).mean())
    return float(np.mean(means))


def test_a_folder_of_another_version_is_rejected(rooms: Written, tmp_path: Path) -> None:
    shutil.copy(rooms.root / "manifest.json", tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 1'))
    with pytest.raises(ValueError, match="made with version 1 instead of 3; use another folder, remove it"):
        write_dataset(tmp_path, 7, 2, 1, (160, 120), 12)


def test_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    code = f"from w2r2_ds.demo.synthetic.write import write_dataset as w; w({str(tmp_path / 'data')!r}, 0, 500, 1)"
    writer = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".data.partial-*/posed_images/*")) and time.monotonic() < end:
        time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(f"-{writer.pid}")

    living = tmp_path / f".data.partial-{socket.gethostname()}-{os.getppid()}"
    kept = [living, tmp_path / f".data.partial-elsewhere-{writer.pid}", tmp_path / f".other.partial-{writer.pid}"]
    old = tmp_path / f".data.partial-{writer.pid}"  # the name of version 1
    for folder in (*kept, old):
        folder.mkdir()
    write_dataset(tmp_path / "data", 0, 1, 1, (64, 48), 12)
    assert {path.name for path in tmp_path.iterdir()} == {"data", *(folder.name for folder in kept)}
