"""Shapes of the attention in a run whose samples have many lengths: their number, and whether cuDNN may see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.backends.cuda import cudnn_sdp_enabled
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from w2r2_ds.data.loader import LENGTH_MULTIPLE, make_collate, make_processor
from w2r2_ds.evaluation.generate import generate_tokens
from w2r2_ds.models.attention import packed as packed_module
from w2r2_ds.models.attention.selected_tokens import ROW_MULTIPLE
from w2r2_ds.models.build import trainable
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step

STEPS = 10


class AttentionCalls(TorchDispatchMode):
    """Shapes of query and key of every SDPA operator, forward and backward, by cuDNN's switch at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
        self.operators: set[str] = set()
        self.backward = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            backward = "backward" in str(func)
            query, key = args[1:3] if backward else args[:2]
            if self.backward or not backward:
                self.shapes[cudnn_sdp_enabled()].add((tuple(query.shape), tuple(key.shape)))
            self.operators.add("backward" if backward else "forward")
        return func(*args, **(kwargs or {}))

    def sizes(self, head_size: int) -> set[tuple[int, int]]:
        """Numbers of queries and keys of the calls without cuDNN whose heads have this size."""
        return {(queries, keys) for (*_, queries, size), (*_, keys, _) in self.shapes[False] if size == head_size}


def test_a_run_has_few_attention_shapes_and_cudnn_sees_only_fixed_ones(
    make_step: Callable[..., W2R2Step], frontend: Any, data_config: Any, samples: list[Any]
) -> None:
    """With activation checkpointing. Nearly every step has another length, and another number of answer tokens."""
    step = make_step()
    text = step.model.family.language_model(step.model.base)
    recompute(text.layers, 1, False, step.recompute_context_fn)
    process = make_processor(frontend, data_config())
    collate = make_collate(frontend, data_config(), pad_to_multiple_of=LENGTH_MULTIPLE)
    sizes: list[tuple[int, int]] = []
    with AttentionCalls() as calls:
        for index in range(STEPS):
            question, answer = " ".join(["chair"] * (1 + 5 * index)), samples[0].answer.replace("]", "0" * index + "]")
            batch = collate([process(replace(samples[0], question=question, what=(0, 5), answer=answer), True)])
            sizes.append((int(batch.attention_mask.sum()), len(batch.answer_positions.label)))
            step(batch)[0].backward()
    assert calls.operators == {"forward", "backward"}
    lengths, rows = (set(each) for each in zip(*sizes, strict=True))
    assert len(lengths) == STEPS and len(rows) > STEPS / 2
    # The geometry encoder: attention within frames and over all frames.
    assert len(calls.shapes[True]) == 2
    # The language model: a shape per rounded length for all tokens, and one per rounded number of rows for the last
    # layer. The vision tower has another head size.
    found = calls.sizes(text.layers[0].self_attn.head_dim)
    all_tokens = {(rounded(length, LENGTH_MULTIPLE),) * 2 for length in lengths}
    last_layer = {(rounded(count, ROW_MULTIPLE), rounded(length, LENGTH_MULTIPLE)) for length, count in sizes}
    assert found == all_tokens | last_layer
    assert len(found) <= STEPS, "without rounding there would be two per step"


