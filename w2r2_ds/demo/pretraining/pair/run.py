"""Run all stages. The result of a stage is stored in a work folder; a stage whose result is there is not run again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import Qwen2Tokenizer

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.demo.pretraining.pair.encoders import identity, load_encoder
from w2r2_ds.demo.pretraining.pair.evaluate import evaluate
from w2r2_ds.demo.pretraining.pair.model import make_merger, make_tokenizer, make_vlm, word_vectors
from w2r2_ds.demo.pretraining.pair.pair import Pair
from w2r2_ds.demo.pretraining.pair.prompts import Prompts
from w2r2_ds.demo.pretraining.pair.rooms.geometry import view_geometry
from w2r2_ds.demo.pretraining.pair.rooms.room_set import RoomSet, load_rooms, make_rooms, save_rooms
from w2r2_ds.demo.pretraining.pair.rooms.tasks import Task
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData
from w2r2_ds.demo.pretraining.pair.settings import Settings
from w2r2_ds.demo.pretraining.pair.stages.dense import DenseHead, DenseTrainer
from w2r2_ds.demo.pretraining.pair.stages.questions import QuestionTrainer
from w2r2_ds.demo.pretraining.pair.stages.tower import TowerTrainer, accuracy, encode_rooms, scale_outputs
from w2r2_ds.demo.pretraining.record import StageRecord
from w2r2_ds.models.geometry.encoder import GeometryEncoder
from w2r2_ds.models.patch_embedding import use_matrix_products
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.json_io import read_json_object

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
"""File of the settings in the work folder."""
TOWER = "tower"
"""Name of stage 1, which has no geometry."""
COURSE_QUESTIONS = 240
"""Questions of each task of an evaluation in the course of stage 3."""


def round_to_bfloat16(module: torch.nn.Module) -> None:
    """Round all weights to bfloat16, in which they are stored; they stay float32."""
    module.to(torch.bfloat16).to(torch.float32)


class Pretraining:
    """The three stages on one set of rooms.

    Args:
        settings: data, lengths and learning rates.
        train: training rooms.
        val: validation rooms.
        encoder: frozen geometry encoder.
        tokenizer: the tokenizer; None to train it.
    """

    def __init__(
        self,
        settings: Settings,
        train: RoomSet,
        val: RoomSet,
        encoder: GeometryEncoder,
        tokenizer: Qwen2Tokenizer | None = None,
    ) -> None:
        self.settings, self.train, self.val, self.encoder = settings, train, val, encoder
        self.tokenizer = tokenizer or make_tokenizer(settings.seed)
        self.vlm = make_vlm(self.tokenizer, settings.seed)
        self.merger = make_merger(settings.seed, encoder.spec.feature_dim)
        self.head = DenseHead(settings.seed)
        use_matrix_products(self.vlm.model.visual)
        self.words = word_vectors(self.tokenizer, self.vlm.model.language_model.embed_tokens.weight.detach())
        self.pair = Pair(self.vlm, self.merger, Prompts(self.tokenizer, self.vlm))
        self._data: dict[str, RoomData] = {}

    def data(self, split: Literal["train", "val"]) -> RoomData:
        """Rooms of a split with the outputs of the trained tower and of the geometry encoder."""
        if split not in self._data:
            rooms = self.train if split == "train" else self.val
            logger.info("encoding %d rooms", len(rooms))
            geometry = view_geometry(self.encoder, rooms, self.settings.seed)
            self._data[split] = RoomData(rooms, encode_rooms(self.vlm.model.visual, rooms), geometry)
        return self._data[split]

    def run_tower(self, record: StageRecord) -> None:
        """Stage 1. Weights are shipped in bfloat16, so the next stages get the rounded tower."""
        tower, steps = self.vlm.model.visual, self.settings.tower_steps
        record.run(TowerTrainer(tower, self.words, self.train, self.settings).step, steps)
        scale_outputs(tower)
        round_to_bfloat16(tower)
        record.add_scores(steps, accuracy(tower, self.words, self.val))

    def run_dense(self, record: StageRecord) -> None:
        """Stage 2."""
        trainer = DenseTrainer(self.pair, self.head, self.data("train"), self.settings)
        record.run(trainer.step, self.settings.dense_steps)

    def run_questions(self, record: StageRecord) -> None:
        """Stage 3."""
        val = self.data("val")
        trainer = QuestionTrainer(self.pair, self.head, self.data("train"), self.settings)
        record.run(
            trainer.step,
            self.settings.question_steps,
            lambda: course_scores(self.pair, val),
            self.settings.eval_every,
        )

    def stages(self) -> dict[str, Callable[[StageRecord], None]]:
        """Name -> stage, in order."""
        return {TOWER: self.run_tower, "dense": self.run_dense, "questions": self.run_questions}

    def state(self) -> dict[str, Any]:
        """All weights."""
        return {"vlm": self.vlm.state_dict(), "merger": self.merger.state_dict(), "head": self.head.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the weights of `state`."""
        self.vlm.load_state_dict(state["vlm"])
        self.merger.load_state_dict(state["merger"])
        self.head.load_state_dict(state["head"])


