"""Answer tokens with many tokenizers: Qwen's rules, byte-level BPE that merges digits, SentencePiece with and without.

All are trained here on answers and descriptions, so that punctuation merges as in the real tokenizers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from w2r2_ds.data.answer_tokens import find_answer_tokens, require_digit_tokens, token_tables, what_tokens
from w2r2_ds.data.batching.collate import Collator
from w2r2_ds.data.processor import Processor
from w2r2_ds.data.tasks.scanrefer import answer_text, question_text
from w2r2_ds.demo.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

# The rule in the tokenizer.json of Qwen2.5-VL, Qwen3 and Qwen3-VL: every digit (\p{N}) is a token.
QWEN_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BODY = '{"frame": 12, "bbox_3d": [-0.63, 0.83, 12.4, 3.0, 0.59, 2.35, -2.32, 1.18, -0.0]}'
MARKS = "..........00...............1.11..2.22..33.3..4.4..5.55..6.66...7.77..8.88...9.9.."
"""The number of every digit of BODY."""
ANSWER, MARKS = f"```json\n\t{BODY}\n```", f"{'.' * 9}{MARKS}{'.' * 4}"
PLACES = [[10, 1], [1, 0, 0.1, 0.01], [1, 0, 0.1, 0.01], [10, 1, 0, 0.1], [1, 0, 0.1], *[[1, 0, 0.1, 0.01]] * 4]
PLACES += [[1, 0, 0.1]]
SIGNS = "+-+++++-+-"
VALUES = [12, 0.63, 0.83, 12.4, 3.0, 0.59, 2.35, 2.32, 1.18, 0.0]

LEFT, DESCRIPTION, RIGHT = "Text: ", "The “red” chair, ½ m… by the cafe\u0301 日本 door 12.", "\nOutput a box.\n"
SPLIT = ("qwen2", "qwen3_5", "tiny", "spm split", "llama split")
MERGED = ("gpt2", "spm", "llama")


def texts() -> list[str]:
    """Questions and answers as the tasks write them, with numbers of every form."""
    draw = np.random.default_rng(0)
    lines = []
    for index in range(400):
        frame, box = int(draw.integers(32)), draw.uniform(-3, 13, 9)
        label, side = ("chair", "table", "door")[index % 3], ("left", "right")[index % 2]
        lines += [
            answer_text(frame, box),
            question_text(f"the brown {label} is {side} of the {frame} doors."),
        ]
    return lines


def trained(backend: Tokenizer, vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend.model = BPE()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts(), BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
    learned = json.loads(backend.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def qwen(kind: Any) -> Any:
    vocab, merges = trained(kind().backend_tokenizer, 800)
    return kind(vocab=vocab, merges=merges)


def gpt2() -> Any:
    """Byte-level BPE with GPT-2's rule: a space and consecutive digits may be one token; offsets exclude the space."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained(backend, 800)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def spm(folder: Path, kind: Any, model_type: str, split_digits: bool) -> tuple[Any, Any]:
    """A SentencePiece model, read by transformers and by SentencePiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        model_type=model_type,
        vocab_size=500,
        split_digits=split_digits,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        # A unigram model normalises (NFKC, newlines to spaces); Llama's BPE keeps text as it is.
        normalization_rule_name="nmt_nfkc" if model_type == "unigram" else "identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=kind is LlamaTokenizer,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind.__name__}))
    return kind.from_pretrained(folder), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """SentencePiece models, with their names as keys."""
    folder = tmp_path_factory.mktemp("spm")
    return {
        "spm split": spm(folder / "0", TokenizersBackend, "unigram", True),
        "spm": spm(folder / "1", TokenizersBackend, "unigram", False),
        "llama split": spm(folder / "2", LlamaTokenizer, "bpe", True),
        "llama": spm(folder / "3", LlamaTokenizer, "bpe", False),
    }


@pytest.fixture(scope="module")
def tokenizers(models: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """All tokenizers, with their names as keys and Qwen's chat."""
    made = {"qwen2": qwen(Qwen2Tokenizer), "qwen3_5": qwen(Qwen3_5Tokenizer), "tiny": train_tokenizer(texts())}
    made |= {"gpt2": gpt2(), **{name: model for name, (model, _) in models.items()}}
    for tokenizer in made.values():
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.chat_template = CHAT_TEMPLATE
    return made


