"""Attention anchors (section 1 of the paper): where the digits of an answer attend, in the 2D-only and the fused pass.

The definitions are in docs/concepts/attention-anchors.md; the anchor and its box are those of
`objective.shortcut_decode: anchor` (`objective/anchor.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.frames.token_rays import token_points
from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.data.loader import labeled_loader
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.diagnostics.attention.target_tokens import target_coverage
from w2r2_ds.models.attention.visual_attention import VisualAttention
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.family import require_row_attention
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.anchor import anchor_similarity, find_anchors
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample

SAVE_EVERY = 20
"""Batches after which the results so far are saved."""
PASSES = ("2d_only", "fused")
"""Phi(F2D, 0) and Phi(F2D, F3D)."""


@dataclass(frozen=True)
class AnchorRecord:
    """Attention of one sample in one pass.

    Attributes:
        sample: id of the sample.
        attention: ``[tokens]`` float32, attention to every visual token of the sample: mean over layers, heads and
            *where* tokens.
        coverage: ``[tokens]`` float64, share of every token that the projected box of the target covers.
        visual_share: per layer, share of the attention that goes to visual tokens.
        target_mass: per layer, share of the attention to visual tokens that goes to the target.
        token: index of the anchored token.
        frame: index of its frame.
        pixel: (x, y) of the token's centre in the frame's file.
        center: centre of the anchored box in the world, metres; NaN if the frame has no pose.
        size: its size along the axes of the world, metres.
        s: IoU3D of the anchored box with the target; 0 if the frame has no pose.
        distance: distance of the two centres in metres; NaN if the frame has no pose.
    """

    sample: str
    attention: np.ndarray
    coverage: np.ndarray
    visual_share: tuple[float, ...]
    target_mass: tuple[float, ...]
    token: int
    frame: int
    pixel: tuple[float, float]
    center: tuple[float, float, float]
    size: tuple[float, float, float]
    s: float
    distance: float

    @property
    def target_area(self) -> float:
        """Share of the visual tokens that the target covers: `target_mass` of uniform attention."""
        return float(self.coverage.mean())

    @property
    def on_target(self) -> bool:
        """Whether the target covers at least half of the anchored token."""
        return bool(self.coverage[self.token] >= 0.5)

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the maps; null for a number that is not defined."""
        hidden = {"attention", "coverage"}
        fields = {name: value for name, value in vars(self).items() if name not in hidden}
        derived = {"target_area": self.target_area, "on_target": self.on_target}
        return {name: _json(value) for name, value in (fields | derived).items()}


@dataclass(frozen=True)
class AnchorSummary:
    """Means over the samples of one pass.

    Attributes:
        samples: number of samples.
        on_target: share of the samples whose anchor is on the target.
        s: mean IoU3D of the anchored box.
        acc25: share of anchored boxes with IoU3D of at least 0.25.
        distance: median distance of the anchored box from the target, metres; NaN if no anchor has a pose.
        target_area: mean share of the visual tokens that the target covers, what uniform attention would give.
        target_mass: ``[layers]`` mean share of the visual attention that goes to the target.
        visual_share: ``[layers]`` mean share of the attention that goes to visual tokens.
    """

    samples: int
    on_target: float
    s: float
    acc25: float
    distance: float
    target_area: float
    target_mass: tuple[float, ...]
    visual_share: tuple[float, ...]

    @classmethod
    def of(cls, records: Sequence[AnchorRecord]) -> AnchorSummary:
        """Summary of at least one record."""
        s = np.array([record.s for record in records])
        return cls(
            samples=len(records),
            on_target=float(np.mean([record.on_target for record in records])),
            s=float(s.mean()),
            acc25=float((s >= 0.25).mean()),
            distance=_median([record.distance for record in records]),
            target_area=float(np.mean([record.target_area for record in records])),
            target_mass=tuple(np.mean([record.target_mass for record in records], axis=0).tolist()),
            visual_share=tuple(np.mean([record.visual_share for record in records], axis=0).tolist()),
        )


@dataclass(frozen=True)
class AttentionAnchors:
    """Result of `attention_anchors`.

    Attributes:
        typical: typical box of the training set.
        records: pass -> one record per sample, in the same order for both passes.
        not_in_view: number of drawn samples whose target is in no frame; they have no record.
    """

    typical: TypicalBox
    records: dict[str, list[AnchorRecord]]
    not_in_view: int

    @property
    def same_anchor(self) -> float:
        """Share of the samples whose anchor is the same token in both passes."""
        pairs = zip(*(self.records[name] for name in PASSES), strict=True)
        return float(np.mean([one.token == other.token for one, other in pairs]))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "typical": {
                "depth": self.typical.depth,
                "size": self.typical.size.tolist(),
                "class_sizes": {str(index): size.tolist() for index, size in self.typical.class_sizes.items()},
                "samples": self.typical.samples,
            },
            "not_in_view": self.not_in_view,
            "same_anchor": self.same_anchor,
            "passes": {
                name: {
                    "summary": {key: _json(value) for key, value in vars(AnchorSummary.of(records)).items()},
                    "records": [record.to_json() for record in records],
                }
                for name, records in self.records.items()
            },
        }


