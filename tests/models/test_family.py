"""A VLM family from one file outside the package: registered, loaded, trained for one step in both pass orders."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import w2r2_ds
from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.models.build import VlmFrontend, build_model, load_frontend
from w2r2_ds.models.family import BUILT_IN, VLM_FAMILIES, find_family, register_family
from w2r2_ds.models.loading import load_vlm
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step

FIRST = 0
"""Layer after which the family adds visual features, as DeepStack does."""


class StackedConfig(Qwen2_5_VLConfig):
    model_type = "stacked_vl"


class StackedVLM(Qwen2_5_VLForConditionalGeneration):
    config_class = StackedConfig


class StackedFamily(Qwen25VL):
    """Qwen2.5-VL whose 2D tokens are added once more after the first decoder layer, as in DeepStack."""

    model_type = "stacked_vl"
    added: ClassVar[list[torch.Tensor]] = []
    """Features of every addition, one per pass of the language model."""

    def encode_visuals(self, vlm: Any, visuals: Any) -> Any:
        output = super().encode_visuals(vlm, visuals)
        output.deepstack_features = torch.cat(output.pooler_output)
        return output

    def to_cache(self, visual: Any) -> torch.Tensor:
        return torch.cat([torch.cat(visual.pooler_output), visual.deepstack_features], dim=-1)

    def from_cache(self, features: torch.Tensor, sizes: Any) -> Any:
        pooled, stacked = features.chunk(2, dim=-1)
        output = super().from_cache(pooled, sizes)
        output.deepstack_features = stacked
        return output

    def select(self, visual: Any, entries: Any) -> Any:
        selected = super().select(visual, entries)
        parts = visual.deepstack_features.split([len(tokens) for tokens in visual.pooler_output])
        selected.deepstack_features = torch.cat([parts[entry] for entry in entries])
        return selected

    def add_layer_features(self, hidden: Any, layer: int, batch: Any, visual: Any) -> Any:
        if layer != FIRST:
            return hidden
        self.added.append(visual.deepstack_features)
        rows = hidden.flatten(0, 1).index_add(0, batch.visual_tokens, visual.deepstack_features)
        return rows.view_as(hidden)

    def row_states(self, vlm: Any, batch: Any, inputs: Any, visual: Any, *rest: Any) -> Any:
        layer = self.language_model(vlm).layers[FIRST]
        hook = layer.register_forward_hook(lambda _, __, out: self.add_layer_features(out, FIRST, batch, visual))
        try:
            return super().row_states(vlm, batch, inputs, visual, *rest)
        finally:
            hook.remove()


@pytest.fixture
def stacked(model_config: ModelConfig, tmp_path: Path) -> Iterator[ModelConfig]:
    """The tiny model's weights under the new `model_type`; the registry is put back afterwards."""
    folder = Path(shutil.copytree(model_config.vlm, tmp_path / "vlm"))
    stock = load_vlm(model_config.vlm, torch.float32)
    AutoConfig.register("stacked_vl", StackedConfig, exist_ok=True)
    AutoModelForImageTextToText.register(StackedConfig, StackedVLM, exist_ok=True)
    fields = json.loads((folder / "config.json").read_text())
    model = StackedVLM(StackedConfig(**{**fields, "model_type": "stacked_vl"}))
    model.load_state_dict(stock.state_dict())
    model.save_pretrained(folder)
    register_family(StackedFamily())
    yield replace(model_config, vlm=str(folder))
    del VLM_FAMILIES["stacked_vl"]
    StackedFamily.added.clear()


def one_step(config: ModelConfig, frontend: VlmFrontend, tables: Any, batch: Any, order: str) -> tuple[Any, Any]:
    """Loss and gradient norm of the LoRA weights after one forward and backward."""
    run = RunConfig(model=config)
    run.train.pass_order = order  # type: ignore[assignment]
    model = build_model(config, torch.device("cpu"), 0)
    step = W2R2Step(model, run, Scorer(tables, frontend.tokenizer, run.objective)).train()
    loss, _ = step(batch)
    loss.backward()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.stack(gradients).norm()


def test_a_family_from_one_file_trains(
    stacked: ModelConfig, model_config: ModelConfig, tables: Any, samples: list[Any], data_config: Any
) -> None:
    frontend = load_frontend(stacked)
    assert isinstance(frontend.family, StackedFamily)
    config = data_config()
    batch = make_collate(frontend, config, False)([make_processor(frontend, config)(s, True) for s in samples[:2]])
    runs = []
    for order in ("sequential", "lockstep"):
        StackedFamily.added.clear()
        runs.append(one_step(stacked, frontend, tables, batch, order))
        fused, shortcut = StackedFamily.added
        assert torch.equal(fused, shortcut) and len(fused) == len(batch.visual_tokens), "both passes add the features"
    torch.testing.assert_close(runs[0], runs[1])
    assert torch.isfinite(runs[0][0]) and runs[0][1] > 0
    stock, _ = one_step(model_config, frontend, tables, batch, "sequential")
    assert not torch.isclose(runs[0][0], stock), "the layer features change the loss"


def test_layer_features_are_cached_and_selected_with_their_images(
    stacked: ModelConfig, samples: list[Any], data_config: Any
) -> None:
    """Cached features are read back, and a selection has the layer features of its images."""
    frontend, config = load_frontend(stacked), data_config()
    batch = make_collate(frontend, config, False)([make_processor(frontend, config)(samples[0], True)])
    visual: Any = build_model(stacked, torch.device("cpu"), 0).encode_2d(batch.visuals)
    again: Any = frontend.family.from_cache(frontend.family.to_cache(visual), batch.visuals.sizes)
    assert torch.equal(again.deepstack_features, visual.deepstack_features)
    assert all(map(torch.equal, again.pooler_output, visual.pooler_output))
    chosen: Any = frontend.family.select(visual, [1, 0, 1])
    # The family adds the 2D tokens themselves, so that both stay equal.
    assert torch.equal(chosen.deepstack_features, torch.cat(chosen.pooler_output))
    assert torch.equal(chosen.pooler_output[0], visual.pooler_output[1])


def test_only_the_registry_and_the_default_model_name_a_family() -> None:
    """Code without comments and docstrings, outside the family's folder and what is about one model (demo, bench)."""
    root = Path(w2r2_ds.__file__).parent
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if name.startswith(("models/qwen2_5_vl/", "convert/", "demo/", "bench/")):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                strings = [each for each in body if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
                node.body = [each for each in body if each not in strings] or [ast.Pass()]  # type: ignore[attr-defined]
        for line in ast.unparse(tree).splitlines():
            if re.search(r"qwen|<\|", line, re.IGNORECASE):
                found.setdefault(name, []).append(line.strip())
    assert found.pop("config/schema.py") == [f"vlm: str = {ModelConfig().vlm!r}"]
    assert found.pop("models/family.py") == [f"BUILT_IN = {BUILT_IN!r}"]
    assert found == {}


def test_an_unknown_family_names_the_file_and_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"here/config\.json: model_type 'other'.*qwen2_5_vl"):
        find_family("other", "here/config.json")
