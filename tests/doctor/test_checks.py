"""The doctor's checks of one node: no error on a correct machine, and an error for each fault."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from depth_scenes import with_depth
from prepared_sets import write_prepared
from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.doctor import checks, run
from w2r2_ds.doctor.checks import data, environment, gpu, host, settings
from w2r2_ds.doctor.report import differences
from w2r2_ds.doctor.result import CheckResult, RankReport


def test_package_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test environment passes. Another version, a missing package and a missing extra are errors."""
    installed = environment.check_versions(frozenset())
    assert installed.errors == [] and installed.must_match["torch"] == torch.__version__
    assert {"torch", "deepspeed", "peft"} <= installed.info.keys()
    lines = [
        "numpy>=99",
        'not-there; python_version < "3"',
        "no-such-package<2,>=1",
        'no-such-flash>=1; extra == "flash"',
        'pytest>=99; extra == "dev"',
        'rich>=99; extra == "metrics"',
    ]
    monkeypatch.setattr(environment, "requires", lambda name: lines)
    result = environment.check_versions(frozenset({"no-such-flash"}))
    number, missing, extra = result.errors
    assert number.startswith("numpy is 2.") and 'pip install "numpy>=99"' in number
    assert "no-such-package" in missing and "no-such-flash" in extra
    assert len(result.warnings) == 1 and result.warnings[0].startswith("rich is ")
    assert len(environment.check_versions(frozenset()).errors) == 2, "flash is optional"


def test_code_hashes(tmp_path: Path) -> None:
    """A changed recipe has another hash; a missing recipe is an error."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("out: a\n")
    first = environment.check_code([str(recipe)])
    assert first.errors == [] and first.must_match == environment.check_code([str(recipe)]).must_match
    recipe.write_text("out: b\n")
    assert first.must_match != environment.check_code([str(recipe)]).must_match
    assert f"{tmp_path}/none.yaml" in environment.check_code([str(tmp_path / "none.yaml")]).errors[0]


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that may be too low is a warning or an error; `ulimit` is advised only up to the hard limit."""
    assert host.check_open_files(0).errors == []
    for soft, field in ((1024, "warnings"), (1000, "errors")):
        monkeypatch.setattr(host.resource, "getrlimit", lambda kind, soft=soft: (soft, 4096))
        found = host.check_open_files(16)
        (message,) = found.errors + found.warnings
        assert getattr(found, field) == [message] and "ulimit -n 1280" in message
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (1024, 1200))
    (message,) = host.check_open_files(16).warnings
    assert "ulimit" not in message and "hard limit 1200" in message
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (1024, host.resource.RLIM_INFINITY))
    assert "ulimit -n 1280" in host.check_open_files(16).warnings[0]


@pytest.mark.parametrize("visual", ["images", "video"])
def test_shared_memory(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visual: str) -> None:
    """The size of a micro-batch is that of the loader's tensors, times train.micro_batch, per set of frames."""
    from w2r2_ds.data import shared_memory
    from w2r2_ds.data.images import input_bytes

    prepared = PreparedSet(Path(config.data.root) / "prepared", config.data.root)
    config.data = replace(config.data, visual=visual, workers=3, prefetch=2)
    largest = max(input_bytes(sample.frames, config.data) for sample in prepared)
    assert largest > 0
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    for micro_batch, questions in ((8, 1), (8, 4)):
        needed = largest * micro_batch // questions * (3 * 2 + 1) * 5  # with the batch of the training process
        config.data.questions_per_scene, config.train.micro_batch = questions, micro_batch
        monkeypatch.setattr(host.shutil, "disk_usage", lambda path, total=needed: usage(total, 0, total))
        assert data.check_data(config, ranks=5).errors == []
        monkeypatch.setattr(host.shutil, "disk_usage", lambda path, total=needed - 1: usage(total, 0, total))
        (message,) = data.check_data(config, ranks=5).errors
        assert "train.micro_batch" in message and "data.prefetch 2" in message
    config.data.workers = 0
    assert data.check_data(config, ranks=5).errors == []


def test_sizes_of_cached_features_are_those_of_the_loader(config: Any, model_config: Any, tmp_path: Path) -> None:
    """The doctor reads config.json only, the loader uses the loaded sizes."""
    from w2r2_ds.data.loader import feature_sizes
    from w2r2_ds.models.build import load_frontend
    from w2r2_ds.models.feature_cache import open_cache

    config.model = model_config  # with a complete config.json
    frontend = load_frontend(model_config)
    assert data.cached_sizes(config) is None is feature_sizes(frontend)
    for cached in ("geometry", "geometry+2d"):
        config.data = replace(config.data, cache=str(tmp_path), cached_features=cached)
        with_cache = replace(frontend, cache=open_cache(config.data, config.model))
        sizes = data.cached_sizes(config)
        assert sizes is not None and sizes == feature_sizes(with_cache)
        assert (sizes.token_bytes > 0) == (cached == "geometry+2d")


