"""VGGT's aggregator and its parts against outputs recorded from the public code (tiny models, random weights)."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import torch

from golden_files import Golden, find, is_aggregator, is_geometry_misc
from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.dinov2 import resample_position_table
from w2r2_ds.models.vggt.layers import grid_positions, rotary_table, rotate
from w2r2_ds.models.vggt.model import PIXEL_MEAN, PIXEL_STD, VGGT, Aggregator

pytestmark = pytest.mark.golden

RUNS = find(is_aggregator)
PARTS = find(is_geometry_misc)


def config_of(values: dict[str, Any]) -> VGGTConfig:
    """The recorded configuration as a `VGGTConfig`; in the record, the sizes of the ViT are nested."""
    given = {key: value for key, value in values.items() if key != "vit"}
    given |= {f"vit_{key}": value for key, value in (values.get("vit") or {}).items()}
    if given["patch_embed"] != "conv":
        assert given["patch_embed"].startswith("dinov2"), given["patch_embed"]
        given["patch_embed"] = "dinov2"
    return VGGTConfig.from_dict(given)


@cache
def aggregator_of(golden: Golden) -> Aggregator:
    """The recorded aggregator; recorded and own weights must have the same names."""
    vggt = VGGT(config_of(golden.record["config"]))
    weights = {key.removeprefix("param/"): value for key, value in golden.tensors.items() if key.startswith("param/")}
    vggt.load_state_dict(weights, strict=True)
    return vggt.eval().aggregator


@cache
@torch.no_grad()
def computed(golden: Golden, case: str) -> dict[str, torch.Tensor]:
    """All outputs that a case may record, computed from its images."""
    aggregator, images = aggregator_of(golden), golden.tensors[f"{case}/in/images"]
    batch, frames, _, height, width = images.shape
    flat = images.flatten(0, 1)
    positions = aggregator.positions(height, width)
    result = {
        "patch_tokens": aggregator.patch_tokens(flat),
        "tokens_in": aggregator.tokens(images),
        "positions": positions.expand(batch * frames, -1, -1),
    }
    for index, layer in aggregator(images, range(aggregator.config.depth)).items():
        result[f"layer_{index:02d}"] = layer
    if aggregator.config.patch_embed == "dinov2":
        vit, size = aggregator.patch_embed, aggregator.config.patch_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        tokens = vit.tokens((flat - mean) / std)
        result["vit_pos_embed"] = resample_position_table(vit.pos_embed, height // size, width // size)
        result["vit_cls"] = tokens[:, 0]
        result["vit_reg"] = tokens[:, 1 : 1 + vit.num_registers]
    return result


@torch.no_grad()
def probed(golden: Golden, name: str) -> torch.Tensor:
    """Output of one module, named as in ``probe/out/NAME``."""
    aggregator, tensors = aggregator_of(golden), golden.tensors
    matched = re.fullmatch(r"(frame_block|global_block|frame_attn|global_attn|q_norm|k_norm|vit_block)(\d+)", name)
    if name == "vit_norm":
        return aggregator.patch_embed.norm(tensors["probe/in/x"])
    assert matched, f"{golden.path} probes {name}, which no test covers"
    part, index = matched[1], int(matched[2])
    if part == "q_norm":
        return aggregator.frame_blocks[index].attn.q_norm(tensors["probe/in/qk"])
    if part == "k_norm":
        return aggregator.global_blocks[index].attn.k_norm(tensors["probe/in/qk"])
    if part == "vit_block":
        return aggregator.patch_embed.blocks[index](tensors["probe/in/x"])
    rope = aggregator.rope(tensors["probe/in/positions"][:, None])
    blocks = aggregator.frame_blocks if part.startswith("frame") else aggregator.global_blocks
    module = blocks[index] if part.endswith("block") else blocks[index].attn
    return module(tensors["probe/in/x"], rope)


def outputs(files: list[Golden], prefix: str) -> list[Any]:
    """One parameter set ``(file, rest of the key)`` per recorded tensor whose key starts with `prefix`."""
    return [
        pytest.param(golden, key.removeprefix(prefix), id=f"{golden.name}-{key}")
        for golden in files
        for key in golden.record["tensors"]
        if key.startswith(prefix)
    ]


CASES = [pytest.param(golden, case, id=f"{golden.name}-{case}") for golden in RUNS for case in golden.record["cases"]]
CASE_OUTPUTS = [
    pytest.param(golden, case, name.values[1], id=name.id)
    for golden in RUNS
    for case in golden.record["cases"]
    for name in outputs([golden], f"{case}/out/")
]


@pytest.mark.parametrize(("golden", "case"), CASES)
def test_a_case_records_every_layer(golden: Golden, case: str) -> None:
    stated = golden.record["cases"][case]
    assert golden.shape(f"{case}/in/images") == tuple(stated["images_shape"])
    assert aggregator_of(golden).config.special_tokens == stated["patch_start_idx"]
    layers = [key for key in golden.tensors if key.startswith(f"{case}/out/layer_")]
    assert len(layers) == stated["n_layers"] == aggregator_of(golden).config.depth


@pytest.mark.parametrize(("golden", "case", "name"), CASE_OUTPUTS)
def test_aggregator_gives_the_recorded_output(golden: Golden, case: str, name: str) -> None:
    key = f"{case}/out/{name}"
    result, wanted = computed(golden, case)[name], golden.tensors[key]
    assert tuple(result.shape) == golden.shape(key)
    if not wanted.is_floating_point():
        assert torch.equal(result, wanted)
        return
    bound = golden.tolerance * max(1.0, golden.record["cases"][case]["out_abs_max"])
    torch.testing.assert_close(result, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(("golden", "name"), outputs(RUNS, "probe/out/"))
def test_a_single_module_gives_the_recorded_output(golden: Golden, name: str) -> None:
    result, wanted = probed(golden, name), golden.tensors[f"probe/out/{name}"]
    assert tuple(result.shape) == golden.shape(f"probe/out/{name}")
    torch.testing.assert_close(result, wanted, rtol=0, atol=golden.tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(("golden", "name"), outputs(PARTS, "rope/out/"))
def test_rotary_positions_give_the_recorded_output(golden: Golden, name: str) -> None:
    wanted = golden.tensors[f"rope/out/{name}"]
    if grid := re.fullmatch(r"grid_positions_(\d+)x(\d+)", name):
        assert torch.equal(grid_positions(int(grid[1]), int(grid[2])).expand_as(wanted), wanted)
        return
    assert name == "tokens", f"{golden.path} records rope/out/{name}, which no test covers"
    tokens, positions = golden.tensors["rope/in/tokens"], golden.tensors["rope/in/positions"]
    stated = re.search(r"frequency=([\d.]+)", golden.record.get("names", {}).get("rope/*", ""))
    base = float(stated[1]) if stated else VGGTConfig.rope_freq
    result = rotate(tokens, rotary_table(positions[:, None], tokens.shape[-1], base))
    assert tuple(result.shape) == golden.shape("rope/out/tokens")
    torch.testing.assert_close(result, wanted, rtol=0, atol=golden.tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize(("golden", "name"), outputs(PARTS, "pos_embed/out/"))
def test_resampled_position_embeddings_equal_the_recorded_ones(golden: Golden, name: str) -> None:
    wanted = golden.tensors[f"pos_embed/out/{name}"]
    height, width = (int(side) for side in name.split("x"))
    patch = math.isqrt(height * width // (wanted.shape[1] - 1))
    result = resample_position_table(golden.tensors["pos_embed/in/pos_embed"], height // patch, width // patch)
    assert tuple(result.shape) == golden.shape(f"pos_embed/out/{name}")
    torch.testing.assert_close(result, wanted, rtol=0, atol=golden.tolerance * float(wanted.abs().max()))
