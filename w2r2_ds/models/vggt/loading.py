"""Load and save VGGT directories: ``config.json`` and safetensors files, whose names and shapes must match exactly."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from w2r2_ds.models.vggt.config import HEAD_SIZES, HEAD_SWITCHES, Head, VGGTConfig
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.files.safetensors_io import INDEX, WEIGHTS, weight_files

CONFIG = "config.json"
HEAD_PREFIXES = ("camera_head.", "point_head.", "depth_head.", "track_head.")
"""Prefixes of the weights of heads, which are loaded only on request (those of ``track_head`` never)."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Supported dtypes of weights, in the notation of safetensors."""


def load_vggt(source: str | Path, heads: Collection[Head] = ()) -> VGGT:
    """Load a VGGT with float32 weights, on the CPU, in eval mode.

    Args:
        source: directory with ``config.json`` and ``model.safetensors`` (or shards and their index), or the id of a
            Hugging Face Hub repository such as ``facebook/VGGT-1B``.
        heads: heads to load besides the aggregator (`HEADS` for all). The weights of others are not read.

    Raises:
        ValueError: there is no such directory or repository, a file is missing or damaged, a weight is missing,
            unknown or of another shape, or the directory has no such head.
    """
    directory = locate(source)
    config = read_config(directory)
    if heads:
        check_heads(directory, heads)
    # On the meta device: no memory, and no random initialisation that the weights would overwrite.
    with torch.device("meta"):
        model = VGGT(config, heads)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        for name, tensor in _read(file, expected).items():
            if name in state:
                raise ValueError(f"{file}: {name} is also in another file of {directory}; fetch the directory again.")
            state[name] = tensor
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(
            f"{directory}: the weights lack {_first(missing)}; its {CONFIG} describes another VGGT, or a file is "
            "incomplete: fetch it again."
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save_vggt(vggt: VGGT, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, each atomically; the directory is created if needed.

    Heads are written if the model has them, and ``config.json`` has the public code's switch of each head.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vggt.state_dict().items()}
    temporary = directory / f".{WEIGHTS}.{os.getpid()}"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, directory / WEIGHTS)
    temporary = directory / f".{CONFIG}.{os.getpid()}"
    values = {key: value for key, value in vggt.config.to_dict().items() if vggt.heads or key not in HEAD_SIZES}
    values |= dict.fromkeys(HEAD_SWITCHES, False) | {_switch(head): True for head in vggt.heads}
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, directory / CONFIG)


def read_config(directory: Path) -> VGGTConfig:
    """Read ``config.json`` of a VGGT directory.

    Raises:
        ValueError: the file is missing or not a JSON object, or a field is unknown or out of range.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a VGGT directory needs {CONFIG} and {WEIGHTS}.")
    try:
        return VGGTConfig.from_dict(read_json_object(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def locate(source: str | Path) -> Path:
    """The local directory of `source`; a hub repository is downloaded if necessary.

    Raises:
        ValueError: `source` is neither a directory nor a hub id that can be downloaded.
    """
    if str(source) and Path(source).is_dir():  # Path("") is the working directory
        return Path(source)
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(
            f"{str(source)!r} is no directory here; correct model.geometry.path (or --geometry_path): a VGGT "
            "directory, or a hub id such as facebook/VGGT-1B."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, INDEX, "*.safetensors"]))
    except Exception as error:  # the hub client raises exceptions of several libraries
        raise ValueError(
            f"{source} is no directory here and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}); "
            "correct model.geometry.path (or --geometry_path), or fetch it where there is a network and give its "
            "directory."
        ) from error


def _read(file: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Read the tensors of one file as float32, after a check of all names, shapes and dtypes.

    Weights of heads that the model does not have are skipped.
    """
    modules = {name.split(".")[0] for name in expected}
    try:
        with safe_open(file, framework="pt") as opened:
            stored = opened.keys()
            names = [name for name in stored if name.split(".")[0] in modules or not name.startswith(HEAD_PREFIXES)]
            unknown = [name for name in names if name not in expected]
            if unknown:
                raise ValueError(f"{file} holds {_first(unknown)}, which this VGGT does not have; check {CONFIG}.")
            for name in names:
                part = opened.get_slice(name)
                if tuple(part.get_shape()) != expected[name]:
                    raise ValueError(
                        f"{file}: {name} has shape {part.get_shape()}, but {CONFIG} describes {list(expected[name])}; "
                        "take both from one VGGT."
                    )
                if part.get_dtype() not in FLOATS:
                    raise ValueError(f"{file}: {name} is stored as {part.get_dtype()}; only {', '.join(FLOATS)} load.")
            return {name: opened.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); it is damaged or incomplete: fetch it again.") from error


def check_heads(directory: Path, heads: Collection[Head]) -> None:
    """Raise ValueError if ``config.json`` excludes one of `heads` or has sizes of which no head can be built."""
    path, config = directory / CONFIG, read_config(directory)
    values = read_json_object(path)
    if absent := [_switch(head) for head in heads if values.get(_switch(head)) is False]:
        raise ValueError(f"{path}: {', '.join(absent)} is false: these weights have no such head.")
    try:
        config.check_heads()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _switch(head: Head) -> str:
    """The field of ``config.json`` for one head."""
    return f"enable_{head}"


def _first(names: Iterable[str]) -> str:
    """The first name and the number of others, for messages."""
    ordered = sorted(names)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more"
