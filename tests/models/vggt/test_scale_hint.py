"""The scale hint: scale and code against hand values, and the encoder on scenes whose scale is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from host_sync import host_constants, host_reads
from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.build import load_geometry
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.loading import load_vggt
from w2r2_ds.models.vggt.predictions import predict
from w2r2_ds.models.vggt.scale_hint import CHANNELS, WAVELENGTHS, at_patch_centres, log_scale, scale_code

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


def test_the_depth_head_stays_in_float32(config: GeometryConfig, model_config: Any) -> None:
    encoder = load_geometry(replace(model_config, geometry=config, dtype="bfloat16"), torch.device("cpu"))
    assert isinstance(encoder, VGGTEncoder) and encoder.vggt.depth_head is not None
    assert {p.dtype for p in encoder.vggt.depth_head.parameters()} == {torch.float32}
    assert {p.dtype for p in encoder.vggt.aggregator.parameters()} == {torch.bfloat16}
    frames = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    features = encoder.encode_frames(frames, torch.ones(1, 2, 2))
    assert features.dtype == torch.bfloat16 and features[0, 0, 0, -1] == 1


def test_identities_depend_on_the_hint_and_on_the_depth_head(config: GeometryConfig, hint_vggt: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = replace(config, scale_hint="none")
    before = VGGTEncoder.identity(config), VGGTEncoder.identity(plain)
    assert before[0] != before[1]
    tensors = load_file(hint_vggt / "model.safetensors")
    name = next(name for name in tensors if name.startswith("depth_head.") and tensors[name].numel() > 1)
    original = tensors[name].clone()
    try:
        tensors[name] = original + 1
        save_file(tensors, hint_vggt / "model.safetensors", {"format": "pt"})
        after = VGGTEncoder.identity(config), VGGTEncoder.identity(plain)
    finally:
        tensors[name] = original
        save_file(tensors, hint_vggt / "model.safetensors", {"format": "pt"})
    assert after[0] != before[0] and after[1] == before[1]


def test_encoders_without_depth_head_or_with_metric_geometry_do_not_support_it(model_config: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.geometry\.scale_hint is depth, which point_map does not support"):
        geometry_spec(GeometryConfig(name="point_map", scale_hint="depth"))
    with pytest.raises(ValueError, match="enable_depth"):
        geometry_spec(replace(model_config.geometry, scale_hint="depth"))