def encode(tokenizer: Any, text: str) -> tuple[list[str], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"]


def pieces(tokenizer: Any, text: str) -> list[str]:
    return [text[begin:end] for begin, end in encode(tokenizer, text)[1]]


def expected_numbers(offsets: list[tuple[int, int]]) -> list[int]:
    """Number index of each token by MARKS: that of the first digit in the token."""
    marks = [MARKS[begin:end].replace(".", "") for begin, end in offsets]
    return [int(mark[0]) if mark else -1 for mark in marks]


def test_the_marks_of_this_file_select_the_digits() -> None:
    marked = "".join(character for character, mark in zip(ANSWER, MARKS, strict=True) if mark != ".")
    assert marked == "12" + "063" + "083" + "124" + "30" + "059" + "235" + "232" + "118" + "00"


def test_tokenizer_rules_equal_those_of_the_real_models() -> None:
    for name in ("qwen2_5_vl", "qwen3", "qwen3_vl"):
        assert TOKENIZER_MAPPING_NAMES[name] == "Qwen2Tokenizer"
    assert TOKENIZER_MAPPING_NAMES["qwen3_5"] == "Qwen3_5Tokenizer"
    rules = []
    for kind in (Qwen2Tokenizer, Qwen3_5Tokenizer):
        first = json.loads(kind().backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]
        rules.append(first["pattern"]["Regex"])
    assert rules[0] == QWEN_RULE
    # Qwen3.5 counts combining marks among the letters; digits as before.
    assert rules[1] == QWEN_RULE.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}")


def test_punctuation_merges_as_in_the_real_tokenizers(tokenizers: dict[str, Any]) -> None:
    begin = [
        "```",
        "json",
        "\n",
        "\t",
        '{"',
        "frame",
        '":',
        " ",
        "1",
        "2",
        ",",
        ' "',
        "bbox",
        "_",
        "3",
        "d",
        '":',
        " [-",
    ]
    for name in ("qwen2", "qwen3_5", "tiny"):
        found = pieces(tokenizers[name], ANSWER)
        assert found[:18] == begin and found[-2:] == ["]}\n", "```"] and " -" in found, name
    merged = pieces(tokenizers["gpt2"], ANSWER)
    assert "12" in merged and "63" in merged  # the first is " 12": offsets exclude the space
    assert "▁12" not in encode(tokenizers["gpt2"], ANSWER)[0] and "Ġ12" in encode(tokenizers["gpt2"], ANSWER)[0]
    assert any(len(piece.strip()) > 1 and piece.strip()[0].isdigit() for piece in pieces(tokenizers["spm"], ANSWER))
    assert " 0." in pieces(tokenizers["llama"], ANSWER) and "2," in pieces(tokenizers["llama"], ANSWER)


def test_transformers_reads_sentencepiece_as_sentencepiece_does(models: dict[str, tuple[Any, Any]]) -> None:
    for name, (tokenizer, reference) in models.items():
        for text in (ANSWER, LEFT + DESCRIPTION + RIGHT, "1 2 3"):
            assert encode(tokenizer, text)[0] == reference.encode(text, out_type=str), (name, text)
        assert any(token.startswith("<0x") for token in encode(tokenizer, DESCRIPTION)[0]), "bytes are tried"


@pytest.mark.parametrize("name", [*SPLIT, *MERGED])
def test_where_tokens_and_number_indices(tokenizers: dict[str, Any], name: str) -> None:
    _, offsets = encode(tokenizers[name], ANSWER + "<|im_end|>")
    assert offsets[-1] == (len(ANSWER), len(ANSWER) + 10)
    found = find_answer_tokens("grounding", ANSWER, offsets)
    assert found.number.tolist() == expected_numbers(offsets)
    assert found.where.tolist() == [number >= 0 for number in expected_numbers(offsets)]
    assert sorted(set(found.number.tolist())) == list(range(-1, 10))
    assert found.single_digits == (name in SPLIT)


