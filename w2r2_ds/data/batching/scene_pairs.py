"""Pair every frame set of a micro-batch with a frame set of another scene, for push terms that contrast geometry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import OtherGeometry
from w2r2_ds.types.sample import Sample


def pair_scenes(features: Sequence[Features], token: torch.Tensor, sample: torch.Tensor) -> OtherGeometry:
    """Visual tokens of other scenes for a batch.

    Args:
        features: one sample per frame set, in the order of the frame sets.
        token: ``[visual tokens]`` int64, `Batch.frame_set_of_token`.
        sample: ``[batch]`` int64, `Batch.frame_set_of_sample`.
    """
    grids = [tuple(map(tuple, feature.visual.grid_thw.tolist())) for feature in features]
    # One more entry, so that index -1 (a sample without frames) has no partner.
    partner = torch.tensor([*next_of_another_scene([f.sample.scene_id for f in features], grids), -1])
    counts = token.bincount(minlength=len(features))
    begin = counts.cumsum(0) - counts  # first token of every frame set
    # Both frame sets have the same grids, so a token and its counterpart have the same distance from the begin.
    own, other = token, partner[token]
    index = torch.arange(len(token)) - begin[own] + begin[other]
    return OtherGeometry(token=torch.where(other >= 0, index, -1), exists=partner[sample] >= 0)


def next_of_another_scene(scenes: Sequence[str], grids: Sequence[object]) -> list[int]:
    """For every frame set, the index of the next one of another scene with equal grids; -1 if there is none.

    The order is cyclic: the first frame set follows the last one. Several may have the same partner.

    Args:
        scenes: scene id of every frame set.
        grids: patch grids of every frame set.
    """
    count = len(scenes)
    return [
        next(
            (
                other
                for other in ((index + step) % count for step in range(1, count))
                if scenes[other] != scenes[index] and grids[other] == grids[index]
            ),
            -1,
        )
        for index in range(count)
    ]


def check_two_scenes(samples: Iterable[Sample], name: str) -> None:
    """Raise ValueError unless samples with frames are of at least two scenes.

    Args:
        samples: the training samples; they are read until a second scene occurs.
        name: the option that needs two scenes, for the error.
    """
    scenes: set[str] = set()
    for sample in samples:
        if sample.frames:
            scenes.add(sample.scene_id)
        if len(scenes) > 1:
            return
    raise ValueError(
        f"{name} needs the geometry of another scene, but data.train has {len(scenes)} scene(s) with frames; "
        "prepare more scenes, or choose another push term."
    )
