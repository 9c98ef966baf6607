"""The kernels that `model.kernels: auto` chose, as a checkpoint stores them, so that a resumed run uses the same ones.

They are reused only on the same GPU model with the same packages. In another environment a stored kernel may be
wrong or slow, and reusing it would not make the resumed run bitwise identical anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from w2r2_ds.kernels.select import ALL_KERNELS, Kernels

PACKAGES = ("torch", "triton", "liger-kernel", "w2r2-ds")
"""Packages whose versions are compared; w2r2-ds contains the Triton kernels."""

logger = logging.getLogger(__name__)


def kernels_to_manifest(name: str, kernels: Kernels, device: torch.device) -> dict[str, Any] | None:
    """The chosen kernels and the environment of their measurement; None unless `model.kernels` is auto on a GPU.

    Args:
        name: `model.kernels`.
        kernels: the model's kernels.
        device: the model's device.

    Returns:
        JSON values: ``names`` (list of kernels), ``device`` (GPU model), and the version of each of `PACKAGES`.
    """
    if name != "auto" or device.type != "cuda":
        return None
    return {"names": sorted(kernels)} | environment(device)


def kernels_from_manifest(saved: Mapping[str, Any], device: torch.device) -> Kernels | None:
    """The stored kernels; None, with a warning, if they were measured in another environment or do not exist here."""
    now = environment(device)
    differences = [f"{key} was {saved.get(key)}, now {value}" for key, value in now.items() if saved.get(key) != value]
    differences += [f"kernel {name} does not exist" for name in saved["names"] if name not in ALL_KERNELS]
    if not differences:
        return frozenset(saved["names"])
    logger.warning(
        "the kernels of the checkpoint (%s) are not reused: %s. model.kernels auto selects them again, so losses may "
        "differ by rounding from those of an uninterrupted run.",
        ", ".join(saved["names"]) or "none",
        "; ".join(differences),
    )
    return None


def environment(device: torch.device) -> dict[str, str]:
    """GPU model (``cpu`` without one) and the installed `PACKAGES`, on which values and speed of kernels depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name} | {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str:
    """Version of a package; ``none`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
