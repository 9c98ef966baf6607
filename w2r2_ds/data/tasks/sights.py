"""What the frames of a scene see of the objects that descriptions are about, and the frames that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from w2r2_ds.data.annotations import Description
from w2r2_ds.data.scannet import Scene
from w2r2_ds.data.tasks.outcome import (
    NO_INSTANCE_MATCH,
    NO_VISIBLE_FRAME,
    Dropped,
    Job,
    TaskOptions,
    world_box,
)
from w2r2_ds.data.views import choose
from w2r2_ds.data.visibility import listed_frames, match_instance, seen_by_depth, seen_by_infos


@dataclass(frozen=True)
class Sight:
    """Positions in ``scene.frames`` that see an object, and the ``[9]`` box whose outline says how well.

    ``box`` is None where the annotated box matches no EmbodiedScan instance.
    """

    seen: frozenset[int]
    box: np.ndarray | None


def look(scene: Scene, job: Job, options: TaskOptions) -> tuple[Scene, dict[int, Sight]]:
    """The scene's frames that count, and what they see, by object id; nothing is looked at where nothing depends on it.

    Raises:
        ValueError: the scene's frames are not those that EmbodiedScan lists, or an image cannot be read.
    """
    if not options.looks:
        return scene, {}
    if options.visibility == "embodiedscan":
        assert job.info is not None, "the plan gives every scene its EmbodiedScan infos"
        scene = listed_frames(scene, job.info)
    return scene, _sights(scene, job, options)


def choose_seeing(
    scene: Scene, about: Description, key: str, options: TaskOptions, sights: Mapping[int, Sight]
) -> list[int] | Dropped:
    """Positions of a sample's frames; of them, one sees the object where the options look for it."""
    sight = sights.get(about.object_id)
    if sight is not None and sight.box is None:
        return Dropped(key, NO_INSTANCE_MATCH, about.where)
    chosen = choose(options.frames, scene, key, None if sight is None else sight.seen)
    return Dropped(key, NO_VISIBLE_FRAME, about.where) if chosen is None else chosen


def _sights(scene: Scene, job: Job, options: TaskOptions) -> dict[int, Sight]:
    """Of every object that a description is about."""
    boxes = {about.object_id: world_box(scene, about.object_id) for _, about in job.descriptions}
    if options.visibility == "depth":
        seen = seen_by_depth(scene, [box[:6] for box in boxes.values()])
        return {number: Sight(each, box) for (number, box), each in zip(boxes.items(), seen, strict=True)}
    assert job.info is not None
    sights = {}
    for number, box in boxes.items():
        instance = match_instance(box[:6], job.info)
        if instance is None:
            sights[number] = Sight(frozenset(), None)
        else:
            sights[number] = Sight(seen_by_infos(scene, job.info, instance), instance.box)
    return sights
