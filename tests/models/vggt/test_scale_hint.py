"""The scale hint: scale and code against hand values and float64, and the encoder on scenes whose scale is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from host_sync import host_constants, host_reads
from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.build import load_geometry
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.vggt.cameras import camera_to_world
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.loading import load_vggt
from w2r2_ds.models.vggt.predictions import predict
from w2r2_ds.models.vggt.scale_hint import (
    CHANNELS,
    MIN_BASELINE,
    WAVELENGTHS,
    at_patch_centres,
    log_scale,
    log_scale_of_centres,
    scale_code,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("metric", "predicted", "expected"),
    [
        ([3.0, 6.0, 9.0], [1.0, 2.0, 3.0], math.log(3)),
        ([2.0, NAN, 40.0, 2.0], [1.0, 1.0, 1.0, 1.0], math.log(2)),  # neither holes nor one outlier
        ([1.0, 1.0, 1.0], [0.0, 2.0, 2.0], math.log(0.5)),  # a prediction of 0 is no ratio
        ([NAN, NAN], [1.0, 2.0], NAN),
    ],
)
def test_the_scale_is_the_median_of_the_ratios(metric: list[float], predicted: list[float], expected: float) -> None:
    found = log_scale(torch.tensor(metric), torch.tensor(predicted))
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def centres(seed: int, frames: int = 9) -> np.ndarray:
    """``[frames, 3]`` float64, metres apart."""
    return np.random.default_rng(seed).normal(size=(frames, 3))


def scale_of(metric: np.ndarray, predicted: np.ndarray) -> float:
    found = log_scale_of_centres(torch.from_numpy(metric), torch.from_numpy(predicted))
    assert found.dtype == torch.float32 and found.shape == ()
    return float(found)


def test_the_scale_of_camera_centres_is_the_median_over_the_longer_distances() -> None:
    """Against float64 on noisy predictions. Nine frames have 36 pairs: of the 19 longer ones, the middle one."""
    metric = centres(1)
    predicted = metric / 1.7 + 0.05 * centres(2)
    distances = pdist(metric)
    ratios = np.sort((distances / pdist(predicted))[distances >= np.sort(distances)[17]])
    assert len(ratios) == 19 and ratios.std() > 0.01
    assert scale_of(metric, predicted) == pytest.approx(math.log(ratios[9]), abs=1e-6)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.5])
def test_metric_centres_times_k_add_log_k_in_any_world(factor: float) -> None:
    """float32 distances of metres have errors of 1e-7; coordinates 20 m from the origin add 1e-6."""
    metric, predicted = centres(3), centres(4)
    world = Rotation.from_euler("zyx", [0.4, -1.1, 2.0]).as_matrix()
    moved = factor * metric @ world.T + np.array([12.0, -16.0, 3.0])
    other = 0.5 * (predicted @ world) + 1.0
    expected = scale_of(metric, predicted) + math.log(factor)
    assert scale_of(moved, predicted) == pytest.approx(expected, abs=1e-5)
    assert scale_of(metric, other) == pytest.approx(expected - math.log(factor) + math.log(2), abs=1e-5)


def test_one_wrong_camera_does_not_change_the_scale() -> None:
    metric = centres(5, 12)
    predicted = metric / 2.5
    metric[7] += 8.0
    assert scale_of(metric, predicted) == pytest.approx(math.log(2.5), abs=1e-5)


def test_a_camera_that_does_not_move_has_no_scale() -> None:
    """Neither a single frame, nor motions below `MIN_BASELINE`; pairs of frames at one place do not count."""
    predicted = centres(6)
    for metric in (centres(7, 1), np.zeros((9, 3)), 0.1 * MIN_BASELINE * centres(7), np.full((9, 3), NAN)):
        assert math.isnan(scale_of(metric, predicted[: len(metric)]))
    assert math.isnan(scale_of(centres(7), np.zeros((9, 3)))), "no predicted motion"
    places = np.repeat(centres(7, 2), [8, 1], axis=0)  # 28 of 36 distances are 0
    jitter = places / 3 + 1e-3 * centres(8)
    assert scale_of(places, jitter) == pytest.approx(math.log(3), abs=0.01)


@pytest.mark.parametrize("scale", [-1.3, 0.0, 0.7, 2.2])
def test_the_code_is_the_scale_its_sines_cosines_and_one(scale: float) -> None:
    """Against Python's float64. float32: 2.2 nats have 9 waves of 0.25, a phase of 55 that is rounded to 4e-6."""
    waves = [2 * math.pi * scale / length for length in WAVELENGTHS]
    expected = [scale, *map(math.sin, waves), *map(math.cos, waves), 1.0]
    code = scale_code(torch.tensor(scale))
    assert code.shape == (CHANNELS,) and code.tolist() == pytest.approx(expected, abs=2e-5)