def test_a_narrow_frame_is_named(config: Any, tmp_path: Path) -> None:
    from w2r2_ds.data.images import input_bytes

    path = tmp_path / "narrow.png"
    Image.new("RGB", (3000, 1)).save(path)
    with pytest.raises(ValueError, match=f"Frame {path}: .*3000 x 1 pixels"):
        input_bytes([path], replace(config.data, frame_width=112))


def test_output_folder(tmp_path: Path) -> None:
    """A folder that can be created passes and no file remains; a path below a file and a full disk are errors."""
    assert host.check_folder("out", tmp_path / "a" / "b", 1, "a run").errors == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    below_file = host.check_folder("out", tmp_path / "file" / "run", 1, "a run")
    assert below_file.errors[0].startswith(f"out: {tmp_path}/file cannot be written (NotADirectoryError")
    assert "needs about 1048576.0" in host.check_folder("out", tmp_path, 2**50, "a run").errors[0]
    assert host.check_folder("out", Path("/proc/run"), 1, "a run").errors[0].startswith("out: /proc cannot be written")


def test_fsync_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "Input/output error" in host.check_folder("TMPDIR", tmp_path, 1, "a run").errors[0]
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_bytes(config: Any, tmp_path: Path) -> None:
    """LoRA, geometry merger and fusion are counted; existing checkpoints are subtracted."""
    from w2r2_ds.models.merger import GeometryMerger

    config.out = str(tmp_path)
    one = host.checkpoint_bytes(config)
    assert one > 0 and host.missing_checkpoint_bytes(config) == 4 * one
    for number in range(1, 5):
        folder = tmp_path / "checkpoints" / f"step-{number:06d}"
        folder.mkdir(parents=True)
        with open(folder / "weights", "wb") as file:
            file.truncate(one)
        assert host.missing_checkpoint_bytes(config) == max(1, 4 - number) * one
    for name in ("step-000001", "step-000002"):
        (tmp_path / "checkpoints" / name).rename(tmp_path / "checkpoints" / f"{name}.damaged")
    assert host.missing_checkpoint_bytes(config) == 2 * one, "damaged ones are kept in addition"
    config.model.geometry.layers = [0, 1]  # of VGGT's width 2 x 32 each
    wider, narrower = (
        sum(p.numel() for p in GeometryMerger(width, 64, config.model.merger_hidden).parameters())
        for width in (128, 64)
    )
    assert host.checkpoint_bytes(config) == one + host.BYTES_PER_PARAMETER * (wider - narrower)
    config.model.geometry.layers = [0]
    config.model.fusion = "cross_attention"  # two norms and four projections
    assert host.checkpoint_bytes(config) == one + host.BYTES_PER_PARAMETER * (2 * 64 + 4 * 64 * 64)
    config.model.fusion = "none such"
    with pytest.raises(ValueError, match=r"model\.fusion"):
        host.checkpoint_bytes(config)
    config.model.vlm = "nowhere"
    assert host.checkpoint_bytes(config) == host.missing_checkpoint_bytes(config) == 0


def test_differences_between_nodes() -> None:
    def report(local_rank: int, host: str, **packages: str) -> RankReport:
        return RankReport(0, local_rank, host, {"versions": CheckResult(must_match=packages)})

    first, same, other = report(0, "n1", a="1", b="2"), report(0, "n2", a="1", b="2"), report(0, "n3", a="9", c="3")
    texts = [text for host, text in differences([first, report(1, "n1"), same, other], "must_match") if host == "n3"]
    assert len(differences([first, same, other], "must_match")) == len(texts) == 3
    assert (
        texts[0].startswith("a is 9 here, but 1 on n1") and texts[1].startswith("b is missing") and "c is" in texts[2]
    )


WELL = "0, NVIDIA H100, 570.1, 4, 81559, 0, No, No, No, Not Active"


