"""Checks of the files that training reads: prepared data sets, their frames, weights of VLM and geometry encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from w2r2_ds.config.schema import GeometryConfig, ModelConfig, RunConfig
from w2r2_ds.doctor.checks.environment import short_hash
from w2r2_ds.doctor.checks.host import check_shared_memory
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.utils.files.json_io import read_json

if TYPE_CHECKING:
    from w2r2_ds.data.shared_memory import FeatureSizes
    from w2r2_ds.types.geometry import GeometrySpec
    from w2r2_ds.types.sample import Sample

SAMPLES_CHECKED = 8
"""Maximum number of samples per data set, evenly spaced, whose first frame is checked; training checks all frames."""


def check_data(run: RunConfig, ranks: int) -> CheckResult:
    """Check prepared sets and their frames, and the shared memory for micro-batches of the node's `ranks` ranks."""
    import numpy as np

    from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet
    from w2r2_ds.data.shared_memory import sample_bytes

    result = CheckResult()
    config, features, geometry = run.data, cached_sizes(run), known_spec(run.model.geometry)
    root, largest = Path(config.root), 0
    for source in [*config.train, *config.val]:
        folder = root / source.path
        try:
            found = PreparedSet(folder, root)
            result.info[source.path] = f"{len(found)} samples in {folder}"
            result.must_match[f"the prepared set {folder}"] = short_hash([folder / MANIFEST], folder)  # has all hashes
            indices = np.linspace(0, len(found) - 1, min(SAMPLES_CHECKED, len(found)), dtype=int)
            samples = [sample for sample in (found[index] for index in indices) if sample.frames]
            missing = [sample.frames[0] for sample in samples if not sample.frames[0].is_file()]
            if missing:
                result.errors.append(
                    f"{missing[0]} of {folder} does not exist ({len(missing)} of {len(samples)} checked frames); mount "
                    "or copy the frames to this node, or correct data.root."
                )
                continue
            largest = max([largest, *(sample_bytes(sample.frames, config, features, geometry) for sample in samples)])
            if geometry is not None:
                check_first_frames(samples, run.model.geometry.name, geometry)
        except ValueError as error:  # the set or a frame cannot be read
            result.errors.append(str(error))
    # Samples that share their frames share the inputs of the encoders too.
    check_shared_memory(result, largest * run.train.micro_batch // config.questions_per_scene, config, ranks)
    return result


def check_first_frames(samples: Sequence[Sample], name: str, geometry: GeometrySpec) -> None:
    """Check the geometry encoder's files of the first frame of every sample; raises ValueError."""
    from w2r2_ds.data.validate import check_geometry_files

    check_geometry_files([replace(sample, frames=sample.frames[:1]) for sample in samples], name, geometry)


def known_spec(config: GeometryConfig) -> GeometrySpec | None:
    """Sizes and input of the geometry encoder from its configuration; None if they are unknown."""
    from w2r2_ds.models.geometry.encoder import geometry_spec

    if config.path and not Path(config.path).is_dir():  # a hub id would be downloaded
        return None
    try:
        return geometry_spec(config)
    except ValueError:  # unreadable files are errors of `check_weights`
        return None


def cached_sizes(run: RunConfig) -> FeatureSizes | None:
    """Sizes of cached features from the models' configurations; None without a cache, or if sizes are unknown."""
    from w2r2_ds.data.shared_memory import FeatureSizes
    from w2r2_ds.kernels.select import resolve_dtype

    model, spec = run.model, known_spec(run.model.geometry)
    if not run.data.cache or spec is None:
        return None
    try:
        tree = read_json(Path(model.vlm) / "config.json")
        tower, hidden = tree["vision_config"], tree.get("text_config", tree)["hidden_size"]
        token = tower["patch_size"] * tower["spatial_merge_size"]
    except (KeyError, ValueError):  # unreadable files are errors of `check_weights`
        return None
    itemsize = resolve_dtype(model.dtype).itemsize
    vision = hidden * itemsize if run.data.cached_features == "geometry+2d" else 0
    return FeatureSizes(spec.patch_size, spec.feature_dim * itemsize, token, vision)


def check_weights(config: ModelConfig) -> CheckResult:
    """Check VLM and geometry encoder: config.json and a sample of the weights must be equal on all nodes."""
    from huggingface_hub import constants

    result = CheckResult()
    sources = {"model.vlm": config.vlm, "model.geometry.path": config.geometry.path}
    for field, source in sources.items():
        if not source:  # a geometry encoder without files
            continue
        folder = Path(source) if Path(source).is_dir() else _cached(source)
        if folder is not None:
            _hash_model(result, field, folder)
            continue
        message = f"{field}: {source} is neither a directory nor in the Hugging Face cache of this node; "
        if constants.HF_HUB_OFFLINE:
            result.errors.append(f"{message}download it on a node with network access, or correct {field}.")
        else:
            result.warnings.append(f"{message}training will download it, or fail if it is not a hub id.")
    if config.merger:
        _hash_file(result, "model.merger", Path(config.merger))
    return result


def _hash_model(result: CheckResult, field: str, folder: Path) -> None:
    from w2r2_ds.models.weights.weights_hash import weights_identity

    try:
        result.must_match[f"{field} ({folder})"] = weights_identity(folder)
        result.info[field] = str(folder)
    except ValueError as error:
        result.errors.append(f"{field}: {error}")
    _hash_file(result, field, folder / "config.json")


def _hash_file(result: CheckResult, field: str, path: Path) -> None:
    try:
        result.must_match[f"{field} ({path})"] = short_hash([path], path.parent)
    except OSError as error:
        result.errors.append(
            f"{field}: {path} cannot be read ({error.strerror}); correct {field}, or copy the complete directory."
        )


def _cached(source: str) -> Path | None:
    """Directory of a hub id in the Hugging Face cache, without network access; None if it is not cached."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception:  # not cached or not a hub id; the exception types vary between versions
        return None
