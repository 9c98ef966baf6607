"""VGGT's heads and camera functions against outputs recorded from the public code (tiny models, random weights)."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from golden_files import Golden, find, is_geometry_misc, is_vggt_heads
from w2r2_ds.models.vggt.cameras import camera_to_world, decode_pose, encode_pose, unproject_depth
from w2r2_ds.models.vggt.config import HEADS, VGGTConfig
from w2r2_ds.models.vggt.dpt_head import position_embedding
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import HeadOutputs, run_heads

pytestmark = pytest.mark.golden

HEAD_FILES = find(is_vggt_heads)
PARTS = find(is_geometry_misc)


@cache
def vggt_of(golden: Golden) -> VGGT:
    """A VGGT whose heads have the recorded weights; recorded and own weights must have the same names."""
    config = golden.record["config"]
    tokens = json.loads(golden.path.with_name(f"{golden.record['input']['tokens_file']}.json").read_text())
    model = VGGT(
        VGGTConfig(
            embed_dim=config["dim_in"] // 2,
            num_heads=4,
            depth=tokens["config"]["depth"],
            patch_embed="conv",
            camera_trunk_depth=config["camera"]["trunk_depth"],
            camera_num_heads=config["camera"]["num_heads"],
            dpt_features=config["dpt"]["features"],
            dpt_out_channels=tuple(config["dpt"]["out_channels"]),
            dpt_layers=tuple(config["dpt"]["intermediate_layer_idx"]),
        ),
        heads=HEADS,
    )
    weights = {key.removeprefix("param/"): value for key, value in golden.tensors.items() if key.startswith("param/")}
    aggregator = {f"aggregator.{name}": value for name, value in model.aggregator.state_dict().items()}
    model.load_state_dict(aggregator | weights, strict=True)
    return model.eval()


@cache
def tokens_of(golden: Golden) -> dict[int, torch.Tensor]:
    """Layer -> recorded output of the aggregator."""
    given = golden.record["input"]
    prefix = f"{given['case']}/out/layer_"
    stored = load_file(golden.path.with_name(f"{given['tokens_file']}.safetensors"))
    return {int(key.removeprefix(prefix)): value for key, value in stored.items() if key.startswith(prefix)}


@cache
@torch.no_grad()
def outputs_of(golden: Golden, factor: float, frames_at_once: int | None = None) -> HeadOutputs:
    """Outputs of the heads on the recorded tokens times a factor."""
    vggt = vggt_of(golden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vggt.aggregator, "forward", lambda *_: {i: factor * x for i, x in tokens_of(golden).items()})
        return run_heads(vggt, torch.zeros(golden.record["input"]["images_shape"]), frames_at_once)


def named(golden: Golden, outputs: HeadOutputs) -> dict[str, torch.Tensor]:
    """Our outputs under the recorded names."""
    height, width = golden.record["input"]["images_shape"][-2:]
    intrinsics, extrinsics = decode_pose(outputs.pose_encodings[-1], height, width)
    return {
        "pose_enc_list": outputs.pose_encodings,
        "extrinsic": extrinsics,
        "intrinsic": intrinsics,
        "depth": outputs.depth[..., None],
        "depth_conf": outputs.depth_confidence,
        "world_points": outputs.points,
        "world_points_conf": outputs.point_confidence,
        "unprojected_points": unproject_depth(outputs.depth, intrinsics, extrinsics)[0],
    }


def recorded(files: list[Golden], pattern: str) -> list[Any]:
    """One parameter set ``(file, key)`` per recorded tensor whose key matches."""
    return [
        pytest.param(golden, key, id=f"{golden.name}-{key}")
        for golden in files
        for key in golden.record["tensors"]
        if re.match(pattern, key)
    ]


def assert_as_recorded(golden: Golden, key: str, result: torch.Tensor) -> None:
    """The same shape and, within the tolerance of the file times the largest finite value, the same numbers."""
    wanted = golden.tensors[key]
    assert tuple(result.shape) == golden.shape(key)
    largest = float(wanted[wanted.isfinite()].abs().max())
    torch.testing.assert_close(result.to(wanted.dtype), wanted, rtol=0, atol=golden.tolerance * largest)


@pytest.mark.parametrize(("golden", "key"), recorded(HEAD_FILES, "out/"))
def test_heads_give_the_recorded_output(golden: Golden, key: str) -> None:
    assert_as_recorded(golden, key, named(golden, outputs_of(golden, 1.0))[key.removeprefix("out/")])


@pytest.mark.parametrize(("golden", "key"), recorded(HEAD_FILES, "small/out/"))
def test_heads_give_the_recorded_output_for_small_tokens(golden: Golden, key: str) -> None:
    assert_as_recorded(golden, key, named(golden, outputs_of(golden, 0.01))[key.removeprefix("small/out/")])


@pytest.mark.parametrize("golden", HEAD_FILES, ids=lambda golden: golden.name)
def test_frames_one_by_one_give_the_recorded_depth(golden: Golden) -> None:
    outputs = outputs_of(golden, 1.0, frames_at_once=1)
    assert_as_recorded(golden, "out/depth", outputs.depth[..., None])
    assert_as_recorded(golden, "out/world_points", outputs.points)


@pytest.mark.parametrize(("golden", "key"), recorded(HEAD_FILES, "probe/out/"))
def test_a_part_of_the_camera_head_gives_the_recorded_output(golden: Golden, key: str) -> None:
    head = vggt_of(golden).camera_head
    assert head is not None
    parts = {"adaln_norm": head.modulated_norm, "trunk0": head.trunk[0], "trunk_norm": head.trunk_norm}
    with torch.no_grad():
        assert_as_recorded(golden, key, parts[key.removeprefix("probe/out/camera_")](golden.tensors["probe/in/cam"]))


@pytest.mark.parametrize(("golden", "key"), recorded(PARTS, "pose/out/"))
def test_pose_encodings_give_the_recorded_matrices(golden: Golden, key: str) -> None:
    name, height, width = re.fullmatch(r"pose/out/(\w+)_(\d+)x(\d+)", key).groups()  # type: ignore[union-attr]
    size = (int(height), int(width))
    intrinsics, extrinsics = decode_pose(golden.tensors["pose/in/pose_enc"], *size)
    results = {
        "extrinsic": extrinsics,
        "intrinsic": intrinsics,
        "reencoded": encode_pose(intrinsics, extrinsics, *size),
    }
    assert_as_recorded(golden, key, results[name])


@pytest.mark.parametrize(("golden", "key"), recorded(PARTS, "unproject/out/"))
def test_depth_maps_give_the_recorded_points(golden: Golden, key: str) -> None:
    depth, intrinsics, extrinsics = (golden.tensors[f"unproject/in/{x}"] for x in ("depth", "intrinsic", "extrinsic"))
    results = {
        "points": unproject_depth(depth[..., 0], intrinsics, extrinsics),
        "inverse_extrinsic": camera_to_world(extrinsics),
    }
    assert_as_recorded(golden, key, results[key.removeprefix("unproject/out/")])


@pytest.mark.parametrize(("golden", "key"), recorded(PARTS, "dpt_pos/out/"))
def test_position_embeddings_of_feature_maps_equal_the_recorded_ones(golden: Golden, key: str) -> None:
    found = re.fullmatch(r"dpt_pos/out/grid(\d+)x(\d+)_c(\d+)_img(\d+)x(\d+)", key)
    assert found
    rows, columns, channels, height, width = map(int, found.groups())
    result = position_embedding(rows, columns, channels, width / height, None)
    assert_as_recorded(golden, key, result.permute(1, 2, 0))
