"""Import of a VG-LLM checkpoint directory: equal weights, and errors that name the file and the tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.convert.from_vgllm import import_vgllm, split_state, vggt_config
from w2r2_ds.demo.tiny_models import build_tiny_vlm
from w2r2_ds.evaluation.loading import run_config, trained_model, trained_weights_sha256
from w2r2_ds.models.build import build_model
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.merger_io import MERGER
from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.loading import load_vggt
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.weights.loading import load_model_config, load_tokenizer, load_vision_spec, load_vlm
from w2r2_ds.utils.files.safetensors_io import INDEX, WEIGHTS

PUBLIC_KEYS = Path(__file__).parents[1] / "golden" / "vggt" / "vggt_1b_state_dict_keys.json"
SIZES = VGGTConfig(
    img_size=42, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, num_register_tokens=3, vit_depth=1, vit_num_heads=2
)
HIDDEN, MERGER_HIDDEN = 64, 48


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen2.5-VL of the checkpoint; its head is tied to the embedding as in the 3B model."""
    out = tmp_path_factory.mktemp("vgllm") / "qwen"
    sizes = {"hidden": HIDDEN, "layers": 2, "intermediate": 96, "vision_hidden": 32}
    return build_tiny_vlm(out, ["the red chair", "a brown table"], 3, **sizes)