def test_packed_sequences_need_varlen_attention_and_few_shapes(
    make_step: Callable[..., W2R2Step], frontend: Any, data_config: Any, samples: list[Any], monkeypatch: Any
) -> None:
    """All layers but the last make varlen calls, which build no plan per shape; the last layer has few SDPA shapes."""
    step = make_step()
    family, base = step.model.family, step.model.base
    family.use_packed_attention(base)
    text = family.language_model(base)
    varlen, tokens = packed_module.varlen_attention, []

    def varlen_attention(query: Any, *given: Any, **options: Any) -> Any:
        tokens.append(len(query))
        with _disable_current_modes():  # SDPA calls of the CPU's implementation of varlen attention are not counted
            return varlen(query, *given, **options)

    monkeypatch.setattr(packed_module, "varlen_attention", varlen_attention)
    config = data_config(questions_per_scene=3)
    process = make_processor(frontend, config)
    collate = make_collate(frontend, config, pad_to_multiple_of=LENGTH_MULTIPLE)
    sizes: list[tuple[int, int]] = []
    with AttentionCalls() as calls:
        calls.backward = False  # that of the CPU's varlen attention cannot be told from that of the last layer
        for index in range(STEPS):
            questions = [" ".join(["chair"] * (1 + 5 * index + word)) for word in range(3)]
            answer = samples[0].answer.replace("]", "0" * index + "]")
            given = [replace(samples[0], question=each, what=(0, 5), answer=answer) for each in questions]
            batch = collate([process(each, True) for each in given])
            assert len(batch.input_ids) == 1, "one packed sequence"
            sizes.append((batch.input_ids.shape[1], len(batch.answer_positions.label)))
            tokens.clear()
            step(batch)[0].backward()
            # The fused pass and the 2D-only pass are a batch of two, but a packed sequence is attended to on its own.
            assert tokens == [batch.input_ids.shape[1]] * len(tokens)
            assert len(tokens) == 2 * (len(text.layers) - 1)
    found = calls.sizes(text.layers[0].self_attn.head_dim)
    assert found == {(rounded(rows, ROW_MULTIPLE), length) for length, rows in sizes}
    assert len({rows for _, rows in sizes}) == STEPS and len(found) <= STEPS / 2
    assert len(calls.shapes[True]) == 2, "the geometry encoder"


def test_decoding_never_reaches_cudnn(
    make_step: Callable[..., W2R2Step], frontend: Any, data_config: Any, samples: list[Any]
) -> None:
    """Every decoded token has another number of keys; prompts of several lengths."""
    model, process = make_step().model, make_processor(frontend, data_config())
    collate = make_collate(frontend, data_config(), with_answer=False)
    batch = collate([process(sample, False) for sample in samples[:2]])
    with AttentionCalls() as calls:
        generate_tokens(model, batch, frontend.tokenizer, "fused", 8, 2.0)
    head = model.family.language_model(model.base).layers[0].self_attn.head_dim
    # A prompt has as many queries as keys. The queries of a decoded token are the heads of a group.
    keys = {keys for queries, keys in calls.sizes(head) if queries != keys}
    assert len(keys) > 4, "a shape per decoded token"
    # With cuDNN: the geometry encoder only, within frames and over all frames of either sample.
    assert len(calls.shapes[True]) <= 4


@pytest.mark.parametrize("packed", [False, True])
def test_rounded_lengths_change_no_result(
    make_step: Callable[..., W2R2Step], frontend: Any, data_config: Any, samples: list[Any], packed: bool
) -> None:
    """Losses, statistics and gradients within 1e-5: float32 products of other sizes."""
    step = make_step(push="poe")
    if packed:
        step.model.family.use_packed_attention(step.model.base)
    config = data_config(questions_per_scene=2 if packed else 1)
    process = make_processor(frontend, config)
    features = [
        process(sample, True) for sample in (samples[0], replace(samples[0], question="the chair", what=(4, 9)))
    ]
    results = []
    for multiple in (1, LENGTH_MULTIPLE):
        batch = make_collate(frontend, config, pad_to_multiple_of=multiple)(features)
        length = batch.input_ids.shape[1]
        assert length % multiple == 0 and batch.attention_mask.sum(1).max() > length - multiple
        assert batch.position_ids.shape[2] == batch.layout.group.shape[1] == batch.layout.suffix.shape[1] == length
        assert torch.equal(batch.layout.group >= 0, batch.attention_mask == 1)
        loss, stats = step(batch)
        parameters = trainable(step.model).values()
        results.append([loss.detach(), stats, *torch.autograd.grad(loss, list(parameters), allow_unused=True)])
        results[-1].append(length)
    assert results[0].pop() < results[1].pop()
    for exact, padded in zip(*results, strict=True):
        if exact is not None:
            assert (padded - exact).norm() <= 1e-5 * exact.norm() + 1e-8


def rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
