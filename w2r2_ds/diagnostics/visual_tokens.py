"""Diagnose the visual tokens of a run, a checkpoint or an adapter: feature map and attention anchors, as files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.typical_box import typical_box
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.diagnostics.attention.anchors import AnchorSummary, AttentionAnchors, attention_anchors
from w2r2_ds.diagnostics.attention.heat_maps import save_heat_map
from w2r2_ds.diagnostics.feature_map import FeatureMapOptions, feature_map
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.loading import run_config, trained_model, with_cache
from w2r2_ds.models.build import load_frontend
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.output_folder import check_writable, make_folder
from w2r2_ds.utils.packages import import_problem

logger = logging.getLogger(__name__)

PARTS = ("features", "attention")
"""``features`` is the feature map, ``attention`` the attention anchors."""


@dataclass(frozen=True)
class VisualOptions:
    """Options of `diagnose_visual_tokens`.

    Attributes:
        parts: names from `PARTS`.
        features: options of the feature map.
        samples: maximum number of samples of the attention anchors.
        pictures: number of samples with a heat map, the first ones.
        seed: seed of the draw of samples.
        batch_size: samples per forward.
    """

    parts: Sequence[str] = PARTS
    features: FeatureMapOptions = field(default_factory=FeatureMapOptions)
    samples: int = 200
    pictures: int = 12
    seed: int = 0
    batch_size: int = 1


def diagnose_visual_tokens(
    path: Path,
    out: Path,
    options: VisualOptions,
    *,
    task: str | None = None,
    data: Path | None = None,
    root: str | Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
) -> dict[str, Any]:
    """Feature map and attention anchors of a trained model on a validation set; a single process.

    Writes ``features-TASK.json``, ``attention-TASK.json`` and ``attention-TASK/NUMBER.png`` to `out`, as soon as there
    are results; `finished` of ``attention-TASK.json`` is false until all samples are in it.

    Args:
        path: folder of a run, a checkpoint or an exported adapter.
        out: folder of the results.
        options: options.
        task: task whose validation sets are used; None if all sets of the run are of one task.
        data: prepared folder instead of the run's own sets.
        root: data root on this machine; None for the one of training.
        vlm: directory or hub id of the VLM on this machine; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder on this machine; None for the one of training.

    Returns:
        Part -> content of its file. Without the part ``attention`` if the set has no grounding samples.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used. Attention anchors need the run's training
            sets, for the typical box, and the scenes' intrinsics.
    """
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown or not options.parts:
        raise ValueError(f"The parts are {', '.join(unknown) or 'empty'}; choose from {', '.join(PARTS)}.")
    if "features" in options.parts and (problem := import_problem("sklearn")):
        raise ValueError(f"The feature map needs scikit-learn, which {problem}: pip install 'w2r2-ds[diagnostics]'.")
    check_writable(out)
    config = run_config(path, root, vlm, geometry_path)
    sets = find_sets(config.data, task, data)
    samples = all_samples(sets)
    parts = list(options.parts)
    if "attention" in parts and not any(sample.kind == "grounding" for sample in samples):
        logger.warning("attention anchors of %s are not measured: it has no grounding samples", sets[0].folder)
        parts.remove("attention")
    # Before the weights are loaded: the training sets may not be on this machine.
    typical = typical_box(load_mixture(config.data, "train")) if "attention" in parts else None
    frontend = with_cache(load_frontend(config.model), config)
    model = trained_model(path, config)
    described = {"checkpoint": str(path), "task": sets[0].task, "data": describe_sets(sets)}
    make_folder(out)
    results: dict[str, Any] = {}

    def save(part: str, content: dict[str, Any]) -> None:
        """Write the file of a part as soon as there are results, so that an interrupted run keeps them."""
        results[part] = described | content
        text = json.dumps(results[part], indent=2, allow_nan=False)
        atomic_io.replace(out / f"{part}-{sets[0].task}.json", text + "\n")

    if "features" in parts:
        found = feature_map(model, frontend, config.data, samples, options.features)
        save("features", found.to_json())
        for pair, each in found.clouds.items():
            logger.info("features %s: CKA %.3f, centroid distance %.3g", pair, each.cka, each.centroid_distance)
    if typical is not None:
        logger.info("%s", typical.describe())
        anchors = attention_anchors(
            model,
            frontend,
            config.data,
            samples,
            typical,
            options.samples,
            options.seed,
            options.batch_size,
            lambda partial: save("attention", partial.to_json() | {"finished": False, "pictures": {}}),
        )
        log_anchors(anchors)
        preprocessor = VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, config.data)
        pictures = save_pictures(out, sets[0].task, anchors, samples, preprocessor, options.pictures)
        save("attention", anchors.to_json() | {"finished": True, "pictures": pictures})
    return results


def log_anchors(anchors: AttentionAnchors) -> None:
    """Log the means of both passes."""
    for name, records in anchors.records.items():
        mean = AnchorSummary.of(records)
        values = 100 * mean.on_target, 100 * mean.target_area, mean.s, 100 * mean.acc25, mean.samples
        message = "attention %s: anchor on the target %.1f %% (area %.1f %%), s %.3f, Acc@0.25 %.1f %%, %d samples"
        logger.info(message, name, *values)


def save_pictures(
    out: Path,
    task: str,
    anchors: AttentionAnchors,
    samples: Sequence[Sample],
    preprocessor: VisualPreprocessor,
    count: int,
) -> dict[str, str]:
    """Write heat maps of the first `count` samples with both passes; returns sample id -> file, relative to `out`."""
    by_id = {sample.id: sample for sample in samples}
    pictures = {}
    for number, records in enumerate(list(zip(*anchors.records.values(), strict=True))[:count]):
        name = f"attention-{task}/{number:03}.png"
        save_heat_map(out / name, by_id[records[0].sample], records, preprocessor)
        pictures[records[0].sample] = name
    return pictures
