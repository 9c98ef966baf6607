"""The model of the pretraining: tokenizer, tiny Qwen2.5-VL with its initial weights, and geometry merger."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from w2r2_ds.data.tasks import scan2cap, scanqa, scanrefer
from w2r2_ds.demo.pretraining.pair.rooms.room_set import CLASSES, COLORS, room_generator
from w2r2_ds.demo.pretraining.pair.settings import (
    HIDDEN,
    MERGER_HIDDEN,
    ROOM_FRAMES,
    SAMPLE_FRAMES,
    TEXT_SIZES,
    TOWER_SIZES,
)
from w2r2_ds.demo.synthetic.questions import make_questions
from w2r2_ds.demo.synthetic.rooms import make_room
from w2r2_ds.demo.synthetic.sentences import make_sentences
from w2r2_ds.demo.tiny_models import make_config, train_tokenizer
from w2r2_ds.models.merger import GeometryMerger

VOCABULARY = 640
FIXED_TEXTS = (
    "You are a helpful assistant.",
    *scanrefer.WORLD_QUESTION.split("{description}"),
    *scan2cap.WORLD_QUESTION.split("{place}"),
    scanqa.QUESTION.removeprefix("{question}"),
)
"""Parts of every prompt. Each is one token: prompts are half as long."""
_TEXT_ROOMS = 40
"""Rooms whose sentences and questions the tokenizer is trained on."""


def phrase(class_name: str, color: str | None) -> str:
    """Description of an object, as `synthetic.phrases` writes it."""
    return f"the {color} {class_name}." if color else f"the {class_name}."


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train the tokenizer on texts of the demo, and add `FIXED_TEXTS`."""
    tokenizer = train_tokenizer(_texts(seed), VOCABULARY)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in FIXED_TEXTS])
    return tokenizer


def _texts(seed: int) -> Iterator[str]:
    """Texts of the demo: phrases, sentences, questions, answers, and the words around frames and turns."""
    for class_name in CLASSES:
        for color in COLORS:
            # More often than the sentences below, so that words of colours and classes become tokens.
            yield from [phrase(class_name, color).capitalize(), color, f"{color} {class_name}", class_name] * 6
    yield from [" ".join(f"Frame-{i}: " for i in range(SAMPLE_FRAMES)) + "system\nuser\nassistant\n"] * 100
    for index in range(_TEXT_ROOMS):
        rng = room_generator(seed, "train", index)
        objects = make_room(rng, ROOM_FRAMES).objects
        everything = range(len(objects))
        for question in make_questions(rng, objects, everything, 20):
            yield from (question.text, *question.answers)
        for sentence in make_sentences(rng, objects, everything, 20):
            yield sentence.text.capitalize()


def make_vlm(tokenizer: Qwen2Tokenizer, seed: int) -> PreTrainedModel:
    """A float32 Qwen2.5-VL with initial weights for narrow layers.

    transformers' standard deviation 0.02 fits widths of thousands. Here a matrix has ``1 / sqrt(columns)``, at the end
    of a residual branch 0.3 times that, and embeddings have a norm of about 1.
    """
    vocabulary = -(-len(tokenizer) // 64) * 64  # padded, as in the real models
    text = {**TEXT_SIZES, "vocab_size": vocabulary}
    config = make_config(tokenizer, text=text, vision=dict(TOWER_SIZES), tied=True, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in vlm.named_parameters():
        if parameter.ndim < 2 or "lm_head" in name or "patch_embed" in name:  # tied; set by `stages/tower.py`
            continue
        std = parameter[0].numel() ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            std *= 0.3
        nn.init.normal_(parameter, std=std, generator=generator)
    return vlm


def make_merger(seed: int, feature_dim: int) -> GeometryMerger:
    """A geometry merger for features of `feature_dim` channels, with standard deviations ``1 / sqrt(columns)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        merger = GeometryMerger(feature_dim, HIDDEN, MERGER_HIDDEN)
        for layer in merger.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return merger


def word_vectors(tokenizer: Qwen2Tokenizer, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of words, from the language model's token embeddings.

    Returns:
        ``[classes + 2, hidden]``: classes, then a random vector for walls and ceiling and one for the floor;
        ``[colors + 1, hidden]``: colours, then a random vector for no colour.
    """

    def vector(word: str) -> Tensor:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return embeddings[ids].sum(0)

    others = torch.randn(3, embeddings.shape[1], generator=torch.Generator().manual_seed(5))
    classes = torch.stack([*map(vector, CLASSES), *others[:2]])
    colors = torch.stack([*map(vector, COLORS), others[2]])
    return nn.functional.normalize(classes, dim=1), nn.functional.normalize(colors, dim=1)
