"""A VLM family from one file outside the package: loaded, trained for a step in both pass orders, decoded."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import w2r2_ds
from w2r2_ds.config.schema import DataConfig, ModelConfig, RunConfig
from w2r2_ds.data.loader import make_collate, make_processor, prompt_loader
from w2r2_ds.data.prepare.features import FeatureSizes
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.features.store import file_size
from w2r2_ds.models import family
from w2r2_ds.models.build import VlmFrontend, build_model, kernel_shapes, load_frontend
from w2r2_ds.models.family import BUILT_IN, find_family
from w2r2_ds.models.feature_cache import open_cache, vision_identity
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.models.weights.loading import load_vlm
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.vision import TowerSizes
from w2r2_ds.utils import plugins

PLUGIN = Path(__file__).parents[2] / "examples" / "custom_vlm_family.py"


@pytest.fixture
def stacked(model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelConfig]:
    """The tiny model's weights under the `model_type` of the plug-in."""
    monkeypatch.setattr(plugins, "IMPORTED", [])
    with patch.dict(family.VLM_FAMILIES):
        assert plugins.import_plugins(["--plugin", str(PLUGIN)]) == []
        folder = Path(shutil.copytree(model_config.vlm, tmp_path / "vlm"))
        fields = json.loads((folder / "config.json").read_text())
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**{**fields, "model_type": "stacked_vl"}))
        model.load_state_dict(load_vlm(model_config.vlm, torch.float32).state_dict())
        model.save_pretrained(folder)
        yield replace(model_config, vlm=str(folder))


