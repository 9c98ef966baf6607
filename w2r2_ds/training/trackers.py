"""Experiment trackers, selected by `train.trackers`; metrics.jsonl is always written too.

To add one, write a class with the methods of `Tracker` and decorate it with ``@register_tracker("NAME")``. The file may
be outside the package (``--plugin FILE``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from w2r2_ds.utils.packages import import_problem
from w2r2_ds.utils.registry import Registry

PROJECT = "w2r2-ds"
"""Project name in trackers that group runs by project."""


class Tracker(Protocol):
    """Interface of an experiment tracker, which exists on rank 0 only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of `step`; steps count from 1 and increase."""
        ...

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture (`train.samples_every`), before the metrics of the same step."""
        ...

    def finish(self) -> None:
        """Flush and close."""
        ...


OpenTracker = Callable[[Path, int], Tracker]
"""(folder of the run, steps completed before this launch) -> tracker. Raises ValueError for errors that the user can
correct."""

TRACKERS: Registry[OpenTracker] = Registry("train.trackers")
"""Registered trackers, keyed by their name in `train.trackers`."""
TRACKER_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
"""Python package that a tracker needs."""


def register_tracker(name: str) -> Callable[[OpenTracker], OpenTracker]:
    """Class decorator that registers a tracker under a name; raises ValueError if another tracker has it."""
    return partial(TRACKERS.register, name)


def check_trackers(names: Iterable[str]) -> None:
    """Check that every tracker is registered and that its package can be imported.

    Raises:
        ValueError: with the first tracker that is not.
    """
    for name in names:
        TRACKERS.find(name, "train.trackers: a name")
        problem = import_problem(TRACKER_PACKAGES[name]) if name in TRACKER_PACKAGES else ""
        if problem:
            raise ValueError(f"train.trackers: {name} {problem}: pip install 'w2r2-ds[{name}]'.")


class _WandbApi:
    """Base class for wandb and trackio, whose runs have the same methods.

    Attributes:
        run: the run.
        image: class of pictures of the package.
    """

    run: Any
    image: Callable[[Image.Image], Any]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to the run."""
        self.run.log(dict(metrics), step=step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Log to the run."""
        self.run.log({name: self.image(image)}, step=step)

    def finish(self) -> None:
        """Upload the rest and close."""
        self.run.finish()


@register_tracker("wandb")
class WandbTracker(_WandbApi):
    """Weights & Biases.

    Raises:
        ValueError: it does not start: missing or wrong API key, no connection, wrong WANDB_* setting.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        import wandb

        self.image = wandb.Image
        # disable_git: the URL of a git remote may contain a token, and the patch of uncommitted changes any secret.
        settings = {"silent": True, "disable_git": True}
        try:
            self.run = wandb.init(dir=str(run_dir), project=PROJECT, name=run_dir.name, settings=settings)
        except (wandb.errors.Error, ValueError) as error:  # pydantic's ValidationError is a ValueError
            parts = (part.strip(" .") for part in re.split(r"\n|\.\s", str(error)))
            raise ValueError(
                f"train.trackers: wandb does not start ({'; '.join(filter(None, parts))}): run `wandb login`, or set "
                "WANDB_MODE=offline to log without an account."
            ) from error


@register_tracker("tensorboard")
class TensorBoardTracker:
    """TensorBoard event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides points that a killed launch logged after its last checkpoint.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Write the picture."""
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


@register_tracker("trackio")
class TrackioTracker(_WandbApi):
    """Trackio (Hugging Face): local, or in a Space named by TRACKIO_SPACE_ID."""

    def __init__(self, run_dir: Path, start: int) -> None:
        import trackio

        self.image = trackio.Image
        # resume="allow": a resumed run continues the run of the same name.
        self.run = trackio.init(project=PROJECT, name=run_dir.name, resume="allow" if start else "never")
