"""Every check of one node fails where it should and passes where it should."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from w2r2_ds.doctor import checks, disk, imports, installed, jit_locks, limits, own_code
from w2r2_ds.doctor.checkpoint_size import checkpoint_bytes, lora_weights, merger_weights, room_bytes
from w2r2_ds.doctor.checks import data, gpu, settings
from w2r2_ds.doctor.imports import MODULES, Imports
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import Alarm


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the tests is right; another version, a missing package and a missing extra are not."""
    well = installed.check_versions(frozenset())
    assert well.wrong == [] and well.equal["torch"] == torch.__version__
    assert {"torch", "deepspeed", "peft"} <= well.shown.keys()
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["numpy>=99", "no-such-package>=1,<2"]\n[project.optional-dependencies]\n'
        + "".join(f'{extra} = ["not-there-{extra}>=1"]\n' for extra in installed.OWN_EXTRAS)
    )
    monkeypatch.setattr(installed, "PROJECT", project)
    sick = installed.check_versions(frozenset({"not-there-flash"}))
    number, missing, extra = sick.wrong
    assert number.startswith("numpy is 2.") and 'pip install "numpy>=99"' in number
    assert missing == 'no-such-package is not installed; pip install "no-such-package<2,>=1".'
    assert extra == 'not-there-flash is not installed; pip install "w2r2-ds[flash]".'
    assert sick.shown["not-there-quant"] == "not there (optional: quant)"


def test_ranges_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyproject.toml beside the code the package's own metadata say what is required and what is optional."""
    lines = [
        "torch<2.15,>=2.11",
        'numpy>=2; python_version >= "3"',
        'tomli; python_version < "3"',
        'flash-attn>=2.7; extra == "flash"',
        'pytest>=8; extra == "dev"',
    ]
    monkeypatch.setattr(installed, "PROJECT", Path("/nowhere"))
    monkeypatch.setattr(installed, "requires", lambda name: lines)
    assert [(each.name, each.versions, each.extra) for each in installed.wanted_packages()] == [
        ("torch", "<2.15,>=2.11", ""),
        ("numpy", ">=2", ""),
        ("flash-attn", ">=2.7", "flash"),
    ]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("value = 1", None),
        ("raise ImportError('libcudart.so.11: cannot open')", "cannot be imported (ImportError: libcudart.so.11"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "importing broken ends the process (signal SIGSEGV)",
        ),
        ("import time; time.sleep(100)", "importing broken hangs; "),
    ],
)
def test_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, sentence: str | None) -> None:
    """A library that raises, crashes or hangs is named; the process that asks lives on."""
    (tmp_path / "broken_library.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODULES, "broken", "broken_library")
    found = Imports(["numpy", "broken"]).result(5)
    assert found.warnings == []
    assert (found.wrong == []) if sentence is None else (len(found.wrong) == 1 and sentence in found.wrong[0])


def test_a_child_that_nobody_waits_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck_library.py").write_text(
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODULES, "stuck", "stuck_library")
    monkeypatch.setattr(imports, "ORPHANED", 1)
    started = time.monotonic()
    found = Imports(["stuck"]).result(20)
    assert time.monotonic() - started < 10 and "ends the process (signal SIGALRM)" in found.wrong[0]


def test_an_import_that_works_on_is_slow_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_library.py").write_text("while True: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODULES, "slow", "slow_library")
    found = Imports(["slow"]).result(1)
    assert found.wrong == [] and found.warnings[0].startswith("importing slow is slow")


