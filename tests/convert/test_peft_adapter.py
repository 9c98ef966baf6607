"""An exported adapter: loaded by stock PEFT and transformers, and by the package's evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from encoder_inputs import pixel_values
from runs import STEPS, World, read_metrics
from trained_models import load_trained_model
from w2r2_ds.config.io import save_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.convert.peft_adapter import _absolute, adapter_config, export_adapter, load_adapter, readme
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import prompt_loader
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.evaluation.runner import evaluate
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.training.checkpoint.manifest import write_manifest
from w2r2_ds.utils.versions import versions

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def adapter(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported adapter of the run."""
    return export_adapter(trained, tmp_path_factory.mktemp("export") / "adapter")


@torch.no_grad()
def test_an_adapter_loads_with_stock_peft_and_transformers(adapter: Path, trained: Path, world: World) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    config, model, frontend = load_trained_model(trained)
    plain = AutoModelForImageTextToText.from_pretrained(world.folder / "vlm", dtype=torch.float32).eval()
    (batch,) = prompt_loader(load_mixture(config.data, "val")[:3], frontend, config.data, 3)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "mm_token_type_ids": batch.token_types,
        "pixel_values": pixel_values(batch.visuals),
        "image_grid_thw": batch.visuals.grid_thw,
    }
    untrained = plain(**inputs).logits
    stock = PeftModel.from_pretrained(plain, str(adapter)).eval()(**inputs).logits
    # Float32 sums in another order: the patch embedding is a matrix product, and every prompt attends by itself. The
    # states of padding are not defined.
    own = batch.attention_mask.bool()
    torch.testing.assert_close(model.vlm(**inputs).logits[own], stock[own], atol=2e-5, rtol=0)
    assert (stock - untrained).abs().max() > 1e-2, "the adapter changes the model"


@pytest.mark.parametrize("geometry", ["fused", "zero"])
def test_the_adapter_gives_the_answers_of_its_checkpoint(
    adapter: Path, trained: Path, tmp_path: Path, geometry: str
) -> None:
    outs = []
    for source in (trained, adapter):
        outs.append(tmp_path / source.name)
        evaluate(source, outs[-1], EvaluationOptions(geometry, batch_size=8, max_new_tokens=40))
    ours, theirs = [(out / f"predictions-scanrefer-{geometry}.jsonl").read_text() for out in outs]
    assert ours == theirs and ours


def test_the_exported_merger_equals_the_trained_one(adapter: Path, trained: Path) -> None:
    _, ours, _ = load_trained_model(adapter)
    _, theirs, _ = load_trained_model(trained)
    merger = theirs.geometry_merger.state_dict()
    assert all(torch.equal(tensor, merger[name]) for name, tensor in ours.geometry_merger.state_dict().items())