def attention_anchors(
    model: W2R2,
    frontend: VlmFrontend,
    config: DataConfig,
    samples: Sequence[Sample],
    typical: TypicalBox,
    count: int = 200,
    seed: int = 0,
    batch_size: int = 1,
    save: Callable[[AttentionAnchors], None] | None = None,
) -> AttentionAnchors:
    """Attention anchors of grounding samples of a data set, in both passes.

    Args:
        model: trained model in evaluation mode.
        frontend: tokenizer and sizes of its VLM, and its feature cache.
        config: data configuration of the run.
        samples: the data set.
        typical: typical box of the training set.
        count: maximum number of samples, drawn from those with frames, an answer and a target.
        seed: seed of the draw.
        batch_size: samples per forward.
        save: called with the results so far, after every ``SAVE_EVERY`` batches.

    Raises:
        ValueError: the VLM's family defines no attention weights, a scene has no intrinsics, or no grounding sample has
            its target in a frame.
    """
    require_row_attention(frontend.family)
    preprocessor = VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, config)
    eligible = [sample for sample in samples if sample.kind == "grounding" and is_complete(sample)]
    order = np.sort(np.random.default_rng(seed).permutation(len(eligible))[:count])
    drawn = [eligible[index] for index in order]
    coverages = [target_coverage(sample, preprocessor) for sample in drawn]
    shown = [(sample, coverage) for sample, coverage in zip(drawn, coverages, strict=True) if coverage.any()]
    if not shown:
        raise ValueError(
            f"None of {len(drawn)} grounding samples with an answer has its target in a frame; choose another data set."
        )
    # One sequence per sample: its visual tokens are consecutive, in the order of `coverages`.
    alone = replace(config, questions_per_scene=1, packing=False)
    loader = labeled_loader([sample for sample, _ in shown], frontend, alone, batch_size, typical=typical)
    anchors = AttentionAnchors(typical, {name: [] for name in PASSES}, len(drawn) - len(shown))
    remaining = iter(shown)
    for number, batch in enumerate(loader, start=1):
        own = [next(remaining) for _ in batch.ids]
        for name, found in _both_passes(model, batch.to(model.base.device)):
            anchors.records[name].extend(
                _record(sample, coverage, preprocessor, *values)
                for (sample, coverage), values in zip(own, found, strict=True)
            )
        if save is not None and number % SAVE_EVERY == 0:
            save(anchors)
    return anchors


def is_complete(sample: Sample) -> bool:
    """Whether a sample has frames, an answer and a target."""
    return bool(sample.frames) and bool(sample.answer) and sample.target is not None


@torch.no_grad()
def _both_passes(model: W2R2, batch: Batch) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Per pass, its name and per sample: attention ``[layers, tokens]``, token, frame, centre, size, s."""
    visual, geometry = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)
    for name in PASSES:
        merged = model.merge(geometry) if name == "fused" else model.zero_geometry_tokens(geometry)
        recorder = VisualAttention(model.family, batch)
        model.answer_hidden_states(batch, model.fuse(visual, merged), on_input=recorder)
        attention = torch.stack(recorder.maps).cpu().numpy()
        anchors = find_anchors(recorder.mean_map(), batch)
        s, _ = anchor_similarity(recorder.mean_map(), batch)
        owner, found = batch.frame_set_of_token.cpu().numpy(), []
        for index, frame_set in enumerate(batch.frame_set_of_sample.tolist()):
            own = np.flatnonzero(owner == frame_set)
            token = int(anchors.token[index]) - int(own[0])
            # Without a pose of the frame, the anchor is a pixel but no place.
            center = torch.where(anchors.valid[index], anchors.center[index], torch.nan)
            values = (anchors.frame[index], center, anchors.size[index], s[index])
            found.append((attention[:, index, own], token, *(value.cpu().numpy() for value in values)))
        yield name, found


def _record(
    sample: Sample,
    coverage: np.ndarray,
    preprocessor: VisualPreprocessor,
    attention: np.ndarray,
    token: int,
    frame: np.ndarray,
    center: np.ndarray,
    size: np.ndarray,
    s: np.ndarray,
) -> AnchorRecord:
    assert sample.target is not None, "chosen samples have a target"
    _, points = token_points(sample, preprocessor)
    x, y = points[token, 0].tolist()
    share = attention.sum(-1, dtype=np.float64)
    on_target = attention.astype(np.float64) @ coverage
    return AnchorRecord(
        sample=sample.id,
        attention=attention.mean(0),
        coverage=coverage,
        visual_share=tuple(share.tolist()),
        target_mass=tuple(np.divide(on_target, share, out=np.zeros_like(share), where=share > 0).tolist()),
        token=token,
        frame=int(frame),
        pixel=(x, y),
        center=tuple(center.tolist()),
        size=tuple(size.tolist()),
        s=float(s),
        distance=float(np.linalg.norm(center - sample.target.box[:3])),
    )


def _median(values: Sequence[float]) -> float:
    """Median of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan


def _json(value: Any) -> Any:
    """A value of a record or a summary; null in place of NaN."""
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
