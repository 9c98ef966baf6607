"""Pictures of `train.samples_every` for a report: the first, the last, and evenly spaced ones between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from w2r2_ds.report.data_uri import jpeg_uri
from w2r2_ds.training.metrics import SAMPLES_FOLDER

PICTURES = 6
"""Most pictures of a run."""
QUALITY = 80
"""JPEG quality."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepPicture:
    """The samples after one step.

    Attributes:
        step: number of the step.
        uri: JPEG as a data URI.
        width: pixels.
        height: pixels.
    """

    step: int
    uri: str
    width: int
    height: int


def step_pictures(run: Path) -> list[StepPicture]:
    """Pictures of a run, by step; empty if it has none. Files that are no PNG images are skipped with a warning."""
    numbered = [(file.stem.removeprefix("step_"), file) for file in (run / SAMPLES_FOLDER).glob("step_*.png")]
    files = {int(number): file for number, file in numbered if number.isdecimal()}
    steps = sorted(files)
    chosen = sorted({round(index) for index in np.linspace(0, len(steps) - 1, min(PICTURES, len(steps)))})
    found = []
    for step in (steps[index] for index in chosen):
        try:
            with Image.open(files[step], formats=("PNG",)) as image:
                picture = image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            logger.warning("%s is not shown: %s", files[step], error)
            continue
        uri = jpeg_uri(picture, QUALITY)
        found.append(StepPicture(step, uri, picture.width, picture.height))
    return found
