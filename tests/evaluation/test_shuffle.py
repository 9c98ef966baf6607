"""--geometry shuffle: own 2D features, another scene's geometry, independent of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from encoder_inputs import pixel_values
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.evaluation.shuffle import ShuffledGeometry, pair_scenes


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_every_scene_gets_another_scene(count: int) -> None:
    scenes = [f"scene{number:04d}_00" for number in range(count)]
    pairs = pair_scenes(scenes)
    assert set(pairs) == set(pairs.values()) == set(scenes)
    assert all(scene != other for scene, other in pairs.items())
    assert pair_scenes(list(reversed(scenes)) * 2) == pairs
    assert count < 4 or pair_scenes(scenes, 1) != pairs


def test_scans_of_one_room_are_not_paired() -> None:
    """Half of the scans are of one room. Names of another form are rooms of their own."""
    scans = [*(f"scene0000_{scan:02d}" for scan in range(6)), *(f"scene{room:04d}_00" for room in range(1, 7))]
    pairs = pair_scenes(scans)
    assert set(pairs) == set(scans) and all(scene[:9] != other[:9] for scene, other in pairs.items())
    assert pair_scenes(["kitchen_00", "kitchen_01"]) == {"kitchen_00": "kitchen_01", "kitchen_01": "kitchen_00"}


def test_fewer_than_two_rooms_are_an_error() -> None:
    for scenes, count in (([], 0), (["scene0000_00"] * 3, 1), (["scene0000_00", "scene0000_01"], 1)):
        with pytest.raises(ValueError, match=f"at least two rooms with frames, but there are {count}"):
            pair_scenes(scenes)


@pytest.fixture
def rooms(samples: list[Any], text_samples: list[Any]) -> list[Any]:
    """Samples of three rooms with 4, 3 (of another size) and 12 frames, and a question without frames."""
    return [replace(each, scene_id=f"scene000{number}_00") for number, each in enumerate([*samples, text_samples[0]])]


def test_2d_features_stay_and_geometry_is_replaced(
    rooms: list[Any], frontend: Any, data_config: Callable[..., Any]
) -> None:
    plain = make_processor(frontend, data_config())
    shuffled = ShuffledGeometry(plain, frontend.geometry, rooms)
    assert set(shuffled.partner) == {room.scene_id for room in rooms[:3]}
    for room in rooms[:3]:
        donor = shuffled.donor(room.scene_id)
        assert donor.scene_id != room.scene_id
        right, wrong, other = plain(room, False), shuffled(room, False), plain(donor, False)
        for field in ("input_ids", "token_types", "what"):
            assert torch.equal(getattr(right, field), getattr(wrong, field)), field
        for field in ("tower_frames", "grid_thw"):
            assert torch.equal(getattr(right.visual, field), getattr(wrong.visual, field)), field
        assert wrong.visual.geometry_frames.shape == right.visual.geometry_frames.shape
        if right.visual.geometry_frames.shape[-2:] == other.visual.geometry_frames.shape[-2:]:
            count = len(other.visual.geometry_frames)
            expected = torch.stack([other.visual.geometry_frames[i % count] for i in range(len(room.frames))])
            assert torch.equal(wrong.visual.geometry_frames, expected)
        else:  # the same images in another shape
            near = torch.nn.functional.interpolate(
                other.visual.geometry_frames[:1].float(), size=right.visual.geometry_frames.shape[-2:], mode="bicubic"
            )
            assert (
                torch.corrcoef(torch.stack([near.flatten(), wrong.visual.geometry_frames[0].flatten().float()]))[0, 1]
                > 0.6
            )
    assert shuffled(rooms[3], False).visual.geometry_frames is None


def test_geometry_does_not_depend_on_the_batch(
    rooms: list[Any], frontend: Any, data_config: Callable[..., Any]
) -> None:
    config = data_config()
    shuffled = ShuffledGeometry(make_processor(frontend, config), frontend.geometry, rooms)
    together = next(iter(prompt_loader(rooms[:3], frontend, config, 3, shuffled)))
    alone = [batch for batch in prompt_loader(rooms[:3][::-1], frontend, config, 1, shuffled)][::-1]
    images = [batch.visuals.geometry_frames[0] for batch in alone]
    assert all(torch.equal(a, b) for a, b in zip(together.visuals.geometry_frames, images, strict=True))
    assert torch.equal(pixel_values(together.visuals), torch.cat([pixel_values(batch.visuals) for batch in alone]))
