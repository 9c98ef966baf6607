"""The DeepSpeed JSON and the run's configuration; initialisation of the process group."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from w2r2_ds.training.deepspeed.config import load_ds_config, resolve_ds_config
from w2r2_ds.training.deepspeed.hpz import common_ranks_per_machine
from w2r2_ds.training.deepspeed.process_group import init_process_group, skip_shm_build, use_private_extensions_dir

FILES = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


def resolve(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = {"global_batch": 16, "micro_batch": 2, "world_size": 4, "bf16": True} | changes
    return resolve_ds_config(raw, path="ds.json", **values)


def test_shipped_files() -> None:
    assert [file.stem for file in FILES] == ["zero2", "zero3", "zero3_hpz", "zero3_offload"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("bf16", [True, False])
def test_shipped_files_resolve_and_parse_in_deepspeed(file: Path, bf16: bool) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve(load_ds_config(file), world_size=1, bf16=bf16)
    parsed = DeepSpeedConfig(config)
    assert parsed.train_batch_size == 16
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_accumulation_steps == 8
    assert parsed.bfloat16_config.enabled is bf16
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_config.stage == (2 if file.stem == "zero2" else 3)
    assert parsed.zero_allow_untested_optimizer and not parsed.zero_force_ds_cpu_optimizer


def test_auto_and_missing_values_are_filled_in_a_copy() -> None:
    raw = {"train_batch_size": "auto", "zero_optimization": {"stage": 3}}
    raw |= {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
    before = json.dumps(raw)
    assert resolve(raw) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "data_types": {"grad_accum_dtype": "bf16"},
    }
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("bf16", "written", "world", "stage", "dtype"),
    [
        (True, {}, 1, 2, "fp32"),  # 8 micro-batches per step
        (True, {}, 1, "3", "fp32"),
        (True, {}, 2, 3, "bf16"),  # 4 micro-batches per step
        (True, {"grad_accum_dtype": "auto"}, 1, 3, "fp32"),
        (True, {"grad_accum_dtype": "bf16"}, 1, 3, "bf16"),
        (True, {"grad_accum_dtype": "fp32"}, 2, 2, "fp32"),
        (True, {"grad_accum_dtype": "fp32"}, 2, 1, "fp32"),
        (True, {}, 1, 1, "bf16"),
        (True, {}, 1, 0, "bf16"),
        (False, {}, 2, 3, "fp32"),
    ],
)
def test_many_micro_batches_accumulate_in_float32(
    bf16: bool, written: dict[str, str], world: int, stage: Any, dtype: str
) -> None:
    raw = {"data_types": written, "zero_optimization": {"stage": stage}}
    assert resolve(raw, world_size=world, bf16=bf16)["data_types"] == {"grad_accum_dtype": dtype}


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "fp32"), (False, "bf16")])
def test_stage_0_and_float32_accumulate_in_the_models_dtype(bf16: bool, dtype: str) -> None:
    raw = {"data_types": {"grad_accum_dtype": dtype}, "zero_optimization": {"stage": 0}}
    with pytest.raises(ValueError, match=rf'ds.json: data_types.grad_accum_dtype is "{dtype}"'):
        resolve(raw, bf16=bf16)


@pytest.mark.parametrize(("world", "local", "filled"), [(16, 8, 8), (8, 8, 1), (1, 1, 1), (4, 2, 2)])
def test_hpz_partitions_are_the_ranks_of_a_machine(world: int, local: int, filled: int) -> None:
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    config = resolve(raw, global_batch=16, micro_batch=1, world_size=world, local_size=local)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == filled


@pytest.mark.parametrize(("machines", "common"), [([8, 8], 8), ([2, 2, 4], 2), ([4, 2], 2), ([3, 1], 1)])
def test_machines_with_different_numbers_of_ranks_use_a_common_size(
    monkeypatch: pytest.MonkeyPatch, machines: list[int], common: int
) -> None:
    """Otherwise each rank would create groups of its own machine's size, and wait for the others forever."""
    everywhere = [size for size in machines for _ in range(size)]
    monkeypatch.setattr(dist, "all_gather_object", lambda target, own: target.__setitem__(slice(None), everywhere))
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    world = sum(machines)
    config = resolve(
        raw, global_batch=world, micro_batch=1, world_size=world, local_size=common_ranks_per_machine(world)
    )
    assert config["zero_optimization"]["zero_hpz_partition_size"] == common


@pytest.mark.parametrize(
    ("stage", "size", "words"),
    [
        (3, 3, ["zero_hpz_partition_size is 3", "does not divide the 16 ranks", "here 8 ranks per machine"]),
        (3, 16, ["zero_hpz_partition_size is 16", "a machine has 8 ranks"]),
        (2, 8, ["zero_hpz_partition_size is 8", "only stage 3"]),
        (3, 0, ["zero_hpz_partition_size is 0"]),
        (3, 8.0, ["zero_hpz_partition_size is 8.0"]),
        (3, True, ["zero_hpz_partition_size is True"]),
        (3, "auto", ['zero_hpz_partition_size is "auto"', "not every machine has 6 ranks", "or write 1"]),
    ],
)
def test_invalid_hpz_partition_sizes_raise(stage: int, size: Any, words: list[str]) -> None:
    raw = {"zero_optimization": {"stage": stage, "zero_hpz_partition_size": size}}
    with pytest.raises(ValueError) as caught:
        resolve(raw, micro_batch=1, world_size=16, local_size=6 if size == "auto" else 8)
    message = str(caught.value)
    assert message.startswith("ds.json: ") and message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