@pytest.mark.parametrize("name", SPLIT)
def test_digit_tokens_of_tokenizers_that_split_digits(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    _, offsets = encode(tokenizer, ANSWER)
    ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    found = find_answer_tokens("grounding", ANSWER, offsets)
    tables = token_tables(tokenizer, len(tokenizer))
    assert found.place_values == [pytest.approx(places) for places in PLACES]
    for number, (tokens, places, value) in enumerate(zip(found.digits, found.place_values, VALUES, strict=True)):
        digits = [(int(tables.digit[ids[i]]), place) for i, place in zip(tokens, places, strict=True) if place > 0]
        assert min(digit for digit, _ in digits) >= 0
        assert sum(digit * place for digit, place in digits) == pytest.approx(value)
        assert bool(tables.minus[ids[found.sign[number]]]) == (SIGNS[number] == "-")
        assert found.sign[number] + 1 == tokens[0]


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("answer", ["0.63,-12.4,3.0,-0.59,2.35,118.0", "-0.63,12.4,-3.0,0.59,-2.35,-118.0"])
def test_digit_tokens_of_world_answers(tokenizers: dict[str, Any], name: str, answer: str) -> None:
    """Also of a first number, before which SentencePiece puts a space that is in no text."""
    tokenizer = tokenizers[name]
    ids, (tokens, offsets) = tokenizer(answer, add_special_tokens=False)["input_ids"], encode(tokenizer, answer)
    found = find_answer_tokens("grounding", answer, offsets, "world")
    tables = token_tables(tokenizer, len(tokenizer))
    chosen = [token for token, flag in zip(tokens, found.where, strict=True) if flag]
    assert found.single_digits and "".join(chosen) == "".join(c for c in answer if c.isdigit())
    for number, text in enumerate(answer.split(",")):
        assert "".join(tokens[i] for i in found.digits[number]) == text.removeprefix("-")
        assert bool(tables.minus[ids[found.sign[number]]]) == text.startswith("-")
        assert found.sign[number] == max(found.digits[number][0] - 1, 0)


@pytest.mark.parametrize("name", MERGED)
def test_no_digit_tokens_where_digits_merge(tokenizers: dict[str, Any], name: str) -> None:
    found = find_answer_tokens("grounding", ANSWER, encode(tokenizers[name], ANSWER)[1])
    assert not found.single_digits and len(found.sign) == 0 and found.digits == [] and found.place_values == []


@pytest.mark.parametrize("name", [*SPLIT, *MERGED])
def test_where_tokens_of_a_caption_are_all_but_the_end_of_turn(tokenizers: dict[str, Any], name: str) -> None:
    _, offsets = encode(tokenizers[name], DESCRIPTION + "<|im_end|>")
    for kind in ("caption", "answer"):
        found = find_answer_tokens(kind, DESCRIPTION, offsets)
        assert found.where.tolist() == [True] * (len(offsets) - 1) + [False]
        assert (found.number == -1).all() and not found.single_digits


# First and last *what* tokens. A leading space belongs to its token, and so do characters merged with the full stop.
# GPT-2's offsets exclude spaces; spm's space before "The" is a token of its own, outside the description.
ENDS = {
    "qwen2": ([" The", " ", "“", "“", "“", "r"], [" door", " ", "1", "2", ".\n"]),
    "qwen3_5": ([" The", " ", "“", "“", "“", "r"], [" door", " ", "1", "2", ".\n"]),
    "tiny": ([" The", " ", "“", "“", "“", "r"], [" door", " ", "1", "2", ".\n"]),
    "gpt2": (["The", "", "“", "“", "“", "r"], ["door", "12", "."]),
    "spm split": ([" T", "h", "e", " ", "“", "“"], [" door", " ", "1", "2", "."]),
    "spm": (["T", "h", "e", " ", "“", "“"], [" door", " 12", "."]),
    "llama split": ([" The", " ", "“", "“", "“", "r"], [" door", " ", "1", "2", ".\n"]),
    "llama": ([" The", " ", "“", "“", "“", "r"], [" door", " 1", "2", ".\n"]),
}


@pytest.mark.parametrize("name", [*SPLIT, *MERGED])
def test_what_tokens_are_the_description(tokenizers: dict[str, Any], name: str) -> None:
    """The description has byte tokens (“ is three), characters that normalise to more (½, …) or fewer (é), and 12."""
    tokenizer, text = tokenizers[name], LEFT + DESCRIPTION + RIGHT
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    what = what_tokens((len(LEFT), len(LEFT) + len(DESCRIPTION)), encoded["offset_mapping"])
    chosen = np.flatnonzero(what).tolist()
    assert chosen == list(range(chosen[0], chosen[-1] + 1))
    found = [text[begin:end] for begin, end in (encoded["offset_mapping"][i] for i in chosen)]
    first, last = ENDS[name]
    assert found[: len(first)] == first and found[-len(last) :] == last
    read = tokenizer.decode([encoded["input_ids"][i] for i in chosen])
    written = tokenizer.decode(tokenizer(DESCRIPTION, add_special_tokens=False)["input_ids"])  # normalised alike
    assert read.strip() == written.strip()


def test_tables_of_merged_digits(tokenizers: dict[str, Any]) -> None:
    for name in MERGED:
        tokenizer = tokenizers[name]
        tables = token_tables(tokenizer, len(tokenizer))
        digit, minus = {}, []
        for token, index in tokenizer.get_vocab().items():
            bare = token.lstrip("▁Ġ")
            code = int(token[3:5], 16) if token.startswith("<0x") else 0
            if bare in list("0123456789") or ord("0") <= code <= ord("9"):
                digit[index] = int(chr(code)) if code else int(bare)
            if token.endswith("-") or code == ord("-"):
                minus.append(index)
        assert {i: int(tables.digit[i]) for i in np.flatnonzero(tables.digit >= 0).tolist()} == digit
        assert np.flatnonzero(tables.minus).tolist() == sorted(minus)
        assert len(digit) > 10 and len(minus) > 1, "spelled in more ways than one"


@pytest.mark.parametrize("name", SPLIT)
def test_require_digit_tokens(tokenizers: dict[str, Any], name: str) -> None:
    require_digit_tokens(tokenizers[name], "objective.push_term soft_iou")


@pytest.mark.parametrize("name", MERGED)
def test_terms_that_need_digit_tokens_raise(tokenizers: dict[str, Any], name: str) -> None:
    kind = {"gpt2": "TokenizersBackend", "spm": "TokenizersBackend", "llama": "LlamaTokenizer"}[name]
    with pytest.raises(ValueError, match=f"^objective.push_term soft_iou needs .*{kind} makes"):
        require_digit_tokens(tokenizers[name], "objective.push_term soft_iou")


@pytest.mark.parametrize("name", ["qwen3_5", "spm split", "gpt2", "spm", "llama"])
def test_tokens_of_a_collated_batch(
    tokenizers: dict[str, Any], name: str, frontend: Any, data_config: Callable[..., Any], samples: list[Any]
) -> None:
    """Placeholders take 8 or 12 tokens before the description; positions still refer to the right tokens."""
    tokenizer = tokenizers[name]
    pads = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    vision = replace(frontend.vision, **pads)
    processor = Processor(tokenizer, frontend.family, vision, frontend.geometry, data_config())
    collate = Collator(
        tokenizer.pad_token_id,
        "image",
        lambda ids, *rest: torch.zeros(3, *ids.shape),
        vision,
        frontend.geometry,
        frontend.family,
    )
    batch = collate([processor(sample, with_answer=True) for sample in samples[:2]])
    positions, what = batch.answer_positions, batch.description_positions
    for index, description in enumerate(["The red chair.", "A small brown table beside the white door of the room."]):
        tokens = batch.input_ids[index, what.position[what.sample == index]]
        assert tokenizer.decode(tokens).strip() == description
        chosen = [
            tokenizer.decode(token).strip() for token in positions.label[(positions.sample == index) & positions.where]
        ]
        digits = "".join(character for token in chosen for character in token if character.isdigit())
        assert digits == "".join(c for c in samples[index].answer.replace("bbox_3d", "") if c.isdigit())
        assert all(any(character.isdigit() for character in token) for token in chosen)
        if name in SPLIT:
            read = [int(tokenizer.decode(positions.label[row])) for row in positions.digit[index, 0] if row >= 0]
            assert read == [(2, 0)[index]]
    if name in MERGED:
        assert positions.digit.tolist() == [[[-1]] * 10] * 2
        assert not positions.sign.any() and not positions.place_value.any()