@pytest.mark.parametrize(
    ("row", "wrong", "warning"),
    [
        (WELL, "", ""),
        ("1, Tesla T4, 570.1, 4, 15000, [N/A], [N/A], [N/A], [N/A], [N/A]", "", ""),
        (WELL.replace("81559, 0", "81559, 3"), "GPU 0 (NVIDIA H100) has 3 memory errors that ECC could not", ""),
        (WELL.replace("No, No, No", "Yes, No, No"), "waits for a reset (retired_pages.pending)", ""),
        (WELL.replace("No, No, No", "No, 1, No"), "waits for a reset (remapped_rows.pending)", ""),
        (WELL.replace("No, No, No", "No, No, Yes"), "GPU 0 (NVIDIA H100) could not remap", ""),
        (WELL.replace("Not Active", "Active"), "GPU 0 (NVIDIA H100) is throttled", ""),
        (WELL.replace(" 4,", " 40000,"), "", "GPU 0 already has 40000 of 81559 MiB in use"),
        ("", "nvidia-smi lists no GPU", ""),
    ],
)
def test_gpu_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, wrong: str, warning: str) -> None:
    """Parses the output of a stub of nvidia-smi."""
    make_smi(tmp_path, f"echo '{row}'" if row else "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.check_health()
    for messages, expected in ((found.errors, wrong), (found.warnings, warning)):
        assert (messages == []) if not expected else (len(messages) == 1 and expected in messages[0])


def test_unsupported_field_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The field is dropped from the query; the message of any other failure is reported."""
    unknown = 'Field "clocks_throttle_reasons.hw_thermal_slowdown" is not a valid field to query.'
    row = WELL.rpartition(",")[0]
    make_smi(tmp_path, f"case $1 in *hw_thermal*) echo '{unknown}'; exit 2;; esac; echo '{row}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.check_health()
    assert found.errors == [] and found.info == {"GPU 0": "NVIDIA H100, driver 570.1"}
    assert found.must_match == {} and found.should_match == {"the GPU driver": "570.1"}
    make_smi(tmp_path, "echo 'Failed to initialize NVML' >&2; exit 18")
    failed = gpu.check_health()
    assert "nvidia-smi lists no GPU (exit status 18: Failed to initialize NVML); " in failed.errors[0]


def test_a_driver_that_fails_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call into a failed driver could block the process."""
    no_gpu = {"GPU health": lambda: CheckResult(errors=["nvidia-smi lists no GPU"])}
    monkeypatch.setattr(run, "node_checks", lambda request, ranks: no_gpu)
    monkeypatch.setattr(run, "rank_checks", lambda request, ranks: pytest.fail("called"))
    assert run.examine(checks.DoctorRequest(None, "", [])) == 1


def test_device_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A correct matrix product passes; a GPU that only nvidia-smi lists and a rank without GPU are errors."""
    make_smi(tmp_path, "echo 0")
    if not torch.cuda.is_available():
        assert gpu.check_device(0).errors == []
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert gpu.check_device(0).errors[0].startswith("nvidia-smi lists GPUs, but torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.check_device(1).errors[0].startswith("local rank 1 would use GPU 1, but 1 are visible")


def test_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one in one element is detected, in both precisions."""
    matmul = torch.Tensor.__matmul__

    def off_by_one(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = matmul(left, other)
        product[7, 9] += 1
        return product

    for dtype in (torch.float32, torch.bfloat16):
        assert gpu.check_product("cpu", dtype) == []
    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    for dtype in (torch.float32, torch.bfloat16):
        assert gpu.check_product("cpu", dtype)[0].startswith("cpu computes wrong results: 1 of 262144 numbers")
    assert gpu.check_product("meta", torch.float32)[0].startswith("meta cannot multiply")


def test_data_sets_and_frames(config: Any, tmp_path: Path) -> None:
    """Existing data sets and frames pass; no data set, and a data set without its frames, are errors."""
    result = data.check_data(config, ranks=1)
    assert result.errors == [] and result.info["prepared"] == f"3 samples in {config.data.root}/prepared"
    prepared = Path(config.data.root) / "prepared"
    config.data.root = str(tmp_path)
    assert "is not a prepared data set" in data.check_data(config, ranks=1).errors[0]
    (tmp_path / "prepared").symlink_to(prepared)
    assert "does not exist (3 of 3 checked frames)" in data.check_data(config, ranks=1).errors[0]


def test_depth_of_point_maps(config: Any, depth_samples: list[Any], tmp_path: Path) -> None:
    """The first frame of the checked samples needs depth and pose; an encoder of images needs neither."""
    chosen = with_depth(tmp_path, depth_samples)
    write_prepared(tmp_path / "prepared", chosen, tmp_path)
    config.data.root, config.data.val = str(tmp_path), []
    config.model.geometry = GeometryConfig(name="point_map", reference_frame="world")
    assert data.check_data(config, ranks=1).errors == []
    chosen[1].frames[0].with_suffix(".txt").unlink()
    (error,) = data.check_data(config, ranks=1).errors
    assert "model.geometry.name point_map" in error and str(chosen[1].frames[0].with_suffix(".txt")) in error
    config.model.geometry = GeometryConfig(path="owner/hub-id")
    assert data.check_data(config, ranks=1).errors == []


def test_an_unreadable_frame_is_one_error_of_its_set(config: Any) -> None:
    complete = data.check_data(config, ranks=1)
    prepared = Path(config.data.root) / "prepared"
    frame = PreparedSet(prepared, config.data.root)[0].frames[0]  # of a file that other tests use
    image = frame.read_bytes()
    frame.write_bytes(b"xx")
    result = data.check_data(config, ranks=1)
    frame.write_bytes(image)
    assert result.errors and all(str(frame) in error for error in result.errors)
    assert result.must_match == complete.must_match and result.info.keys() >= complete.info.keys()


def test_checked_samples_are_evenly_spaced(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `SAMPLES_CHECKED`, with the first and the last one; each is decoded once."""
    sample = PreparedSet(Path(config.data.root) / "prepared", config.data.root)[0]
    decoded: list[int] = []
    monkeypatch.setattr(PreparedSet, "__len__", lambda self: 15)
    monkeypatch.setattr(PreparedSet, "__init__", lambda self, folder, root: None)
    monkeypatch.setattr(PreparedSet, "__getitem__", lambda self, index: decoded.append(int(index)) or sample)
    config.data = replace(config.data, val=[])
    assert data.check_data(config, ranks=1).errors == []
    assert decoded == [0, 2, 4, 6, 8, 10, 12, 14]


def test_weight_files(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete folders pass; other weights have another hash; truncated, missing and uncached weights are errors."""
    result = data.check_weights(config.model)
    assert result.errors == [] and len(result.must_match) == 4
    folder = tmp_path / "vggt"
    folder.mkdir()
    config.model.geometry.path = str(folder)
    assert [text.split(":")[0] for text in data.check_weights(config.model).errors] == ["model.geometry.path"] * 2
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3, 4)}, folder / "model.safetensors")
    first = data.check_weights(config.model)
    save_file({"weight": torch.zeros(3, 4)}, folder / "model.safetensors")
    assert first.errors == [] and first.must_match != data.check_weights(config.model).must_match
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])
    assert "cannot be read (" in data.check_weights(config.model).errors[0]
    config.model.geometry.path = "someone/model-that-is-not-here"
    config.model.merger = str(tmp_path / "merger.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline, merger = data.check_weights(config.model).errors
    assert "in the Hugging Face cache" in offline and merger.startswith("model.merger: ")
    config.model.geometry.path = ""  # an encoder without files
    assert [text.split(":")[0] for text in data.check_weights(config.model).errors] == ["model.merger"]
    config.model.geometry.path = "someone/model-that-is-not-here"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "training will download it" in data.check_weights(config.model).warnings[0]


def test_training_settings(config: Any, run_options: dict[str, str]) -> None:
    """Batch sizes, DeepSpeed JSON and push term, with the same checks as training."""
    result = settings.check_settings(config, run_options["deepspeed"], 2)
    assert result.errors == [] and result.info["ZeRO"] == "stage 3"
    assert (
        "not divisible by train.micro_batch" in settings.check_settings(config, run_options["deepspeed"], 7).errors[0]
    )
    assert "none.json" in settings.check_settings(config, "none.json", 2).errors[0]
    config.objective.push_term = {"name": "nothing of the kind"}
    assert len(settings.check_settings(config, "", 2).errors) == 1
    config.objective.push_term, config.train.micro_batch = {"name": "contrast"}, 1
    assert "train.micro_batch" in settings.check_settings(config, "", 2).errors[0]


def test_precision_and_packages(config: Any) -> None:
    """FlashAttention needs a GPU and its package; trackers need their packages."""
    assert settings.check_precision(None).errors == [] and settings.check_precision(config).errors == []
    assert settings.needed_packages(None) == settings.needed_packages(config) == frozenset()
    config.model.attention = "flash_attention_2"
    config.train.trackers = ["wandb", "tensorboard"]
    assert settings.needed_packages(config) == {"flash-attn", "wandb", "tensorboard"}
    if not torch.cuda.is_available():
        [error] = settings.check_precision(config).errors
        assert "model.attention" in error and "CUDA" in error
    offloaded = {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}
    assert settings.describe_zero(offloaded) == "stage 3, offload_param to cpu, weights kept within 8 ranks (hpZ)"


def test_a_check_that_raises_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> CheckResult:
        raise AttributeError("module 'torch' has no attribute 'x'")

    def hangs() -> CheckResult:
        time.sleep(100)
        return CheckResult()

    monkeypatch.setattr(checks, "SECONDS", 0.5)
    results = checks.run_checks({"a": raises, "b": hangs, "c": CheckResult})
    assert "AttributeError: module 'torch' has no attribute 'x'" in results["a"].errors[0]
    assert results["b"].errors[0].startswith("check b: no result within")
    assert results["c"] == CheckResult()


def make_smi(folder: Path, body: str) -> None:
    """Write a script called nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
