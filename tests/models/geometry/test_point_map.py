"""Codes of points against float64, holes, and the options of the point-map encoder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from host_sync import host_constants, host_reads
from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.models.build import fingerprint, load_geometry
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.geometry.point_map import CHANNELS, WAVELENGTHS, PointMapEncoder


@pytest.fixture
def encoder() -> PointMapEncoder:
    return PointMapEncoder(torch.float32, torch.device("cpu"))


def test_features_are_coordinates_sines_cosines_and_validity(encoder: PointMapEncoder) -> None:
    """Every channel against Python's float64: of 4 points, 180 of coordinates and codes, and 4 of validity."""
    points = torch.randn(2, 3, 5, 4, 3, generator=torch.Generator().manual_seed(0)) * 3
    features = encoder.encode(points)
    assert features.shape == (2, 3, 5, 4 * CHANNELS) == (2, 3, 5, 180 + 4) and features.dtype == torch.float32
    channels = features.view(2, 3, 5, 4, CHANNELS)
    assert WAVELENGTHS == (16, 8, 4, 2, 1, 0.5, 0.25)
    for index in ((0, 0, 0, 0), (1, 2, 4, 3), (0, 1, 3, 2)):
        point = points[index].tolist()
        waves = [2 * math.pi * value / length for value in point for length in WAVELENGTHS]
        expected = [*point, *map(math.sin, waves), *map(math.cos, waves), 1.0]
        # float32: a coordinate of 10 m has 40 waves of 0.25 m; its phase of 250 is rounded to 1.5e-5.
        assert channels[index].tolist() == pytest.approx(expected, abs=1e-4)


def test_points_without_depth_are_zeros(encoder: PointMapEncoder) -> None:
    points = torch.randn(1, 2, 2, 4, 3)
    points[0, 0, 1, 2] = torch.nan
    points[0, 1, 1] = torch.nan
    channels = encoder.encode(points).view(1, 2, 2, 4, CHANNELS)
    assert not channels[0, 0, 1, 2].any() and not channels[0, 1, 1].any()
    valid = channels[..., -1]
    assert valid.sum() == 16 - 5 and torch.equal(valid == 1, points.isfinite().all(-1))
    assert torch.equal(channels[0, 0, 1, [0, 1, 3], :3], points[0, 0, 1, [0, 1, 3]])


def test_encoding_does_not_wait_for_the_device(encoder: PointMapEncoder) -> None:
    points = torch.rand(1, 2, 2, 4, 3)
    for found in (host_reads(lambda: encoder.encode(points)), host_constants(lambda: encoder.encode(points))):
        assert not found


def test_features_have_the_dtype_of_the_model(model_config: ModelConfig) -> None:
    config = replace(model_config, dtype="bfloat16", geometry=GeometryConfig(name="point_map"))
    encoder = load_geometry(config, torch.device("cpu"))
    points = torch.rand(1, 1, 1, 4, 3)
    exact = PointMapEncoder(torch.float32, torch.device("cpu")).encode(points)
    assert torch.equal(encoder.encode(points), exact.bfloat16()), "codes are computed in float32, then rounded"
    assert encoder.encode_frames(points).dtype == torch.bfloat16


def test_point_maps_are_read_off_the_spec() -> None:
    for frame in ("world", "camera", "first", "last"):
        spec = geometry_spec(GeometryConfig(name="point_map", reference_frame=frame))  # type: ignore[arg-type]
        assert (spec.patch_size, spec.feature_dim) == (14, 184)
        assert spec.point_maps is not None
        assert (spec.point_maps.reference_frame, spec.point_maps.needs_poses) == (frame, frame != "camera")
        assert spec.point_map_shape(3, 42, 56) == (3, 3, 4, 4, 3)
        assert spec.frame_size((3, 3, 4, 4, 3)) == (42, 56)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"path": "somewhere"}, r"model\.geometry\.path is 'somewhere'; point_map"),
        ({"layers": [1]}, r"model\.geometry\.layers is \[1\]; point_map"),
    ],
)
def test_options_that_do_not_apply_raise(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        geometry_spec(GeometryConfig(name="point_map", **changes))


@pytest.mark.parametrize("frame", ["world", "camera"])
def test_vggt_has_no_world(model_config: ModelConfig, frame: Any) -> None:
    config = replace(model_config, geometry=replace(model_config.geometry, reference_frame=frame))
    for load in (
        lambda: geometry_spec(config.geometry),
        lambda: load_geometry(config, torch.device("cpu")),
        lambda: fingerprint(config),
    ):
        with pytest.raises(ValueError, match=rf"model\.geometry\.reference_frame is {frame}.*vggt.*first, last"):
            load()


def test_the_reference_frame_is_in_checkpoints(model_config: ModelConfig) -> None:
    world, camera = (
        fingerprint(replace(model_config, geometry=GeometryConfig(name="point_map", reference_frame=frame)))
        for frame in ("world", "camera")
    )
    assert world["geometry_encoder"] == "point_map" and world["geometry_features"] == 184
    assert {name for name in world if world[name] != camera[name]} == {"reference_frame"}


def test_a_feature_cache_is_not_supported(model_config: ModelConfig, data_config: Any, tmp_path: Path) -> None:
    config = replace(model_config, geometry=GeometryConfig(name="point_map"))
    with pytest.raises(ValueError, match=r"data\.cache is .*model\.geometry\.name point_map"):
        open_cache(data_config(cache=str(tmp_path / "cache")), config)
    assert not (tmp_path / "cache").exists()
    assert open_cache(data_config(), config) is None
