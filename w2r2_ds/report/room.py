"""3D view of a room: points from the depth images, cameras, and boxes, as a plotly figure that can be turned."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from plotly.graph_objects import Figure, Scatter3d

from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix
from w2r2_ds.data.frames.box_views import with_poses
from w2r2_ds.data.frames.projection import EDGES, box_corners, load_depth
from w2r2_ds.data.images import load_frame
from w2r2_ds.data.sources.frames import Frame, SceneParts
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.types.sample import Sample

MAX_POINTS = 12_000
VOXEL = 0.04
"""Points that are nearer to each other than this are drawn once, metres."""
CUT = 2.0
"""Height above the floor at which the room is cut, so that the ceiling does not hide it, metres."""
FRAMES = 12
"""Most depth images that are read."""
PALETTE = 64
"""Number of point colours."""
CAMERA = 0.2
"""Length of a camera in the view, metres."""
BOX_STYLES = {"true": ("#1a9850", "true box", 7), "fused": ("#d9730d", "2D + 3D", 5), "zero": ("#a33bbf", "2D only", 4)}
"""Box -> line colour, name and width; the colours are those of the style sheet."""


def room_figure(root: Path, sample: Sample, boxes: Mapping[str, np.ndarray]) -> tuple[Figure, str]:
    """Points, cameras and boxes of a sample's scene; and why there are no points, empty if there are.

    Args:
        root: data root.
        sample: a sample of the scene; its frames are the cameras.
        boxes: ``true``, ``fused``, ``zero`` -> world box ``[6]`` or ``[9]``.
    """
    figure, problem = Figure(), ""
    try:
        points, colors = room_points(root, sample.scene_id)
        figure.add_trace(_points(points, colors))
        sample = with_poses(sample)
    except ValueError as error:
        problem = f"No points: {error}"
    cameras = [_camera(pose) for pose in sample.cam_to_world if np.isfinite(pose).all()]
    if cameras:
        figure.add_trace(_lines(np.concatenate(cameras), "cameras", "#7a7a7a", 2))
    for name, (color, label, width) in BOX_STYLES.items():
        if name in boxes:
            figure.add_trace(_lines(box_lines(boxes[name]), label, color, width))
    axis = {"showspikes": False, "title": {"text": ""}, "showbackground": False}
    scene = {"aspectmode": "data", "xaxis": axis, "yaxis": axis, "zaxis": axis}
    scene["camera"] = {"eye": {"x": 1.4, "y": -1.4, "z": 1.4}}
    legend = {"orientation": "h", "y": 0, "yanchor": "top"}
    figure.update_layout(height=460, margin={"l": 0, "r": 0, "t": 0, "b": 0}, scene=scene, legend=legend)
    return figure, problem


def room_points(root: Path, scene_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of a scene below `CUT` in the axis-aligned world: ``[n, 3]`` float32 metres, ``[n, 3]`` uint8 colours.

    Raises:
        ValueError: a depth or colour image, a pose or the intrinsics are missing or broken.
    """
    scene = load_scene(root, scene_id, SceneParts.POSES | SceneParts.INTRINSICS | SceneParts.DEPTH)
    chosen = np.linspace(0, len(scene.frames) - 1, min(FRAMES, len(scene.frames))).round().astype(int)
    parts = [frame_points(scene.frames[index], scene.depth_intrinsic) for index in dict.fromkeys(chosen.tolist())]
    points, colors = (np.concatenate(each) for each in zip(*parts, strict=True))
    if not len(points):
        raise ValueError(f"scene {scene_id} has no depth measurements.")
    floor = np.quantile(points[:, 2], 0.01)
    keep = points[:, 2] < floor + CUT
    points, colors = points[keep], colors[keep]
    # One point per voxel, then a random choice, which is the same in every report.
    _, first = np.unique(np.floor(points / VOXEL).astype(np.int64), axis=0, return_index=True)
    if len(first) > MAX_POINTS:
        first = np.random.default_rng(0).choice(first, MAX_POINTS, replace=False)
    return points[first].astype(np.float32), colors[first]


def frame_points(frame: Frame, intrinsic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of one depth image: ``[n, 3]`` float64 in the axis-aligned world, and ``[n, 3]`` uint8 colours."""
    depth = load_depth(frame)
    height, width = depth.shape
    step = max(1, width // 120)
    y, x = np.mgrid[0:height:step, 0:width:step]
    z = depth[::step, ::step] / 1000.0
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(intrinsic[:3, :3]).T  # [h, w, 3] at depth 1
    measured = z > 0
    camera = (rays * z[..., None])[measured]
    # Colour and depth images show the same view, possibly in different sizes.
    color = np.asarray(Image.fromarray(load_frame(frame.color)).resize((width, height)))[::step, ::step][measured]
    return camera @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3], color


def box_lines(box: np.ndarray) -> np.ndarray:
    """Edges of a box as a line with gaps: ``[36, 3]``, every third row NaN."""
    points = box_corners(box[:6])
    if len(box) == 9:
        points = (points - box[:3]) @ euler_angles_to_matrix(box[6:]).T + box[:3]
    return _with_gaps(np.array([[points[i], points[j]] for i, j in EDGES]))


def _camera(pose: np.ndarray) -> np.ndarray:
    """A camera as a pyramid of lines."""
    corners = np.array([[-0.6, -0.4, 1], [0.6, -0.4, 1], [0.6, 0.4, 1], [-0.6, 0.4, 1]]) * CAMERA
    corners = corners @ pose[:3, :3].T + pose[:3, 3]
    sides = [[pose[:3, 3], corner] for corner in corners]
    return _with_gaps(np.array([*sides, *([corners[i], corners[(i + 1) % 4]] for i in range(4))]))


def _with_gaps(edges: np.ndarray) -> np.ndarray:
    """``[edges, 2, 3]`` -> ``[3 * edges, 3]`` with a row of NaN after each edge, where plotly interrupts a line."""
    gap = np.full((len(edges), 1, 3), np.nan)
    return np.concatenate([edges, gap], axis=1).reshape(-1, 3)


def _lines(points: np.ndarray, name: str, color: str, width: int) -> Scatter3d:
    x, y, z = points.astype(np.float32).T
    line = {"color": color, "width": width}
    return Scatter3d(x=x, y=y, z=z, mode="lines", name=html.escape(name), line=line, hoverinfo="name")


def _points(points: np.ndarray, colors: np.ndarray) -> Scatter3d:
    """Points with a palette: one byte per point instead of a colour name each."""
    image = Image.fromarray(colors[None]).quantize(PALETTE)
    index = np.asarray(image)[0]
    palette: Sequence[int] = image.getpalette() or []
    used = int(index.max()) + 1
    names = [f"rgb({palette[3 * i]},{palette[3 * i + 1]},{palette[3 * i + 2]})" for i in range(used)]
    scale = (
        [[i / max(1, used - 1), name] for i, name in enumerate(names)] if used > 1 else [[0, names[0]], [1, names[0]]]
    )
    marker = {"size": 2, "color": index, "colorscale": scale, "cmin": 0, "cmax": max(1, used - 1), "showscale": False}
    x, y, z = points.T
    return Scatter3d(x=x, y=y, z=z, mode="markers", name="room", marker=marker, hoverinfo="skip")