def test_equal_values_are_accepted_and_other_settings_unchanged() -> None:
    zero = {"stage": 3, "log_trace_cache_warnings": True, "memory_efficient_linear": False}
    raw = {"train_batch_size": 16, "gradient_accumulation_steps": 2, "fp16": {"enabled": False}}
    assert resolve(raw | {"zero_optimization": zero})["zero_optimization"] == zero


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"train_batch_size": 32}, ["train_batch_size is 32", "train.global_batch is 16"]),
        ({"train_micro_batch_size_per_gpu": 1}, ["train_micro_batch_size_per_gpu is 1", "train.micro_batch is 2"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps is 4", "4 ranks) is 2"]),
        ({"gradient_accumulation_steps": "2"}, ['gradient_accumulation_steps is "2"']),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is false", "model.dtype resolves to bfloat16"]),
        ({"bf16": True}, ["bf16 is true"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer is true", "AdamW"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer is false"]),
        (
            {"zero_optimization": {"memory_efficient_linear": True}},
            ["zero_optimization.memory_efficient_linear is true"],
        ),
        ({"optimizer": {"type": "AdamW"}}, ['remove "optimizer"', "train.lr"]),
        ({"timers": {"throughput": {"enabled": True}}}, ['remove "timers"', "metrics.jsonl"]),
        ({"scheduler": {}}, ['remove "scheduler"', "train.warmup_ratio"]),
        ({"fp16": {"enabled": True}}, ["fp16", "use", "bf16"]),
        ({"zero_optimisation": {"stage": 3}}, ['unknown key "zero_optimisation"', "zero_optimization"]),
        ({"gradient_clipping": "auto"}, ['gradient_clipping is "auto"']),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ['zero_optimization.reduce_bucket_size is "auto"']),
        ({"data_types": {"x": [1, "auto"]}}, ['data_types.x[1] is "auto"']),
    ],
)
def test_contradictions_raise_with_file_field_and_values(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(raw)
    message = str(caught.value)
    assert message.startswith("ds.json: ") and message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}},
            'unknown key "zero_optimization.stage3_prefetch_bucket" (did you mean '
            "zero_optimization.stage3_prefetch_bucket_size",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}}},
            'unknown key "zero_optimization.offload_param.pin_memry" (did you mean '
            "zero_optimization.offload_param.pin_memory",
        ),
        ({"zero_optimization": {"stage": 3, "xyzzy": 5}}, 'unknown key "zero_optimization.xyzzy".'),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7: Input should be 0, 1, 2"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, 'zero_optimization.overlap_comm is "maybe": Input should'),
        ({"zero_optimization": True}, "zero_optimization is true"),
        ({"bf16": {"enable": True}}, 'unknown key "bf16.enable" (did you mean bf16.enabled?)'),
        ({"comms_logger": {"verbos": True}}, 'unknown key "comms_logger.verbos" (did you mean comms_logger.verbose'),
        ({"flops_profiler": 1}, "flops_profiler is 1"),
        ({"gradient_clipping": "much"}, 'gradient_clipping is "much"'),
        ({"checkpoint": {"load_universal": True}}, 'unknown key "checkpoint.load_universal"'),
        ({"checkpoint": {"tag_validaton": "Warn"}}, "(did you mean checkpoint.tag_validation"),
        ({"gradient_cliping": 1.0}, 'unknown key "gradient_cliping" (did you mean gradient_clipping'),
    ],
)
def test_a_misspelt_key_or_a_wrong_value_raises(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(raw)
    message = str(caught.value)
    assert message.startswith("ds.json: ") and message.endswith(".") and "\n" not in message
    assert words in message


def test_true_is_not_accepted_as_one() -> None:
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu is true"):
        resolve({"train_micro_batch_size_per_gpu": True}, micro_batch=1)


def test_an_indivisible_global_batch_raises() -> None:
    with pytest.raises(ValueError, match=r"train.global_batch is 16, not divisible by train.micro_batch 2 x 3 ranks"):
        resolve({}, world_size=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "ds_configs/zero3.json"),
        ("{", "not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' is given twice"),
    ],
)
def test_unreadable_files_raise(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_shm_build_is_skipped_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op

    if get_accelerator().device_name() != "cpu":
        pytest.skip("DeepSpeed compiles its shared-memory all-reduce on CPUs only")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    assert get_accelerator().create_op_builder("ShareMemCommBuilder").NAME == "deepspeed_shm_comm"
    skip_shm_build()
    assert build_shm_op() is None


def test_every_launch_has_its_own_extensions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / f"w2r2-ds-{os.getuid()}"
    folders = []
    for names in ({}, {"JOB_ID": "7"}, {"JOB_ID": "7", "RESTART_COUNT": "1", "STEP_ID": "2"}):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"):
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        for name, value in names.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        use_private_extensions_dir()
        folders.append(os.environ["TORCH_EXTENSIONS_DIR"])
    ends = [f"launcher-{os.getppid()}", "7", "7-1-2"]
    assert folders == [str(mine / f"extensions-{end}") for end in ends]
    use_private_extensions_dir()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == folders[-1]
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    mine.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it"):
        use_private_extensions_dir()


def test_a_taken_port_raises_with_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        start = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in start.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/unused")
        with pytest.raises(ValueError) as caught:
            init_process_group()
    message = str(caught.value)
    assert message.startswith(f"port {port} of this machine is taken") and "\n" not in message
    found = re.search(r"deepspeed --master_port (\d+) launchers/train.py", message)
    assert found and int(found[1]) != port
    assert not dist.is_initialized()


def test_no_temporary_folder_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", unusable)
    with pytest.raises(ValueError, match="TMPDIR"):
        use_private_extensions_dir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/proc")
    with pytest.raises(ValueError, match="TMPDIR"):
        use_private_extensions_dir()