def test_without_a_scale_the_code_is_zero() -> None:
    assert not scale_code(torch.tensor(NAN)).any()


def test_nothing_waits_for_the_device() -> None:
    metric, predicted = torch.rand(3, 4, 4), torch.rand(3, 4, 4) + 1

    def run() -> None:
        scale_code(log_scale(metric, predicted))
        scale_code(log_scale_of_centres(metric[0, :, :3], predicted[0, :, :3]))

    assert not host_reads(run) and not host_constants(run)


def test_depth_at_patch_centres() -> None:
    rows, columns = torch.arange(28.0)[:, None], torch.arange(42.0)
    found = at_patch_centres((100 * rows + columns).expand(2, 28, 42), 14)
    assert found[1].tolist() == [[707.0, 721.0, 735.0], [2107.0, 2121.0, 2135.0]]


@pytest.fixture
def config(hint_vggt: Path) -> GeometryConfig:
    return GeometryConfig(path=str(hint_vggt), layers=[1], scale_hint="depth")


def load(config: Any, model_config: Any) -> Any:
    return load_geometry(replace(model_config, geometry=config), torch.device("cpu"))


@pytest.mark.parametrize("reference_frame", ["first", "last"])
@pytest.mark.parametrize("scale", [0.5, 2.75])
def test_a_known_scale_is_in_every_feature(
    config: GeometryConfig, model_config: Any, reference_frame: Any, scale: float
) -> None:
    """Metric depth is the predicted depth times `scale`, with holes and some wrong values; images differ by frame."""
    config = replace(config, reference_frame=reference_frame)
    encoder, plain = load(config, model_config), load(replace(config, scale_hint="none"), model_config)
    frames = torch.randint(0, 256, (3, 3, 28, 42), generator=torch.Generator().manual_seed(1)).byte()
    turn = (lambda tensor: tensor.flip(0)) if reference_frame == "last" else (lambda tensor: tensor)
    predicted = turn(predict(load_vggt(config.path, HEADS), turn(unit_range(frames))).depth)
    metric = scale * at_patch_centres(predicted, 14)
    metric[0, 0, 1], metric[2, 1] = 50.0, NAN
    assert metric.shape == (3, 2, 3)
    features = encoder.encode_frames(frames, metric)
    without = plain.encode_frames(frames)
    assert features.shape == (3, 2, 3, without.shape[-1] + CHANNELS) and encoder.spec.feature_dim == features.shape[-1]
    assert torch.equal(features[..., :-CHANNELS], without)
    codes = features[..., -CHANNELS:].flatten(0, 2)
    assert (codes == codes[0]).all()
    assert codes[0].tolist() == pytest.approx(scale_code(torch.tensor(math.log(scale))).tolist(), abs=1e-4)
    assert not encoder.encode_frames(frames, torch.full_like(metric, NAN))[..., -CHANNELS:].any()


