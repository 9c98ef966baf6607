"""Directories of tiny models load with transformers' classes and behave like the real models."""

from __future__ import annotations

import copy
import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from w2r2_ds.demo.tiny_models import build_tiny_vggt, build_tiny_vlm, train_tokenizer
from w2r2_ds.models.vggt.loading import load_vggt

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
}


def test_files_are_complete(tiny_dir: Path) -> None:
    assert {path.name for path in tiny_dir.iterdir()} == FILES


def test_transformers_loads_every_weight(tiny_dir: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_dir, output_loading_info=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows >= len(AutoTokenizer.from_pretrained(tiny_dir))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(AutoImageProcessor.from_pretrained(tiny_dir)).__name__.startswith("Qwen2VLImageProcessor")


def test_same_seed_same_bytes_other_seed_other_weights(tiny_dir: Path, tmp_path: Path, texts: list[str]) -> None:
    before = torch.random.get_rng_state()
    build_tiny_vlm(tmp_path / "same", texts, seed=3)
    build_tiny_vlm(tmp_path / "other", texts, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    equal, different, errors = filecmp.cmpfiles(tiny_dir, tmp_path / "same", FILES, shallow=False)
    assert (set(equal), different, errors) == (FILES, [], [])
    _, different, _ = filecmp.cmpfiles(tiny_dir, tmp_path / "other", FILES, shallow=False)
    assert different == ["model.safetensors"]


@pytest.mark.parametrize(
    "text",
    [
        "find the red chair",
        "It's 12.345, -0.07!\n\n  two  spaces",
        "café naïve",
        "日本語 椅子",
        "🙂👩‍🚀",
        "\t{'box': [1, -2]}",
    ],
)
def test_text_round_trip(tiny_dir: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 256 + 512


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("1.15, 1.15 and 2048")
    assert [token for token in tokens if any(sign.isdigit() for sign in token)] == list("1151152048")
    assert "Ġchair" in tokenizer.get_vocab() or "chair" in tokenizer.get_vocab()


def test_special_tokens_are_single_tokens_and_skipped_in_decoding(tokenizer: Any) -> None:
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_chat_template_format(tokenizer: Any) -> None:
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "where?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "there"}]
    text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    visual = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
    assert text == f"{head}{visual}where?<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == f"{text}there<|im_end|>\n"
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns[:1]], tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    numbered = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_vision_id=True)
    assert "Picture 1: <|vision_start|><|image_pad|>" in numbered and "Video 1: <|vision_start|>" in numbered


@pytest.mark.parametrize(("kind", "frames"), [("image", 1), ("video", 3)])
def test_precomputed_features_give_the_same_logits(
    vlm: Any, tokenizer: Any, visual_inputs: Any, kind: str, frames: int
) -> None:
    inputs = visual_inputs(vlm.config, tokenizer, kind, frames)
    pixels, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    with torch.no_grad():
        logits = vlm(**inputs, use_cache=False).logits
        values = inputs.pop(pixels)
        encode = vlm.get_image_features if kind == "image" else vlm.get_video_features
        features = encode(values, inputs[grid])
        route = vlm(**inputs, mm_encoder_outputs={kind: features}, use_cache=False).logits
        fused = copy.copy(features)
        fused.pooler_output = tuple(item + 1.0 for item in features.pooler_output)
        shifted = vlm(**inputs, mm_encoder_outputs={kind: fused}, use_cache=False).logits
        again = vlm(**inputs, mm_encoder_outputs={kind: features}, use_cache=False).logits
    assert torch.equal(logits, route) and torch.equal(logits, again)
    assert not torch.allclose(logits, shifted)


def test_generation_stops_at_the_right_tokens(vlm: Any, tokenizer: Any) -> None:
    generation = vlm.generation_config
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation.pad_token_id == tokenizer.pad_token_id and not generation.do_sample


def test_untied_head(tmp_path: Path, texts: list[str]) -> None:
    build_tiny_vlm(tmp_path, texts, seed=0, layers=1, hidden=64, vision_depth=1, tie=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_invalid_texts_or_vocabulary_raise(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        train_tokenizer([""])
    with pytest.raises(ValueError, match="at least 256"):
        train_tokenizer(texts, vocabulary=100)


def test_tiny_vggt_is_seeded(tmp_path: Path) -> None:
    build_tiny_vggt(tmp_path / "a", seed=1)
    build_tiny_vggt(tmp_path / "b", seed=1)
    build_tiny_vggt(tmp_path / "c", seed=2)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    equal, _, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert set(equal) == names
    _, different, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", names, shallow=False)
    assert different
    assert sum(value.numel() for value in load_vggt(str(tmp_path / "a")).parameters()) < 1_000_000
    assert json.loads((tmp_path / "a" / "config.json").read_text())["embed_dim"] == 64
    with pytest.raises(ValueError, match="embed_dim 60"):
        build_tiny_vggt(tmp_path / "d", seed=1, embed_dim=60)
