"""Pair every frame set of a micro-batch with a frame set of another room, for push terms that contrast geometry.

Two scans of one room (ScanNet's ``scene0011_00`` and ``scene0011_01``) have the same geometry in different worlds, so
they are not paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import OtherGeometry
from w2r2_ds.types.sample import Sample, room_of


def pair_scenes(features: Sequence[Features], token: torch.Tensor, sample: torch.Tensor) -> OtherGeometry:
    """Visual tokens of other rooms for a batch.

    Args:
        features: one sample per frame set, in the order of the frame sets.
        token: ``[visual tokens]`` int64, `Batch.frame_set_of_token`.
        sample: ``[batch]`` int64, `Batch.frame_set_of_sample`.
    """
    grids = [tuple(map(tuple, feature.visual.grid_thw.tolist())) for feature in features]
    # One more entry, so that index -1 (a sample without frames) has no partner.
    rooms = [room_of(feature.sample.scene_id) for feature in features]
    partner = torch.tensor([*next_of_another_room(rooms, grids), -1])
    counts = token.bincount(minlength=len(features))
    begin = counts.cumsum(0) - counts  # first token of every frame set
    # Both frame sets have the same grids, so a token and its counterpart have the same distance from the begin.
    own, other = token, partner[token]
    index = torch.arange(len(token)) - begin[own] + begin[other]
    return OtherGeometry(token=torch.where(other >= 0, index, -1), exists=partner[sample] >= 0)


def next_of_another_room(rooms: Sequence[str], grids: Sequence[object]) -> list[int]:
    """For every frame set, the index of the next one of another room with equal grids; -1 if there is none.

    The order is cyclic: the first frame set follows the last one. Several may have the same partner.

    Args:
        rooms: room of every frame set.
        grids: patch grids of every frame set.
    """
    count = len(rooms)
    return [
        next(
            (
                other
                for other in ((index + step) % count for step in range(1, count))
                if rooms[other] != rooms[index] and grids[other] == grids[index]
            ),
            -1,
        )
        for index in range(count)
    ]


def check_two_rooms(samples: Iterable[Sample], name: str) -> None:
    """Raise ValueError unless samples with frames are of at least two rooms.

    Args:
        samples: the training samples; they are read until a second room occurs.
        name: the option that needs two rooms, for the error.
    """
    rooms: set[str] = set()
    for sample in samples:
        if sample.frames:
            rooms.add(room_of(sample.scene_id))
        if len(rooms) > 1:
            return
    raise ValueError(
        f"{name} needs the geometry of another room, but data.train has {len(rooms)} room(s) with frames (scans of "
        "one room count once); prepare more scenes, or choose another push term."
    )