@pytest.fixture(scope="session")
def geometry() -> tuple[VGGT, GeometryMerger]:
    """VGGT and merger of the checkpoint, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = VGGT(SIZES), GeometryMerger(2 * SIZES.embed_dim, HIDDEN, MERGER_HIDDEN)
        for module in modules:
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=0.3)
    return modules


@pytest.fixture(scope="session")
def weights(plain: Path, geometry: tuple[VGGT, GeometryMerger]) -> dict[str, torch.Tensor]:
    """VG-LLM's state_dict, including the point head. Parameter names are those of Qwen2.5-VL's hub files."""
    vggt, merger = (module.state_dict() for module in geometry)
    return {
        **load_file(plain / WEIGHTS),
        **{f"vggt.{name}": tensor for name, tensor in vggt.items()},
        **{f"merger.{name}": tensor for name, tensor in merger.items()},
        "vggt.point_head.norm.weight": torch.zeros(5),
    }


@pytest.fixture
def source(tmp_path: Path, plain: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The checkpoint directory, in shards, with the flat config that transformers 4.50 writes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    sections = {"type": "default", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": sections, "torch_dtype": "float32"}
    own = {"use_vggt_feature": True, "reference_frame": "last", "vggt_merger_hidden_dim": MERGER_HIDDEN}
    architectures = {"architectures": ["Qwen2_5_VLForConditionalGenerationWithVGGT"]}
    (folder / "config.json").write_text(json.dumps({**flat, **own, **architectures, "add_ground_classifier": False}))
    write(folder, weights)
    return folder


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write two shards and their index."""
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    where = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_language_model_loads_with_stock_classes_and_equal_weights(
    source: Path, plain: Path, tmp_path: Path
) -> None:
    import_vgllm(source, tmp_path / "out")
    imported = tmp_path / "out" / "vlm"
    assert same(load_file(imported / WEIGHTS), load_file(plain / WEIGHTS)), "names as on the hub, without the tied head"
    model = load_vlm(imported, torch.float32)
    assert same(model.state_dict(), load_vlm(plain, torch.float32).state_dict())
    config = json.loads((imported / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert not [key for key in ("use_vggt_feature", "reference_frame") if key in json.dumps(config)]
    rope = load_model_config(imported).text_config.rope_parameters
    assert rope["mrope_section"] == load_model_config(plain).text_config.rope_parameters["mrope_section"]
    assert load_vision_spec(imported) == load_vision_spec(plain)
    assert load_tokenizer(imported).get_vocab() == load_tokenizer(plain).get_vocab()
    assert (imported / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_vggt_and_merger_have_the_same_weights(
    source: Path, geometry: tuple[VGGT, GeometryMerger], tmp_path: Path
) -> None:
    import_vgllm(source, tmp_path / "out")
    vggt = load_vggt(tmp_path / "out" / "vggt")
    assert vggt.config == SIZES
    assert same(vggt.state_dict(), geometry[0].state_dict())
    assert same(load_file(tmp_path / "out" / MERGER), geometry[1].state_dict())


def test_the_written_options_build_the_model(
    source: Path, geometry: tuple[VGGT, GeometryMerger], tmp_path: Path
) -> None:
    config = import_vgllm(source, tmp_path / "out")
    assert config == load_config(tmp_path / "out" / "model.yaml").model
    assert config == ModelConfig(
        vlm=str(tmp_path / "out" / "vlm"),
        geometry=GeometryConfig(path=str(tmp_path / "out" / "vggt"), layers=[SIZES.depth - 2], reference_frame="last"),
        merger_hidden=MERGER_HIDDEN,
        merger=str(tmp_path / "out" / MERGER),
        fusion="add",
    )
    config.dtype = "float32"
    model = build_model(config, torch.device("cpu"), seed=0)
    images = torch.rand(3, 3, 28, 56, generator=torch.Generator().manual_seed(1))
    features = VGGTEncoder(geometry[0], [1], "last").encode(images)
    assert torch.equal(model.geometry.encode(images), features)
    assert model.fingerprint["reference_frame"] == "last"
    assert torch.equal(model.merge([features]), geometry[1]([features]))


def test_an_import_is_evaluated_like_a_checkpoint(
    source: Path, plain: Path, geometry: tuple[VGGT, GeometryMerger], tmp_path: Path
) -> None:
    """Also after the folder was moved. New weights of another import give another hash."""
    import_vgllm(source, tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    config = run_config(moved, "data")
    assert (config.model.vlm, config.model.geometry.path) == (str(moved / "vlm"), str(moved / "vggt"))
    assert config.data.root == "data"
    config.model.dtype = "float32"
    model = trained_model(moved, config)
    assert same(model.geometry_merger.state_dict(), geometry[1].state_dict())
    base, stock = model.base.state_dict(), load_vlm(plain, torch.float32).state_dict()
    merged = {name.replace(".base_layer", ""): tensor for name, tensor in base.items() if ".lora_" not in name}
    assert same(merged, stock)
    assert all(not tensor.any() for name, tensor in base.items() if ".lora_B." in name), "LoRA changes nothing"
    first = trained_weights_sha256(moved)
    save_file({name: tensor + 1 for name, tensor in geometry[1].state_dict().items()}, moved / MERGER)
    assert trained_weights_sha256(moved) != first


def test_single_file_checkpoints_keep_their_dtypes(
    source: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (source / INDEX).unlink()
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, source / WEIGHTS)
    edit_config(source, torch_dtype="bfloat16")
    import_vgllm(source, tmp_path / "out")
    for file in (f"vlm/{WEIGHTS}", f"vggt/{WEIGHTS}", MERGER):
        stored = load_file(tmp_path / "out" / file)
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "vlm" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("classifier.0.weight", torch.zeros(1), "classifier.0.weight belongs neither"),
        ("vggt.other_head.weight", torch.zeros(1), "vggt.other_head.weight belongs neither"),
        (
            "model.layers.2.mlp.up_proj.weight",
            torch.zeros(1),
            "model.layers.2.mlp.up_proj.weight has no place in the vlm",
        ),
        ("visual.surplus", torch.zeros(1), "visual.surplus has no place in the vlm"),
        ("merger.surplus", torch.zeros(1), "merger.surplus has no place in the geometry_merger"),
        ("vggt.aggregator.surplus", torch.zeros(1), "vggt.aggregator.surplus has no place in the vggt"),
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.embed_tokens.weight", None, "model.embed_tokens.weight is missing"),
        ("visual.merger.mlp.0.bias", None, "visual.merger.mlp.0.bias is missing"),
        ("merger.mlp.2.bias", None, "merger.mlp.2.bias is missing"),
        ("vggt.aggregator.camera_token", None, "vggt.aggregator.camera_token is missing"),
        ("vggt.aggregator.global_blocks.1.ls1.gamma", None, "vggt.aggregator.global_blocks.1.ls1.gamma is missing"),
        ("merger.mlp.2.bias", torch.zeros(7), "merger.mlp.2.bias is torch.float32 [7], not floating-point [64]"),
        ("merger.mlp.2.bias", torch.zeros(64, dtype=torch.int8), "merger.mlp.2.bias is torch.int8 [64], not floating"),
    ],
)
def test_missing_or_unexpected_weights_raise_with_their_names(
    source: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    name: str,
    tensor: torch.Tensor | None,
    message: str,
) -> None:
    changed = {key: value for key, value in weights.items() if key != name}
    write(source, changed if tensor is None else {**changed, name: tensor})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        import_vgllm(source, tmp_path / "out")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_differs_from_the_embedding_is_rejected(
    source: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write(source, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, to which config"):
        import_vgllm(source, tmp_path / "out")


def test_a_tied_head_may_be_stored(source: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write(source, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    import_vgllm(source, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "vlm" / WEIGHTS)


def test_an_untied_head_must_be_stored(source: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    edit_config(source, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        import_vgllm(source, tmp_path / "out")
    write(source, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    import_vgllm(source, tmp_path / "other")
    model = load_vlm(tmp_path / "other" / "vlm", torch.float32)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"] + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_vggt_feature": False}, "use_vggt_feature is not true"),
        ({"reference_frame": "middle"}, "reference_frame 'middle' is neither first nor last"),
        ({"vggt_merger_hidden_dim": 47}, r"merger.mlp.0.weight is .* \[48, 256\]"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_an_unsupported_config_raises_with_the_field(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        import_vgllm(source, tmp_path / "out")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", INDEX, "model-00002-of-00002.safetensors"]
)
def test_a_missing_file_raises_with_its_name(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).unlink()
    with pytest.raises(ValueError, match=name):
        import_vgllm(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard_is_rejected(source: Path, tmp_path: Path) -> None:
    file = source / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{source}.*broken or incomplete"):
        import_vgllm(source, tmp_path / "out")


def test_a_folder_that_is_not_empty_is_rejected(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is not empty"):
        import_vgllm(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.golden
def test_shapes_of_the_public_vggt_give_the_default_sizes() -> None:
    shapes = json.loads(PUBLIC_KEYS.read_text())["shapes"]
    tensors = {f"vggt.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert vggt_config(split_state(tensors)["vggt"]) == VGGTConfig()


def test_a_merger_of_other_sizes_is_rejected(source: Path, tmp_path: Path) -> None:
    config = import_vgllm(source, tmp_path / "out")
    config.dtype, config.merger_hidden = "float32", MERGER_HIDDEN + 1
    with pytest.raises(
        ValueError, match=r"geometry_merger\.safetensors: mlp\.\d\.\w+ has shape .*model\.merger_hidden"
    ):
        build_model(config, torch.device("cpu"), seed=0)
    config.merger = str(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: cannot read the geometry merger"):
        build_model(config, torch.device("cpu"), seed=0)
