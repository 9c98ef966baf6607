"""The cost model against independently computed values; docs/research/cost-model.md and README.md show its tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from docs_scripts import DOCS, docs_script
from objectives import push_term
from w2r2_ds.bench import cost_model
from w2r2_ds.bench.hf_baseline.hf_trainer import stock_forwards
from w2r2_ds.bench.model import build
from w2r2_ds.bench.shapes import TINY, find_shapes
from w2r2_ds.training.throughput import language_flops

PARTS = {
    # size, frames: tokens, vision tower, VGGT, LLM forward, head at all positions, shortcut forward (Tflop)
    ("3B", "8"): (2304, 10.7, 34.8, 13.6, 1.4, 13.3),
    ("3B", "32"): (8448, 43.0, 281.6, 57.5, 5.3, 55.9),
    ("7B", "8"): (2304, 10.8, 34.8, 31.2, 2.5, 30.2),
    ("7B", "32"): (8448, 43.1, 281.6, 124.7, 9.2, 120.3),
}
RATIOS = {
    # size, frames, training: baseline (Tflop); relative to it naive, shared, exact, geometry cached, both cached;
    # relative to the single pass exact, geometry cached, both cached
    ("3B", "8", "full, checkpointed"): (105, 1.66, 1.14, 1.06, 0.74, 0.64, 1.13, 1.21, 1.25),
    ("3B", "32", "LoRA, checkpointed"): (525, 1.46, 1.12, 1.06, 0.54, 0.46, 1.11, 1.25, 1.30),
    ("7B", "16", "LoRA, checkpointed"): (313, 1.70, 1.21, 1.13, 0.84, 0.77, 1.20, 1.29, 1.32),
    ("7B", "32", "full, checkpointed"): (860, 1.67, 1.16, 1.08, 0.76, 0.71, 1.15, 1.23, 1.25),
}
"""Computed with an independent program."""


@pytest.fixture(scope="module")
def tables() -> Any:
    """docs/scripts/cost_model.py."""
    return docs_script("cost_model")


@pytest.mark.parametrize(("make", "known", "keys"), [("parts", PARTS, 2), ("ratios", RATIOS, 3)])
def test_tables_equal_independently_computed_values(tables: Any, make: str, known: dict[Any, Any], keys: int) -> None:
    found = {tuple(row[:keys]): [float(cell) for cell in row[keys:]] for row in getattr(tables, make)()[1]}
    for key, expected in known.items():
        # Both numbers are rounded: twice half a unit of the last printed digit.
        assert found[key] == pytest.approx(expected, abs=0.11 if keys == 2 else 0.011, rel=2e-3), key


def test_packing_divides_the_cost_of_the_prefix(tables: Any) -> None:
    row = next(row for row in tables.packed()[1] if row[:2] == ["7B", "LoRA, checkpointed"])
    assert float(row[2]) == 442
    # The independent program computes the whole last layer (1/28 more) and counts the frames' 48 start and end tokens
    # in every suffix.
    for cell, before, count in zip(row[3:8], (375, 196, 107, 62, 40), (1, 2, 4, 8, 16), strict=True):
        fewer = (6096 + count * 208) / (6048 + count * 256)
        assert float(cell.split()[0]) == pytest.approx(before * fewer * 27 / 28, abs=1.0)


def test_the_docs_contain_these_tables(tables: Any) -> None:
    text = (DOCS / "research" / "cost-model.md").read_text()
    for make in tables.TABLES.values():
        for line in tables.markdown(make()).splitlines():
            assert line in text, "run docs/scripts/cost_model.py and copy its tables to docs/research/cost-model.md"
    readme = (DOCS.parent / "README.md").read_text()
    for line in tables.markdown(tables.summary()).splitlines():
        assert line in readme, "run docs/scripts/cost_model.py and copy its first table to README.md"


def test_parts_equal_the_counts_of_torch() -> None:
    """On the shape `tiny`. PyTorch's FLOP counter counts all query-key pairs of the language model, and LoRA."""
    subject = build(TINY, torch.device("cpu"))
    batch = subject.batch()
    model = subject.model
    # FlopCounterMode supports neither `addmm_` nor the CPU's fused attention kernel.
    with stock_forwards(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as tower:
            visual = model.encode_2d(batch.visuals)
        with FlopCounterMode(display=False) as geometry:
            features = model.encode_3d(batch.visuals)
        with FlopCounterMode(display=False) as merger:
            model.merge(features)
        with FlopCounterMode(display=False) as language:
            model.base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                mm_encoder_outputs={"image": visual},
                use_cache=False,
            )
    passed = cost_model.language(TINY, causal=False)
    lora = 2 * TINY.tokens * TINY.layers * TINY.lora_rank * lora_sides()
    expected = passed.linear + passed.attention + lora
    assert language.get_total_flops() == pytest.approx(expected, rel=0.01)  # rotary angles
    assert merger.get_total_flops() == cost_model.geometry_merger(TINY)
    assert geometry.get_total_flops() == cost_model.geometry(TINY, TINY.geometry_layer + 1)
    assert tower.get_total_flops() == pytest.approx(cost_model.vision(TINY), rel=0.01)


def test_model_operations_equal_those_of_training() -> None:
    """Except for LoRA's products, which the cost model does not count."""
    subject = build(TINY, torch.device("cpu"))
    counted = language_flops(subject.model, push_term("margin"), subject.batch())
    keys = 2 * (TINY.hidden + TINY.hidden * TINY.kv_heads // TINY.heads)  # widths of the key and value projections
    rows = lora_sides() * TINY.tokens * (TINY.layers - 1) + keys * TINY.tokens
    rows += (lora_sides() - keys) * TINY.answer_tokens  # the rest of the last layer
    # Forward, gradients of inputs and of weights, and the forward of the shortcut: 4 products of 2 operations.
    lora = 8 * TINY.lora_rank * rows
    assert counted == cost_model.model_operations(TINY, two_passes=True) + lora


def lora_sides() -> int:
    """Sum of the input and output widths of a layer's seven projections."""
    hidden, keys, inner = TINY.hidden, TINY.hidden * TINY.kv_heads // TINY.heads, TINY.intermediate
    return 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)


def test_find_shapes_rejects_unknown_shapes_and_too_many_frames() -> None:
    with pytest.raises(ValueError, match="--shape is '30b'; it is one of cpu, tiny, 3b, 7b"):
        find_shapes("30b", [])
    with pytest.raises(ValueError, match="--frames is 80; shape 3b allows 1 to 79"):
        find_shapes("3b", [8, 80])
    assert [shape.visual_tokens for shape in find_shapes("3b", [8, 24])] == [2016, 6048]
    (cpu,) = find_shapes("cpu", [])
    assert (cpu.visual_tokens, cpu.tokens - cpu.visual_tokens, cpu.answer_tokens) == (704, 64, 40)
