"""Rules of six public Scan2Cap evaluators for references, captions and IoU: one `Scan2CapRules` each."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from w2r2_ds.evaluation.metrics.captions import Tokenizer

TOKEN_LIMIT = 30
"""Words of a reference that Scan2Cap and LEO compare with (Scan2Cap ``lib/config.py``, MAX_DES_LEN)."""
_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'\w+|\w+|[^\w\s]")


@dataclass(frozen=True)
class DescribedObject:
    """An annotated object; `descriptions` and `tokens` are parallel.

    Attributes:
        key: ``scene|object|name``, as in ScanRefer's file.
        descriptions: texts as annotated.
        tokens: the words of each, as in ScanRefer's file; used by Scan2Cap's and LEO's protocols only.
        box: ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres.
    """

    key: str
    descriptions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    box: tuple[float, ...]


@dataclass(frozen=True)
class Caption:
    """A generated caption.

    Attributes:
        text: as generated.
        box: the box that the caption describes, as in `DescribedObject`; None without one.
        tokens: its words, for Scan2Cap's own two protocols.
        iou: IoU of that box if it is given by the data (VG-LLM's files have it); used instead of `box`.
    """

    text: str
    box: tuple[float, ...] | None = None
    tokens: tuple[str, ...] | None = None
    iou: float | None = None


@dataclass(frozen=True)
class Scan2CapRules:
    """One evaluator.

    Attributes:
        description: one sentence.
        source: repository and file.
        reference: object -> the strings of its references.
        candidate: caption -> the string that is scored.
        placeholder: string of a caption that is missing or whose IoU is too small.
        passes: whether an IoU is large enough for a k.
        precision: dtype of the IoU arithmetic.
        tokenizer: applied to both sides last.
        reference_words: whether `reference` needs ``DescribedObject.tokens``.
        caption_words: whether `candidate` needs ``Caption.tokens``.
        average: ``corpus`` scores the corpus with placeholders; ``items`` averages item scores, failures being 0.
    """

    description: str
    source: str
    reference: Callable[[DescribedObject], list[str]]
    candidate: Callable[[Caption], str]
    placeholder: str
    passes: Callable[[float, float], bool]
    precision: type[np.floating] = np.float64
    tokenizer: Tokenizer = "none"
    reference_words: bool = False
    caption_words: bool = False
    average: str = "corpus"


def wrap(text: str) -> str:
    """``sos text eos``."""
    return f"sos {text} eos"


def spaced(text: str) -> str:
    """VG-LLM's and Video-3D-LLM's wrapping: blanks around full stops and commas, then lower case.

    LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scan2cap.py``, LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scan2cap/utils.py``.
    """
    return wrap(text.replace(".", " . ").replace(",", " , ").lower())


def split_words(text: str) -> list[str]:
    """Words of a caption, close to the field ``token`` of ScanRefer's file: lower case; punctuation, 's, n't split."""
    return _WORD.findall(text.lower())


def _caption_words(caption: Caption) -> str:
    if caption.tokens is None:
        raise ValueError("Scan2Cap's own protocols score words as ScanRefer's file splits them: set Caption.tokens.")
    return wrap(" ".join(caption.tokens))


def _first_words(annotated: DescribedObject) -> list[str]:
    return [wrap(" ".join(words[:TOKEN_LIMIT])) for words in annotated.tokens]


def _all_words(annotated: DescribedObject) -> list[str]:
    return [wrap(" ".join(words)) for words in annotated.tokens]


def _spaced_references(annotated: DescribedObject) -> list[str]:
    return [spaced(text) for text in annotated.descriptions]


def _raw_references(annotated: DescribedObject) -> list[str]:
    return [wrap(text) for text in annotated.descriptions]


def _spaced_rules(description: str, source: str) -> Scan2CapRules:
    return Scan2CapRules(
        description, source, _spaced_references, lambda caption: spaced(caption.text), spaced(""), operator.ge
    )


SCAN2CAP_RULES: Mapping[str, Scan2CapRules] = {
    # functions prepare_corpus, check_candidates, organize_candidates
    "scan2cap_original": Scan2CapRules(
        "IoU > k in float32, references cut at 30 words, failures score as 'sos eos'.",
        "daveredrum/Scan2Cap lib/eval_helper.py",
        _first_words,
        _caption_words,
        "sos eos",
        operator.gt,
        np.float32,
        reference_words=True,
        caption_words=True,
    ),
    # function evaluate_captioning
    "scan2cap_benchmark": Scan2CapRules(
        "IoU >= k in float32, failures are a true 0; recall, precision and F1 of item scores.",
        "daveredrum/Scan2Cap benchmark/eval.py",
        _all_words,
        _caption_words,
        "sos eos",
        operator.ge,
        np.float32,
        reference_words=True,
        caption_words=True,
        average="items",
    ),
    # method CaptionEvaluator.update
    "leo": Scan2CapRules(
        "IoU >= k, references cut at 30 words, captions as generated, failures score as 'sos eos'.",
        "embodied-generalist/embodied-generalist evaluator/cap_eval.py",
        _first_words,
        lambda caption: wrap(caption.text).replace(". ", " . "),
        "sos eos",
        operator.ge,
        reference_words=True,
    ),
    # function main
    "video3dllm": _spaced_rules(
        "IoU >= k, lower-cased texts with blanks around . and , on both sides, failures score as the empty caption.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scan2cap.py",
    ),
    # function scan2cap_process_results
    "vgllm": _spaced_rules(
        "As video3dllm; VG-LLM itself reports k = 0.5 only, with IoU of proposals from its data files.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scan2cap/utils.py",
    ),
    # function calc_scan2cap_score
    "chatscene": Scan2CapRules(
        "IoU >= k, raw texts through the PTB tokenizer on both sides, failures score as 'sos eos'.",
        "ZzZZCHS/Chat-Scene utils/eval.py",
        _raw_references,
        lambda caption: wrap(caption.text),
        "sos eos",
        operator.ge,
        tokenizer="ptb",
    ),
}
"""Second part of the protocol's name -> rules."""
