"""The card of the weights: how they were made, on which machine, what they score, and the hash of every file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Tokenizer

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.demo.pretraining.card_files import machine_text, origin, write_files
from w2r2_ds.demo.pretraining.pair.encoders import VGGT_LAYERS, identity, load_encoder
from w2r2_ds.demo.pretraining.pair.rooms.geometry import VIEWS
from w2r2_ds.demo.pretraining.pair.rooms.room_set import make_rooms
from w2r2_ds.demo.pretraining.pair.run import Pretraining
from w2r2_ds.demo.pretraining.pair.settings import IMAGE_SIZE, MERGER_HIDDEN, SAMPLE_FRAMES, Settings
from w2r2_ds.demo.pretraining.record import FIRST, StageRecord

SHORT = Settings(
    train_rooms=4,
    val_rooms=1,
    tower_steps=FIRST,
    tower_frames=4,
    dense_steps=FIRST,
    dense_rooms=2,
    question_steps=FIRST,
    question_rooms=2,
    questions=3,
)
"""Settings of a run of seconds, whose losses are in the card and are compared by a test."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "trimesh", "embreex", "pillow")


def short_run(tokenizer: Qwen2Tokenizer, geometry: GeometryConfig) -> dict[str, list[dict[str, float]]]:
    """Losses of all steps of the stages with settings `SHORT`; the tokenizer is not trained again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rooms = (make_rooms(SHORT.seed, "train", SHORT.train_rooms), make_rooms(SHORT.seed, "val", SHORT.val_rooms))
        pretraining = Pretraining(SHORT, *rooms, load_encoder(geometry), tokenizer)
        losses = {}
        for name, run in pretraining.stages().items():
            record = StageRecord(name)
            run(record)
            losses[name] = record.first
        return losses
    finally:
        torch.set_num_threads(threads)


def write_card(
    folder: Path,
    settings: Settings,
    geometry: GeometryConfig,
    records: Mapping[str, Any],
    scores: Mapping[str, Any],
    tokenizer: Qwen2Tokenizer,
) -> None:
    """Write ``card.json`` and ``card.md`` beside the weights.

    Args:
        folder: folder of the weights.
        settings: settings of the run.
        geometry: geometry encoder.
        records: record of each stage.
        scores: scores of the shipped weights by task and mode.
        tokenizer: tokenizer of the weights.
    """
    card = {
        "geometry": {"name": geometry.name, **identity(geometry)},
        "settings": asdict(settings),
        "stages": dict(records),
        "scores": dict(scores),
        "short_run": {"settings": asdict(SHORT), "losses": short_run(tokenizer, geometry)},
        **origin(folder, _LIBRARIES),
    }
    write_files(folder, card, card_text(card))


def _seconds(card: Mapping[str, Any]) -> float:
    return sum(record["seconds"] for record in card["stages"].values())


def card_text(card: Mapping[str, Any]) -> str:
    """The text of ``card.md``."""
    settings = Settings(**card["settings"])
    rows = [
        f"| {task} | {mode.replace('_', ' ')} | {', '.join(f'{name} {value}' for name, value in values.items())} |"
        for task, modes in card["scores"].items()
        for mode, values in modes.items()
    ]
    size = f"{IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}"
    encoder, frame, option = _BY_GEOMETRY[card["geometry"]["name"]]
    return _TEXT.format(
        s=settings,
        encoder=encoder,
        world=frame,
        option=option,
        size=size,
        frames=SAMPLE_FRAMES,
        merger=MERGER_HIDDEN,
        minutes=round(_seconds(card) / 60),
        cpu=machine_text(card),
        rows="\n".join(rows),
    )


_BY_GEOMETRY = {
    "point_map": (
        "the encoder `point_map` with\n`reference_frame: world`",
        "rooms with geometry are also turned by random quarter turns and mirrored",
        "",
    ),
    "vggt": (
        f"layer {VGGT_LAYERS[0]} of the tiny VGGT\nin `w2r2_ds/demo/weights/vggt`",
        f"half of the rooms are mirrored; {VIEWS} random views of a room",
        " --geometry vggt",
    ),
}
"""Name of the encoder -> encoder, world frames, and option of the command."""

_TEXT = """# The demo's pretrained pair

A tiny Qwen2.5-VL (`vlm/`: 4 layers of width 128, vision tower of 3 blocks of width 96) and the geometry merger
(`geometry_merger.safetensors`, `model.merger_hidden` {merger}, fusion `add`) of {encoder}. All weights are bfloat16.

* **Pretrained with geometry.** As the VG-LLM checkpoints on which W2R2 fine-tunes, and unlike a published Qwen2.5-VL,
  the pair has been trained on questions with geometry. It is not a model of real images.
* **Data.** {s.train_rooms} synthetic rooms, made in memory by `w2r2_ds/demo/synthetic` with seed {s.seed}; images of
  {size} pixels after a JPEG round trip; {frames} of 6 frames a question. The second number of a room's seed is 2
  (training) or 3 (evaluation); rooms of a written data set have 0 or 1 there, so that no room of a demo is among these,
  with any seed.
* **Tasks.** ScanRefer in format `video3dllm` (six world numbers, one decimal), phrases of colour and class; Scan2Cap
  (centre of the box in the world, one decimal -> phrase), ScanQA (colour of the only object of a class; numbers).
  World frame `corner`; {world}, {s.only_2d:.0%} of the
  rooms are in 2D only.
* **Stages.** Tower: {s.tower_steps} steps of {s.tower_frames} frames. Dense: {s.dense_steps} steps of {s.dense_rooms}
  rooms. Questions: {s.question_steps} steps of {s.question_rooms} rooms with {s.questions} questions. Losses, scores in
  the course of stage 3, versions and SHA-256 of every file are in `card.json`.
* **Time.** {minutes} minutes without the rendering of the rooms ({cpu}).

Repeat it with `python -m w2r2_ds.demo.pretraining{option} --seed {s.seed} --work FOLDER --out FOLDER`.

Scores of these files on {s.val_rooms} rooms that are not in the training (greedy answers; acc25, acc50: percent with
an IoU of at least 0.25 and 0.5; exact: percent equal to the label; only 2d: without geometry; shuffled: with the
geometry of another room):

| task | mode | scores |
|---|---|---|
{rows}
"""
