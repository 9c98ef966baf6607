"""The geometry merger: formula, sizes in the real models, one call of every module per pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from w2r2_ds.models.merger import GeometryMerger, pair_frames


def reference(merger: GeometryMerger, features: torch.Tensor) -> torch.Tensor:
    """The merger written out with loops: cell by cell, patch by patch."""
    tokens = []
    weights = {name: value.detach() for name, value in merger.named_parameters()}
    for frame in features:
        for row in range(frame.shape[0] // 2):
            for column in range(frame.shape[1] // 2):
                cell = [frame[2 * row + y, 2 * column + x] for y in (0, 1) for x in (0, 1)]
                normal = [weights["ln_q.weight"] * v / torch.sqrt(v.pow(2).mean() + 1e-6) for v in cell]
                hidden = weights["mlp.0.weight"] @ torch.cat(normal) + weights["mlp.0.bias"]
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
                tokens.append(weights["mlp.2.weight"] @ hidden + weights["mlp.2.bias"])
    return torch.stack(tokens)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 3)])
def test_merger_equals_its_formula_and_crops(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    merger = GeometryMerger(8, 12, merger_hidden=16, init_std=0.3)
    nn.init.normal_(merger.ln_q.weight)
    nn.init.normal_(merger.get_parameter("mlp.0.bias"))
    features = torch.randn(3, *grid, 8)
    merged = merger([features])
    assert merged.shape == (3 * (grid[0] // 2) * (grid[1] // 2), 12)
    torch.testing.assert_close(merged, reference(merger, features), rtol=1e-5, atol=1e-6)


def test_token_order_is_frame_row_column() -> None:
    merger = GeometryMerger(4, 4, merger_hidden=8, init_std=0.5)
    features = torch.randn(2, 4, 6, 4)
    changed = features.clone()
    changed[1, 2, 5] += 1.0
    difference = (merger([features]) - merger([changed])).abs().sum(-1)
    assert difference.nonzero().flatten().tolist() == [6 + 3 + 2]


def test_samples_of_any_size_are_merged_in_one_call() -> None:
    """ZeRO-3 needs equally many calls on a rank with three samples and on one with none."""
    torch.manual_seed(0)
    merger = GeometryMerger(8, 12, merger_hidden=16, init_std=0.3).double()
    nn.init.normal_(merger.get_parameter("mlp.2.bias"))
    grids = [torch.randn(*size, 8, dtype=torch.float64) for size in [(2, 4, 6), (0, 4, 4), (1, 5, 3), (3, 2, 2)]]
    calls: list[tuple[str, int]] = []
    for name, module in merger.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *call, name=name: calls.append((name, len(call[2]))))
    merged = merger(grids)
    assert calls == [(name, 12 + 0 + 2 + 3) for name in ("ln_q", "mlp.0", "mlp.1", "mlp.2")]
    one_by_one = torch.cat([merger([grid]) for grid in grids])
    torch.testing.assert_close(merged, one_by_one, rtol=1e-12, atol=1e-12)


def test_without_samples_every_module_is_called_and_has_a_gradient() -> None:
    merger = GeometryMerger(8, 12, merger_hidden=16)
    for grids in ([], [torch.zeros(0, 4, 4, 8)]):
        merged = merger(grids)
        assert merged.shape == (0, 12)
        merged.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in merger.parameters())
        merger.zero_grad()


@pytest.mark.parametrize(("hidden", "count"), [(2048, 41_951_232), (3584, 48_244_224)])
def test_real_sizes(hidden: int, count: int) -> None:
    with torch.device("meta"):
        merger = GeometryMerger(2048, hidden)
    shapes = {name: tuple(value.shape) for name, value in merger.named_parameters()}
    assert shapes == {
        "ln_q.weight": (2048,),
        "mlp.0.weight": (4096, 8192),
        "mlp.0.bias": (4096,),
        "mlp.2.weight": (hidden, 4096),
        "mlp.2.bias": (hidden,),
    }
    assert sum(value.numel() for value in merger.parameters()) == count


def test_initialisation_is_normal_and_dtype_follows_the_weights() -> None:
    torch.manual_seed(0)
    merger = GeometryMerger(32, 64, merger_hidden=256)
    assert merger.get_parameter("mlp.0.weight").std().item() == pytest.approx(0.02, rel=0.05)
    assert not merger.get_parameter("mlp.0.bias").any() and not merger.get_parameter("mlp.2.bias").any()
    assert merger.to(torch.bfloat16)([torch.randn(1, 2, 2, 32)]).dtype == torch.bfloat16


COPIES = ("_to_copy", "cat", "clone", "copy_", "flip", "index", "index_select")


class FullCopies(TorchDispatchMode):
    """Records operations that write a copy of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COPIES and made.numel() >= self.size:
            self.found.append(name)
        return made