def test_code(tmp_path: Path) -> None:
    """Another byte or name anywhere is another hash; a recipe that is not there is wrong."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("out: a\n")
    first = own_code.check_code([str(recipe)])
    assert first.wrong == [] and first.equal == own_code.check_code([str(recipe)]).equal
    recipe.write_text("out: b\n")
    assert first.equal != own_code.check_code([str(recipe)]).equal
    assert (
        own_code.check_code([str(tmp_path / "none.yaml")]).wrong[0].startswith(f"{tmp_path}/none.yaml cannot be seen")
    )
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("1")
    assert own_code.content_hash([tmp_path / "a.py"], tmp_path) != own_code.content_hash([tmp_path / "b.py"], tmp_path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.check_limits(0, 2, 1).wrong == []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (10**9, 10**9))
    for prefetch, size in ((2, 250000), (4, 500000)):
        (memory,) = limits.check_limits(10**6, prefetch, 1).wrong
        assert f"data.prefetch {prefetch} need {size}.00; enlarge it (docker: --shm-size {size}g)" in memory
    monkeypatch.setattr(limits, "SHM", tmp_path / "none")
    assert limits.check_limits(0, 2, 1).wrong == [] and limits.check_limits(1, 2, 1).wrong[-1].startswith(
        "there is no "
    )


def test_folder(tmp_path: Path) -> None:
    """A folder to be made passes and leaves nothing; one below a file cannot be; one without room is named."""
    assert disk.check_folder("out", tmp_path / "a" / "b", 1, "a run").wrong == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert (
        disk.check_folder("out", tmp_path / "file" / "run", 1, "a run")
        .wrong[0]
        .startswith(f"out: {tmp_path}/file cannot be written (NotADirectoryError")
    )
    assert "needs about 1048576.0; make room" in disk.check_folder("out", tmp_path, 2**50, "a run").wrong[0]
    assert disk.check_folder("out", Path("/proc/run"), 1, "a run").wrong[0].startswith("out: /proc cannot be written")


def test_fsync_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "Input/output error" in disk.check_folder("TMPDIR", tmp_path, 1, "a run").wrong[0]
    assert list(tmp_path.iterdir()) == []


def test_mark(tmp_path: Path) -> None:
    mark = disk.leave_mark(tmp_path / "run", "token")
    assert disk.check_mark("out", str(mark), "n1", 0).wrong == []
    mark.unlink()
    assert "is not the folder that n1 sees" in disk.check_mark("out", str(mark), "n1", 0.2).wrong[0]


def test_checkpoint_room(config: Any) -> None:
    """LoRA's and the merger's weights are counted as peft and the merger count them; huge ones do not fit any disk."""
    from w2r2_ds.models.merger import GeometryMerger

    merger = GeometryMerger(64, 64, config.model.merger_hidden)
    assert merger_weights(64, 64, config.model.merger_hidden) == sum(p.numel() for p in merger.parameters())
    text = {
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    assert lora_weights(text, 5) == 3 * 5 * ((8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + 3 * (8 + 24))
    config.model.lora_rank = 10**12
    needed = checkpoint_bytes(config)
    assert needed is not None and disk.check_folder("out", Path(config.out), needed, "the run's checkpoints").wrong
    config.model.vlm = "nowhere"
    assert checkpoint_bytes(config) is None and room_bytes(config) == 0


def test_room_that_checkpoints_already_have(config: Any, tmp_path: Path) -> None:
    """A run that is queued again needs free space for what is not there yet, and for one checkpoint at least."""
    config.out = str(tmp_path)
    one = checkpoint_bytes(config)
    assert one is not None and room_bytes(config) == 4 * one
    for number, name in enumerate(("step-000001", "step-000002", "step-000003", "step-000004"), 1):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        with open(folder / "weights", "wb") as file:
            file.truncate(one)
        assert room_bytes(config) == max(1, 4 - number) * one
    (tmp_path / "checkpoints" / "step-000001").rename(tmp_path / "checkpoints" / "step-000001.damaged")
    (tmp_path / "checkpoints" / "step-000002").rename(tmp_path / "checkpoints" / "step-000002.damaged")
    assert room_bytes(config) == 2 * one, "damaged ones stay"


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than the loaders may need do for most data; fewer than are usual do not."""
    for soft, field in ((1024, "warnings"), (1000, "wrong")):
        monkeypatch.setattr(limits.resource, "getrlimit", lambda kind, soft=soft: (soft, 4096))
        found = limits.check_limits(16, 2, 0)
        (sentence,) = found.wrong + found.warnings
        assert getattr(found, field) == [sentence] and "may need 1280; run ulimit -n 1280" in sentence


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that nobody holds is stale, one that a process holds open is not; in PyTorch's own folder it warns."""
    lock = tmp_path / "mine" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit_locks.check_locks().wrong == []
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert jit_locks.check_locks().wrong == [], "held"
    os.close(descriptor)
    found = jit_locks.check_locks()
    assert f"remove it: rm {lock}" in found.wrong[0] and found.warnings == []
    (tmp_path / "mine").rename(tmp_path / "torch_extensions")
    found = jit_locks.check_locks()
    assert found.wrong == [] and "programs that build there hang" in found.warnings[0]


