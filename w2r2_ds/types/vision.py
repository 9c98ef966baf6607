"""Sizes and token ids of a vision tower, as pre-processing needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.models.qwen2_5_vl.loading import PREPROCESSOR_FILE, _read_json, _three, load_config


@dataclass(frozen=True)
class VisionSpec:
    """What pre-processing must know of the vision tower and the prompt.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches per side that become one token of the language model.
        temporal_patch_size: frames that become one row of tokens.
        window_size: side in pixels of a window of the tower's attention.
        image_mean: per-channel mean, RGB, of pixels in [0, 1].
        image_std: per-channel standard deviation, RGB.
        image_token_id: id of ``<|image_pad|>``.
        video_token_id: id of ``<|video_pad|>``.
        vision_start_id: id of ``<|vision_start|>``.
        tokens_per_second: temporal positions per second of video.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_token_id: int
    video_token_id: int
    vision_start_id: int
    tokens_per_second: int

    @classmethod
    def load(cls, name_or_path: str | Path) -> VisionSpec:
        """Read ``config.json`` and ``preprocessor_config.json``.

        Raises:
            ValueError: a file or field is missing, or the two files disagree about a size.
        """
        config = load_config(name_or_path)
        vision: Any = config.vision_config
        where = f"{name_or_path}/{PREPROCESSOR_FILE}"
        raw = _read_json(name_or_path, PREPROCESSOR_FILE)
        sizes = {
            "patch_size": int(vision.patch_size),
            "merge_size": int(vision.spatial_merge_size),
            "temporal_patch_size": int(vision.temporal_patch_size),
        }
        for field, size in sizes.items():
            if raw.get(field, size) != size:
                raise ValueError(
                    f"{where}: {field} is {raw[field]} but config.json says {size}; take both files from the same model"
                )
        return cls(
            **sizes,
            window_size=int(vision.window_size),
            image_mean=_three(raw, "image_mean", where),
            image_std=_three(raw, "image_std", where),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_id=config.vision_start_token_id,
            tokens_per_second=int(vision.tokens_per_second),
        )
