"""Every fusion: formula, gradients in float64, initialisation, and Phi(F2D, 0) bit-equal to F2D."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import layer_norm

from encoder_inputs import pixel_values
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.fusion import FUSIONS, NUM_HEADS, Fusion, make_fusion, position_embeddings
from w2r2_ds.models.token_masking import mask_images
from w2r2_ds.models.weights.loading import load_vlm

SIZES = (3, 3, 5, 0, 2)
WIDTH = 16
STOCK_WITHOUT_GEOMETRY = [name for name, kind in FUSIONS.items() if kind.zero_is_stock]


def randomised(name: str, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Fusion:
    """A fusion whose parameters all differ from their initial values."""
    fusion = make_fusion(name, width).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return fusion


def tokens(count: int = sum(SIZES), width: int = WIDTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """F2D with a mean and a scale that differ from 0 and 1, and geometry tokens."""
    generator = torch.Generator().manual_seed(seed)
    visual, geometry = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return 3 * visual + 1, geometry


def test_make_fusion_covers_the_registry() -> None:
    assert {"add", "concat", "cross_attention", "gated"} == set(FUSIONS)
    assert [type(make_fusion(name, WIDTH)) for name in FUSIONS] == list(FUSIONS.values())
    assert STOCK_WITHOUT_GEOMETRY == ["add", "cross_attention", "gated"]
    with pytest.raises(ValueError, match=r"model.fusion is 'sum'; it must be one of add, concat"):
        make_fusion("sum", WIDTH)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("add", 0),
        ("concat", 2 * 2048 * 2048 + 2048 + 4 * 2048),
        ("cross_attention", 4 * 2048 * 2048 + 2 * 2048),
        ("gated", 2 * 2048 * 2048 + 2048 + 4 * 2048),
    ],
)
def test_real_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in FUSIONS[name](2048).parameters()) == count


def test_add_equals_the_sum() -> None:
    visual, geometry = tokens()
    assert torch.equal(make_fusion("add", WIDTH)(visual, geometry, SIZES), visual + geometry)


def test_gated_equals_values_computed_by_hand() -> None:
    """With two channels LayerNorm of (a, b) is (-1, 1) or (1, -1) up to epsilon, so the gate has a closed form."""
    fusion = make_fusion("gated", 2).double()
    fusion.load_state_dict(
        {
            "norm_visual.weight": torch.tensor([1.0, 2.0]),
            "norm_visual.bias": torch.tensor([0.0, 1.0]),
            "norm_geometry.weight": torch.tensor([3.0, 1.0]),
            "norm_geometry.bias": torch.tensor([0.5, 0.0]),
            "gate.weight": torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.4, 0.3, -0.2, 0.1]]),
            "gate.bias": torch.tensor([0.05, -0.1]),
        }
    )
    visual, geometry = torch.tensor([[100.0, 300.0]]).double(), torch.tensor([[60.0, -40.0]]).double()
    # norms: visual (-1, 2 * 1 + 1) = (-1, 3); geometry (3 * 1 + 0.5, -1) = (3.5, -1)
    first = 0.1 * -1 + 0.2 * 3 + 0.3 * 3.5 + 0.4 * -1 + 0.05  # 1.2
    second = -0.4 * -1 + 0.3 * 3 + -0.2 * 3.5 + 0.1 * -1 - 0.1  # 0.4
    gate = [1 / (1 + math.exp(-first)), 1 / (1 + math.exp(-second))]
    expected = torch.tensor([[100 + 60 * gate[0], 300 - 40 * gate[1]]], dtype=torch.float64)
    torch.testing.assert_close(fusion(visual, geometry, [1]), expected, rtol=1e-6, atol=0)


def test_concat_equals_values_computed_by_hand() -> None:
    fusion = make_fusion("concat", 2).double()
    fusion.load_state_dict(
        {
            "norm_visual.weight": torch.tensor([1.0, 2.0]),
            "norm_visual.bias": torch.tensor([0.0, 1.0]),
            "norm_geometry.weight": torch.tensor([3.0, 1.0]),
            "norm_geometry.bias": torch.tensor([0.5, -2.0]),
            "projection.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, 3.0, -2.0, 1.0]]),
            "projection.bias": torch.tensor([0.5, -1.0]),
        }
    )
    visual, geometry = torch.tensor([[100.0, 300.0]]).double(), torch.tensor([[60.0, -40.0]]).double()
    # norms: visual (-1, 3); geometry (3.5, -1 - 2) = (3.5, -3); zero geometry (0.5, -2), the bias
    fused = [[-1 + 6 + 10.5 - 12 + 0.5, 4 + 9 - 7 - 3 - 1.0]]
    torch.testing.assert_close(fusion(visual, geometry, [1]), torch.tensor(fused).double(), rtol=1e-5, atol=0)
    single = [[-1 + 6 + 1.5 - 8 + 0.5, 4 + 9 - 1 - 2 - 1.0]]
    torch.testing.assert_close(fusion(visual, None, [1]), torch.tensor(single).double(), rtol=1e-5, atol=0)


def attention_by_hand(fusion: Any, visual: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
    """Cross-attention inside one image, token by token and head by head."""
    width, depth = fusion.hidden_size, fusion.hidden_size // NUM_HEADS

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / torch.sqrt(x.pow(2).mean() + 1e-6)

    def code(index: int) -> torch.Tensor:
        angles = [index / 10000 ** (i / (width // 2)) for i in range(width // 2)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)

    normed = [rms_norm(g, fusion.norm_geometry.weight) for g in geometry]
    keys = [fusion.key.weight @ (s + code(j)) for j, s in enumerate(normed)]
    values = [fusion.value.weight @ s for s in normed]
    fused = []
    for i, token in enumerate(visual):
        query = fusion.query.weight @ (rms_norm(token, fusion.norm_visual.weight) + code(i))
        answer = []
        for begin in range(0, width, depth):
            head = slice(begin, begin + depth)
            scores = torch.stack([query[head] @ key[head] / math.sqrt(depth) for key in keys])
            weights = scores.exp() / scores.exp().sum()
            answer.append(sum(w * value[head] for w, value in zip(weights, values, strict=True)))
        fused.append(token + fusion.output.weight @ torch.cat(answer))
    return torch.stack(fused)


def test_cross_attention_equals_a_reference_per_image() -> None:
    fusion = randomised("cross_attention")
    visual, geometry = tokens()
    pairs = zip(visual.split(SIZES), geometry.split(SIZES), strict=True)
    expected = torch.cat([attention_by_hand(fusion, v, g) for v, g in pairs if len(v)])
    # position embeddings are float32
    torch.testing.assert_close(fusion(visual, geometry, SIZES), expected, rtol=1e-5, atol=1e-5)


def test_cross_attention_is_restricted_to_an_image() -> None:
    fusion = randomised("cross_attention")
    visual, geometry = tokens()
    fused = fusion(visual, geometry, SIZES)
    other = geometry.clone()
    other[3:6] += 1.0  # all of the second image
    changed = (fusion(visual, other, SIZES) - fused).abs().amax(-1)
    assert changed[3:6].min() > 1e-3 and changed[:3].max() == 0 and changed[6:].max() == 0
    moved = visual.clone()
    moved[7] += 1.0  # a 2D token changes its own query only
    assert (fusion(moved, geometry, SIZES) - fused).abs().amax(-1).nonzero().flatten().tolist() == [7]
    # Permuting images permutes the outputs.
    order = [4, 2, 0, 3, 1]
    turned = [torch.cat([list(x.split(SIZES))[i] for i in order]) for x in (visual, geometry, fused)]
    torch.testing.assert_close(fusion(turned[0], turned[1], [SIZES[i] for i in order]), turned[2])


def test_cross_attention_depends_on_positions() -> None:
    """Without position embeddings, the order of the geometry tokens would not matter."""
    fusion = randomised("cross_attention")
    visual, geometry = tokens(6)
    assert not torch.allclose(fusion(visual, geometry, [6]), fusion(visual, geometry.flip(0), [6]), atol=1e-3)
    # Positions count within an image: a second image with the same content has the same output.
    twice = fusion(torch.cat([visual, visual]), torch.cat([geometry, geometry]), [6, 6])
    torch.testing.assert_close(twice[:6], twice[6:])


def test_position_embeddings() -> None:
    codes = position_embeddings([2, 0, 3], 4)
    one, two = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)], [math.sin(2), math.sin(0.02)]
    expected = [[0, 0, 1, 1], one, [0, 0, 1, 1], one, [*two, math.cos(2), math.cos(0.02)]]
    torch.testing.assert_close(codes, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert position_embeddings([], 4).shape == position_embeddings([0], 4).shape == (0, 4)


def test_a_width_not_divisible_by_heads_raises() -> None:
    with pytest.raises(ValueError, match=r"cross_attention, which needs a width divisible by 8, .* 12; choose add"):
        make_fusion("cross_attention", 12)


@pytest.mark.parametrize("name", FUSIONS)
def test_gradients_equal_finite_differences(name: str) -> None:
    width = NUM_HEADS if name == "cross_attention" else 4
    fusion, sizes = randomised(name, width), (2, 0, 1)
    visual, geometry = (x.clone().requires_grad_() for x in tokens(3, width))
    names = [key for key, _ in fusion.named_parameters()]

    def fuse(visual: torch.Tensor, geometry: torch.Tensor | None, *weights: torch.Tensor) -> torch.Tensor:
        return functional_call(fusion, dict(zip(names, weights, strict=True)), (visual, geometry, sizes))

    weights = [parameter.detach().clone().requires_grad_() for parameter in fusion.parameters()]
    assert torch.autograd.gradcheck(fuse, (visual, geometry, *weights), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(fuse, (visual, None, *weights), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_batch_equals_its_images_one_by_one(name: str) -> None:
    fusion = randomised(name)
    visual, geometry = tokens()
    pairs = zip(visual.split(SIZES), geometry.split(SIZES), SIZES, strict=True)
    single = torch.cat([fusion(v, g, [size]) for v, g, size in pairs])
    torch.testing.assert_close(fusion(visual, geometry, SIZES), single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_weight_has_a_gradient_without_tokens(name: str) -> None:
    fusion = randomised(name)
    visual, geometry = (x.clone().requires_grad_() for x in tokens(0))
    for sizes in ([], [0, 0]):
        fused = fusion(visual, geometry, sizes)
        assert fused.shape == (0, WIDTH)
        fused.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in fusion.parameters())
        fusion.zero_grad()


@pytest.mark.parametrize("name", FUSIONS)
def test_modules_are_called_once_per_pass(name: str) -> None:
    fusion = randomised(name)
    calls: dict[str, int] = {}

    def count(key: str) -> Callable[..., None]:
        return lambda *_: calls.update({key: calls.get(key, 0) + 1})

    for key, module in fusion.named_modules():
        module.register_forward_pre_hook(count(key))
    fusion(*tokens(), SIZES)
    assert calls == {key: 1 for key, _ in fusion.named_modules()}


@pytest.mark.parametrize("name", STOCK_WITHOUT_GEOMETRY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_geometry_equals_the_stock_vlm_for_all_weights(name: str, dtype: torch.dtype) -> None:
    fusion = randomised(name, dtype=dtype)
    visual = tokens()[0].to(dtype)
    assert fusion(visual, None, SIZES) is visual
    assert torch.equal(fusion(visual, torch.zeros_like(visual), SIZES), visual)


def test_initialisation() -> None:
    visual, geometry = (x.float() for x in tokens(64, 256))
    start = {name: make_fusion(name, 256)(visual, geometry, [64]) for name in FUSIONS}
    assert torch.equal(start["add"], visual + geometry)
    assert torch.equal(start["cross_attention"], visual)
    torch.testing.assert_close(start["gated"], visual + geometry / 2, rtol=1e-6, atol=1e-6)
    geometry_part = start["concat"] - layer_norm(visual, (256,))
    # a normal(0, 0.02) projection of 256 channels of unit variance
    assert geometry_part.std().item() == pytest.approx(0.02 * math.sqrt(256), rel=0.1)


def test_gradients_of_cross_attention_in_the_first_two_steps() -> None:
    fusion = make_fusion("cross_attention", WIDTH).double()
    visual, geometry = tokens()
    geometry.requires_grad_()
    for step, reached in enumerate([{"output.weight"}, set(dict(fusion.named_parameters()))]):
        fusion.zero_grad()
        geometry.grad = None
        fusion(visual, geometry, SIZES).pow(2).sum().backward()
        assert {name for name, p in fusion.named_parameters() if p.grad is not None and p.grad.any()} == reached
        assert geometry.grad is not None and geometry.grad.any().item() == (step == 1)
        with torch.no_grad():
            for parameter in fusion.parameters():
                parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("name", FUSIONS)
def test_dtypes_and_shape_mismatch(name: str) -> None:
    fusion = randomised(name, dtype=torch.bfloat16)
    visual, geometry = (x.float() for x in tokens())
    assert fusion(visual.bfloat16(), geometry, SIZES).dtype == torch.bfloat16
    assert fusion(visual, geometry, SIZES).dtype == torch.float32
    with pytest.raises(ValueError, match=r"vision grid is \(13, 16\).*geometry grid is \(12, 16\)"):
        fusion(visual, geometry[:-1], SIZES)
    with pytest.raises(AssertionError, match="12 tokens in 1 images, but 13 tokens"):
        fusion(visual, geometry, [12])


# The composed model.


def composed(model_config: Any, fusion: str, **changes: Any) -> Any:
    """The tiny model with a fusion whose parameters all differ from their initial values."""
    model = build_model(
        type(model_config)(**{**vars(model_config), "fusion": fusion, **changes}), torch.device("cpu"), seed=1
    )
    model.fusion.load_state_dict(randomised(fusion, model.fusion.hidden_size, torch.float32).state_dict())
    return model.eval()


def stock_tokens(model_config: Any, visuals: Any) -> torch.Tensor:
    """Visual tokens of the stock VLM."""
    vlm = load_vlm(model_config.vlm, torch.float32, "sdpa").eval()
    encode = vlm.model.get_video_features if visuals.kind == "video" else vlm.model.get_image_features
    with torch.no_grad():
        return torch.cat(encode(pixel_values(visuals), visuals.grid_thw, return_dict=True).pooler_output)


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("name", FUSIONS)
@torch.no_grad()
def test_merged_zeros_give_the_stock_vlm(
    model_config: Any, batch_of: Any, samples: list[Any], name: str, visual: str
) -> None:
    batch = batch_of(samples, visual=visual)
    model = composed(model_config, name)
    tower, features = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)
    without_geometry = torch.cat(model.fuse(tower, model.zero_geometry_tokens(features)).pooler_output)
    stock = stock_tokens(model_config, batch.visuals)
    assert torch.equal(without_geometry, stock) == (name in STOCK_WITHOUT_GEOMETRY)
    fused = model.fuse(tower, model.merge(features))
    assert not torch.allclose(torch.cat(fused.pooler_output), without_geometry, atol=1e-3)
    assert torch.equal(torch.cat(tower.pooler_output), stock), "the tower's output is unchanged"
    assert [len(tokens) for tokens in fused.pooler_output] == [len(tokens) for tokens in tower.pooler_output]
    # Four, three and twelve frames; in a video, pairs of frames.
    assert len(tower.pooler_output) == (4 + 3 + 12 if visual == "images" else 2 + 2 + 6)


@pytest.mark.parametrize("name", FUSIONS)
@torch.no_grad()
def test_zero_features_give_the_mergers_output_for_zeros(
    model_config: Any, batch_of: Any, samples: list[Any], name: str
) -> None:
    batch = batch_of(samples[:2])
    model = composed(model_config, name, zero_geometry="features")
    tower, features = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)
    torch.nn.init.normal_(model.geometry_merger.mlp[2].bias)
    zeros = model.zero_geometry_tokens(features)
    torch.testing.assert_close(zeros, model.geometry_merger.mlp[2].bias.expand_as(zeros))
    visual, sizes = torch.cat(tower.pooler_output), [len(tokens) for tokens in tower.pooler_output]
    expected = model.fusion(visual, zeros, sizes)
    assert torch.equal(torch.cat(model.fuse(tower, zeros).pooler_output), expected)
    assert not torch.allclose(expected, visual, atol=1e-3)


def test_cross_attention_is_restricted_to_an_image_in_the_model(
    model_config: Any, batch_of: Any, samples: list[Any]
) -> None:
    """Geometry of one pair of video frames changes only the tokens of that pair."""
    batch = batch_of(samples[:2], visual="video")
    model = composed(model_config, "cross_attention")
    with torch.no_grad():
        tower = model.encode_2d(batch.visuals)
        merged = model.merge(model.encode_3d(batch.visuals))
        bounds = [0, *torch.tensor([len(tokens) for tokens in tower.pooler_output]).cumsum(0).tolist()]
        other = merged.clone()
        other[bounds[1] : bounds[2]] += 1.0
        one, two = (model.fuse(tower, geometry).pooler_output for geometry in (merged, other))
    assert [not torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_is_trained_and_in_the_fingerprint(model_config: Any, name: str) -> None:
    model = composed(model_config, name)
    names = {name for name in trainable(model) if name.startswith("fusion.")}
    assert names == {f"fusion.{key}" for key in model.fusion.state_dict()} and bool(names) == (name != "add")
    parameters = [parameter for module in model.geometry_modules().values() for parameter in module.parameters()]
    expected = {id(p) for key, p in trainable(model).items() if key.startswith(("fusion.", "geometry_merger."))}
    assert {id(parameter) for parameter in parameters} == expected
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert model.fingerprint["fusion"] == name


def test_masking_applies_to_the_fused_pass_only(model_config: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples[:2])
    model = composed(model_config, "add")
    with torch.no_grad():
        tower, features = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)
        before = [tokens.clone() for tokens in tower.pooler_output]
        merged = model.merge(features)
        ids_and_sizes = list(zip(batch.visuals.ids, map(len, features), strict=True))
        mask = functools.partial(mask_images, samples=ids_and_sizes, ratio=0.5, seed=0, step=0)
        masked = model.fuse(tower, merged, mask).pooler_output
    for without_geometry, fused, geometry in zip(before, masked, merged.split([len(t) for t in before]), strict=True):
        hidden = (fused == geometry).all(-1)
        assert int(hidden.sum()) == math.floor(len(without_geometry) / 2 + 0.5)
        assert torch.equal(fused[~hidden], (without_geometry + geometry)[~hidden])
    assert all(torch.equal(old, now) for old, now in zip(before, tower.pooler_output, strict=True))
    shortcut = model.fuse(tower, model.zero_geometry_tokens(features)).pooler_output
    assert all(torch.equal(old, now) for old, now in zip(before, shortcut, strict=True))
    with pytest.raises(AssertionError, match="the shortcut is never masked"):
        model.fuse(tower, None, mask)
