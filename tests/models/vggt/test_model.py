"""VGGT: its directories, and properties of its features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.loading import CONFIG, load_vggt, save_vggt
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.utils.files.safetensors_io import INDEX, WEIGHTS

TINY = VGGTConfig(img_size=28, embed_dim=32, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2)
WEIGHT = "aggregator.frame_blocks.1.mlp.fc1.weight"


def tiny(**changes: object) -> VGGT:
    """A tiny VGGT with random weights everywhere, so that no part is multiplied by zero or by a small LayerScale."""
    torch.manual_seed(0)
    model = VGGT(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def vggt() -> VGGT:
    return tiny()


@pytest.fixture
def directory(vggt: VGGT, tmp_path: Path) -> Path:
    save_vggt(vggt, tmp_path / "vggt")
    return tmp_path / "vggt"


@pytest.fixture
def images() -> torch.Tensor:
    """Two scenes of three frames, 2 x 3 patches each."""
    return torch.rand(2, 3, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def run(vggt: VGGT, images: torch.Tensor, *layers: int) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        return vggt.aggregator(images, layers)


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the weights with some added, replaced or (None) removed; `__` stands for a dot."""
    weights = load_file(directory / WEIGHTS)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, directory / WEIGHTS)


def same_weights(one: VGGT, other: VGGT) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_saved_weights_are_loaded(vggt: VGGT, directory: Path) -> None:
    loaded = load_vggt(directory)
    assert loaded.config == vggt.config
    assert same_weights(loaded, vggt)
    assert not loaded.training


