"""Time to decode and resize the frames of a sample, on one or more threads, and the bytes that reach the device."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from w2r2_ds.bench.feature_cache import write_frames
from w2r2_ds.bench.harness import Case, Lap, interleave, time_ratio
from w2r2_ds.bench.model import build_frontend
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import PATCH, Shape, find_shapes
from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.batching.collate import tower_input
from w2r2_ds.data.images import load_frame, load_resized, resize_frames, scaled_size
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.types.batch import Visuals, to_device
from w2r2_ds.types.sample import Sample

DECODE, DEVICE = "decode", "copy to the device, normalise and cut patches"
MAX_BYTES = 1 / 8
"""Maximum bytes of a sample relative to float32 inputs of both encoders."""


def run(shape_name: str, frames: list[int] | None, size: tuple[int, int], rounds: int) -> BenchReport:
    """Time the loading of one sample, for every number of frames.

    Args:
        shape_name, frames: see `find_shapes`.
        size: width and height of the JPEG files in pixels.
        rounds: number of runs per case, interleaved.
    """
    report = BenchReport("loader", "wall-clock seconds per sample, one loader process", [])
    for shape in find_shapes(shape_name, frames):
        with tempfile.TemporaryDirectory() as folder:
            measure(shape, write_frames(Path(folder), shape.frames, size), size, rounds, report)
    return report


def measure(shape: Shape, paths: list[Path], size: tuple[int, int], rounds: int, report: BenchReport) -> None:
    """Add one shape's rows, criterion and note to the report."""
    frontend, width = build_frontend(shape), shape.frame_size[0]
    sample = Sample("bench", "scanrefer", "bench", tuple(paths), np.tile(np.eye(4), (len(paths), 1, 1)), "", "", None)

    def preprocessor(threads: int) -> VisualPreprocessor:
        config = DataConfig(frame_width=width, decode_threads=threads)
        return VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, config)

    inputs = preprocessor(1).compute(sample)
    assert inputs.tower_frames is not None, "without a cache, frames are decoded"
    visuals = tower_input("image", [inputs.tower_frames], inputs.grid_thw, frontend.vision, frontend.family)
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16) if count <= cores]
    others = alternatives()
    calls: dict[str, Callable[[], object]] = {
        DECODE: partial(decode, paths),
        **{threads_case(count): partial(preprocessor(count).compute, sample) for count in counts},
        **{name: partial(call_all, call, paths, width) for name, call in others.items()},
        DEVICE: partial(encoder_inputs, visuals, frontend),
    }
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    cases: dict[str, Case] = {name: partial(wall_clock, call, cpu[name]) for name, call in calls.items()}
    spreads = interleave(cases, rounds, torch.device("cpu"), warmups=1)
    base = spreads[threads_case(1)]
    differing = {name: differing_values(name, paths[0], width) for name in others}
    for name, spread in spreads.items():
        row = {"case": name, "shape": shape.label, **spread.columns(), "samples/s": 1 / spread.median}
        report.rows.append(
            row
            | {"/1 thread": time_ratio(spread, base), "cpu seconds": float(np.median(cpu[name]))}
            | {"differing": differing.get(name)}
        )
    floats = sum(tensor.nbytes for tensor in encoder_inputs(visuals, frontend))
    claim = f"{shape.label}: bytes of a sample / as float32 inputs"
    report.criteria.append(Criterion(claim, inputs.tower_frames.nbytes / floats, MAX_BYTES))
    report.notes.append(
        f"{shape.label}: JPEG files of {size[0]} x {size[1]} pixels; a sample has "
        f"{inputs.tower_frames.nbytes / 1e6:.1f} MB for both encoders, {floats / 1e6:.1f} MB as float32 inputs."
    )


def threads_case(count: int) -> str:
    """Name of the case that decodes and resizes on `count` threads."""
    return f"decode and resize, {count} thread{'s' if count > 1 else ''}"


def alternatives() -> dict[str, Callable[[Path, int], np.ndarray]]:
    """Other libraries for a part of the work, if they are installed: (file, width) -> ``uint8 [height, width, 3]``."""
    found: dict[str, Callable[[Path, int], np.ndarray]] = {"decode, resize with torch": resize_with_torch}
    if importlib.util.find_spec("simplejpeg"):
        found["decode with simplejpeg, resize"] = decode_with_simplejpeg
    if importlib.util.find_spec("cv2"):
        found["decode with OpenCV, resize"] = decode_with_opencv
    return found


def resize_with_torch(path: Path, width: int) -> np.ndarray:
    """Resize with torch's antialiased bicubic interpolation of 8-bit images."""
    pixels = torch.from_numpy(load_frame(path).copy()).permute(2, 0, 1)[
        None
    ]  # channels are last in memory, as required
    _, height = scaled_size((pixels.shape[3], pixels.shape[2]), width, PATCH)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def decode_with_simplejpeg(path: Path, width: int) -> np.ndarray:
    """Decode with simplejpeg."""
    import simplejpeg  # type: ignore[import-not-found]

    return resize(simplejpeg.decode_jpeg(path.read_bytes(), colorspace="RGB"), width)


def decode_with_opencv(path: Path, width: int) -> np.ndarray:
    """Decode with OpenCV, on one thread."""
    import cv2  # type: ignore[import-not-found]

    cv2.setNumThreads(1)
    return resize(cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), width)


def resize(pixels: np.ndarray, width: int) -> np.ndarray:
    """Resize ``uint8 [height, width, 3]`` with Pillow."""
    return resize_frames([pixels], width, PATCH)[0].transpose(1, 2, 0)


def differing_values(name: str, path: Path, width: int) -> float:
    """Fraction of the values of a resized frame that an alternative gives otherwise than Pillow."""
    return float((alternatives()[name](path, width) != load_resized(path, width, PATCH)).mean())


def call_all(call: Callable[[Path, int], np.ndarray], paths: list[Path], width: int) -> None:
    """Load all files with an alternative."""
    for path in paths:
        call(path, width)


def decode(paths: list[Path]) -> None:
    """Decode the files without resizing them."""
    for path in paths:
        with Image.open(path) as image:
            image.load()


def encoder_inputs(visuals: Visuals, frontend: VlmFrontend) -> list[torch.Tensor]:
    """Inputs of both encoders on the GPU, if there is one: pixel values, and frames in [0, 1]; float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = to_device(visuals, device)
    values = frontend.family.tower_pixels(moved, torch.float32), *(unit_range(frames) for frames in moved.tower_frames)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return list(values)


def wall_clock(call: Callable[[], object], cpu_seconds: list[float]) -> Lap:
    """Run a call and return its wall-clock time; its process time, which adds up the threads, is appended."""
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    cpu_seconds.append(time.process_time() - cpu_started)
    return Lap(seconds=time.perf_counter() - started)
