"""VGGT by its own laws: early stop, bfloat16, strict loading, round trips, the encoder on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.geometry.encoder import GeometryEncoder, VGGTEncoder
from w2r2_ds.geometry.layers import grid_positions, rotary_table, rotate
from w2r2_ds.geometry.loading import load_vggt, save_vggt
from w2r2_ds.geometry.vggt import VGGT, VGGTConfig

SMALL = VGGTConfig(img_size=56, embed_dim=32, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def vggt() -> VGGT:
    """Small, with a ViT, every parameter random."""
    torch.manual_seed(0)
    model = VGGT(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(vggt: VGGT, tmp_path: Path) -> Path:
    save_vggt(vggt, tmp_path)
    return tmp_path


def rewrite(directory: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a saved VGGT."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path) -> None:
    """Split the single weights file in two with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@torch.no_grad()
def test_early_stop_changes_nothing_and_keeps_only_what_is_wanted(vggt: VGGT, images: torch.Tensor) -> None:
    calls: list[int] = []
    for index, block in enumerate(vggt.aggregator.global_blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    full = vggt.aggregator(images, range(3))
    calls.clear()
    early = vggt.aggregator(images, [1])
    assert calls == [0, 1]
    assert list(early) == [1] and list(full) == [0, 1, 2]
    assert torch.equal(early[1], full[1])
    assert full[1].shape == (1, 3, 5 + 2 * 3, 64)


@torch.no_grad()
def test_only_the_first_frame_is_special(vggt: VGGT, images: torch.Tensor) -> None:
    there = vggt.aggregator(images, [2])[2]
    permuted = vggt.aggregator(images[:, [0, 2, 1]], [2])[2]
    swapped = vggt.aggregator(images[:, [1, 0, 2]], [2])[2]
    assert torch.allclose(permuted, there[:, [0, 2, 1]], atol=1e-4)
    assert not torch.allclose(swapped, there[:, [1, 0, 2]], atol=1e-2)


@torch.no_grad()
def test_bfloat16_runs_and_stays_near(vggt: VGGT, images: torch.Tensor) -> None:
    exact = vggt.aggregator(images, [2])[2]
    rounded = vggt.to(torch.bfloat16).aggregator(images, [2])[2]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_rotation_of_bfloat16_tokens_uses_float32_angles() -> None:
    x = torch.randn(37 * 28, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    table = rotary_table(1 + grid_positions(37, 28), 64, 100)
    assert table[0].dtype == torch.float32
    turned = rotate(x, table)
    assert torch.equal(turned, rotate(x.float(), table))
    assert torch.allclose(turned.square().sum(-1), x.float().square().sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "layers", "match"),
    [
        ((1, 2, 3, 28, 40), [0], "multiples of 14"),
        ((2, 3, 28, 28), [0], "give \\[batch, frames, 3"),
        ((1, 2, 4, 28, 28), [0], "give \\[batch, frames, 3"),
        ((1, 2, 3, 28, 28), [3], "0 to 2"),
        ((1, 2, 3, 28, 28), [-1], "0 to 2"),
        ((1, 2, 3, 28, 28), [], "0 to 2"),
    ],
)
def test_wrong_calls_are_refused(vggt: VGGT, shape: tuple[int, ...], layers: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vggt.aggregator(torch.zeros(shape), layers)


def test_integer_images_are_refused(vggt: VGGT) -> None:
    with pytest.raises(ValueError, match="floating point"):
        vggt.aggregator(torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8), [0])


def test_encoder_gives_the_patch_grid_of_its_layer(vggt: VGGT, images: torch.Tensor) -> None:
    encoder: GeometryEncoder = VGGTEncoder(vggt, 1)
    features = encoder.encode(images[0])
    assert encoder.feature_dim == 64
    assert features.shape == (3, 2, 3, 64) and not features.requires_grad
    expected = vggt.aggregator(images, [1])[1][0, :, 5:]
    assert torch.equal(features.flatten(1, 2), expected)
    assert not any(parameter.requires_grad for parameter in vggt.parameters())
    assert VGGTEncoder(vggt, 1).to("cpu", torch.bfloat16).encode(images[0]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="layers 0 to 2"):
        VGGTEncoder(vggt, 3)
    with pytest.raises(ValueError, match="give \\[frames, 3"):
        encoder.encode(images)


@pytest.mark.parametrize("sharded", [False, True])
def test_saved_and_loaded_is_the_same(vggt: VGGT, saved: Path, images: torch.Tensor, sharded: bool) -> None:
    if sharded:
        shard(saved)
    loaded = load_vggt(saved)
    assert loaded.config == vggt.config and not loaded.training
    state, other = vggt.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(loaded.aggregator(images, [2])[2], vggt.aggregator(images, [2])[2])
    assert load_vggt(saved, dtype=torch.bfloat16).aggregator.camera_token.dtype == torch.bfloat16


def test_saving_over_the_loaded_directory_is_safe(saved: Path, vggt: VGGT) -> None:
    loaded = load_vggt(saved)
    save_vggt(loaded, saved)
    again = load_vggt(saved).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in vggt.state_dict().items())
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_head_weights_are_skipped_and_half_precision_is_widened(saved: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].half()
        for head in ("camera", "point", "depth", "track"):
            tensors[f"{head}_head.some.weight"] = torch.zeros(3)

    rewrite(saved, change)
    loaded = load_vggt(saved)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("aggregator.camera_token"), ["lack aggregator.camera_token"]),
        (lambda t: t.update({"aggregator.new": torch.zeros(1)}), ["model.safetensors holds aggregator.new"]),
        (lambda t: t.update({"pose_head.x": torch.zeros(1)}), ["model.safetensors holds pose_head.x"]),
        (
            lambda t: t.update({"aggregator.camera_token": torch.zeros(1, 2, 1, 31)}),
            ["model.safetensors: aggregator.camera_token", "[1, 2, 1, 31]", "[1, 2, 1, 32]"],
        ),
        (
            lambda t: t.update({"aggregator.camera_token": torch.zeros(1, 2, 1, 32, dtype=torch.int8)}),
            ["aggregator.camera_token is stored as I8"],
        ),
    ],
    ids=["missing", "extra", "other head", "shape", "quantised"],
)
def test_loading_is_strict(saved: Path, change: Callable[[Tensors], Any], words: list[str]) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError) as raised:
        load_vggt(saved)
    assert all(word in str(raised.value) for word in [*words, str(saved)])


