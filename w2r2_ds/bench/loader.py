"""CPU time to load a sample: ours, and the stock image processor per image as in VG-LLM."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from w2r2_ds.bench.harness import discard, interleave, ratio
from w2r2_ds.bench.model import build_front
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import QWEN_3B, TINY, Shape
from w2r2_ds.data.images import even_crop, load_frame, resize_for_vggt
from w2r2_ds.data.visual_inputs import vision_patches

CPU = torch.device("cpu")
SIDE = {"scannet": (1296, 968), "small": (640, 480)}
"""Width and height of ScanNet's colour images, and of images resized in advance."""


def loader(frames: int = 8, images: str = "scannet", rounds: int = 5) -> Report:
    """CPU seconds from JPEG files to both towers' inputs, per sample.

    Args:
        frames: per sample.
        images: scannet for 1296x968, small for 640x480.
        rounds: how often each is run, in turns.
    """
    if images not in SIDE:
        raise ValueError(f"--images is {images!r}; it is one of {', '.join(SIDE)}.")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_frames(Path(folder), frames, SIDE[images])
        ways = ways_of(paths, QWEN_3B if frames > 2 else TINY)
        spreads = interleave({name: discard(way) for name, way in ways.items()}, rounds, CPU, warmups=1)
        same = {name: way() for name, way in ways.items()}
    report = Report("loader", f"{frames} JPEG files of {images} size to patches and VGGT's images", [])
    for name, spread in spreads.items():
        report.rows.append(
            {
                "way": name,
                **spread.columns(),
                "samples/s": 1 / spread.median,
                "ms/frame": 1000 * spread.median / frames,
                "/field": ratio(spread, spreads["field: stock processor, image by image"]),
            }
        )
    ours, field = same["ours: one resize for both"], same["field: stock processor, image by image"]
    gap = float(np.abs(ours - field).max()) if ours.shape == field.shape else float("inf")
    report.criteria.append(Criterion("largest difference of a patch's value from the stock processor's", gap, 1e-5))
    report.notes.append("One process; the training loader has data.workers of them per rank beside the GPU.")
    return report


def write_frames(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEG files of smooth noise, which compresses about as photographs do."""
    noise = np.random.default_rng(0)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        paths.append(folder / f"{index}.jpg")
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def ways_of(paths: list[Path], shape: Shape) -> dict[str, Callable[[], np.ndarray]]:
    """Both ways, each from files to the vision tower's patches ``[patches, values]``."""
    vision, width = build_front(shape).vision, shape.frame_size[0]
    stock = Qwen2VLImageProcessorPil()

    def ours() -> np.ndarray:
        images = resize_for_vggt([load_frame(path) for path in paths], width=width)
        patches, _ = vision_patches(even_crop(images), vision, "image")
        return patches.numpy()

    def field() -> np.ndarray:
        found: list[Any] = []
        for path in paths:
            processor = copy.deepcopy(stock)
            images = resize_for_vggt([load_frame(path)], width=width)
            cropped = even_crop(images)[0]
            seen = Image.fromarray(np.round(cropped.transpose(1, 2, 0) * 255).astype(np.uint8))
            found.append(processor(images=[seen], return_tensors="np")["pixel_values"])
        return np.concatenate(found)

    return {"field: stock processor, image by image": field, "ours: one resize for both": ours}
