"""Compiled code of every kernel for Ampere, Hopper and Blackwell, made on a machine without a GPU.

The kernels' own launch functions run with `JITFunction.run` replaced, so that argument types, divisibility of pointers
and sizes, and constants are those of a launch on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.kernels import dropout_matmul
from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed

triton = pytest.importorskip("triton", reason="kernels are not installed: pip install 'w2r2-ds[kernels]'")

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = 99 * 2**10
"""Bytes of shared memory of one program on sm_86, sm_89 and sm_120, the smallest limit from sm_80 on."""
ROWS = 1101
"""Odd: Triton must not derive an alignment from the number of tokens. 18 blocks of rows, so that `outer` loops."""
WIDTHS = {"3B": 2048, "7B": 3584}
PRODUCTS = ("down", "outer", "up")


def launch_product(name: str, rank: int, width: int) -> None:
    """One product of `dropout_matmul.py` in bfloat16."""
    x, low = torch.empty(ROWS, width, dtype=torch.bfloat16), torch.empty(ROWS, rank, dtype=torch.bfloat16)
    keep, a = torch.empty(ROWS, width, dtype=torch.bool), torch.empty(rank, width, dtype=torch.bfloat16)
    launches = {
        "down": lambda: dropout_matmul.down(x, keep, a, 1.25, "triton"),
        "outer": lambda: dropout_matmul.outer(low, x, keep, 1.25, "triton"),
        "up": lambda: dropout_matmul.up_(x, low, a, keep, 1.25, "triton"),
    }
    launches[name]()


def launch_embed(width: int, tokens: torch.dtype, stream: torch.dtype) -> None:
    text, visual = torch.empty(1, 9, width, dtype=stream), torch.empty(5, width, dtype=tokens)
    dual_stream_embed(text, torch.arange(5), visual, visual, "triton")


def compiled(launch: Callable[[], None], capability: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel that `launch` starts, compiled as the JIT compiles it for a GPU of this compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        launched.append((kernel, args, constants))

    monkeypatch.setattr(JITFunction, "run", run)
    # An empty folder: otherwise a second run would find the compiled kernels in Triton's cache.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    launch()
    ((kernel, args, constants),) = launched
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **constants
    )
    options, signature, constexprs, attrs = kernel._pack_args(backend, constants, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def load_bytes(ptx: str) -> list[int]:
    """Bytes per thread of every read from global memory, in the order of the code."""
    direct = r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bsuf](\d+) "
    asynchronous = r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)"
    found = re.finditer(f"{direct}|{asynchronous}", ptx)
    sizes = [int(each[3], 0) if each[3] else int(each[1] or 1) * int(each[2]) // 8 for each in found]
    assert len(sizes) == len(re.findall(r"ld\.global|cp\.async\.c[ag]\.|cp\.async\.bulk", ptx))
    return sizes


def assert_no_spills_and_fits(kernel: Any, folder: Path) -> None:
    """No registers in local memory (the stack), and shared memory within the limit of every supported GPU."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found and int(found[1]) > 8, usage
    assert (int(found[2]), int(found[3])) == (0, 0), usage
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert not re.search(r"(ld|st)\.local", kernel.asm["ptx"])


def product_cases() -> Iterator[Any]:
    """Ranks 16 (the default) and `MAX_RANK` always; other padded ranks, and ranks below their tile, nightly."""
    for rank in (8, 16, 24, 32, dropout_matmul.MAX_RANK):
        marks = [] if rank in (16, dropout_matmul.MAX_RANK) else [pytest.mark.nightly]
        for name in PRODUCTS:
            for capability in CAPABILITIES:
                yield pytest.param(name, rank, capability, id=f"{name}-rank {rank}-sm_{capability}", marks=marks)


@pytest.mark.parametrize(("name", "rank", "capability"), list(product_cases()))
def test_products_with_dropout(
    name: str, rank: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are read 16 bytes at a time and multiplied in bfloat16 by tensor cores; nothing is spilled."""
    kernel = compiled(partial(launch_product, name, rank, WIDTHS["7B"]), capability, tmp_path, monkeypatch)
    ptx = kernel.asm["ptx"]
    assert f"sm_{capability}" in ptx
    sizes = load_bytes(ptx)
    # Only the dropout mask may be read in 8 bytes per thread: one byte for each of the 8 elements of x in 16 bytes.
    narrow = [size for size in sizes if size != 16]
    copies = kernel.metadata.num_stages if name != "up" else 1  # of the loads: before the loop, and in it
    mask = dropout_matmul.ROWS * dropout_matmul.COLUMNS // (32 * kernel.metadata.num_warps)
    assert set(narrow) <= {8} and sum(narrow) in (0, copies * mask), sizes
    assert sizes.count(16) >= (3 if name == "up" else 3 * copies)
    # Every load of a loop reads ahead, into shared memory.
    assert ("ld.global" in ptx) == (name == "up") and ("cp.async.c" in ptx) == (name != "up")
    products = {80: r"mma\.sync\S*bf16\.bf16", 90: r"(wgmma|mma)\S*bf16\.bf16", 100: r"tcgen05\.mma\S*f16|mma\S*bf16"}
    assert re.search(products[capability], ptx) and "tf32" not in ptx and "fma.rn.f32" not in ptx
    assert_no_spills_and_fits(kernel, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("tokens", "stream"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_embedding_of_both_streams(
    width: int,
    tokens: torch.dtype,
    stream: torch.dtype,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are read and written 16 bytes at a time; only the visual token's index is one int32."""
    kernel = compiled(partial(launch_embed, width, tokens, stream), capability, tmp_path, monkeypatch)
    sizes = load_bytes(kernel.asm["ptx"])
    assert sorted(sizes)[0] == 4 and set(sorted(sizes)[1:]) == {16}, sizes
    assert {wide for _, wide in re.findall(r"(st\.global(\.v4)?\.b32)", kernel.asm["ptx"])} == {".v4"}
    assert_no_spills_and_fits(kernel, tmp_path)
