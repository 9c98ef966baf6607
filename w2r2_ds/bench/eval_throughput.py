"""Generated answers per second: the stock `generate` per sample with both towers, and this project's batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from w2r2_ds.bench.harness import find_device, interleave, ratio
from w2r2_ds.bench.hf_trainer import BaselineModel, stock
from w2r2_ds.bench.model import Subject
from w2r2_ds.bench.model import build as build_subject
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import find_shapes
from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.collate import Collator
from w2r2_ds.data.processor import Features
from w2r2_ds.evaluation.generate import generate_tokens
from w2r2_ds.types.batch import Batch

BASELINE = "field: one sample at a time"


def eval_throughput(
    shape: str = "cpu", batch_sizes: tuple[int, ...] = (1, 4), tokens: int = 24, rounds: int = 2
) -> Report:
    """Seconds per greedy answer of a fixed length, from frames to token ids.

    Args:
        shape: cpu, tiny, 3b or 7b.
        batch_sizes: batch sizes of this project's generation.
        tokens: length of every answer.
        rounds: number of runs per case, interleaved.
    """
    (chosen,) = find_shapes(shape, [])
    device = find_device()
    subject = build_subject(chosen, device)
    subject.model.eval()
    report = Report("eval_throughput", f"greedy answers of {tokens} tokens, {chosen.visual_tokens} visual tokens", [])
    batches = {size: prompts(subject, size) for size in batch_sizes}
    answers: dict[str, Any] = {}

    def keep(name: str, answer: Callable[[], Any]) -> Callable[[], None]:
        def case() -> None:
            answers[name] = answer()

        return case

    cases = {BASELINE: keep(BASELINE, lambda: stock_tokens(subject, prompts(subject, 1), tokens))}
    for size, batch in batches.items():
        name = f"ours, {size} at a time"
        cases[name] = keep(name, partial(ours, subject, batch, tokens))
    spreads = interleave(cases, rounds, device)
    counts = {BASELINE: 1} | {f"ours, {size} at a time": size for size in batch_sizes}
    for name, spread in spreads.items():
        per_answer = spread.median / counts[name]
        report.rows.append(
            {
                "way": name,
                **spread.columns(),
                "answers/s": 1 / per_answer,
                "/field": ratio(spread, spreads[BASELINE]) / counts[name],
            }
        )
    first = f"ours, {batch_sizes[0]} at a time"
    report.criteria.append(
        Criterion("answers that differ from the stock ones", float(answers[first][0] != answers[BASELINE]), 0)
    )
    return report


def prompts(subject: Subject, count: int) -> Batch:
    """Batch of `count` left-padded prompts, each with its own frames."""
    made = [prompt(feature) for feature in subject.features(count)]
    collate = Collator(
        subject.frontend.tokenizer.pad_token_id, "image", None, subject.frontend.vision, subject.frontend.family
    )
    return collate(made).to(subject.device)


def prompt(feature: Features) -> Features:
    """Remove the answer from a sample."""
    length = len(feature.input_ids) - feature.answer_tokens
    return replace(
        feature,
        input_ids=feature.input_ids[:length],
        token_types=feature.token_types[:length],
        what=feature.what[:length],
        answer_tokens=0,
        digit_tokens=None,
    )


def ours(subject: Subject, batch: Batch, tokens: int) -> list[list[int]]:
    """Token ids of this project's answers."""
    return generate_tokens(subject.model, batch, subject.frontend.tokenizer, "fused", tokens, DataConfig().video_fps)


@torch.inference_mode()
def stock_tokens(subject: Subject, batch: Batch, tokens: int) -> list[int]:
    """Token ids of one answer of the stock `generate`, with all layers of VGGT."""
    field = BaselineModel(subject.model)
    images = batch.visuals.geometry_images[0]
    assert images is not None, "a batch without a cache"
    tokenizer = subject.frontend.tokenizer
    end = tokenizer.convert_tokens_to_ids(subject.frontend.family.end_of_turn)
    with stock(subject.model):
        visual = field.fused(batch.visuals.pixel_values, batch.visuals.grid_thw, images)
        output = subject.model.base.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.token_types,
            mm_encoder_outputs={"image": visual},
            image_grid_thw=batch.visuals.grid_thw,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer: list[int] = output[0, batch.input_ids.shape[1] :].tolist()
    return answer[: answer.index(end)] if end in answer else answer
