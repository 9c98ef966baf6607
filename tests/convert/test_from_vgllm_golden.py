"""An imported VG-LLM model against outputs, losses and gradients recorded with VG-LLM's code."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from encoder_inputs import pixel_values
from golden_files import Golden, find, is_vgllm_run
from vgllm_reference import (
    LOSSES,
    MAIN,
    VARIANTS,
    batch_of,
    computed,
    gradients,
    loss_of,
    model_of,
    state_of,
    tokenizer_of,
)
from w2r2_ds.convert.from_vgllm import split_state, vggt_config
from w2r2_ds.evaluation.generate import generate_tokens

pytestmark = pytest.mark.golden

LOSS_ERROR = 1e-4
"""Absolute tolerance; the files have the tolerance of activations only."""
GRADIENT_ERROR = 1e-3
"""Tolerance of a gradient, relative to its norm."""

FILES = find(is_vgllm_run)


def from_record(*names: str) -> list[Any]:
    """One parameter set ``(file, key or index)`` per item at the path `names` of a file's record."""
    sets = []
    for golden in FILES:
        found: Any = golden.record
        for name in names:
            found = found[name]
        items = list(found) if isinstance(found, dict) else range(len(found))
        sets += [pytest.param(golden, item, id=f"{golden.name}-{item}") for item in items]
    return sets


def recorded_outputs(gradients: bool) -> list[Any]:
    """``(file, variant, name)`` of every recorded output, or of every recorded gradient."""
    sets = []
    for golden in FILES:
        for key in golden.record["tensors"]:
            if key.startswith("out/") and key.startswith("out/grad_") == gradients:
                variant, _, name = key.removeprefix("out/").rpartition("/")
                sets.append(pytest.param(golden, variant, name, id=f"{golden.name}-{key}"))
    return sets


every_file = pytest.mark.parametrize("golden", [pytest.param(golden, id=golden.name) for golden in FILES])
every_route = pytest.mark.parametrize("route", LOSSES)


@every_file
def test_the_golden_tensors_match_their_json(golden: Golden) -> None:
    samples = golden.record["samples"]
    for index, stated in enumerate(samples):
        assert golden.shape(f"in/images_vggt_{index}") == (stated["frames"], 3, *stated["hw"])
    assert len(golden.tensors["in/image_grid_thw"]) == sum(stated["frames"] for stated in samples)
    assert len(golden.tensors["in/input_ids"]) == len(samples)
    shapes = {key: tuple(value.shape) for key, value in golden.tensors.items()}
    assert shapes == {key: golden.shape(key) for key in golden.record["tensors"]}


@every_file
def test_sizes_of_vggt_are_derived_from_its_tensors(golden: Golden) -> None:
    found, stated = vggt_config(split_state(state_of(golden))["vggt"]).to_dict(), golden.record["config"]["vggt"]
    assert {name: found[name] for name in stated} == stated


@pytest.mark.parametrize(("golden", "variant", "name"), recorded_outputs(gradients=False))
def test_outputs_equal_the_recorded_ones(golden: Golden, variant: str, name: str) -> None:
    assert variant in VARIANTS, f"{golden.path} has the variant {variant}, which no test covers"
    wanted = golden.tensors["/".join(filter(None, ("out", variant, name)))]
    found = computed(golden, variant)[name]
    assert found.shape == wanted.shape
    if name in ("logits", "position_ids"):  # at padding they are arbitrary
        used = golden.tensors["in/attention_mask"].bool()
        found, wanted = (values[:, used] if name == "position_ids" else values[used] for values in (found, wanted))
    bound = golden.tolerance if wanted.is_floating_point() else 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


@every_route
@every_file
def test_the_loss_equals_the_recorded_one(golden: Golden, route: str) -> None:
    assert LOSSES[route](golden).item() == pytest.approx(golden.record["results"]["loss"], abs=LOSS_ERROR)


