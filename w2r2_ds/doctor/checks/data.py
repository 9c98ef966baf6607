"""What training reads, seen from this node: prepared sets, the frames they name, the weights of VLM and VGGT."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from w2r2_ds.config.schema import DataConfig, ModelConfig, RunConfig
from w2r2_ds.doctor.own_code import content_hash
from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief

FRAMES = 8
"""Image files of every set that are looked for, evenly spread; training itself looks for all of them."""


def check_data(config: DataConfig) -> CheckResult:
    """Prepared sets: readable, with frames; equal content is equal digests of their manifests, which hash the rest."""
    from w2r2_ds.data.dataset import MANIFEST, PreparedSet

    outcome = CheckResult()
    root = Path(config.root)
    for source in [*config.train, *config.val]:
        folder = root / source.path
        try:
            found = PreparedSet(folder, root)
        except ValueError as error:
            outcome.wrong.append(str(error))
            continue
        outcome.shown[source.path] = f"{len(found)} samples in {folder}"
        outcome.equal[f"the prepared set {folder}"] = content_hash([folder / MANIFEST], folder)
        every = max(1, len(found) // FRAMES)
        frames = [found[index].frames[0] for index in range(0, len(found), every) if found[index].frames]
        lost = [path for path in frames if not path.is_file()]
        if lost:
            outcome.wrong.append(
                f"{lost[0]} of {folder} cannot be seen ({len(lost)} of {len(frames)} frames looked for); mount or copy "
                "the frames to this node, or correct data.root."
            )
    return outcome


def check_weights(config: ModelConfig) -> CheckResult:
    """Directories of VLM and VGGT, or their copies in the hub's cache; equal weights have equal fingerprints."""
    outcome = CheckResult()
    for field, source in (("model.vlm", config.vlm), ("model.vggt", config.vggt)):
        folder = Path(source)
        if not folder.is_dir():
            cached = _cached(source)
            if cached is None:
                sentence = f"{field}: {source} is no directory here and not in the Hugging Face cache of this node; "
                if os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "ON", "YES", "TRUE"):
                    outcome.wrong.append(f"{sentence}fetch it where there is a network, or correct {field}.")
                else:
                    outcome.warnings.append(f"{sentence}training will fetch it, or fail where it is no hub id.")
                continue
            folder = cached
        _look(outcome, field, folder)
    if config.merger:
        _digest(outcome, "model.merger", Path(config.merger))
    return outcome


def demo_makes(config: RunConfig) -> CheckResult:
    """The demo makes scenes and models where they are missing, so that none can be missed."""
    return CheckResult(
        shown={"data and models": f"the demo's, in {config.data.root} and {Path(config.model.vlm).parent}"}
    )


def _look(outcome: CheckResult, field: str, folder: Path) -> None:
    from w2r2_ds.models.weights_hash import weights_identity

    try:
        outcome.equal[f"{field} ({folder})"] = weights_identity(folder)
        outcome.shown[field] = str(folder)
    except (ValueError, OSError) as error:
        outcome.wrong.append(f"{field}: {error}")
    except Exception as error:  # a torn safetensors file has an exception of its own
        outcome.wrong.append(f"{field}: the weights in {folder} cannot be read ({brief(error)}); fetch them again.")
    _digest(outcome, field, folder / "config.json")


def _digest(outcome: CheckResult, field: str, path: Path) -> None:
    try:
        outcome.equal[f"{field} ({path})"] = content_hash([path], path.parent)
    except OSError as error:
        outcome.wrong.append(
            f"{field}: {path} cannot be read ({error.strerror}); correct {field}, or copy the complete directory."
        )


def _cached(source: str) -> Path | None:
    """The directory of a hub id in the cache; never goes to the network."""
    from huggingface_hub import snapshot_download

    fetch: Callable[..., str] = snapshot_download
    try:
        return Path(fetch(source, local_files_only=True))
    except Exception:  # not there, or no hub id: several kinds of several libraries, all one answer
        return None
