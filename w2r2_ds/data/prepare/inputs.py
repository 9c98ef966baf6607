"""Which files a task is made of, where below the data root they lie, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w2r2_ds.data.sources.labels import LABELS_FILE
from w2r2_ds.data.tasks.base import TaskOptions

SCANNET = "ScanNet: sign its terms of use (http://www.scan-net.org), then use its download script"
EXTRACTED = f"{SCANNET}; docs/data.md says how frames are extracted"
BOXES = "launchers/prepare.py boxes, or ScanRefer's batch_load_scannet_data.py"
SCANREFER = "ScanRefer: fill in its form (https://github.com/daveredrum/ScanRefer)"
SCANQA = "ScanQA: its public download (https://github.com/ATR-DBI/ScanQA)"
EMBODIEDSCAN = "EmbodiedScan: fill in its form (https://github.com/OpenRobotLab/EmbodiedScan, data/README.md)"
PROPOSALS = (
    "boxes of Mask3D's masks in LEO's release (https://github.com/embodied-generalist/embodied-generalist); "
    "docs/data.md says how they are written"
)


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        name: annotations, labels, infos, proposals or frames.
        path: where it lies.
        origin: where a user gets it.
    """

    name: str
    path: Path
    origin: str


def annotation_source(root: Path, options: TaskOptions) -> Source:
    """The file whose entries become samples."""
    if options.task == "scanqa":
        return Source("annotations", root / "ScanQA" / f"ScanQA_v1.0_{options.split}.json", SCANQA)
    if options.task == "detection":
        return Source("infos", infos_files(root, options.split)[0], EMBODIEDSCAN)
    return Source("annotations", root / "ScanRefer" / f"ScanRefer_filtered_{options.split}.json", SCANREFER)


def sources(root: Path, options: TaskOptions) -> list[Source]:
    """Every file that a task and split are made of, besides the scenes; the annotations first."""
    found = [annotation_source(root, options)]
    if options.task in ("scanrefer", "scan2cap"):
        found.append(Source("labels", root / LABELS_FILE, SCANNET))
    if needs_infos(options):
        found += [Source("infos", path, EMBODIEDSCAN) for path in infos_files(root, options.split)]
    if needs_proposals(options):
        path = root / "proposals" / f"scannet_{options.split}_pred_box.json"
        found.append(Source("proposals", path, PROPOSALS))
    if options.frames.file is not None:
        found.append(Source("frames", Path(options.frames.file), "you: it is what frames.file names"))
    return found


def needs_infos(options: TaskOptions) -> bool:
    """Whether EmbodiedScan says what frames see (detection reads it as its annotations)."""
    return options.looks and options.visibility == "embodiedscan"


def needs_proposals(options: TaskOptions) -> bool:
    """Whether captions are about proposed boxes."""
    return options.task == "scan2cap" and options.split != "train" and options.boxes == "proposals"


def scene_sources(root: Path, scene_id: str) -> Iterator[Source]:
    """What every scene needs besides its frames."""
    yield Source("alignment", root / "scans" / scene_id / f"{scene_id}.txt", SCANNET)
    yield Source("boxes", root / "scannet_data" / f"{scene_id}_aligned_bbox.npy", BOXES)
    for name in ("intrinsic.txt", "depth_intrinsic.txt"):
        yield Source("intrinsics", root / "posed_images" / scene_id / name, EXTRACTED)


def infos_files(root: Path, split: str) -> list[Path]:
    """EmbodiedScan's infos of a split, and the other's if it is there: it need not divide scenes as ScanNet does."""
    folder = root / "embodiedscan"
    own, other = (folder / f"embodiedscan_infos_{name}.pkl" for name in (split, "val" if split == "train" else "train"))
    return [own, other] if other.is_file() else [own]
