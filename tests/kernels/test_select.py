"""`model.kernels` and `model.attention` on machines with and without a GPU, Triton and flash-attn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from w2r2_ds.config.io import load_config, relocated
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.kernels import select
from w2r2_ds.utils.packages import import_problem


def machine(monkeypatch: pytest.MonkeyPatch, gpu: bool, *installed: str) -> None:
    """Simulate a machine with or without a CUDA device, with these packages installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(select, "import_problem", lambda name: "" if name in installed else "is not installed")
    monkeypatch.setattr(select, "transformers_accepts_flash_attn", lambda: "flash_attn" in installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("installed", [("triton", "liger_kernel"), ("triton",), ("liger_kernel",), ()])
@pytest.mark.parametrize("gpu", [True, False])
def test_auto_measures_if_triton_is_supported(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, installed: tuple[str, ...]
) -> None:
    machine(monkeypatch, gpu, *installed)
    runs = gpu and len(installed) == 2
    assert bool(select.unavailable()) is not runs
    assert select.describe_kernels("auto").startswith("torch") is not runs
    assert select.describe_kernels("torch") == "torch"


def test_triton_raises_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True, "triton")
    with pytest.raises(ValueError, match=r"liger-kernel .*pip install \"w2r2-ds\[kernels\]\".*--model.kernels torch"):
        select.check_kernels("triton")
    machine(monkeypatch, False, "triton", "liger_kernel")
    with pytest.raises(ValueError, match=r"CUDA.*--model.kernels torch"):
        select.check_kernels("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.describe_kernels("triton") == "triton" and select.describe_kernels("auto").startswith("torch")


def test_attention_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True, "flash_attn")
    assert select.resolve_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert select.resolve_attention("auto", torch.float32) == "sdpa"
    assert select.resolve_attention("eager", torch.bfloat16) == "eager"
    machine(monkeypatch, False, "flash_attn")
    assert select.resolve_attention("auto", torch.bfloat16) == "sdpa"
    machine(monkeypatch, True)
    assert select.resolve_attention("auto", torch.bfloat16) == "sdpa"


def test_logged_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, False)
    line = select.describe_attention("auto", torch.float32)
    assert line.startswith("attention: sdpa; ") and "batched sdpa" in line and "no CUDA device" in line
    machine(monkeypatch, True)
    line = select.describe_attention("auto", torch.bfloat16)
    assert "torch varlen" in line and "auto: flash-attn is not installed" in line
    assert "torch varlen" not in select.describe_attention("eager", torch.bfloat16)
    machine(monkeypatch, True, "flash_attn")
    assert select.describe_attention("auto", torch.bfloat16).startswith("attention: flash_attention_2 (")


def test_flash_attn_that_does_not_import_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True)
    broken = "is installed, but cannot be imported (ImportError: undefined symbol)"
    monkeypatch.setattr(select, "import_problem", lambda name: broken)
    assert select.resolve_attention("auto", torch.bfloat16) == "sdpa"
    assert "undefined symbol" in select.describe_attention("auto", torch.bfloat16)
    for describe in (select.check_attention, select.describe_attention):
        with pytest.raises(ValueError, match=r"model\.attention is flash_attention_2.*undefined symbol"):
            describe("flash_attention_2", torch.bfloat16)


def test_flash_attn_4_alone_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is a namespace package flash_attn with a module cute, and can be imported."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    check = select.transformers_accepts_flash_attn
    machine(monkeypatch, True, "flash_attn")
    monkeypatch.setattr(select, "import_problem", import_problem.__wrapped__)
    monkeypatch.setattr(select, "transformers_accepts_flash_attn", check)
    assert not import_problem.__wrapped__("flash_attn")
    line = select.describe_attention("auto", torch.bfloat16)
    assert line.startswith("attention: sdpa; ") and "2.3.3" in line


def test_flash_attn_is_not_chosen_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True, "flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    line = select.describe_attention("auto", torch.bfloat16)
    assert line.startswith("attention: sdpa; ") and "Ampere" in line
    with pytest.raises(ValueError, match=r"model\.attention is flash_attention_2, but .*Ampere"):
        select.check_attention("flash_attention_2", torch.bfloat16)


def test_flash_attention_needs_a_gpu_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, False, "flash_attn")
    with pytest.raises(ValueError, match=r"model\.attention.*CUDA"):
        select.check_attention("flash_attention_2", torch.bfloat16)
    machine(monkeypatch, True, "flash_attn")
    with pytest.raises(ValueError, match=r"model\.attention.*bfloat16"):
        select.check_attention("flash_attention_2", torch.float32)
    select.check_attention("flash_attention_2", torch.bfloat16)


@pytest.mark.parametrize(("trained", "elsewhere"), [("triton", "auto"), ("auto", "auto"), ("torch", "torch")])
def test_the_configuration_of_a_gpu_run_loads_without_a_gpu(trained: str, elsewhere: str) -> None:
    config = load_config(overrides=["--model.kernels", trained])
    assert config.model.kernels == trained and RunConfig().model.kernels == "auto"
    assert relocated(config).model.kernels == elsewhere


@pytest.mark.parametrize(
    ("trained", "elsewhere"), [("flash_attention_2", "auto"), ("auto", "auto"), ("sdpa", "sdpa"), ("eager", "eager")]
)
def test_a_run_with_flash_attn_is_evaluated_without_it(trained: str, elsewhere: str) -> None:
    config = load_config(overrides=["--model.attention", trained])
    assert config.model.attention == trained
    assert relocated(config).model.attention == elsewhere