def test_a_lock_on_a_network_is_stale_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(jit_locks, "on_network", lambda path: True)
    assert jit_locks.stale_locks(tmp_path) == []
    os.utime(lock, (0, time.time() - jit_locks.OLD - 1))
    assert jit_locks.stale_locks(tmp_path) == [lock]


WELL = "0, NVIDIA H100, 570.1, 4, 81559, 0, No, No, No, Not Active"


@pytest.mark.parametrize(
    ("row", "wrong", "warning"),
    [
        (WELL, "", ""),
        ("1, Tesla T4, 570.1, 4, 15000, [N/A], [N/A], [N/A], [N/A], [N/A]", "", ""),
        (WELL.replace("81559, 0", "81559, 3"), "GPU 0 (NVIDIA H100) has 3 memory errors that ECC could not", ""),
        (WELL.replace("No, No, No", "Yes, No, No"), "waits for a reset (retired_pages.pending)", ""),
        (WELL.replace("No, No, No", "No, 1, No"), "waits for a reset (remapped_rows.pending)", ""),
        (WELL.replace("No, No, No", "No, No, Yes"), "could not remap a broken row", ""),
        (WELL.replace("Not Active", "Active"), "slowed down by its heat", ""),
        (WELL.replace(" 4,", " 40000,"), "", "GPU 0 already has 40000 of 81559 MiB in use"),
        ("", "nvidia-smi lists no GPU", ""),
    ],
)
def test_gpu_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, wrong: str, warning: str) -> None:
    """What a program called nvidia-smi answers, on a machine that has none."""
    make_smi(tmp_path, f"echo '{row}'" if row else "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.check_health()
    for sentences, expected in ((found.wrong, wrong), (found.warnings, warning)):
        assert (sentences == []) if not expected else (len(sentences) == 1 and expected in sentences[0])


def test_a_field_that_nvidia_smi_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is left out of the next question; any other failure is told in its own words."""
    unknown = 'Field "clocks_throttle_reasons.hw_thermal_slowdown" is not a valid field to query.'
    row = WELL.rpartition(",")[0]
    make_smi(tmp_path, f"case $1 in *hw_thermal*) echo '{unknown}'; exit 2;; esac; echo '{row}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.check_health()
    assert found.wrong == [] and found.shown == {"GPU 0": "NVIDIA H100, driver 570.1"}
    assert found.equal == {} and found.alike == {"the GPU driver": "570.1"}
    make_smi(tmp_path, "echo 'Failed to initialize NVML' >&2; exit 18")
    silent = gpu.check_health()
    assert "nvidia-smi lists no GPU (exit status 18: Failed to initialize NVML); " in silent.wrong[0]
    assert checks.driver_silent({"GPU health": silent}) and not checks.driver_silent({"GPU health": found})


def test_a_silent_driver_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might hold Python's lock."""
    alarm = Alarm(60, "n1")
    health = {"GPU health": lambda: CheckResult(wrong=["nvidia-smi lists no GPU"])}
    try:
        found = checks.do_checks(health | {"settings": lambda: pytest.fail("called")}, alarm, 50)
        found |= checks.do_checks({"device": lambda: pytest.fail("called"), "use": CheckResult}, alarm, 50, found)
        assert checks.do_checks({"device": CheckResult}, alarm, 50) == {"device": CheckResult()}
    finally:
        alarm.off()
    for name in ("settings", "device", "use"):
        assert found[name].warnings == [f"{name} was not looked at, as the GPU driver does not answer."]


def test_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is right; a GPU that only nvidia-smi sees; a rank without a GPU of its own."""
    make_smi(tmp_path, "echo 0")
    if not torch.cuda.is_available():
        assert gpu.check_device(0, 1).wrong == []
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert gpu.check_device(0, 1).wrong[0].startswith("nvidia-smi shows GPUs, but torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.check_device(1, 2).wrong[0].startswith("local rank 1 would use GPU 1, but sees 1; ")


def test_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number that is off by one is found, in both precisions."""
    right = torch.Tensor.__matmul__

    def off_by_one(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        product[7, 9] += 1
        return product

    for dtype in (torch.float32, torch.bfloat16):
        assert gpu.product_wrong("cpu", dtype) == []
    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    for dtype in (torch.float32, torch.bfloat16):
        assert gpu.product_wrong("cpu", dtype)[0].startswith("cpu computes wrong: 1 of 262144 numbers")
    assert gpu.product_wrong("meta", torch.float32)[0].startswith("meta cannot multiply")


def test_data(config: Any, tmp_path: Path) -> None:
    """Sets and frames that are there; no set; a set whose frames are elsewhere."""
    well = data.check_data(config.data)
    assert well.wrong == [] and well.shown == {"prepared": f"3 samples in {config.data.root}/prepared"}
    prepared = Path(config.data.root) / "prepared"
    config.data.root = str(tmp_path)
    assert "holds no prepared data set" in data.check_data(config.data).wrong[0]
    (tmp_path / "prepared").symlink_to(prepared)
    assert "cannot be seen (3 of 3 frames looked for)" in data.check_data(config.data).wrong[0]


def test_weights(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories that are whole; other weights have another fingerprint; torn, missing and uncached ones are named."""
    well = data.check_weights(config.model)
    assert well.wrong == [] and len(well.equal) == 4
    folder = tmp_path / "vggt"
    folder.mkdir()
    config.model.vggt = str(folder)
    assert [sentence.split(":")[0] for sentence in data.check_weights(config.model).wrong] == ["model.vggt"] * 2
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3, 4)}, folder / "model.safetensors")
    first = data.check_weights(config.model)
    save_file({"weight": torch.zeros(3, 4)}, folder / "model.safetensors")
    assert first.wrong == [] and first.equal != data.check_weights(config.model).equal
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])
    assert "cannot be read (SafetensorError" in data.check_weights(config.model).wrong[0]
    config.model.vggt, config.model.merger = "someone/model-that-is-not-here", str(tmp_path / "merger.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline, merger = data.check_weights(config.model).wrong
    assert "not in the Hugging Face cache of this node; fetch it" in offline and merger.startswith("model.merger: ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "training will fetch it" in data.check_weights(config.model).warnings[0]


def test_settings(config: Any, little_run: dict[str, str]) -> None:
    """Batch sizes for the ranks, the DeepSpeed JSON, the push term: as training refuses them."""
    well = settings.check_settings(config, little_run["deepspeed"], 2)
    assert well.wrong == [] and well.shown["ZeRO"] == "stage 3"
    assert "not divisible by train.micro_batch" in settings.check_settings(config, little_run["deepspeed"], 7).wrong[0]
    assert "none.json" in settings.check_settings(config, "none.json", 2).wrong[0]
    config.objective.push = "nothing of the kind"
    assert len(settings.check_settings(config, "", 2).wrong) == 1


def test_use(config: Any) -> None:
    """What an option needs: flash attention a GPU, loggers their packages."""
    assert settings.check_use(None).wrong == [] and settings.check_use(config).wrong == []
    assert settings.needed_packages(None) == settings.needed_packages(config) == frozenset()
    config.model.attention = "flash_attention_2"
    config.train.wandb = config.train.tensorboard = True
    assert settings.needed_packages(config) == {"flash-attn", "wandb", "tensorboard"}
    if not torch.cuda.is_available():
        assert "needs a GPU" in settings.check_use(config).wrong[0]
    offloaded = {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}
    assert settings.zero(offloaded) == "stage 3, offload_param to cpu, weights kept within 8 ranks (hpZ)"


def test_checks_that_fail_themselves_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises and one that hangs are sentences, and the next one is done."""

    def raises() -> CheckResult:
        raise AttributeError("module 'torch' has no attribute 'x'")

    def hangs() -> CheckResult:
        time.sleep(100)
        return CheckResult()

    monkeypatch.setattr(checks, "SECONDS", 0.5)
    alarm = Alarm(60, "n1")
    try:
        found = checks.do_checks({"a": raises, "b": hangs, "c": CheckResult}, alarm, 50)
    finally:
        alarm.off()
    assert "a cannot be looked at (AttributeError: module 'torch' has no attribute 'x')" in found["a"].wrong[0]
    assert "looking at b had not ended in its time; a file system or driver hangs" in found["b"].wrong[0]
    assert found["c"] == CheckResult()


def make_smi(folder: Path, body: str) -> None:
    """A program called nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
