"""What all runs of an ablation share: options, evaluations, prepared data and first weights. OUT/ablation.json has it.

A later command with another value is an error, because its runs would not be comparable with those that exist. Arms,
seeds and evaluations may be added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.config.options import dotted
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.prepared_set import MANIFEST, read_manifest
from w2r2_ds.models.weights.weights_hash import weights_identity
from w2r2_ds.training.deepspeed.config import load_ds_config
from w2r2_ds.utils import plugins
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.hashing import file_sha256, json_sha256
from w2r2_ds.utils.files.json_io import check_fields, read_json_object
from w2r2_ds.utils.files.output_folder import make_folder

IDENTITY = "ablation.json"
OF_A_RUN = ("out", "resume", "train.seed")
"""Options with another value in every run."""


def shared_values(base: RunConfig, deepspeed: str, imported: Iterable[str]) -> dict[str, Any]:
    """What all runs share, with dotted names: configuration, DeepSpeed JSON, and the code of every plug-in (a hash)."""
    config = {name: value for name, value in dotted(asdict(base)) if name not in OF_A_RUN}
    code = {f"plugin {plugin}": plugins.SHA256[plugin] for plugin in imported}
    return {**config, "deepspeed": load_ds_config(deepspeed), **code}


def data_digests(configs: Iterable[RunConfig], evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Folder -> SHA-256 of the manifest of every prepared set that a run is trained or evaluated on.

    Args:
        configs: configurations of all arms.
        evaluations: name -> options; those with the option ``data`` have a set of their own.

    Raises:
        ValueError: a set is not prepared.
    """
    folders: dict[str, Path] = {}
    for config in configs:
        root = Path(config.data.root)
        for source in [*config.data.train, *config.data.val]:
            folders.setdefault(str(root / source.path), root / source.path)
        for options in evaluations.values():
            if (data := options.get("data")) is not None:
                folder = Path(data) if (Path(data) / MANIFEST).is_file() else root / data
                folders.setdefault(str(folder), folder)
    return {name: json_sha256(read_manifest(folder)) for name, folder in folders.items()}


def weights_digests(configs: Iterable[RunConfig]) -> dict[str, str]:
    """Folder of a VLM or file of a geometry merger, from which a run is trained -> hash of its weights.

    Only those on this machine: a hub id names the same weights in every run.

    Args:
        configs: configurations of all arms.

    Raises:
        ValueError: a folder has no weights, or they cannot be read.
    """
    found: dict[str, str] = {}
    for model in (config.model for config in configs):
        if Path(model.vlm).is_dir() and model.vlm not in found:
            found[model.vlm] = weights_identity(model.vlm)
        if Path(model.merger).is_file() and model.merger not in found:
            found[model.merger] = file_sha256(Path(model.merger))
    return found


def check_identity(
    out: Path, shared: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]], data: Mapping[str, str]
) -> None:
    """Compare what all runs share with that of the runs that `out` has, and write it.

    Args:
        out: folder of the ablation.
        shared: result of `shared_values`.
        evaluations: name -> options; others than those of an earlier command may be added.
        data: results of `data_digests` and `weights_digests`; other sets and weights may be added.

    Raises:
        ValueError: a value differs, so that the runs would not be comparable, and the message names it; or the file of
            the earlier runs lacks values.
    """
    file = out / IDENTITY
    # As it is read back: tuples become lists.
    wanted = json.loads(json.dumps({"shared": shared, "evaluations": evaluations, "data": data}))
    if file.is_file():
        found = read_json_object(file)
        check_fields(found, wanted, file, "pass another --out, and run the ablation again")
        for name in dict.fromkeys([*wanted["shared"], *found["shared"]]):
            old, new = found["shared"].get(name), wanted["shared"].get(name)
            if old != new:
                raise ValueError(
                    f"{file}: {name} was {old!r} and is {new!r} now, so the runs would not be comparable; pass another "
                    "--out, or the old value."
                )
        for name, options in wanted["evaluations"].items():
            if found["evaluations"].get(name, options) != options:
                raise ValueError(
                    f"{file}: the evaluation {name} had other options ({found['evaluations'][name]}); choose another "
                    "name for it."
                )
        for folder, digest in wanted["data"].items():
            if found["data"].get(folder, digest) != digest:
                raise ValueError(
                    f"{folder} has another content than at the first run (a set that was prepared again with other "
                    "samples or options, or replaced weights), so the runs would not be comparable; restore it or pass "
                    "another --out."
                )
        for key in ("evaluations", "data"):
            wanted[key] = found[key] | wanted[key]
    make_folder(out)
    atomic_io.replace(file, json.dumps(wanted, indent=2) + "\n")