@pytest.mark.parametrize(("golden", "variant"), from_record("variants"))
def test_loss_and_logits_of_variants_differ_as_recorded(golden: Golden, variant: str) -> None:
    stated, logits = golden.record["variants"][variant], computed(golden, variant)["logits"]
    assert loss_of(golden, logits).item() == pytest.approx(stated["loss"], abs=LOSS_ERROR)
    moved = (logits - computed(golden, MAIN)["logits"])[golden.tensors["in/attention_mask"].bool()]
    assert moved.abs().max().item() == pytest.approx(stated["max_abs_diff_to_main"], abs=2 * golden.tolerance)


@every_file
def test_positions_after_the_prompt_equal_the_recorded_ones(golden: Golden) -> None:
    positions, ids = batch_of(golden).position_ids, golden.tensors["in/input_ids"]
    assert positions is not None
    behind = positions.amax((0, 2)) + 1 - ids.shape[1]
    assert behind[:, None].tolist() == golden.record["results"]["rope_deltas"]


@every_file
@torch.no_grad()
def test_zero_geometry_after_the_merger_equals_the_stock_model_bitwise(golden: Golden) -> None:
    batch, base = batch_of(golden), model_of(golden, *VARIANTS["geometry_output_zero"][:2]).base
    stock = base(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=batch.token_types,
        pixel_values=pixel_values(batch.visuals),
        image_grid_thw=batch.visuals.grid_thw,
        use_cache=False,
    ).logits
    used = batch.attention_mask.bool()
    assert torch.equal(computed(golden, "geometry_output_zero")["logits"][used], stock[used])


@every_route
@every_file
def test_every_trained_weight_has_a_recorded_gradient(golden: Golden, route: str) -> None:
    assert gradients(golden, route).keys() == golden.record["grad_norm_and_sum"].keys()


@every_route
@pytest.mark.parametrize(("golden", "name"), from_record("grad_norm_and_sum"))
def test_norms_and_sums_of_gradients(golden: Golden, name: str, route: str) -> None:
    norm, total = golden.record["grad_norm_and_sum"][name]
    found = gradients(golden, route)[name]
    assert found.norm().item() == pytest.approx(norm, rel=GRADIENT_ERROR)
    assert found.sum().item() == pytest.approx(total, abs=GRADIENT_ERROR * norm)


@every_route
@pytest.mark.parametrize(("golden", "variant", "name"), recorded_outputs(gradients=True))
def test_gradients_of_the_merger_equal_the_recorded_ones(golden: Golden, variant: str, name: str, route: str) -> None:
    def bare(text: str) -> str:
        return text.removesuffix("weight").replace(".", "").replace("_", "")

    wanted = golden.tensors[f"out/{name}"]
    named = {bare(key): value for key, value in gradients(golden, route).items()}
    found = named[bare(name.removeprefix("grad_"))]
    torch.testing.assert_close(found, wanted, rtol=0, atol=GRADIENT_ERROR * float(wanted.norm()))


@every_file
def test_greedy_tokens_equal_the_recorded_ones(golden: Golden) -> None:
    """All prompts in one left-padded batch."""
    batch, stated, text = batch_of(golden), golden.record["results"]["greedy"], golden.record["config"]["text"]
    prompts = [batch.input_ids[case["sample"], : case["prompt_len"]] for case in stated]
    assert [case["sample"] for case in stated] == list(range(len(batch.ids))), "the visuals are those of all samples"
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        for rows, value in ((prompts, text["pad_token_id"]), ([torch.ones_like(row) for row in prompts], 0))
    )
    for_prompts = dataclasses.replace(
        batch,
        input_ids=ids,
        attention_mask=mask,
        token_types=(ids == text["image_token_id"]).long(),
        optional_answer_positions=None,
    )
    longest = max(len(case["new_tokens"]) for case in stated)
    model = model_of(golden, *VARIANTS[MAIN][:2])
    found = generate_tokens(model, for_prompts, tokenizer_of(golden), "fused", longest, video_fps=1.0)
    wanted = [case["new_tokens"] for case in stated]
    assert [row[: len(case)] for row, case in zip(found, wanted, strict=True)] == wanted