@pytest.mark.parametrize("sizes", [[(4, 4, 6)], [(1, 4, 6), (2, 5, 7), (1, 4, 6)]])
def test_features_behind_special_tokens_are_copied_once(sizes: list[tuple[int, int, int]]) -> None:
    """From the encoder's output to the merger's: only the write into cells, which also reorders the patches."""
    torch.manual_seed(0)
    merger = GeometryMerger(8, 12, merger_hidden=2)
    nn.init.normal_(merger.ln_q.weight)
    tokens = [torch.randn(frames, 5 + rows * columns, 8) for frames, rows, columns in sizes]
    smallest = min(frames * (rows // 2 * 2) * (columns // 2 * 2) * 8 for frames, rows, columns in sizes)
    results = []
    for strided in (True, False):
        grids = [t[:, 5:].unflatten(1, size[1:]) for t, size in zip(tokens, sizes, strict=True)]
        grids = [grid if strided else grid.contiguous() for grid in grids]
        assert any(grid.is_contiguous() for grid in grids) != strided or len(sizes) > 1
        merger.zero_grad()
        with FullCopies(smallest) as copies:
            merged = merger(grids)
            (merged * torch.arange(merged.numel()).view_as(merged)).sum().backward()
        assert copies.found == ["copy_"] * len(sizes)
        results.append([merged, *(p.grad.clone() for p in merger.parameters() if p.grad is not None)])
    assert len(results[0]) == 6 and all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradients_of_features() -> None:
    torch.manual_seed(0)
    merger = GeometryMerger(4, 6, merger_hidden=8, init_std=0.5).double()
    grids = [torch.randn(*size, 4, dtype=torch.float64, requires_grad=True) for size in [(1, 2, 2), (1, 3, 4)]]
    assert torch.autograd.gradcheck(lambda *features: merger(features), grids)


def test_features_of_wrong_shape_raise() -> None:
    merger = GeometryMerger(8, 12, merger_hidden=16)
    with pytest.raises(ValueError, match=r"expected \[frames, h, w, 8\]"):
        merger([torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 9)])
    with pytest.raises(ValueError, match=r"\(4, 4, 8\)"):
        merger(torch.zeros(1, 4, 4, 8))  # a grid instead of a list of grids
    for rows, columns in ((1, 4), (4, 1), (0, 4)):
        with pytest.raises(ValueError, match=f"a {rows} x {columns} grid holds no 2 x 2 cell"):
            merger([torch.zeros(1, rows, columns, 8)])


def test_pair_frames() -> None:
    frames = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 3, 4)
    assert pair_frames(frames)[:, 0, 0, 0].tolist() == [0.5, 2.5, 4.0]
    assert pair_frames(frames[:4]).shape == (2, 2, 3, 4)
    assert torch.equal(pair_frames(frames[3:4]), frames[3:4])
    assert pair_frames(frames.bfloat16()).dtype == torch.bfloat16
    narrow = frames[:4].bfloat16()
    with FullCopies(narrow.numel()) as copies:
        pair_frames(narrow)
    assert copies.found == []
    with pytest.raises(ValueError, match="frames >= 1"):
        pair_frames(frames[:0])


def test_the_scale_hint_is_a_linear_map_of_the_last_channels() -> None:
    """Zero at first; per frame set, at all of its tokens; a gradient also without any grid (ZeRO-3 needs it)."""
    torch.manual_seed(0)
    merger, plain = GeometryMerger(4, 6, merger_hidden=8, scale_channels=3), GeometryMerger(4, 6, merger_hidden=8)
    assert merger.scale_hint is not None and not merger.scale_hint.weight.any() and merger.scale_hint.bias is None
    plain.load_state_dict({name: value for name, value in merger.state_dict().items() if "scale_hint" not in name})
    codes, grids = torch.randn(2, 3), [torch.randn(2, 4, 4, 4), torch.randn(1, 2, 5, 4)]
    given = [torch.cat([grid, code.expand(*grid.shape[:3], -1)], -1) for grid, code in zip(grids, codes, strict=True)]
    expected = plain(grids)
    assert torch.equal(merger(given), expected) and len(expected) == 8 + 2
    torch.nn.init.normal_(merger.scale_hint.weight)
    hints = torch.repeat_interleave(codes @ merger.scale_hint.weight.T, torch.tensor([8, 2]), dim=0)
    torch.testing.assert_close(merger(given), expected + hints)
    assert merger([]).shape == (0, 6)
    merger([]).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in merger.parameters())
    with pytest.raises(ValueError, match=r"expected \[frames, h, w, 7\]"):
        merger(grids)
