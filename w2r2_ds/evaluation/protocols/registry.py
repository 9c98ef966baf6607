"""The registry of scoring protocols, and the paper's "Overall".

A name is ``task/protocol``: one project scores several tasks. See docs/reference/metrics/ for what is comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from w2r2_ds.evaluation.metrics.captions import Score
from w2r2_ds.evaluation.protocols import scan2cap, scanqa, scanrefer
from w2r2_ds.evaluation.protocols.detection import score_f1
from w2r2_ds.evaluation.protocols.scanrefer import score_official, score_vgllm, score_vgllm_refined, score_video3dllm


@dataclass(frozen=True)
class Protocol:
    """One way to score one task.

    Attributes:
        name: ``task/protocol``.
        task: ``scanrefer``, ``scan2cap``, ``scanqa`` or ``detection``.
        score: the function; annotations first, predictions second, then what its signature says.
        description: one sentence.
        source: repository and file whose numbers it gives.
    """

    name: str
    task: str
    score: Callable[..., dict[str, Any]]
    description: str
    source: str


def _scanrefer(name: str, score: Callable[..., dict[str, Any]], description: str, source: str) -> Protocol:
    return Protocol(f"scanrefer/{name}", "scanrefer", score, description, source)


def _scan2cap(name: str, description: str, source: str) -> Protocol:
    score = partial(scan2cap.score_scan2cap, protocol=name)
    return Protocol(f"scan2cap/{name}", "scan2cap", score, description, source)


def _scanqa(name: str, description: str, source: str) -> Protocol:
    return Protocol(f"scanqa/{name}", "scanqa", partial(scanqa.score_scanqa, protocol=name), description, source)


_ALL = (
    _scanrefer(
        "vgllm-direct",
        scanrefer.summarise,
        "This project's own, of scored answers: strict JSON, angles as the labels mean them, exact oriented IoU.",
        "w2r2_ds/evaluation/protocols/scanrefer.py",
    ),
    _scanrefer(
        "scanrefer_official",
        score_official,
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by ScanNet-18 classes, others apart.",
        "daveredrum/ScanRefer benchmark/eval.py",
    ),
    _scanrefer(
        "video3dllm",
        score_video3dllm,
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by NYU40 ids.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scanrefer.py",
    ),
    _scanrefer(
        "vgllm",
        score_vgllm,
        "VG-LLM's answers as its evaluator reads them, angles as extrinsic zxy included; exact oriented IoU.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py",
    ),
    _scanrefer(
        "vgllm_ZXY",
        partial(score_vgllm, angles="ZXY"),
        "As vgllm, but angles are read as the labels mean them, intrinsic ZXY.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scanrefer/utils.py, its two 'zxy' changed to 'ZXY'",
    ),
    _scanrefer(
        "vgllm_refined",
        score_vgllm_refined,
        "As vgllm, but each box first gives way to the detected box of its scene that overlaps it most.",
        "LaVi-Lab/VG-LLM, as its paper describes the numbers in parentheses; no public evaluator to compare with",
    ),
    _scan2cap(
        "scan2cap_original",
        "IoU > k in float32, references cut at 30 words, failures score as 'sos eos'.",
        "daveredrum/Scan2Cap lib/eval_helper.py",
    ),
    _scan2cap(
        "scan2cap_benchmark",
        "IoU >= k in float32, failures are a true 0; recall, precision and F1 of item scores.",
        "daveredrum/Scan2Cap benchmark/eval.py",
    ),
    _scan2cap(
        "leo",
        "IoU >= k, references cut at 30 words, captions as generated, failures score as 'sos eos'.",
        "embodied-generalist/embodied-generalist evaluator/cap_eval.py",
    ),
    _scan2cap(
        "video3dllm",
        "IoU >= k, raw lower-cased texts with blanks round . and , on both sides, failures score as the empty caption.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scan2cap.py",
    ),
    _scan2cap(
        "vgllm",
        "As video3dllm; VG-LLM itself reports k = 0.5 only, with IoU of proposals from its data files.",
        "LaVi-Lab/VG-LLM src/lmms_eval/tasks/scan2cap/utils.py",
    ),
    _scan2cap(
        "chatscene",
        "IoU >= k, raw texts through the PTB tokenizer on both sides, failures score as 'sos eos'.",
        "ZzZZCHS/Chat-Scene utils/eval.py",
    ),
    _scanqa(
        "scanqa_official",
        "EM and EM@10 of raw texts, captions through the PTB tokenizer.",
        "ATR-DBI/ScanQA scripts/score.py",
    ),
    _scanqa(
        "video3dllm",
        "EM of raw texts; captions without tokenizer, full stops at the end off (also Spatial-MLLM).",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scanqa.py; "
        "diankun-wu/Spatial-MLLM src/evaluation/scanqa/score_scanqa.py",
    ),
    _scanqa(
        "leo",
        "Cleaned texts on both sides, EM and EM-refined of the first answer that matches at all, no tokenizer.",
        "embodied-generalist/embodied-generalist evaluator/scanqa_eval.py",
    ),
    _scanqa(
        "vlm3r",
        "Cleaned texts on both sides, an equal answer is looked for first, then the PTB tokenizer.",
        "VITA-Group/VLM-3R llava/eval/scanqa_evaluator.py",
    ),
    _scanqa(
        "chatscene",
        "The prediction alone is cleaned, the empty one matches nothing, then the PTB tokenizer.",
        "ZzZZCHS/Chat-Scene utils/eval.py",
    ),
    Protocol(
        "detection/f1",
        "detection",
        score_f1,
        "This project's own: strict JSON, exact oriented IoU, greedy matching per label; precision, recall and F1.",
        "w2r2_ds/evaluation/protocols/detection.py",
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str) -> Protocol:
    """The protocol ``task/protocol``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"There is no protocol {name!r}; it is one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def overall(acc_25: Score, acc_50: Score, bleu_4: Score, cider: Score, em: Score) -> Score:
    """ "Overall" of the W2R2 paper's Table 2, in percent: the plain mean of five numbers of three tasks.

    overall = 100 (Acc@0.25 + Acc@0.5 + BLEU-4 + CIDEr + EM) / 5

    The table's head says BLEU-4 and CIDEr at IoU 0.25, the text at 0.5; the numbers that it cites for Video-3D-LLM are
    that paper's at 0.5. It mixes shares with a score that may exceed 1, and protocols that differ: quote its parts.

    Args:
        acc_25, acc_50: ScanRefer's accuracies, fractions.
        bleu_4, cider: Scan2Cap's, as ``captions.py`` has them.
        em: ScanQA's exact match, a fraction.

    Returns:
        the mean, None where one of them was not computed.
    """
    parts = [part for part in (acc_25, acc_50, bleu_4, cider, em) if part is not None]
    return 100 * sum(parts) / 5 if len(parts) == 5 else None
