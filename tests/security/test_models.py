"""Untrusted model and adapter folders: no code in them runs, and no pickle is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.config.io import load_config, save_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.convert.from_vgllm import check_no_remote_code
from w2r2_ds.convert.peft_adapter import adapter_config, export_adapter, load_adapter
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.weights.loading import load_tokenizer, load_vlm, meta_model
from w2r2_ds.training.checkpoint.manifest import write_manifest
from w2r2_ds.utils.files.safetensors_io import weight_files
from w2r2_ds.utils.versions import versions

WEIGHTS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_in_a_pickle_are_not_read(vlm_folder: Path, payload: Any, mark: Path) -> None:
    """Not even harmless ones. Without `use_safetensors`, transformers would load them."""
    torch.save(load_file(vlm_folder / WEIGHTS), vlm_folder / BIN)
    (vlm_folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"cannot read model weights \(.*no file named model.safetensors"):
        load_vlm(vlm_folder, torch.float32)
    torch.save(payload, vlm_folder / BIN)
    with pytest.raises(ValueError, match="cannot read model weights"):
        load_vlm(vlm_folder, torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize("name", [BIN, "../other.safetensors", "/etc/passwd.safetensors", ".."])
def test_an_index_may_list_safetensors_of_its_folder_only(vlm_folder: Path, name: str) -> None:
    tensors = load_file(vlm_folder / WEIGHTS)
    torch.save(tensors, vlm_folder / BIN)
    (vlm_folder / WEIGHTS).rename(vlm_folder.parent / "other.safetensors")
    (vlm_folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    for load in (lambda: load_vlm(vlm_folder, torch.float32), lambda: weight_files(vlm_folder)):
        with pytest.raises(ValueError, match=r"index\.json names .*, which is (no safetensors file|not beside it)"):
            load()


def test_code_of_a_model_folder_is_not_run(vlm_folder: Path, code: str, mark: Path) -> None:
    """`trust_remote_code` would import the modules in `auto_map`. The stock classes are used."""
    (vlm_folder / "evil.py").write_text(code)
    models = {name: "evil.Model" for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")}
    edit(vlm_folder / "config.json", auto_map={"AutoConfig": "evil.Config", **models})
    edit(vlm_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    assert type(load_vlm(vlm_folder, torch.float32)).__module__.startswith("transformers.")
    assert type(load_tokenizer(vlm_folder)).__module__.startswith("transformers.")
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_class_of_the_folders_own_code_is_not_imported(
    vlm_folder: Path, code: str, mark: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vlm_folder / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(vlm_folder))
    changes: dict[str, Any] = {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
        "tokenizer_config.json": {
            "tokenizer_class": "Tokenizer",
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer"] * 2},
        },
    }
    edit(vlm_folder / file, **changes[file])
    try:
        assert type(load_tokenizer(vlm_folder)).__module__.startswith("transformers.")
    except ValueError as error:
        assert str(vlm_folder) in str(error)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
def test_attention_of_the_hub_is_rejected(vlm_folder: Path, part: str) -> None:
    """transformers would download OWNER/NAME and run it, even without `trust_remote_code`."""
    raw = json.loads((vlm_folder / "config.json").read_text())
    (raw[part] if part else raw)["attn_implementation"] = "owner/kernel:forward"
    (vlm_folder / "config.json").write_text(json.dumps(raw))
    for load in (lambda: load_vlm(vlm_folder, torch.float32), lambda: meta_model(vlm_folder)):
        with pytest.raises(ValueError, match=r"attn_implementation 'owner/kernel:forward' is code of the Hugging"):
            load()


def test_attention_of_the_hub_is_rejected_as_an_option(model_config: Any) -> None:
    with pytest.raises(ValueError, match=r"model.attention is 'owner/kernel'; .* not a kernel of the Hugging"):
        load_config(overrides=["--model.attention", "owner/kernel"])
    with pytest.raises(ValueError, match=r"model.attention owner/kernel is code of the Hugging Face Hub"):
        load_vlm(model_config.vlm, torch.float32, "owner/kernel")


def test_flash_attention_that_is_not_installed_is_not_fetched(
    model_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2r2_ds.models.weights.hub_safety.import_problem", lambda name: "is not installed")
    with pytest.raises(ValueError, match=r"flash_attention_2.*flash_attn is not installed"):
        load_vlm(model_config.vlm, torch.float32, "flash_attention_2")


def test_an_adapter_in_a_model_folder_is_rejected(vlm_folder: Path) -> None:
    """transformers would load it automatically, with any class in its configuration."""
    (vlm_folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(ValueError, match=r"holds a PEFT adapter \(adapter_config.json\)"):
        load_vlm(vlm_folder, torch.float32)


@pytest.fixture(scope="module")
def checkpoint(model_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the engine saves it, with changed LoRA weights."""
    config = RunConfig(model=model_config)
    model = build_model(config.model, torch.device("cpu"), seed=1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file({name: p.detach().contiguous() for name, p in trainable(model).items()}, folder / "trainable.safetensors")
    save_config(config, folder / "config.yaml")
    description = {"step": 0, "model": model.fingerprint, "metrics": {}, "versions": versions()}
    write_manifest(folder, description, {})
    return folder


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    return export_adapter(checkpoint, tmp_path / "adapter")


def read(adapter: Path) -> Any:
    return load_adapter(adapter, adapter_config(adapter), torch.device("cpu"))


def test_an_adapter_config_cannot_import_modules(
    adapter: Path, checkpoint: Path, code: str, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports the module in `megatron_core`. This package reads only the tensors of the folder."""
    (adapter / "evil_core.py").write_text(code)
    monkeypatch.syspath_prepend(str(adapter))
    edit(adapter / "adapter_config.json", megatron_core="evil_core", megatron_config={"a": 1})
    model = read(adapter)
    assert not mark.exists() and "evil_core" not in sys.modules
    saved = load_file(checkpoint / "trainable.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trainable(model).items())


def test_an_adapter_in_a_pickle_is_not_read(adapter: Path, payload: Any, mark: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    for content in (tensors, payload):
        torch.save(content, adapter / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: cannot read the LoRA weights"):
            read(adapter)
    assert not mark.exists()


def test_an_adapter_with_other_tensors_is_rejected(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    for content, sentence in (
        (tensors | {"stray": torch.zeros(1)}, "stray is in it but not in the model"),
        ({key: value for key, value in tensors.items() if key != name}, f"{name} is missing in it"),
        (tensors | {name: torch.zeros(1, 1)}, rf"{name} has shape \(1, 1\), the model"),
    ):
        save_file(content, file)
        with pytest.raises(ValueError, match=sentence):
            read(adapter)


def test_a_model_card_is_parsed_as_plain_values(
    adapter: Path, mark: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "evil_card.py").write_text(code)
    monkeypatch.syspath_prepend(str(adapter))
    card = json.loads((adapter / "w2r2_card.json").read_text())
    for section, values, sentence in (
        ("data", {"class_path": "evil_card.Config"}, "data.class_path"),
        ("data", "evil_card.Config", r"configuration: data: .*evil_card.Config"),
        ("model", {"attention": "owner/kernel"}, "not a kernel of the Hugging Face Hub"),
        ("model", {"lora_rank": "many"}, r"w2r2_card.json: configuration: model.lora_rank: .*many"),
        ("nothing", 1, "there is no option nothing"),
    ):
        (adapter / "w2r2_card.json").write_text(
            json.dumps(card | {"configuration": card["configuration"] | {section: values}})
        )
        with pytest.raises(ValueError, match=sentence):
            adapter_config(adapter)
    (adapter / "w2r2_card.json").write_text("{}")
    with pytest.raises(ValueError, match=r"w2r2_card.json: field 'configuration' is missing"):
        adapter_config(adapter)
    assert not mark.exists()


def test_code_in_the_readme_quotes_paths(checkpoint: Path, model_config: Any, tmp_path: Path) -> None:
    """An unquoted path with a quote in it would inject code into the README's example."""
    folder = tmp_path / 'a"); import os; ("'
    folder.symlink_to(model_config.vlm)
    text = (export_adapter(checkpoint, tmp_path / "out", vlm=str(folder)) / "README.md").read_text()
    assert f"from_pretrained({json.dumps(str(folder))}, dtype" in text


@pytest.mark.parametrize("target", ["../../blobs", "/shared"])
def test_an_import_follows_links_and_copies_no_code(target: str, tmp_path: Path) -> None:
    """Snapshots in the hub's cache are links to blobs; other model folders may be links to another disk."""
    source = tmp_path / "models--a--b" / "snapshots" / "a1"
    source.mkdir(parents=True)
    blobs = tmp_path / "shared_fixtures" if target == "/shared" else source / target
    blobs.mkdir()
    for name, content in (("0123", "{}"), ("4567", '{"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}')):
        (blobs / name).write_text(content)
    (source / "tokenizer.json").symlink_to(blobs / "0123")
    check_no_remote_code(source / "tokenizer.json")
    (source / "tokenizer_config.json").symlink_to(blobs / "4567")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: auto_map"):
        check_no_remote_code(source / "tokenizer_config.json")
