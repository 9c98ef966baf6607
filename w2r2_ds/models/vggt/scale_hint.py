"""Scale hint: the metric scale of a scene, which VGGT's geometry lacks, as channels of its features.

VGGT predicts depth and cameras in units of the scene's own size. The missing scale is the ratio of metric to predicted
depth, or that of metric to predicted distances between the camera centres. Its logarithm s is coded like the
coordinates of `point_map.py`, and the code is appended to every feature of the frame set, so that it reaches the merger
through the feature cache and `--geometry shuffle` alike. The merger adds a linear map of it to the merged geometry
(`models/merger.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WAVELENGTHS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
"""Wavelengths in nats of the sin-cos code of s. 8: a factor of e ** 4 = 55 in both directions; 0.25: a few per cent."""
CHANNELS = 2 + 2 * len(WAVELENGTHS)
"""Channels of the code: s, its sines, its cosines, validity."""
MIN_BASELINE = 0.1
"""Least distance in metres of two camera centres whose ratio counts; poses of ScanNet are wrong by centimetres."""


def log_scale(metric: Tensor, predicted: Tensor) -> Tensor:
    """log(median of metric / predicted depth) over all positions with measured depth; a scalar.

    The median ignores wrong depths at the borders of objects and in single frames. One scalar for all frames: VGGT
    predicts them in one scale. NaN if no depth was measured.

    Args:
        metric: ``[...]`` depth in metres, NaN where none was measured.
        predicted: the same shape, above 0, in VGGT's units.
    """
    return _log_median(metric.float() / predicted.float())


def log_scale_of_centres(metric: Tensor, predicted: Tensor) -> Tensor:
    """log(median of metric / predicted distances) over pairs of camera centres; a scalar.

    A pair counts if its metric distance is at least the median distance of all pairs, and at least `MIN_BASELINE`: the
    error of a predicted centre matters least for distant ones. Distances do not depend on the coordinate systems, so
    that metric centres may be in any world. NaN if no pair counts: a single frame, or a camera that does not move.

    Args:
        metric: ``[frames, 3]``, metres; NaN if unknown.
        predicted: ``[frames, 3]``, in VGGT's units.
    """
    # Not `cdist`, which loses digits of small distances (it expands the square for more than 25 rows).
    baseline, own = (torch.nn.functional.pdist(centres.float()) for centres in (metric, predicted))
    counts = baseline >= baseline.nanmedian().clamp(min=MIN_BASELINE)
    return _log_median(torch.where(counts, baseline / own, torch.nan))


def _log_median(ratios: Tensor) -> Tensor:
    """log of the median of the ratios that are finite and above 0; NaN if there are none."""
    return torch.where(ratios.isfinite() & (ratios > 0), ratios, torch.nan).nanmedian().log()


def scale_code(scale: Tensor) -> Tensor:
    """Code of s: s itself, sines and cosines at all wavelengths, and 1; all zeros without a scale.

    Args:
        scale: float32 scalar, nats; NaN if unknown.

    Returns:
        ``[CHANNELS]`` float32.
    """
    # On the device, from a range: a list of frequencies would be copied to the GPU and make the host wait.
    octaves = torch.arange(len(WAVELENGTHS), device=scale.device)
    phases = scale * (2 * math.pi / WAVELENGTHS[0]) * 2.0**octaves
    code = torch.cat([scale[None], phases.sin(), phases.cos(), torch.ones_like(scale)[None]])
    return torch.where(scale.isfinite(), code, 0.0)


def at_patch_centres(depth: Tensor, patch_size: int) -> Tensor:
    """Depth of the pixel at the centre of every patch: ``[frames, height, width]`` -> ``[frames, rows, columns]``."""
    middle = patch_size // 2
    return depth[:, middle::patch_size, middle::patch_size]