def course_scores(pair: Pair, val: RoomData) -> dict[str, dict[str, float]]:
    """Task -> mode -> percent of the first `COURSE_QUESTIONS` answers that are right.

    Boxes are right with an IoU of at least 0.25, other answers if they are equal to the label.
    """
    return {
        task: {
            mode: scores["acc25" if task == "grounding" else "exact"]
            for mode, scores in evaluate(pair, val, task, COURSE_QUESTIONS).items()
        }
        for task in get_args(Task)
    }


def stored_rooms(folder: Path, split: str, count: int, seed: int) -> RoomSet:
    """Rooms of a split, from the work folder or rendered and stored there."""
    file = folder / f"rooms_{split}.npz"
    if not file.is_file():
        logger.info("rendering %d rooms", count)
        save_rooms(make_rooms(seed, split, count), file)
    return load_rooms(file)


def check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """Compare the settings with those of the results in the work folder, and write them.

    Raises:
        ValueError: a setting differs, so that the results would be taken for those of these settings.
    """
    file = folder / SETTINGS
    if file.is_file():
        found = read_json_object(file)
        if different := [name for name in found | wanted if found.get(name) != wanted.get(name)]:
            raise ValueError(
                f"--work: {folder} has rooms and stages of another {' and '.join(different)}; use another folder."
            )
    atomic_io.replace(file, json.dumps(wanted, indent=1) + "\n")


def run_stages(folder: Path, settings: Settings, geometry: GeometryConfig) -> tuple[Pretraining, dict[str, Any]]:
    """Run all stages, or load their results from the work folder. Rooms and stage 1 are the same with any geometry.

    Args:
        folder: work folder.
        settings: data, lengths and learning rates.
        geometry: geometry encoder.

    Returns:
        The pretraining with the final weights, and the record of each stage.

    Raises:
        ValueError: the results in the work folder are of other settings, or the encoder cannot be loaded.
    """
    encoder = load_encoder(geometry)
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, asdict(settings) | identity(geometry))
    rooms = [
        stored_rooms(folder, split, count, settings.seed)
        for split, count in (("train", settings.train_rooms), ("val", settings.val_rooms))
    ]
    pretraining = Pretraining(settings, rooms[0], rooms[1], encoder)
    records = {}
    for name, run in pretraining.stages().items():
        file = folder / f"{name}.pt"
        if file.is_file():
            stored = torch.load(file, weights_only=True)
            if name == TOWER:  # the merger is that of the encoder
                pretraining.vlm.load_state_dict(stored["state"]["vlm"])
            else:
                pretraining.load_state(stored["state"])
        else:
            record = StageRecord(name)
            run(record)
            stored = {"state": pretraining.state(), "record": record.as_json()}
            torch.save(stored, file)
        records[name] = stored["record"]
    return pretraining, records
