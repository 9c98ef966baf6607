"""Loading: class and sizes from the config, shapes of the real models on the meta device, and errors."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.models.weights.loading import (
    load_model_config,
    load_tokenizer,
    load_vision_spec,
    load_vlm,
    meta_model,
)

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def copy_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change top-level fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "count", "hidden", "layers", "kv_rows", "intermediate", "tied"),
    [
        ("qwen2_5_vl_3b", 3_754_622_976, 2048, 36, 256, 11008, True),
        ("qwen2_5_vl_7b", 8_292_166_656, 3584, 28, 512, 18944, False),
    ],
)
def test_real_models_on_the_meta_device(
    name: str, count: int, hidden: int, layers: int, kv_rows: int, intermediate: int, tied: bool
) -> None:
    model = meta_model(CONFIGS / name)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert all(value.is_meta for value in model.parameters())
    assert sum(value.numel() for value in model.parameters()) == count
    assert ("lm_head.weight" not in shapes) == tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    layer = f"model.language_model.layers.{layers - 1}"
    assert f"model.language_model.layers.{layers}.input_layernorm.weight" not in shapes
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == (hidden, hidden)
    assert shapes[f"{layer}.self_attn.k_proj.weight"] == (kv_rows, hidden)
    assert shapes[f"{layer}.self_attn.v_proj.bias"] == (kv_rows,)
    assert shapes[f"{layer}.mlp.down_proj.weight"] == (hidden, intermediate)
    assert shapes["model.visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert shapes["model.visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert shapes["model.visual.blocks.31.mlp.gate_proj.weight"] == (3420, 1280)
    assert shapes["model.visual.merger.mlp.2.weight"] == (hidden, 5120)


def test_class_and_sizes_come_from_the_config(tiny_dir: Path, tmp_path: Path) -> None:
    misleading = tmp_path / "Qwen3-VL-72B-llama"
    shutil.copytree(tiny_dir, misleading)
    model: Any = load_vlm(misleading, torch.bfloat16, "eager")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.config.text_config.hidden_size == 128
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_vision_spec(tiny_dir: Path, tokenizer: Any, copy_dir: Path) -> None:
    spec = load_vision_spec(tiny_dir)
    assert (spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.tokens_per_second) == (14, 2, 2, 2)
    assert spec.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert spec.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert spec.vision_start_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert spec.image_mean[0] == pytest.approx(0.48145466) and len(spec.image_std) == 3
    edit(copy_dir / "preprocessor_config.json", patch_size=16)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: patch_size is 16 but config.json has 14"):
        load_vision_spec(copy_dir)
    edit(copy_dir / "preprocessor_config.json", patch_size=14, image_std=[1.0])
    with pytest.raises(ValueError, match="image_std must be a list of three"):
        load_vision_spec(copy_dir)
    (copy_dir / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config.json"):
        load_vision_spec(copy_dir)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_position_ids_equal_those_of_the_forward(
    vlm: Any, tokenizer: Any, visual_inputs: Any, tiny_dir: Path, kind: str
) -> None:
    inputs = visual_inputs(vlm.config, tokenizer, kind, frames=1 if kind == "image" else 2)
    extra = {"second_per_grid_ts": torch.tensor([1.5, 1.5])} if kind == "video" else {}
    positions = Qwen25VL().position_ids(
        meta_model(tiny_dir),
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["attention_mask"],
        {kind: inputs[f"{kind}_grid_thw"]},
        seconds_per_grid=1.5,
    )
    assert positions.shape == (3, *inputs["input_ids"].shape) and positions.dtype == torch.int64
    assert positions[1, 0, 1:25].reshape(4, 6)[:, 0].tolist() == [1, 2, 3, 4]
    types = inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        explicit = vlm(**inputs, position_ids=positions, use_cache=False).logits
        implicit = vlm(**inputs, mm_token_type_ids=types, **extra, use_cache=False).logits
    used = inputs["attention_mask"].bool()
    assert torch.equal(explicit[used], implicit[used])


def test_position_ids_raise_on_inconsistent_inputs(tokenizer: Any, visual_inputs: Any, tiny_dir: Path) -> None:
    model = meta_model(tiny_dir)
    inputs = visual_inputs(model.config, tokenizer, "image")
    ids, types, grid = inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    positions = functools.partial(Qwen25VL().position_ids, model, ids, attention_mask=None, seconds_per_grid=1.0)
    with pytest.raises(ValueError, match="must be 1 exactly where"):
        positions(token_types=torch.zeros_like(types), grids={"image": grid})
    with pytest.raises(ValueError, match="48 image pad tokens in the batch but the grids hold 24"):
        positions(token_types=types, grids={"image": grid[:1]})
    with pytest.raises(ValueError, match="the grids hold 0"):
        positions(token_types=types, grids={})
    with pytest.raises(ValueError, match="token_types is"):
        positions(token_types=types[:, :-1], grids={"image": grid})


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./runs/model", "a/b/c", "../x", ""])
def test_a_missing_directory_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"no directory here; correct model\.vlm .* or a hub id") as caught:
        load_model_config(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_id_raises() -> None:
    with pytest.raises(
        ValueError, match=r"no-such-org/no-such-model.*no such directory.*; correct model\.vlm .* give its directory$"
    ) as caught:
        load_vlm("no-such-org/no-such-model", torch.float32)
    assert "\n" not in str(caught.value)


def test_an_unsupported_model_type_raises(copy_dir: Path) -> None:
    for model_type in ("llama", "not_a_model"):
        edit(copy_dir / "config.json", model_type=model_type)
        with pytest.raises(ValueError, match=f"config.json: model_type is '{model_type}'"):
            load_vlm(copy_dir, torch.float32)
    (copy_dir / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json"):
        load_vlm(copy_dir, torch.float32)


def test_weights_that_do_not_match_the_config_raise(copy_dir: Path) -> None:
    path = copy_dir / "model.safetensors"
    weights = load_file(path)
    name = "visual.blocks.0.attn.qkv.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing, first model.visual.blocks.0.attn.qkv.weight"):
        load_vlm(copy_dir, torch.float32)
    save_file({**weights, "visual.extra": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected, first .*visual.extra"):
        load_vlm(copy_dir, torch.float32)
    save_file({**weights, name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 of another shape"):
        load_vlm(copy_dir, torch.float32)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot read model weights"):
        load_vlm(copy_dir, torch.float32)
    path.unlink()
    with pytest.raises(ValueError, match="cannot read model weights"):
        load_vlm(copy_dir, torch.float32)


@pytest.fixture
def live_zero3() -> Iterator[Any]:
    """An `HfDeepSpeedConfig` of ZeRO-3, under which transformers partitions the weights that it loads."""
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    yield live
    hf_deepspeed.unset_hf_deepspeed_config()


def test_weights_that_do_not_match_the_config_raise_under_zero3(copy_dir: Path, live_zero3: Any) -> None:
    """Before a weight is read: there is no process group here."""
    path, name = copy_dir / "model.safetensors", "visual.blocks.0.attn.qkv.weight"
    weights = load_file(path)
    save_file({**weights, "visual.extra": torch.zeros(1), name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected, first .*visual.extra; 1 of another shape"):
        load_vlm(copy_dir, torch.float32)
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing, first model.visual.blocks.0.attn.qkv.weight"):
        load_vlm(copy_dir, torch.float32)
    assert hf_deepspeed.is_deepspeed_zero3_enabled() and hf_deepspeed.deepspeed_config() == live_zero3.config


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors", "bitsandbytes", "a new one"])
@pytest.mark.parametrize("part", ["", "text_config"])
def test_a_quantised_model_raises(copy_dir: Path, method: str, part: str) -> None:
    """Where config.json is read, before all other checks."""
    path = copy_dir / "config.json"
    raw = json.loads(path.read_text())
    (raw[part] if part else raw)["quantization_config"] = {"quant_method": method}
    path.write_text(json.dumps(raw))
    for load in (load_model_config, load_tokenizer, load_vision_spec, meta_model, load_vlm):
        with pytest.raises(ValueError, match=rf"config\.json: .*quantization_config.*\({method}\)"):
            load(copy_dir)


def test_a_tokenizer_that_does_not_match_the_config_raises(copy_dir: Path) -> None:
    path = copy_dir / "tokenizer.json"
    text = path.read_text()
    settings = (copy_dir / "tokenizer_config.json").read_text()
    path.write_text(text.replace("<|video_pad|>", "<|other|>"))
    (copy_dir / "tokenizer_config.json").write_text(settings.replace("<|video_pad|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"tokenizer.json: no token <\|video_pad\|>"):
        load_tokenizer(copy_dir)
    path.write_text(text)
    (copy_dir / "tokenizer_config.json").write_text(settings)
    edit(copy_dir / "config.json", image_token_id=7)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> has id \d+ but config.json has image_token_id = 7"):
        load_tokenizer(copy_dir)


def test_a_tokenizer_without_template_or_files_raises(copy_dir: Path) -> None:
    (copy_dir / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(copy_dir)
    (copy_dir / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        load_tokenizer(copy_dir)


def test_meta_model_ignores_a_live_zero3_config(tiny_dir: Path, live_zero3: Any) -> None:
    model = meta_model(tiny_dir)
    assert all(value.is_meta and value.numel() and not hasattr(value, "ds_id") for value in model.parameters())
    assert hf_deepspeed.is_deepspeed_zero3_enabled() and hf_deepspeed.deepspeed_config() == live_zero3.config
