"""VGGT's heads: built and loaded only on request, names and shapes of their weights, predictions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.vggt import loading
from w2r2_ds.models.vggt.cameras import camera_to_world, decode_pose, encode_pose, unproject_depth
from w2r2_ds.models.vggt.config import HEADS, VGGTConfig
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.loading import CONFIG, load_vggt, save_vggt
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import predict, run_heads
from w2r2_ds.utils.files.safetensors_io import WEIGHTS

PUBLIC_KEYS = Path(__file__).parents[2] / "golden" / "vggt" / "vggt_1b_state_dict_keys.json"
TINY = VGGTConfig(
    embed_dim=32,
    depth=3,
    num_heads=2,
    patch_embed="conv",
    camera_trunk_depth=1,
    camera_num_heads=2,
    dpt_features=8,
    dpt_out_channels=(4, 8, 12, 16),
    dpt_layers=(0, 1, 1, 2),
)


@pytest.fixture
def vggt() -> VGGT:
    torch.manual_seed(0)
    return VGGT(TINY, HEADS).eval()


@pytest.fixture
def directory(vggt: VGGT, tmp_path: Path) -> Path:
    save_vggt(vggt, tmp_path / "vggt")
    return tmp_path / "vggt"


@pytest.fixture
def images() -> torch.Tensor:
    """One scene of three frames, 2 x 3 patches each."""
    return torch.rand(3, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def change_config(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | changes))


def change_weights(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace or (None) remove one weight."""
    weights = load_file(directory / WEIGHTS)
    del weights[name]
    save_file(weights if value is None else weights | {name: value}, directory / WEIGHTS)


@pytest.mark.golden
def test_default_sizes_give_the_names_and_shapes_of_the_public_checkpoint() -> None:
    """All of them: aggregator, camera, depth and point head; only the track head is not implemented."""
    shapes = json.loads(PUBLIC_KEYS.read_text())["shapes"]
    with torch.device("meta"):
        ours = VGGT(VGGTConfig(), HEADS).state_dict()
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith("track_head.")}
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == wanted


def test_a_vggt_has_no_heads_unless_they_are_requested(vggt: VGGT) -> None:
    assert VGGT(TINY).heads == ()
    assert {name.split(".")[0] for name in VGGT(TINY).state_dict()} == {"aggregator"}
    assert VGGT(TINY, ["depth"]).heads == ("depth",)
    assert vggt.heads == HEADS


def test_an_unknown_head_raises_with_its_name(directory: Path) -> None:
    with pytest.raises(ValueError, match="track"):
        load_vggt(directory, ["track"])  # type: ignore[list-item]


@pytest.mark.parametrize("heads", [HEADS, ("camera",), ("point", "depth"), ()])
def test_requested_heads_are_loaded(vggt: VGGT, directory: Path, heads: tuple[Any, ...]) -> None:
    loaded = load_vggt(directory, heads)
    assert set(loaded.heads) == set(heads) and not loaded.training and loaded.config == TINY
    state, saved = loaded.state_dict(), vggt.state_dict()
    prefixes = ("aggregator.", *(f"{head}_head." for head in heads))
    assert state.keys() == {name for name in saved if name.startswith(prefixes)}
    assert all(torch.equal(value, saved[name]) for name, value in state.items())


def test_the_track_head_is_skipped(directory: Path) -> None:
    save_file(load_file(directory / WEIGHTS) | {"track_head.x": torch.zeros(1)}, directory / WEIGHTS)
    assert load_vggt(directory, HEADS).heads == HEADS


