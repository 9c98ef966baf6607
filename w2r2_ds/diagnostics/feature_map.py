"""Feature map (Fig. 1 of the paper): how 2D tokens, geometry tokens and fused tokens lie in the feature space.

The picture is a t-SNE of all three; the numbers (`representation.py`) do not depend on it. Per decoder layer, the
visual tokens of the fused pass are compared with those of the 2D-only pass: the first layer at which they are equal
again has lost the geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.loader import labeled_loader
from w2r2_ds.diagnostics.representation import Comparison, compare
from w2r2_ds.diagnostics.token_features import TokenFeatures, collect_tokens
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.packages import import_problem

CLOUDS = ("2d", "3d", "fused")
"""Names of the clouds: F2D, the merged geometry, Phi(F2D, F3D)."""


@dataclass(frozen=True)
class FeatureMapOptions:
    """Options of the feature map.

    Attributes:
        samples: maximum number of samples, those with different frames and an answer.
        tokens: maximum number of tokens, drawn from all samples equally.
        perplexity: perplexity of t-SNE, about the number of neighbours that a point keeps.
        neighbours: k of `neighbour_mix`.
        seed: seed of samples, tokens and t-SNE.
        batch_size: samples per forward.
    """

    samples: int = 64
    tokens: int = 1000
    perplexity: float = 30.0
    neighbours: int = 10
    seed: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class FeatureMap:
    """Result of `feature_map`.

    Attributes:
        options: the options.
        samples: id of the sample of every token.
        clouds: ``"2d_3d"``, ``"2d_fused"``, ``"3d_fused"`` -> comparison of two clouds; `norm_ratio` is that of the
            second to the first.
        layers: per decoder layer, its input in the 2D-only pass compared with that in the fused pass.
        points: name of a cloud -> ``[tokens, 2]`` float64 coordinates of t-SNE.
    """

    options: FeatureMapOptions
    samples: tuple[str, ...]
    clouds: dict[str, Comparison]
    layers: tuple[Comparison, ...]
    points: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """JSON values; coordinates rounded to 4 decimals."""
        return {
            "options": vars(self.options),
            "samples": list(self.samples),
            "clouds": {name: comparison.to_json() for name, comparison in self.clouds.items()},
            "layers": [comparison.to_json() for comparison in self.layers],
            "points": {name: np.round(points, 4).tolist() for name, points in self.points.items()},
        }


def feature_map(
    model: W2R2, frontend: VlmFrontend, config: DataConfig, samples: Sequence[Sample], options: FeatureMapOptions
) -> FeatureMap:
    """Feature map of a trained model on a data set.

    Args:
        model: trained model in evaluation mode.
        frontend: tokenizer and sizes of its VLM, and its feature cache.
        config: data configuration of the run.
        samples: the data set.
        options: options.

    Raises:
        ValueError: scikit-learn cannot be imported, no sample has frames and an answer, or an option does not fit the
            number of tokens.
    """
    if problem := import_problem("sklearn"):
        raise ValueError(f"The feature map needs scikit-learn, which {problem}: pip install 'w2r2-ds[diagnostics]'.")
    chosen = with_different_frames(samples, options.samples, options.seed)
    # One sequence per sample, so that every frame set belongs to one sample.
    loader = labeled_loader(chosen, frontend, replace(config, questions_per_scene=1, packing=False), options.batch_size)
    features = collect_tokens(model, loader, max(1, options.tokens // len(chosen)), options.seed)
    return map_of(features, options)


def map_of(features: TokenFeatures, options: FeatureMapOptions) -> FeatureMap:
    """Comparisons and t-SNE of collected tokens."""
    clouds = dict(zip(CLOUDS, (features.two_d, features.three_d, features.fused), strict=True))
    _check_count(len(features.samples), options)
    pairs = {f"{a}_{b}": (clouds[a], clouds[b]) for a, b in (("2d", "3d"), ("2d", "fused"), ("3d", "fused"))}
    return FeatureMap(
        options=options,
        samples=features.samples,
        clouds={name: compare(*pair, options.neighbours) for name, pair in pairs.items()},
        layers=tuple(compare(short, fused, options.neighbours) for short, fused in features.layers),
        points=dict(zip(CLOUDS, tsne(list(clouds.values()), options.perplexity, options.seed), strict=True)),
    )


def with_different_frames(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` random samples with an answer, no two with the same frames, in their order.

    Raises:
        ValueError: there are none.
    """
    first: dict[object, int] = {}
    for index, sample in enumerate(samples):
        if sample.frames and sample.answer:
            first.setdefault(sample.frames, index)
    if not first:
        raise ValueError("No sample has both frames and an answer; choose another data set.")
    candidates = np.array(list(first.values()))
    drawn = np.random.default_rng(seed).permutation(candidates)[:count]
    return [samples[int(index)] for index in np.sort(drawn)]


def tsne(clouds: Sequence[np.ndarray], perplexity: float, seed: int) -> list[np.ndarray]:
    """One common t-SNE of several clouds ``[n, channels]``: ``[n, 2]`` float64 coordinates of each.

    Initialised with the first two principal components and seeded, so that equal inputs give equal pictures.
    """
    from sklearn.manifold import TSNE

    points = np.concatenate(clouds).astype(np.float32)
    embedded = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points).astype(np.float64)
    return np.split(embedded, np.cumsum([len(cloud) for cloud in clouds])[:-1])


def _check_count(tokens: int, options: FeatureMapOptions) -> None:
    """Raise ValueError if there are too few tokens for the options."""
    if tokens < 4 or options.perplexity >= 3 * tokens or options.neighbours >= 2 * tokens:
        raise ValueError(
            f"The feature map has {tokens} tokens, too few for perplexity {options.perplexity:g} (below the "
            f"{3 * tokens} points) and {options.neighbours} neighbours (below {2 * tokens}); raise the number of "
            "tokens or of samples, or lower these."
        )