@pytest.mark.parametrize("reference_frame", ["first", "last"])
def test_a_known_scale_of_the_poses_is_in_every_feature(
    config: GeometryConfig, model_config: Any, reference_frame: Any
) -> None:
    """Metric centres are the predicted ones in another world, at another scale."""
    config = replace(config, scale_hint="poses", reference_frame=reference_frame)
    encoder, plain = load(config, model_config), load(replace(config, scale_hint="none"), model_config)
    frames = torch.randint(0, 256, (4, 3, 28, 42), generator=torch.Generator().manual_seed(1)).byte()
    turn = (lambda tensor: tensor.flip(0)) if reference_frame == "last" else (lambda tensor: tensor)
    poses = predict(load_vggt(config.path, HEADS), turn(unit_range(frames))).world_to_camera
    predicted = turn(camera_to_world(poses))[:, :3, 3].double()
    assert pdist(predicted.numpy()).min() > 0
    factor = 1 / float(np.median(pdist(predicted.numpy())))  # the cameras of random weights hardly move
    world = torch.from_numpy(Rotation.from_euler("zyx", [0.4, -1.1, 2.0]).as_matrix())
    metric = (factor * predicted @ world.T + 5).float()
    features = encoder.encode_frames(frames, metric)
    assert torch.equal(features[..., :-CHANNELS], plain.encode_frames(frames))
    codes = features[..., -CHANNELS:].flatten(0, 2)
    assert (codes == codes[0]).all()
    # Predicted centres are float32 differences of translations near 0.
    expected = scale_code(torch.tensor(math.log(factor)))
    torch.testing.assert_close(codes[0], expected, atol=1e-2, rtol=1e-3)
    assert not encoder.encode_frames(frames, metric[:1].expand(4, 3))[..., -CHANNELS:].any(), "no motion"
    assert not encoder.encode_frames(frames[:1], metric[:1])[..., -CHANNELS:].any(), "one frame"


def test_the_depth_head_stays_in_float32(config: GeometryConfig, model_config: Any) -> None:
    encoder = load_geometry(replace(model_config, geometry=config, dtype="bfloat16"), torch.device("cpu"))
    assert isinstance(encoder, VGGTEncoder) and encoder.vggt.depth_head is not None
    assert {p.dtype for p in encoder.vggt.depth_head.parameters()} == {torch.float32}
    assert {p.dtype for p in encoder.vggt.aggregator.parameters()} == {torch.bfloat16}
    frames = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    features = encoder.encode_frames(frames, torch.ones(1, 2, 2))
    assert features.dtype == torch.bfloat16 and features[0, 0, 0, -1] == 1


@pytest.mark.parametrize(("hint", "head", "other"), [("depth", "depth", "poses"), ("poses", "camera", "depth")])
def test_identities_depend_on_the_hint_and_on_its_head(
    config: GeometryConfig, hint_vggt: Path, hint: Any, head: str, other: Any
) -> None:
    from safetensors.torch import load_file, save_file

    config, plain = replace(config, scale_hint=hint), replace(config, scale_hint="none")
    before = VGGTEncoder.identity(config), VGGTEncoder.identity(plain)
    assert before[0] != before[1] and before[0] != VGGTEncoder.identity(replace(config, scale_hint=other))
    tensors = load_file(hint_vggt / "model.safetensors")
    name = next(name for name in tensors if name.startswith(f"{head}_head.") and tensors[name].numel() > 1)
    original = tensors[name].clone()
    try:
        tensors[name] = original + 1
        save_file(tensors, hint_vggt / "model.safetensors", {"format": "pt"})
        after = VGGTEncoder.identity(config), VGGTEncoder.identity(plain)
    finally:
        tensors[name] = original
        save_file(tensors, hint_vggt / "model.safetensors", {"format": "pt"})
    assert after[0] != before[0] and after[1] == before[1]


def test_encoders_without_the_head_or_with_metric_geometry_do_not_support_it(model_config: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.geometry\.scale_hint is depth, which point_map does not support"):
        geometry_spec(GeometryConfig(name="point_map", scale_hint="depth"))
    with pytest.raises(ValueError, match="enable_depth"):
        geometry_spec(replace(model_config.geometry, scale_hint="depth"))
    with pytest.raises(ValueError, match="enable_camera"):
        geometry_spec(replace(model_config.geometry, scale_hint="poses"))