def test_broken_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_vggt(saved)
    weights.unlink()
    with pytest.raises(ValueError, match="has neither"):
        load_vggt(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_vggt(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_vggt(saved)
    with pytest.raises(ValueError, match="is no directory"):
        load_vggt(saved / "nowhere")


def test_missing_and_doubled_shards_are_named(saved: Path) -> None:
    shard(saved)
    save_file(load_file(saved / "a.safetensors") | load_file(saved / "b.safetensors"), saved / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: aggregator\..* is also in another file"):
        load_vggt(saved)
    (saved / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b\.safetensors, which is not beside it"):
        load_vggt(saved)


def test_unreachable_hub_id_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=r"someone/vggt is no directory here.*no route"):
        load_vggt("someone/vggt")


def test_hub_id_is_fetched(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(saved))
    assert load_vggt("someone/vggt").config == SMALL


def test_config_of_the_public_model_means_the_1b_sizes() -> None:
    public = VGGTConfig.from_dict({"img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_track": True})
    assert public == VGGTConfig() == VGGTConfig.from_dict(public.to_dict())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"embed_dims": 64}, "embed_dims"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": "24"}, "depth is '24'"),
        ({"embed_dim": 100}, "multiple of 4"),
        ({"img_size": 500}, "img_size 500"),
        ({"patch_embed": "resnet"}, "patch_embed"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"aa_block_size": 2}, "aa_block_size"),
        ({"vit_num_heads": 3}, "vit_num_heads"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VGGTConfig.from_dict(values)
