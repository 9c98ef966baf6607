"""Memory and time of the LM head with its loss: at all positions (stock) and at the answer positions only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from w2r2_ds.bench.harness import find_device, in_fresh_process, peak_bytes
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import IGNORED

ANSWER = 96
"""Positions with a label."""
SHARE = 0.05
"""Maximum memory of the answer positions relative to all positions."""


def all_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Stock transformers: float32 logits at all positions, cross-entropy that ignores most of them."""
    return cross_entropy(linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's fused linear cross-entropy: every row too, but never all logits at once."""
    options = nn.LinearCrossEntropyOptions()  # without them it makes all logits
    return nn.functional.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, options=options)


def answer_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """This project: logits at labelled positions only, whose indices the collator gives."""
    return cross_entropy(linear(hidden[-ANSWER:], weight).float(), labels[-ANSWER:])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all rows": all_rows,
    "all rows, chunked": chunked,
    "answer rows": answer_rows,
}


def head_memory(rows: int = 2304, hidden: int = 512, vocabularies: tuple[int, ...] = (32768, 151936)) -> Report:
    """Peak memory and time of the frozen head with its loss, forward and backward, each way in its own process.

    Args:
        rows: hidden states of a sequence.
        hidden: their width.
        vocabularies: rows of the head's weight, one after the other.
    """
    report = Report("head_memory", f"LM head and loss, {rows} rows of {hidden}, {ANSWER} of them with a label", [])
    ways = list(WAYS)
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        ways.remove("all rows, chunked")
        report.notes.append(f"torch {torch.__version__} has no chunked linear cross-entropy; 2.13 has.")
    for vocabulary in vocabularies:
        measured = {name: in_fresh_process(measure, name, rows, hidden, vocabulary) for name in ways}
        for name, found in measured.items():
            memory = found["bytes"] / 2**20
            report.rows.append(
                {"head on": name, "vocabulary": vocabulary, "peak_mib": memory, "seconds": found["seconds"]}
            )
        share = measured["answer rows"]["bytes"] / measured["all rows"]["bytes"]
        gap = max(found["loss"] for found in measured.values()) - min(found["loss"] for found in measured.values())
        report.criteria.append(
            Criterion(f"memory, answer rows / all rows, {vocabulary}", share, max(SHARE, 2 * ANSWER / rows))
        )
        report.criteria.append(Criterion(f"difference of the losses, {vocabulary}", gap, 1e-4))
    report.notes.append("Memory is what the process has resident beyond its inputs (CPU) or allocated (GPU).")
    return report


def measure(name: str, rows: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Measure one implementation in this process: peak bytes, seconds, loss."""
    device = find_device()
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, device=device, requires_grad=True)
    weight = 0.02 * torch.randn(vocabulary, hidden, device=device)
    labels = torch.full((rows,), IGNORED, device=device)
    labels[-ANSWER:] = torch.randint(vocabulary, (ANSWER,), device=device)
    kept: dict[str, Any] = {}

    def run() -> None:
        started = time.process_time()
        loss = WAYS[name](states, weight, labels)
        loss.backward()
        kept.update(loss=loss.item(), seconds=time.process_time() - started)

    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        run()
        torch.cuda.synchronize()
        kept["seconds"] = time.perf_counter() - started
        return kept | {"bytes": torch.cuda.max_memory_allocated() - before}
    return {"bytes": peak_bytes(run)} | kept
