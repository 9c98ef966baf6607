"""What a prepared data set lacks or cannot show, as sentences for the logs and score files of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepare.unseen import Unseen
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.types.sample import Sample


def preparation_notes(samples: Sequence[Sample], root: Path | str) -> list[str]:
    """Sentences about unseen and skipped items and inputs of the prepared data sets; other sources have none.

    Skipped items are not in the denominator of any score, so scores must be printed with their number.

    Args:
        samples: a mixture or one data set.
        root: data root; folders are named relative to it.
    """
    sets = samples.sets if isinstance(samples, Mixture) else [samples]
    return [note for each in sets if isinstance(each, PreparedSet) for note in _notes(each, Path(root))]


def _notes(prepared: PreparedSet, root: Path) -> list[str]:
    manifest, folder = prepared.manifest, prepared.folder
    name = folder.relative_to(root) if folder.is_relative_to(root) else folder
    trains = manifest.get("split") == "train"
    notes = []
    unseen = Unseen(**manifest["counts"].get("unseen", {}))
    if unseen.count:
        # Training skips unseen items, which the reasons below count.
        stays = "" if trains else "; they stay in the denominator of the scores"
        notes.append(f"{unseen.count} of {unseen.of} items are seen by no frame{stays}")
    skipped: dict[str, int] = manifest.get("skipped", {})
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        effect = "" if trains else "; they are not in the denominator of the scores"
        notes.append(f"{sum(skipped.values())} items were skipped in the preparation ({reasons}){effect}")
    notes += [f"skipped input: {line}" for line in manifest.get("skipped_inputs", ())]
    return [f"{name}: {note}" for note in notes]
