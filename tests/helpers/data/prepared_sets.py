"""Write samples as a prepared data set, in the format of launchers/prepare.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.data.prepared_set import MANIFEST, VERSION, write_samples
from w2r2_ds.types.sample import Sample

SCENE_FILE = "scene.parquet"


def write_prepared(folder: Path, samples: Sequence[Sample], root: Path, **manifest: Any) -> Path:
    """Write all samples to one scene file; `manifest` replaces fields of the manifest. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / SCENE_FILE, list(enumerate(samples)), root)
    task = samples[0].task if samples else "scanrefer"
    content = {"version": VERSION, "task": task, "counts": {"samples": len(samples)}, **manifest}
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder
