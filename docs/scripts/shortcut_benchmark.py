"""Pictures and table of docs/research/shortcut-benchmark.md: ``python docs/scripts/shortcut_benchmark.py``.

Writes docs/figures/shortcut_views.png and shortcut_plans.png, and prints the table of cues in Markdown. The rooms are
generated in a temporary folder.
"""

from __future__ import annotations

import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from w2r2_ds.boxes3d.transforms import CORNER_OFFSETS, corners
from w2r2_ds.data.frames.projection import project
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.scannet import Scene, load_scene
from w2r2_ds.data.sources.shortcut_cues import ShortcutCue, cues_file, read_cues
from w2r2_ds.demo.synthetic.options import SHIFTS, ShiftOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.diagnostics.shortcut_cue import Measure, cue_shares

FIGURES = Path(__file__).parents[1] / "figures"
ROOMS, PICTURED, FRAMES = 40, 6, 12
"""Validation rooms of the table and of the pictures, and frames per room."""
GROUPS = (tuple(name for name in SHIFTS if name != "position_prior"), ("position_prior",))
"""Shifts of the two folders."""
TRUE_COLOR, CUE_COLOR, OTHER_COLOR = "#00c853", "#d50000", "#9e9e9e"
EDGES = [(i, j) for i, j in combinations(range(8), 2) if np.not_equal(CORNER_OFFSETS[i], CORNER_OFFSETS[j]).sum() == 1]
"""Pairs of corners that differ in one coordinate."""


def make(folder: Path, rooms: int, size: tuple[int, int]) -> dict[str, Path]:
    """Write both folders; shift -> data root."""
    roots = {}
    for names in GROUPS:
        root = folder / f"{names[0]}_{rooms}"
        write_dataset(root, 0, 1, rooms, size, FRAMES, shift=ShiftOptions(names))
        roots |= dict.fromkeys(names, root)
    return roots


def cues_of(root: Path, shift: str) -> list[ShortcutCue]:
    """All cues of a shift."""
    return list(read_cues(cues_file(root, f"val_{shift}")).values())


def table(roots: dict[str, Path]) -> str:
    """Markdown table: items, items with a cue, distance of cue and truth, and share that can be scored."""
    head = "| shift | items | with a cue | world: distance | scored by IoU | scored by centre | camera: distance |"
    lines = [f"{head} scored by IoU | scored by centre |", "| --- |" + " --- |" * 8]
    for shift, root in roots.items():
        cues = cues_of(root, shift)
        cells = [f"`{shift}`", str(len(cues)), str(sum(bool(cue.frames) for cue in cues))]
        with_cue = [cue for cue in cues if cue.frames]
        truth = [cue.truth for cue in with_cue]
        for boxes in ([cue.world_box() for cue in with_cue], [camera_cue(cue) for cue in with_cue]):
            apart = [np.linalg.norm(np.subtract(b, t)[:3]) for b, t in zip(boxes, truth, strict=True) if b is not None]
            cells.append(f"{np.median(apart):.2f} m")
            measures: tuple[Measure, ...] = ("iou", "centre")
            for measure in measures:
                cells.append(f"{cue_shares(truth, truth, boxes, measure).scored / len(truth):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def camera_cue(cue: ShortcutCue) -> np.ndarray | None:
    """Cue for an answer in the camera of the frame that shows the object largest."""
    return cue.camera_box(max(cue.frames, key=lambda each: each.area).frame)


def pictured_item(roots: dict[str, Path], names: tuple[str, ...]) -> tuple[dict[str, ShortcutCue], int]:
    """A description and a frame with a cue of every shift, at least 0.4 m from the truth, and the whole box in view.

    Of these, the one whose smallest area is the largest.
    """
    cues = {name: {cue.paired_id: cue for cue in cues_of(roots[name], name)} for name in names}
    best, choice = 0.0, None
    for key in cues[names[0]]:
        of_shifts = {name: cues[name][key] for name in names}
        for frame in range(FRAMES):
            area = min(shown_area(roots[name], cue, frame) for name, cue in of_shifts.items())
            if area > best:
                best, choice = area, (of_shifts, frame)
    assert choice is not None, "no description has all cues in one frame"
    return choice


def shown_area(root: Path, cue: ShortcutCue, number: int) -> float:
    """Projected area of the true box; 0 if the frame has no cue, or not the whole box, or the cue is near the truth."""
    found = [each for each in cue.frames if each.frame == number]
    if not found or np.linalg.norm(np.subtract(found[0].world, cue.truth)[:3]) < 0.4:
        return 0.0
    scene = load_scene(root, cue.scene_id)
    points, depth = project(corners(np.array(cue.truth)), scene.frames[number].cam_to_world, scene.intrinsic)
    inside = (points > 0).all() and (points < scene.intrinsic[:2, 2] * 2).all() and (depth > 0).all()
    return found[0].area if inside else 0.0


def draw_view(axes: Axes, frame: Frame, boxes: list[tuple[np.ndarray, str, str, np.ndarray]]) -> None:
    """A frame with wire frames of boxes (box, colour, line style, intrinsics)."""
    with Image.open(frame.color) as image:
        axes.imshow(np.asarray(image))
    limits = axes.get_xlim(), axes.get_ylim()
    for box, color, style, intrinsic in boxes:
        points, depth = project(corners(box), frame.cam_to_world, intrinsic)
        for i, j in EDGES:
            if min(depth[i], depth[j]) > 0.1:
                axes.plot(*points[[i, j]].T, color=color, linestyle=style, linewidth=1.6)
    axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])


def draw_plan(axes: Axes, scene: Scene, frame: Frame, boxes: list[tuple[np.ndarray, str, str]]) -> None:
    """Floor plan: all objects, the camera with its viewing direction, and boxes (box, colour, line style)."""
    others = [(np.append(each.box, np.zeros(3)), OTHER_COLOR, "-") for each in scene.instances.values()]
    for box, color, style in others + boxes:
        points = corners(box)[:, :2]
        for i, j in EDGES:
            axes.plot(*points[[i, j]].T, color=color, linestyle=style, linewidth=0.7 if color == OTHER_COLOR else 1.8)
    eye, ahead = frame.cam_to_world[:2, 3], frame.cam_to_world[:2, 2]
    axes.annotate("", eye + ahead, eye, arrowprops={"arrowstyle": "-|>", "color": "black"})
    axes.set(xlim=(-3.6, 3.6), ylim=(-3.4, 3.4), aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axes.tick_params(labelsize=7)


def draw(roots: dict[str, Path], folder: Path = FIGURES) -> list[Path]:
    """Draw both pictures; returns their files."""
    views, plans = (Figure(figsize=(9, height), layout="constrained") for height in (4.9, 5.9))
    rows = [figure.subplots(2, 3).ravel() for figure in (views, plans)]
    panel = 0
    for names in GROUPS:
        cues, number = pictured_item(roots, names)
        for name in names if panel else ("", *names):
            cue = cues[name or names[0]]
            scenes = [load_scene(roots[cue.shift], each.partition("|")[0]) for each in (cue.paired_id, cue.id)]
            usual, scene = scenes[0], scenes[1] if name else scenes[0]
            frame, truth = scene.frames[number], np.array(cue.truth if name else cue.paired_truth)
            true = (truth, TRUE_COLOR, "-")
            found = [each for each in cue.frames if each.frame == number and name]
            # A model that is used to the focal length of `val` projects its box with that.
            cameras = [(np.array(each.camera), CUE_COLOR, "--", usual.intrinsic) for each in found]
            draw_view(rows[0][panel], frame, [(*true, scene.intrinsic), *cameras])
            draw_plan(
                rows[1][panel], scene, frame, [true, *((np.array(each.world), CUE_COLOR, "--") for each in found)]
            )
            for axes in (rows[0][panel], rows[1][panel]):
                axes.set_title(f"val_{name}" if name else "val", fontsize=9)
            panel += 1
    files = [folder / "shortcut_views.png", folder / "shortcut_plans.png"]
    for figure, file in zip((views, plans), files, strict=True):
        figure.savefig(file, dpi=100)
        with Image.open(file) as image:
            small = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        small.save(file, optimize=True)
    return files


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for file in draw(make(Path(temporary), PICTURED, (320, 240))):
            print(f"{file}: {file.stat().st_size} bytes")
        print(table(make(Path(temporary), ROOMS, (160, 120))))
