"""Build a tiny random Qwen2.5-VL and a tiny random VGGT, with the classes and file formats of the real models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.loading import save_vggt
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.weights.loading import without_zero3_init

# In the order of Qwen2.5-VL's tokenizer, where <|endoftext|> has id 151643.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
IMAGE_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}

# Gives the same prompts as Qwen2.5-VL's template.
CHAT_TEMPLATE = r"""
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages and messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for turn in messages -%}
    {{- '<|im_start|>' + turn['role'] + '\n' -}}
    {%- if turn['content'] is string -%}
        {{- turn['content'] -}}
    {%- else -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
                {%- set seen.images = seen.images + 1 -%}
                {{- 'Picture ' ~ seen.images ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {{- 'Video ' ~ seen.videos ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()


def build_tiny_vlm(
    out: Path,
    texts: Iterable[str],
    seed: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    intermediate: int = 384,
    vision_hidden: int = 64,
    vision_depth: int = 2,
    tie: bool = True,
) -> Path:
    """Write a small Qwen2.5-VL that ``AutoModelForImageTextToText`` and ``AutoTokenizer`` can load.

    Patches are 14 pixels, merged 2 x 2, with a temporal patch of two frames, as in the real models. Weights are float32
    with transformers' initialisation (normal, 0.02); the same arguments give the same bytes.

    Args:
        out: directory, created if needed; files of the same names are replaced.
        texts: texts to train the tokenizer on, for example the data set's questions and answers.
        seed: seed of the weights.
        hidden: width of the language model, a multiple of 64: four heads with three rotary sections each.
        layers: decoder layers.
        intermediate: width of the language model's MLP.
        vision_hidden: width of the vision tower (4 heads, so a multiple of 16).
        vision_depth: blocks of the vision tower; the last one has full attention.
        tie: tie the embedding and the LM head, as in Qwen2.5-VL-3B.

    Raises:
        ValueError: no text.
    """
    tokenizer = train_tokenizer(texts)
    config = make_config(
        tokenizer,
        text={
            "vocab_size": -(-len(tokenizer) // 64) * 64,  # padded, as in the real models
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": 4,
            "window_size": 56,  # 4 x 4 patches
            "fullatt_block_indexes": [vision_depth - 1],
        },
        tied=tie,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), without_zero3_init():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    save_tiny_vlm(model, tokenizer, out)
    return out


def save_tiny_vlm(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write weights, tokenizer, generation options and preprocessors of a small Qwen2.5-VL.

    Args:
        model: its weights are written in their dtype.
        tokenizer: its tokenizer.
        out: directory, created if needed; files of the same names are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=end_of_text,
        eos_token_id=[end_of_turn, end_of_text],
        pad_token_id=end_of_text,
    )
    model.save_pretrained(out)
    _write_preprocessors(out)


def train_tokenizer(texts: Iterable[str], vocabulary: int = 512) -> Qwen2Tokenizer:
    """Train a ``Qwen2Tokenizer`` on ``texts``; its vocabulary has every byte and every special token.

    The pre-tokenizer is Qwen2's, which splits numbers into single digits, so every digit is one token.

    Raises:
        ValueError: no text, or ``vocabulary`` below 256.
    """
    lines = [text for text in texts if text]
    if not lines:
        raise ValueError("tiny model: texts is empty; pass the questions and answers to train the tokenizer on")
    if vocabulary < 256:
        raise ValueError(f"tiny model: vocabulary must be at least 256 (the bytes), got {vocabulary}")
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.model = BPE()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    # Number the tokens without gaps, special tokens last, as in Qwen2.5-VL's vocabulary.
    learned = json.loads(backend.to_str())["model"]
    vocab: dict[str, int] = {token: number for token, number in learned["vocab"].items() if token not in SPECIAL_TOKENS}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    vocab = {token: number for number, token in enumerate((*tokens, *SPECIAL_TOKENS))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_vggt(out: Path, seed: int, *, embed_dim: int = 64, depth: int = 4, num_heads: int = 4) -> Path:
    """Write a small random VGGT directory: float32 features of ``2 * embed_dim`` channels, patches of 14 pixels.

    Args:
        out: directory, created if needed.
        seed: seed of the weights; the same arguments give the same bytes.
        embed_dim: width of a token, a multiple of ``4 * num_heads`` (rotary halves for rows and columns).
        depth: number of frame attention blocks, and of global attention blocks.
        num_heads: attention heads.

    Raises:
        ValueError: ``embed_dim`` is not divisible by the heads.
    """
    config = VGGTConfig(
        img_size=112,
        patch_size=14,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_embed="conv",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VGGT(config)
    save_vggt(model, out)
    return out


def make_config(
    tokenizer: Qwen2Tokenizer, text: dict[str, int], vision: dict[str, Any], tied: bool, dtype: str
) -> Qwen2_5_VLConfig:
    """Configuration of a Qwen2.5-VL with other sizes; patches, rotary positions and special tokens as in the real ones.

    Args:
        tokenizer: tokenizer with the ids of the special tokens.
        text: sizes of the language model, as in config.json; ``hidden_size / num_attention_heads`` must be a multiple
            of 16, for M-RoPE sections in the ratio 2 : 3 : 3.
        vision: sizes of the vision tower, as in config.json.
        tied: tie the embedding and the LM head.
        dtype: dtype of the weights.
    """
    token_id = tokenizer.convert_tokens_to_ids
    eighth = text["hidden_size"] // text["num_attention_heads"] // 16
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth],
            },
        },
        vision_config={
            **vision,
            "in_channels": 3,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def _write_preprocessors(out: Path) -> None:
    """Write ``preprocessor_config.json`` and ``video_preprocessor_config.json`` for transformers' processors."""
    shared = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = {**shared, "size": IMAGE_SIZE, "image_processor_type": "Qwen2VLImageProcessor"}
    video = {
        **shared,
        "size": VIDEO_SIZE,
        "do_sample_frames": False,
        "min_frames": 4,
        "max_frames": 768,
        "cap_pixels_per_frame": False,
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    for name, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
