"""A model, its data pipeline, and the pair of the pretraining with the same weights, on rooms in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from w2r2_ds.config.schema import DataConfig, ModelConfig
from w2r2_ds.demo.pretraining.pair.pair import Pair
from w2r2_ds.demo.pretraining.pair.prompts import Prompts
from w2r2_ds.demo.pretraining.pair.rooms.geometry import view_geometry
from w2r2_ds.demo.pretraining.pair.rooms.room_set import RoomSet
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData
from w2r2_ds.demo.pretraining.pair.stages.tower import encode_rooms
from w2r2_ds.models.build import build_model, load_frontend
from w2r2_ds.models.weights.loading import load_vlm

DATA = DataConfig(frame_width=168, max_length=512, workers=0)


@dataclass(frozen=True)
class LoadedPair:
    """The model as it is trained and evaluated, and the same weights in the pretraining."""

    model: Any
    frontend: Any
    pair: Pair
    data: RoomData


def load_pair(config: ModelConfig, rooms: RoomSet) -> LoadedPair:
    """Load both on the CPU; the merger of the pair is the model's."""
    model = build_model(config, torch.device("cpu"), seed=0).eval()
    frontend = load_frontend(config)
    vlm = load_vlm(config.vlm, torch.float32, "sdpa")
    pair = Pair(vlm, model.geometry_merger, Prompts(frontend.tokenizer, vlm))
    # The pretraining stores visual tokens in float16; in float32 they are those of the model.
    features = encode_rooms(vlm.model.visual, rooms, torch.float32)
    return LoadedPair(model, frontend, pair, RoomData(rooms, features, view_geometry(model.geometry, rooms, seed=0)))