@pytest.fixture(params=["add", "concat", "cross_attention", "gated"])
def untrained(request: pytest.FixtureRequest, model_config: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A model with a changed value in every trained tensor, and a checkpoint of it as the engine writes it."""
    config = RunConfig(model=type(model_config)(**{**vars(model_config), "fusion": request.param}))
    model = build_model(config.model, torch.device("cpu"), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({name: p.detach().contiguous() for name, p in trainable(model).items()}, folder / "trainable.safetensors")
    save_config(config, folder / "config.yaml")
    description = {"step": 0, "model": model.fingerprint, "metrics": {}, "versions": versions()}
    write_manifest(folder, description, {})
    return model, folder


def test_a_fusion_is_exported_beside_the_merger(
    untrained: tuple[Any, Path], tmp_path: Path, batch_of: Any, samples: list[Any]
) -> None:
    model, checkpoint = untrained
    out = export_adapter(checkpoint, tmp_path / "adapter")
    names = set(load_file(out / "geometry_merger.safetensors"))
    vgllm = {"ln_q.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert names == vgllm | {f"fusion.{name}" for name, _ in model.fusion.named_parameters()}
    loaded = load_adapter(out, adapter_config(out), torch.device("cpu"))
    assert type(loaded.fusion) is type(model.fusion)
    visuals = batch_of(samples[:2]).visuals
    with torch.no_grad():
        ours, theirs = (
            torch.cat(m.fuse(m.encode_2d(visuals), m.merge(m.encode_3d(visuals))).pooler_output)
            for m in (model.eval(), loaded.eval())
        )
    assert torch.equal(ours, theirs)


def test_an_adapter_of_a_relative_path_loads_in_another_working_directory(
    model_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModel

    vlm = Path(model_config.vlm)
    monkeypatch.chdir(vlm.parent)
    geometry = replace(model_config.geometry, path=Path(model_config.geometry.path).name)
    config = RunConfig(model=replace(model_config, vlm=vlm.name, geometry=geometry))
    model = build_model(config.model, torch.device("cpu"), seed=1)
    (tmp_path / "checkpoint").mkdir()
    tensors = {name: parameter.detach().contiguous() for name, parameter in trainable(model).items()}
    save_file(tensors, tmp_path / "checkpoint" / "trainable.safetensors")
    save_config(config, tmp_path / "checkpoint" / "config.yaml")
    description = {"step": 0, "model": model.fingerprint, "metrics": {}, "versions": versions()}
    write_manifest(tmp_path / "checkpoint", description, {})
    out = export_adapter(tmp_path / "checkpoint", tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModel.from_pretrained(str(out))
    assert loaded.peft_config["default"].base_model_name_or_path == str(vlm.absolute())
    assert adapter_config(out).model.geometry.path == str(vlm.parent.absolute() / geometry.path)
    assert type(load_adapter(out, adapter_config(out), torch.device("cpu"))) is type(model)
    assert str(vlm.absolute()) in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-3B-Instruct", "", "/models/vlm"])
def test_other_names_of_base_models_stay(name: str) -> None:
    assert _absolute(name) == name


def test_missing_or_unknown_fusion_tensors_are_rejected(untrained: tuple[Any, Path], tmp_path: Path) -> None:
    _, checkpoint = untrained
    out = export_adapter(checkpoint, tmp_path / "adapter")
    file = out / "geometry_merger.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"fusion.stray": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"geometry_merger\.safetensors: fusion\.stray is in it but not in the model"):
        load_adapter(out, adapter_config(out), torch.device("cpu"))
    for name in (name for name in tensors if name.startswith("fusion.")):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
        with pytest.raises(ValueError, match=f"{name} is missing in it"):
            load_adapter(out, adapter_config(out), torch.device("cpu"))


def test_an_adapter_of_another_fusion_is_rejected(untrained: tuple[Any, Path], tmp_path: Path) -> None:
    _, checkpoint = untrained
    out = export_adapter(checkpoint, tmp_path / "adapter")
    card = json.loads((out / "w2r2_card.json").read_text())
    other = "add" if card["model"]["fusion"] != "add" else "gated"
    card["configuration"]["model"]["fusion"] = other
    (out / "w2r2_card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=f"model.fusion is '{card['model']['fusion']}', but .* has '{other}'"):
        load_adapter(out, adapter_config(out), torch.device("cpu"))


def test_the_folder_has_trained_tensors_only(adapter: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {}
    for path in sorted(adapter.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes[path.name] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert sorted(shapes) == ["adapter_model.safetensors", "geometry_merger.safetensors"]
    assert all(0 not in shape and shape for names in shapes.values() for shape in names.values())
    assert len(shapes["adapter_model.safetensors"]) == 56
    assert all("lora_" in name for name in shapes["adapter_model.safetensors"])


def test_the_card_has_model_configuration_and_metrics(adapter: Path, trained: Path, world: World) -> None:
    card = json.loads((adapter / "w2r2_card.json").read_text())
    assert card["base_model"] == str(world.folder / "vlm")
    assert card["geometry_model"] == str(world.folder / "vggt")
    assert card["step"] == STEPS
    assert card["configuration"]["data"]["root"] == str(world.folder / "scenes")
    last = read_metrics(trained)[-1]
    assert card["training_metrics"]["loss"] == last["loss"]
    for made in ("trained_with", "exported_with"):
        assert {"w2r2_ds", "torch", "transformers", "peft", "deepspeed", "python"} <= card[made].keys()
    adapter_config = json.loads((adapter / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(world.folder / "vlm")


def test_the_readme_has_metadata_and_code_that_compiles(adapter: Path, world: World) -> None:
    text = (adapter / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == str(world.folder / "vlm") and head["library_name"] == "peft"
    assert f"trained with W2R2-DS {versions()['w2r2_ds']} to step {STEPS}." in text
    assert "push term `margin`, lambda 1.5, mu 0.0." in text
    assert f"layers [2] of {world.folder / 'vggt'}" in text
    named = {file.name for file in adapter.iterdir()} - {"README.md"}
    assert all(f"`{name}`" in text for name in named), named
    assert "[More Information Needed]" not in text  # of peft's empty template
    compile("\n".join(line[4:] for line in text.split("transformers only")[1].splitlines()[1:]), "README.md", "exec")


def test_the_readme_of_an_encoder_without_files() -> None:
    content: dict[str, Any] = {
        "base_model": "owner/vlm",
        "geometry_model": "",
        "model": {"geometry_encoder": "point_map", "geometry_layers": [0], "fusion": "add"},
        "trained_with": {"w2r2_ds": "1.2.3"},
        "step": 7,
        "configuration": {"objective": {"push_term": {"name": "none"}, "lambda_det": 1.0, "mu": 0.5}},
    }
    text = readme(content)
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["w2r2", "point_map"]
    assert "encoder `point_map`" in text and "layers" not in text and " of  " not in text


def test_an_adapter_is_not_exported_again(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{adapter} is an exported adapter already"):
        export_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_rejected(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty"):
        export_adapter(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-run holds no complete checkpoint"):
        export_adapter(tmp_path / "no-run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
