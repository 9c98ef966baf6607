"""Prepare data: ``python launchers/prepare.py synthetic --help``."""

from __future__ import annotations

import os
import sys

from jsonargparse import auto_cli

from w2r2_ds.command_line import Parser
from w2r2_ds.config import load_config
from w2r2_ds.data.synthetic.write import write_dataset
from w2r2_ds.demo import prepare_models, prepare_scenes


def synthetic(
    out: str,
    seed: int = 0,
    train_scenes: int = 48,
    val_scenes: int = 12,
    image_size: tuple[int, int] = (320, 240),
    frames_per_scene: int = 24,
    workers: int = 0,
) -> None:
    """Furnished rooms with referring sentences, in ScanNet's and ScanRefer's layout.

    A complete data set with the same options is reused; one with other options is never overwritten.
    OUT/contact_sheets/ shows each scene with its described objects.

    Args:
        out: folder to write, e.g. runs/demo/scenes.
        seed: the same seed and options give the same bytes.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms; none is a training room.
        image_size: width and height of the images in pixels, e.g. [320,240].
        frames_per_scene: posed images per room.
        workers: processes; 0 means one per available core.
    """
    count = workers if workers > 0 else len(os.sched_getaffinity(0))
    print(write_dataset(out, seed, train_scenes, val_scenes, image_size, frames_per_scene, count).message)


def demo(workers: int = 0) -> None:
    """What the demo recipe needs: its synthetic scenes, a tiny warmed-up VLM and a tiny VGGT.

    Args:
        workers: processes for the scenes; 0 means one per available core.
    """
    config = load_config()
    prepare_scenes(config, workers if workers > 0 else len(os.sched_getaffinity(0)))
    prepare_models(config)


def main() -> None:
    """Parse the command line and run one preparation."""
    try:
        auto_cli(
            {"synthetic": synthetic, "demo": demo},
            as_positional=False,
            parser_class=Parser,
            description="Prepare data for training and evaluation.",
        )
    except ValueError as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