def test_saving_writes_two_files(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted([CONFIG, WEIGHTS])


def test_weights_are_loaded_in_float32(directory: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(weights, directory / WEIGHTS)
    assert {weight.dtype for weight in load_vggt(directory).parameters()} == {torch.float32}


def test_a_missing_weight_raises_with_its_name(directory: Path) -> None:
    change_weights(directory, **{WEIGHT.replace(".", "__"): None})
    with pytest.raises(ValueError, match=WEIGHT):
        load_vggt(directory)


def test_an_unknown_weight_raises_with_its_name(directory: Path) -> None:
    change_weights(directory, aggregator__surplus=torch.zeros(1))
    with pytest.raises(ValueError, match=r"aggregator\.surplus"):
        load_vggt(directory)


def test_a_weight_of_another_shape_raises_with_both_shapes(directory: Path) -> None:
    change_weights(directory, **{WEIGHT.replace(".", "__"): torch.zeros(5, 7)})
    with pytest.raises(ValueError, match=rf"{WEIGHT}.*\[5, 7\].*\[128, 32\]"):
        load_vggt(directory)


def test_a_quantised_weight_raises_with_its_name(directory: Path) -> None:
    change_weights(directory, **{WEIGHT.replace(".", "__"): torch.zeros(128, 32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=f"{WEIGHT}.*I8"):
        load_vggt(directory)


@pytest.mark.parametrize("head", ["camera_head", "point_head", "depth_head", "track_head"])
def test_weights_of_heads_are_skipped(vggt: VGGT, directory: Path, head: str) -> None:
    change_weights(directory, **{f"{head}__trunk__weight": torch.zeros(3)})
    assert same_weights(load_vggt(directory), vggt)


def shard(directory: Path) -> None:
    """Replace the one weights file by two and an index."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, directory / file)
    where = {name: file for file, part in parts.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))


def test_shards_are_loaded_through_their_index(vggt: VGGT, directory: Path) -> None:
    shard(directory)
    assert same_weights(load_vggt(directory), vggt)


def test_a_missing_shard_raises_with_its_name(directory: Path) -> None:
    shard(directory)
    (directory / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        load_vggt(directory)


def test_a_weight_in_two_shards_is_rejected(directory: Path) -> None:
    shard(directory)
    save_file(
        load_file(directory / "a.safetensors") | load_file(directory / "b.safetensors"), directory / "b.safetensors"
    )
    with pytest.raises(ValueError, match="also in another file"):
        load_vggt(directory)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_rejected_naming_the_folder(directory: Path, kept: float) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=str(directory)):
        load_vggt(directory)


@pytest.mark.parametrize("text", ['{"depth": 3,', "[]", '{"depht": 3}', '{"depth": "3"}', '{"embed_dim": 30}'])
def test_a_bad_config_is_rejected_naming_the_file(directory: Path, text: str) -> None:
    (directory / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=str(directory / CONFIG)):
        load_vggt(directory)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_raises_with_its_name(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_vggt(directory)


def test_a_missing_directory_raises_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path / "nowhere")):
        load_vggt(tmp_path / "nowhere")


def test_an_unknown_config_field_raises_with_its_name() -> None:
    with pytest.raises(ValueError, match="'depht'"):
        VGGTConfig.from_dict({"depht": 24})


def test_the_public_config_is_the_default_model() -> None:
    upstream = {"img_size": 518, "patch_embed": "dinov2_vitl14_reg", "enable_camera": True, "aa_block_size": 1}
    assert VGGTConfig.from_dict(upstream) == VGGTConfig()


def test_another_order_of_blocks_is_rejected() -> None:
    with pytest.raises(ValueError, match="aa_order"):
        VGGTConfig.from_dict({"aa_order": ["global", "frame"]})


def test_a_layers_output_does_not_depend_on_deeper_layers(vggt: VGGT, images: torch.Tensor) -> None:
    every = run(vggt, images, 0, 1, 2)
    assert torch.equal(run(vggt, images, 1)[1], every[1])
    assert list(run(vggt, images, 1)) == [1]


def test_blocks_after_the_selected_layer_do_not_run(vggt: VGGT, images: torch.Tensor) -> None:
    with torch.no_grad():
        vggt.aggregator.global_blocks[2].mlp.fc2.bias.fill_(torch.nan)
    assert run(vggt, images, 1)[1].isfinite().all()
    assert run(vggt, images, 2)[2].isnan().any()


def test_scenes_of_a_batch_do_not_attend_to_each_other(vggt: VGGT, images: torch.Tensor) -> None:
    both = run(vggt, images, 2)[2]
    torch.testing.assert_close(run(vggt, images[1:], 2)[2], both[1:], rtol=1e-4, atol=1e-4)


def test_frames_of_a_scene_attend_to_each_other(vggt: VGGT, images: torch.Tensor) -> None:
    changed = images.clone()
    changed[:, 2] = 0
    assert (run(vggt, changed, 0)[0][:, 0] - run(vggt, images, 0)[0][:, 0]).abs().max() > 1e-2


def test_only_the_choice_of_the_first_frame_changes_features(vggt: VGGT, images: torch.Tensor) -> None:
    plain = run(vggt, images, 2)[2]
    torch.testing.assert_close(run(vggt, images[:, [0, 2, 1]], 2)[2], plain[:, [0, 2, 1]], rtol=1e-4, atol=1e-4)
    assert (run(vggt, images[:, [1, 0, 2]], 2)[2] - plain[:, [1, 0, 2]]).abs().max() > 1e-2


@pytest.mark.parametrize("patch_embed", ["dinov2", "conv"])
def test_bfloat16_is_close_to_float32(images: torch.Tensor, patch_embed: str) -> None:
    vggt = tiny(patch_embed=patch_embed)
    exact = run(vggt, images, 2)[2]
    rounded = run(vggt.to(torch.bfloat16), images, 2)[2]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("height", "width"), [(27, 42), (28, 43)])
def test_sides_that_are_no_multiple_of_14_are_rejected(vggt: VGGT, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.*multiples of 14"):
        run(vggt, torch.zeros(1, 1, 3, height, width), 0)


def test_integer_images_are_rejected(vggt: VGGT) -> None:
    with pytest.raises(ValueError, match="uint8"):
        run(vggt, torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8), 0)


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 3]])
def test_layers_that_do_not_exist_are_rejected(vggt: VGGT, images: torch.Tensor, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        run(vggt, images, *layers)


def test_encoder_gives_the_patch_tokens_of_its_layer_as_a_grid(vggt: VGGT, images: torch.Tensor) -> None:
    features = VGGTEncoder(vggt, layers=[1]).encode(images[0])
    tokens = run(vggt, images[:1], 1)[1][0, :, 5:]
    assert features.shape == (3, 2, 3, VGGTEncoder(vggt, layers=[1]).spec.feature_dim)
    assert torch.equal(features.flatten(1, 2), tokens)


def test_features_of_one_layer_are_not_copied(vggt: VGGT, images: torch.Tensor) -> None:
    """They are a view behind the special tokens of the aggregator's output."""
    outputs: list[torch.Tensor] = []
    vggt.aggregator.register_forward_hook(lambda *call: outputs.append(call[-1][1]))
    features = VGGTEncoder(vggt, layers=[1]).encode(images[0])
    assert features.untyped_storage().data_ptr() == outputs[0].untyped_storage().data_ptr()


def test_features_of_several_layers_are_concatenated(vggt: VGGT, images: torch.Tensor) -> None:
    both, deep, shallow = (VGGTEncoder(vggt, layers) for layers in ([2, 0], [2], [0]))
    expected = torch.cat([deep.encode(images[0]), shallow.encode(images[0])], dim=-1)
    assert torch.equal(both.encode(images[0]), expected)
    assert both.spec.feature_dim == 2 * deep.spec.feature_dim == expected.shape[-1]
    assert both.flops(3, 28, 42) == deep.flops(3, 28, 42) > shallow.flops(3, 28, 42)


def test_encoder_freezes_its_vggt(vggt: VGGT, images: torch.Tensor) -> None:
    encoder = VGGTEncoder(vggt.train(), layers=[1])
    assert not encoder.encode(images[0].requires_grad_()).requires_grad
    assert not vggt.training
    assert not any(weight.requires_grad for weight in vggt.parameters())


@pytest.mark.parametrize("layer", [-1, 3])
def test_encoder_rejects_a_layer_that_does_not_exist(vggt: VGGT, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layers is \[{layer}\].*0 to 2"):
        VGGTEncoder(vggt, [layer])


def test_encoder_rejects_frames_of_more_than_one_scene(vggt: VGGT, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"frames, 3, height, width\]"):
        VGGTEncoder(vggt, layers=[0]).encode(images)


def test_last_reference_frame_equals_first_of_reversed_frames(vggt: VGGT, images: torch.Tensor) -> None:
    first, last = (VGGTEncoder(vggt, [2], frame) for frame in ("first", "last"))
    assert torch.equal(last.encode(images[0]), first.encode(images[0].flip(0)).flip(0))
    assert (last.encode(images[0]) - first.encode(images[0])).abs().max() > 1e-2


@pytest.mark.parametrize(("frame", "others"), [("first", [0, 2, 1]), ("last", [1, 0, 2])])
def test_only_the_position_of_the_reference_frame_matters(
    vggt: VGGT, images: torch.Tensor, frame: str, others: list[int]
) -> None:
    encoder = VGGTEncoder(vggt, [2], frame)
    plain = encoder.encode(images[0])
    torch.testing.assert_close(encoder.encode(images[0, others]), plain[others], rtol=1e-4, atol=1e-4)
    with_reference = [2, 1, 0]
    assert (encoder.encode(images[0, with_reference]) - plain[with_reference]).abs().max() > 1e-2


def test_a_reference_frame_in_between_is_rejected(vggt: VGGT) -> None:
    with pytest.raises(ValueError, match="reference_frame is 'middle'; it is one of first, last"):
        VGGTEncoder(vggt, [0], "middle")
