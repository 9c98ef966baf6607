"""Model FLOPs against PyTorch's FLOP counter, and the logged throughput."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from host_sync import host_reads
from objectives import objective_config, push_term
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.answer_tokens import token_tables
from w2r2_ds.models.attention import selected_tokens
from w2r2_ds.models.build import build_model
from w2r2_ds.models.flops import tokens_and_pairs
from w2r2_ds.models.qwen2_5_vl.family import squares
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.throughput import Throughput, groups, matrix_rate, step_flops

CASES = [
    # push, fusion, zero, visual
    ("margin", "add", "merged", "images"),
    ("representation", "concat", "features", "video"),
    ("unblocked", "gated", "merged", "images"),
    ("none", "cross_attention", "features", "images"),
    ("contrast", "concat", "features", "images"),
    ("contrast", "add", "merged", "images"),
]


def make_step(model_config: Any, frontend: Any, push: str) -> W2R2Step:
    config = RunConfig(model=model_config, objective=objective_config(push=push, mu=0.001))
    model = build_model(model_config, torch.device("cpu"), 1)
    model.base.enable_input_require_grads()
    tables = token_tables(frontend.tokenizer, model.base.config.get_text_config().vocab_size)
    return W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()


@pytest.mark.parametrize(("push", "fusion", "zero", "visual"), CASES)
def test_model_flops_equal_pytorchs_flop_counter(
    model_config: Any,
    frontend: Any,
    batch_of: Any,
    samples: list[Any],
    push: str,
    fusion: str,
    zero: str,
    visual: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step without padding and recomputation, with attention as matrix products, which PyTorch counts.

    Within 0.1 % (at most 0.04 % was measured). The rest: the mean number of keys per answer position in the last layer,
    the attention of a fusion, products of the loss.
    """
    monkeypatch.setattr(selected_tokens, "ROW_MULTIPLE", 1)
    step = make_step(replace(model_config, fusion=fusion, zero_geometry=zero), frontend, push)
    batch = batch_of(samples[1:2], visual=visual)
    # PyTorch counts addmm but not addmm_, which adds the LoRA update.
    counter = FlopCounterMode(display=False)
    counter.flop_registry = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
    with counter, sdpa_kernel(SDPBackend.MATH):
        step(batch)[0].backward()
    term = push_term(push)
    assert step_flops(step.model, term, batch) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_samples_are_independent(model_config: Any, frontend: Any, batch_of: Any, samples: list[Any]) -> None:
    """Padding does not count; tolerance for the last layer's attention, which is a mean over all samples."""
    step, term = make_step(model_config, frontend, "margin"), push_term("margin")
    single = [step_flops(step.model, term, batch_of([sample])) for sample in samples]
    assert step_flops(step.model, term, batch_of(samples)) == pytest.approx(sum(single), rel=5e-3)


def test_flops_of_a_shared_prefix_count_once(batch_of: Any, samples: list[Any]) -> None:
    """A prefix of 8 tokens with suffixes of 3 and 2, and a sample of 4."""
    batch = batch_of(samples[:1])
    packed = replace(batch, layout=replace(batch.layout, spans=(((0, 8, 11, 13), (13, 17)),)))
    assert tokens_and_pairs(groups(packed)) == (17, 8 * 8 + 3 * (8 + 3) + 2 * (8 + 2) + 4 * 4)
    halves = (8 * 8 + 3 * 3 + 2 * 2 + 4 * 4) / 2
    assert tokens_and_pairs(groups(packed), causal=True) == (17, halves + 3 * 8 + 2 * 8)


def test_flops_of_the_last_layer_count_answer_positions(model_config: Any, frontend: Any) -> None:
    model = make_step(model_config, frontend, "margin").model
    few, more = (model.family.decoder_flops(model.base, 100, 0.0, rows)[0].forward for rows in (10, 20))
    layer = model.base.model.language_model.layers[-1]
    heads = layer.self_attn
    sizes = [parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1]
    skipped = [p.numel() for module in (heads.k_proj, heads.v_proj) for p in module.parameters() if p.dim() > 1]
    assert more - few == 2 * 10 * (sum(sizes) - sum(skipped))


def test_squared_window_lengths_include_the_remainder() -> None:
    assert squares(8, 8) == 64 and squares(20, 8) == 64 + 64 + 16 and squares(6, 8) == 36


def test_logged_throughput_of_a_step(
    model_config: Any, frontend: Any, batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, term = make_step(model_config, frontend, "margin"), push_term("margin")
    batches = [batch_of(samples[:1]), batch_of(samples[1:])]
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    found = Throughput(step.model, term, rate=2e9)(batches, seconds=2.0)
    flops = sum(step_flops(step.model, term, batch) for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert found == pytest.approx(
        {
            "samples_per_s": 6.0,
            "tokens_per_s": 2.0 * tokens,
            "step_s": 2.0,
            "tflops": flops / 2e12,
            "mfu": flops / 4e9,
        }
    )


def test_no_device_synchronisation(model_config: Any, frontend: Any, batch_of: Any, samples: list[Any]) -> None:
    """Only the patch grids are read, which are on the CPU."""
    step, term = make_step(model_config, frontend, "margin"), push_term("margin")
    batch = batch_of(samples)
    grids = replace(batch, visuals=replace(batch.visuals, grid_thw=batch.visuals.grid_thw))
    assert host_reads(lambda: step_flops(step.model, term, grids)) <= {"aten::item", "aten::_local_scalar_dense"}


def test_matrix_rate() -> None:
    """A plausible rate within 5 s of CPU time; the random state does not change."""
    before, state = time.process_time(), torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14 and torch.equal(state, torch.get_rng_state())
    assert time.process_time() - before < 5
