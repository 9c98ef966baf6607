"""Rules of six public Scan2Cap evaluators for references, captions and IoU: one `Scan2CapRules` each."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from w2r2_ds.evaluation.metrics.captions import Tokenizer

TOKEN_LIMIT = 30
"""Number of words of a reference that Scan2Cap and LEO use (Scan2Cap ``lib/config.py``, MAX_DES_LEN)."""
# A word before "n't", "n't", an apostrophe with letters such as "'s", another word, or one punctuation mark.
_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'\w+|\w+|[^\w\s]")


@dataclass(frozen=True)
class DescribedObject:
    """An annotated object with its descriptions.

    Attributes:
        key: ``scene|object id|object name``.
        descriptions: annotated texts.
        tokens: words of each description, as in ScanRefer's file; used by Scan2Cap's and LEO's protocols only.
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
        text: generated text.
        box: the box that the caption describes, as in `DescribedObject`; None without one.
        tokens: words of the text; required by Scan2Cap's own two protocols.
        iou: IoU of that box with the annotated one if the data contains it (as VG-LLM's files do); replaces `box`.
    """

    text: str
    box: tuple[float, ...] | None = None
    tokens: tuple[str, ...] | None = None
    iou: float | None = None


@dataclass(frozen=True)
class Scan2CapRules:
    """Rules of one public evaluator.

    Attributes:
        description: one sentence.
        source: repository and file.
        reference: object -> strings of its references.
        candidate: caption -> string that is scored.
        placeholder: string that is scored for a caption that is missing or whose IoU is too small.
        passes: (IoU, k) -> whether the IoU is sufficient.
        precision: dtype of the IoU arithmetic.
        tokenizer: tokenizer of references and captions, applied last.
        reference_words: whether `reference` needs ``DescribedObject.tokens``.
        caption_words: whether `candidate` needs ``Caption.tokens``.
        average: ``corpus``: metrics of the corpus with placeholders; ``items``: means of item scores, 0 for failures.
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
    """Add the start and end words of Scan2Cap: ``sos text eos``."""
    return f"sos {text} eos"


def spaced(text: str) -> str:
    """VG-LLM's and Video-3D-LLM's normalisation: spaces around full stops and commas, lower case, ``sos`` and ``eos``.

    LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scan2cap.py``, LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scan2cap/utils.py``.
    """
    return wrap(text.replace(".", " . ").replace(",", " , ").lower())


def split_words(text: str) -> list[str]:
    """Words of a caption, similar to the field ``token`` of ScanRefer's file.

    Lower case; punctuation, "'s" and "n't" are words of their own.
    """
    return _WORD.findall(text.lower())


def _caption_words(caption: Caption) -> str:
    if caption.tokens is None:
        raise ValueError("Scan2Cap's own protocols compare words, as ScanRefer's file splits them: set Caption.tokens.")
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
    # The placeholder is the wrapped empty caption, "sos  eos": its two spaces make an empty word for ROUGE-L.
    return Scan2CapRules(
        description, source, _spaced_references, lambda caption: spaced(caption.text), spaced(""), operator.ge
    )


SCAN2CAP_RULES: Mapping[str, Scan2CapRules] = {
    # From `prepare_corpus`, `check_candidates` and `organize_candidates`.
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
    # From `evaluate_captioning`. The placeholder of a missing caption is masked afterwards.
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
    # From `CaptionEvaluator.update`. The replacement is applied after wrapping, so it splits the last full stop too.
    "leo": Scan2CapRules(
        "IoU >= k, references cut at 30 words, captions with full stops split off, failures score as 'sos eos'.",
        "embodied-generalist/embodied-generalist evaluator/cap_eval.py",
        _first_words,
        lambda caption: wrap(caption.text).replace(". ", " . "),
        "sos eos",
        operator.ge,
        reference_words=True,
    ),
    # From `main`.
    "video3dllm": _spaced_rules(
        "IoU >= k, lower-case texts with spaces around . and , on both sides, failures score as the empty caption.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scan2cap.py",
    ),
    # From `scan2cap_process_results` and `scan2cap_aggregate_results`.
    "vgllm": _spaced_rules(
        "As video3dllm; VG-LLM itself reports k = 0.5 only, with the IoU of proposals from its data files.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scan2cap/utils.py",
    ),
    # From `calc_scan2cap_score`.
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
"""Second part of the protocol's name -> rules. The comments name the reference's functions."""