def test_the_encoder_neither_builds_nor_reads_heads(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Recorded:
        """An open safetensors file that records the names of the tensors that are read."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = original(*args, **options)

        def __enter__(self) -> Recorded:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    original = loading.safe_open
    monkeypatch.setattr(loading, "safe_open", Recorded)
    config = GeometryConfig(path=str(directory), layers=[2])
    encoder = VGGTEncoder.load(config, torch.float32, torch.device("cpu"))
    assert encoder.vggt.heads == ()
    assert {name.split(".")[0] for name in read} == {"aggregator"}


def test_heads_do_not_change_the_identity_of_the_encoder(vggt: VGGT, directory: Path, tmp_path: Path) -> None:
    plain = VGGT(TINY)
    plain.load_state_dict({name: value for name, value in vggt.state_dict().items() if "head" not in name})
    save_vggt(plain, tmp_path / "plain")
    identities = [VGGTEncoder.identity(GeometryConfig(path=str(path))) for path in (directory, tmp_path / "plain")]
    assert identities[0] == identities[1]
    assert not any(key.startswith(("camera", "dpt")) for key in identities[0]["config"])


@pytest.mark.parametrize("name", ["camera_head.token_norm.bias", "depth_head.scratch.layer3_rn.weight"])
def test_a_missing_weight_of_a_requested_head_raises_with_its_name(directory: Path, name: str) -> None:
    change_weights(directory, name, None)
    with pytest.raises(ValueError, match=name):
        load_vggt(directory, HEADS)


def test_a_weight_of_another_shape_raises_with_its_name(directory: Path) -> None:
    change_weights(directory, "point_head.norm.bias", torch.zeros(3))
    with pytest.raises(ValueError, match=r"point_head\.norm\.bias.*\[3\].*\[64\]"):
        load_vggt(directory, ["point"])
    assert load_vggt(directory, ["depth"]).heads == ("depth",)


def test_a_directory_without_a_head_has_its_switch_off(vggt: VGGT, tmp_path: Path) -> None:
    save_vggt(VGGT(TINY, ["camera", "depth"]), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    switches = {key: value for key, value in values.items() if key.startswith("enable_")}
    assert switches == {"enable_camera": True, "enable_depth": True, "enable_point": False, "enable_track": False}
    with pytest.raises(ValueError, match=f"{CONFIG}.*enable_point"):
        load_vggt(tmp_path, HEADS)


def test_the_public_config_has_all_heads_of_the_public_sizes(directory: Path) -> None:
    """The public ``config.json`` has no sizes of heads, and may lack the switches."""
    assert VGGTConfig.from_dict({"img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_depth": True}) == (
        VGGTConfig()
    )
    values = {key: value for key, value in TINY.to_dict().items()}
    (directory / CONFIG).write_text(json.dumps(values))  # without switches
    assert load_vggt(directory, HEADS).heads == HEADS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("camera_num_heads", 3),
        ("dpt_layers", [0, 1, 2, 3]),
        ("dpt_features", 12),
        ("dpt_out_channels", [4, 8, 12, 18]),
        ("dpt_out_channels", [0, 8, 12, 16]),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_if_heads_are_requested(directory: Path, field: str, value: Any) -> None:
    change_config(directory, **{field: value})
    with pytest.raises(ValueError, match=f"{CONFIG}.*{field}"):
        load_vggt(directory, ["camera"])
    assert load_vggt(directory).heads == ()


@pytest.mark.parametrize("value", [[0, 1, 2], [0, 1, 2, "3"], [0, 1, 2, -3], 4])
def test_a_layer_list_that_is_no_list_of_four_numbers_is_rejected(directory: Path, value: Any) -> None:
    change_config(directory, dpt_layers=value)
    with pytest.raises(ValueError, match=f"{CONFIG}.*dpt_layers"):
        load_vggt(directory)


def test_predictions_have_one_camera_and_one_map_per_frame(vggt: VGGT, images: torch.Tensor) -> None:
    predicted = predict(vggt, images)
    shapes = {field.name: tuple(getattr(predicted, field.name).shape) for field in dataclasses.fields(predicted)}
    assert shapes == {
        "intrinsics": (3, 3, 3),
        "world_to_camera": (3, 3, 4),
        "depth": (3, 28, 42),
        "depth_confidence": (3, 28, 42),
        "points": (3, 28, 42, 3),
        "point_confidence": (3, 28, 42),
    }
    assert not any(getattr(predicted, name).requires_grad for name in shapes)
    assert all(getattr(predicted, name).isfinite().all() for name in shapes)
    assert predicted.depth.min() > 0 and predicted.depth_confidence.min() > 1 and predicted.point_confidence.min() > 1


def test_a_new_camera_head_predicts_cameras_near_the_first_one(vggt: VGGT, images: torch.Tensor) -> None:
    """No translation, no rotation and a field of view of 1 rad, so that the ReLU has a gradient."""
    encodings = run_heads(vggt, images[None]).pose_encodings[-1]
    assert (encodings - torch.tensor([0.0] * 6 + [1.0] * 3)).abs().max() < 0.3


def test_predictions_of_many_frames_equal_those_in_one_call(vggt: VGGT) -> None:
    images = torch.rand(10, 3, 14, 28, generator=torch.Generator().manual_seed(2))  # more than FRAMES_AT_ONCE
    with torch.no_grad():
        outputs = run_heads(vggt, images[None])
    predicted = predict(vggt, images)
    torch.testing.assert_close(predicted.depth, outputs.depth[0])
    torch.testing.assert_close(predicted.points, outputs.points[0])


def test_dense_heads_run_on_the_chosen_frames(vggt: VGGT, images: torch.Tensor) -> None:
    with torch.no_grad():
        every, chosen = run_heads(vggt, images[None]), run_heads(vggt, images[None], dense_frames=[2, 0])
    torch.testing.assert_close(chosen.pose_encodings, every.pose_encodings)
    for name in ("depth", "depth_confidence", "points", "point_confidence"):
        torch.testing.assert_close(getattr(chosen, name), getattr(every, name)[:, [2, 0]])


def test_heads_keep_float32_beside_an_aggregator_in_bfloat16(vggt: VGGT, images: torch.Tensor) -> None:
    exact = predict(vggt, images)
    vggt.aggregator.to(torch.bfloat16)
    rounded = predict(vggt, images)
    assert rounded.depth.dtype == rounded.world_to_camera.dtype == torch.float32
    assert (rounded.depth - exact.depth).norm() < 0.05 * exact.depth.norm()


def test_gradients_reach_every_weight(vggt: VGGT, images: torch.Tensor) -> None:
    outputs = run_heads(vggt, images[None])
    sum(getattr(outputs, field.name).mean() for field in dataclasses.fields(outputs)).backward()  # type: ignore[union-attr]
    without = {name for name, weight in vggt.named_parameters() if weight.grad is None or not weight.grad.any()}
    # The first iteration's input is all zero, so that its weight gets a gradient from the later iterations only.
    assert without <= {"camera_head.empty_pose_tokens"}


def test_a_missing_head_is_named(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="heads=HEADS"):
        predict(VGGT(TINY, ["depth"]), images)


def test_pose_encodings_round_trip_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    quaternion = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True) * quaternion[..., 3:].sign()
    translation = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    fields = 0.5 + torch.rand(2, 4, 2, generator=generator, dtype=torch.float64)
    encoding = torch.cat((translation, quaternion, fields), dim=-1)
    again = encode_pose(*decode_pose(encoding, 42, 56), 42, 56)
    torch.testing.assert_close(again, encoding, rtol=0, atol=1e-12)


def test_unprojected_points_project_to_their_pixels() -> None:
    generator = torch.Generator().manual_seed(4)
    encoding = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    encoding[:, 7:] = torch.tensor([0.8, 1.1])
    intrinsics, world_to_camera = decode_pose(encoding, 6, 8)
    depth = 1 + torch.rand(2, 6, 8, generator=generator, dtype=torch.float64)
    points = unproject_depth(depth, intrinsics, world_to_camera)
    homogeneous = torch.cat((points, torch.ones_like(points[..., :1])), dim=-1)
    pixels = torch.einsum("nij,njk,nhwk->nhwi", intrinsics, world_to_camera, homogeneous)
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    expected = torch.stack((column, row), dim=-1).double().expand(2, -1, -1, -1)
    torch.testing.assert_close(pixels[..., 2], depth, rtol=0, atol=1e-12)
    torch.testing.assert_close(pixels[..., :2] / pixels[..., 2:], expected, rtol=0, atol=1e-10)
    lower = torch.eye(4, dtype=torch.float64)[3:].expand(2, 1, 4)
    product = camera_to_world(world_to_camera) @ torch.cat((world_to_camera, lower), dim=1)
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64).expand(2, -1, -1), rtol=0, atol=1e-12)