@pytest.fixture
def additions(stacked: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The features of every addition, one per pass of the language model."""
    kind: Any = type(family.VLM_FAMILIES["stacked_vl"])
    found: list[torch.Tensor] = []
    real = kind.add_features

    def record(self: Any, hidden: torch.Tensor, positions: torch.Tensor, visual: Any) -> torch.Tensor:
        found.append(visual.stacked)
        result: torch.Tensor = real(self, hidden, positions, visual)
        return result

    monkeypatch.setattr(kind, "add_features", record)
    return found


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


def batch_of(frontend: VlmFrontend, config: DataConfig, samples: list[Any], with_prompts: bool = False) -> Any:
    processor = make_processor(frontend, config)
    return make_collate(frontend, config, with_prompts)([processor(sample, True) for sample in samples])


def test_a_family_from_one_file_trains(
    stacked: ModelConfig,
    additions: list[torch.Tensor],
    model_config: ModelConfig,
    tables: Any,
    samples: list[Any],
    data_config: Any,
) -> None:
    frontend = load_frontend(stacked)
    assert frontend.family.model_type == "stacked_vl"
    batch = batch_of(frontend, data_config(), samples[:2])
    runs = []
    for order in ("sequential", "lockstep"):
        additions.clear()
        runs.append(one_step(stacked, frontend, tables, batch, order))
        fused, shortcut = additions
        assert torch.equal(fused, shortcut) and len(fused) == len(batch.visual_tokens), "both passes add the features"
    torch.testing.assert_close(runs[0], runs[1])
    assert torch.isfinite(runs[0][0]) and runs[0][1] > 0
    stock, _ = one_step(model_config, frontend, tables, batch, "sequential")
    assert not torch.isclose(runs[0][0], stock), "the layer features change the loss"


def test_layer_features_are_cached_and_selected_with_their_images(
    stacked: ModelConfig, samples: list[Any], data_config: Any
) -> None:
    """Cached features are read back, and a selection has the layer features of its images."""
    frontend = load_frontend(stacked)
    batch = batch_of(frontend, data_config(), samples[:1])
    visual: Any = build_model(stacked, torch.device("cpu"), 0).encode_2d(batch.visuals)
    again: Any = frontend.family.from_cache(frontend.family.to_cache(visual), batch.visuals.sizes)
    assert torch.equal(again.stacked, visual.stacked)
    assert all(map(torch.equal, again.pooler_output, visual.pooler_output))
    chosen: Any = frontend.family.select(visual, [1, 0, 1])
    # The family adds the 2D tokens themselves, so that both stay equal.
    assert torch.equal(chosen.stacked, torch.cat(chosen.pooler_output))
    assert torch.equal(chosen.pooler_output[0], visual.pooler_output[1])


def test_cache_keys_depend_on_the_cached_channels(stacked: ModelConfig, tmp_path: Path, data_config: Any) -> None:
    """Equal weights and equal settings, but `to_cache` of one family adds the layer features."""
    config: Any = type("PlainConfig", (type(AutoConfig.from_pretrained(stacked.vlm)),), {"model_type": "plain_vl"})
    AutoConfig.register("plain_vl", config, exist_ok=True)
    family.register_family(type("Plain", (Qwen25VL,), {"model_type": "plain_vl"})())
    folder = Path(shutil.copytree(stacked.vlm, tmp_path / "plain"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "plain_vl"}))
    assert vision_identity(data_config(), replace(stacked, vlm=str(folder))) != vision_identity(data_config(), stacked)


def test_decoding_adds_the_layer_features(
    stacked: ModelConfig, additions: list[torch.Tensor], samples: list[Any], data_config: Any
) -> None:
    """The first greedy token is that of the training pass, and only the prompt gets the features."""
    frontend = load_frontend(stacked)
    batch = batch_of(frontend, data_config(), samples[:1], with_prompts=True)
    model = build_model(stacked, torch.device("cpu"), 0).eval()
    with torch.no_grad():
        visual = model.fuse(model.encode_2d(batch.visuals), None)
        first = int(model.logits(model.answer_hidden_states(batch, visual))[0].argmax())
        additions.clear()
        (ids,) = frontend.family.generate(
            model.base, batch.prompts, batch.visuals, visual, frontend.tokenizer, max_new_tokens=4, video_fps=1.0
        )
    assert first != frontend.tokenizer.convert_tokens_to_ids(frontend.family.end_of_turn)
    assert ids[0] == first and len(additions) == 1


@pytest.mark.parametrize("configured", [None, 5, [5, 6]])
def test_end_tokens_are_the_end_of_turn_and_those_of_the_generation_config(
    vlm: Any, frontend: VlmFrontend, configured: Any
) -> None:
    vlm.generation_config.eos_token_id = configured
    end_of_turn = frontend.tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = {"None": (), "5": (5,), "[5, 6]": (5, 6)}[str(configured)]
    assert frontend.family.end_tokens(vlm, frontend.tokenizer) == (end_of_turn, *expected)
    vlm.generation_config.eos_token_id = [end_of_turn, 5]
    assert frontend.family.end_tokens(vlm, frontend.tokenizer) == (end_of_turn, 5)


@pytest.mark.parametrize("plugin", [False, True])
def test_decoding_stops_at_every_end_token(
    model_config: ModelConfig,
    stacked: ModelConfig,
    tables: Any,
    samples: list[Any],
    data_config: Any,
    plugin: bool,
) -> None:
    """Evaluation, and the decoded shortcut of training; of the plug-in alike."""
    config = stacked if plugin else model_config
    frontend, tokenizer = load_frontend(config), load_frontend(config).tokenizer
    run = RunConfig(model=config)
    run.objective.shortcut_decode = "greedy"
    step = W2R2Step(build_model(config, torch.device("cpu"), 0), run, Scorer(tables, tokenizer, run.objective)).eval()
    batch = batch_of(frontend, data_config(), samples[:1], with_prompts=True)
    vlm = step.model.base
    assert step.scorer.end_tokens == frontend.family.end_tokens(vlm, tokenizer), "teacher-forced texts end there too"
    with torch.no_grad():  # so that tokens do not repeat
        for layer in vlm.model.language_model.layers:
            layer.mlp.down_proj.weight.normal_(generator=torch.Generator().manual_seed(0))

    visual = step.model.fuse(step.model.encode_2d(batch.visuals), None)
    forwards: list[int] = []
    vlm.get_output_embeddings().register_forward_hook(lambda *_: forwards.append(1))

    def generated() -> list[list[int]]:
        forwards.clear()
        return frontend.family.generate(vlm, batch.prompts, batch.visuals, visual, tokenizer, 12, video_fps=1.0)

    vlm.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = generated()
    assert [len(tokens) for tokens in ids] == [12] and len(forwards) == 12, "the untrained model does not stop"
    # A token of the answer becomes a second end token.
    index, end = next((index, token) for index, token in enumerate(ids[0]) if index > 1 and token not in ids[0][:index])
    vlm.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>"), end]
    assert generated() == [ids[0][:index]] and len(forwards) == index + 1
    assert step.decode(batch, visual) == [tokenizer.decode(ids[0][:index], skip_special_tokens=True)]


def test_vision_tower_sizes_come_from_the_family(stacked: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merger, resampling and fingerprint take them from the family, not from fields of its config.json."""
    kind = type(family.VLM_FAMILIES["stacked_vl"])
    monkeypatch.setattr(kind, "tower_sizes", lambda self, config: TowerSizes(patch_size=7, merge_size=3, depth=5))
    model = build_model(stacked, torch.device("cpu"), 0)
    assert model.geometry_merger.merge_size == 3 and model.fingerprint["vision_depth"] == 5
    grid = torch.randn(1, 5, 6, model.geometry.spec.feature_dim)
    monkeypatch.setattr(model.geometry, "encode", lambda images: grid)
    images = torch.zeros(1, 3, 70, 84, dtype=torch.uint8)
    visuals: Any = SimpleNamespace(cached_3d=(), geometry_frames=(images,), scale_reference=(), kind="image")
    (features,) = model.encode_3d(visuals)
    assert features.shape[1:3] == (9, 12), "70 x 84 pixels hold 10 x 12 patches of 7, in cells of 3 x 3"


def test_names_that_a_family_may_lack_are_not_used_outside_it(
    stacked: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The width of the MLPs, which only measured kernels need, and the name of the output head."""
    kind = type(family.VLM_FAMILIES["stacked_vl"])

    def lacking(self: Any, config: Any) -> int:
        raise AttributeError("intermediate_size")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "mlp_width", lacking)
        model = build_model(replace(stacked, kernels="torch"), torch.device("cpu"), 0)
    monkeypatch.setattr(kind, "mlp_width", lambda self, config: 7)
    assert kernel_shapes(stacked).intermediate == 7
    head = torch.nn.Linear(model.base.config.get_text_config().hidden_size, 3)
    monkeypatch.setattr(type(model.base), "get_output_embeddings", lambda self: head)
    assert model.logits(torch.zeros(2, head.in_features)).shape == (2, 3)


def test_the_computed_size_of_a_feature_file_includes_the_layer_features(
    stacked: ModelConfig, samples: list[Any], data_config: Any, tmp_path: Path
) -> None:
    data = data_config(cache=str(tmp_path / "cache"), cached_features="geometry+2d")
    frontend = load_frontend(stacked)
    cache = open_cache(data, stacked)
    assert cache is not None
    preprocess = VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, data, cache)
    sizes = FeatureSizes(RunConfig(model=stacked, data=data), frontend.vision, frontend.geometry, cache)
    model = build_model(stacked, torch.device("cpu"), 0)
    stored = model.family.to_cache(model.encode_2d(batch_of(frontend, data_config(), samples[:1]).visuals))
    assert sizes.upper_bounds(samples[0], preprocess)[1] == file_size(stored.shape, stored.dtype)


def test_only_the_registry_and_the_default_model_mention_a_family() -> None:
    """In code without comments and docstrings, outside the family's folder and packages for one model (demo, bench)."""
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


def test_an_unknown_family_names_the_file_and_the_known_families() -> None:
    with pytest.raises(ValueError, match=r"here/config\.json: model_type is 'other'.*qwen2_5_vl"):
        find_family("other", "here/config.json")


@pytest.mark.distributed
def test_loader_workers_that_are_not_forked_import_the_plugin(
    stacked: ModelConfig, samples: list[Any], data_config: Any
) -> None:
    """As with the default start method of Python 3.14."""
    loader = prompt_loader(samples[:1], load_frontend(stacked), data_config(workers=1), 1)
    loader.multiprocessing_context = "forkserver"
    (batch,) = loader
    assert batch.ids == (samples[0].id,)
