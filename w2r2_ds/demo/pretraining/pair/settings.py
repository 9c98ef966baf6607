"""Settings of the pretraining. Lengths are numbers of steps, so that a run is repeatable."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = (168, 112)
"""Width and height of a frame, pixels."""
ROOM_FRAMES = 6
"""Frames of a room."""
SAMPLE_FRAMES = 4
"""Frames of a question."""
HIDDEN = 128
"""Width of the language model."""
MERGER_HIDDEN = 256
"""`model.merger_hidden` of the demo."""
TEXT_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER_SIZES = {
    "depth": 3,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_heads": 4,
    "window_size": 56,
    "fullatt_block_indexes": [0, 1, 2],
}


@dataclass(frozen=True)
class Settings:
    """Data, lengths and learning rates.

    Attributes:
        seed: seed of rooms, weights and draws.
        train_rooms: rooms to train on.
        val_rooms: rooms for the evaluation.
        tower_steps: steps of stage 1.
        tower_frames: frames of a step of stage 1.
        dense_steps: steps of stage 2.
        dense_rooms: rooms of a step of stage 2.
        question_steps: steps of stage 3.
        geometry_steps: first steps of stage 3, in which all rooms have geometry.
        question_rooms: rooms of a step of stage 3.
        questions: questions about a room in a step of stage 3.
        eval_every: steps of stage 3 between two evaluations.
        muon_lr: learning rate of matrices (Muon).
        adamw_lr: learning rate of all other weights (AdamW).
        early_factor: factor on the learning rate of the matrices of stage 2, in stage 3.
        label_weight: weight of class and color beside boxes, in stages 2 and 3.
        dense_weight: weight of the losses of stage 2 in stage 3.
        attention_weight: weight of the loss on attention in stage 3.
        only_2d: share of the rooms without geometry, in the other steps of stage 3.
        captions: share of the questions of stage 3 that ask for a description.
        answers: share of the questions of stage 3 that ask for a colour or a number.
        colors: share of these that ask for a colour, where the view shows an object to ask about.
    """

    seed: int = 0
    train_rooms: int = 1500
    val_rooms: int = 100
    tower_steps: int = 2200
    tower_frames: int = 24
    dense_steps: int = 1500
    dense_rooms: int = 16
    question_steps: int = 4000
    geometry_steps: int = 900
    question_rooms: int = 10
    questions: int = 6
    eval_every: int = 400
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    early_factor: float = 0.2
    label_weight: float = 0.1
    dense_weight: float = 10.0
    attention_weight: float = 0.3
    only_2d: float = 0.3
    captions: float = 0.2
    answers: float = 0.25
    colors: float = 0.8


SETTINGS = {
    "point_map": Settings(),
    "vggt": Settings(dense_steps=1000, question_steps=1000, geometry_steps=300, eval_every=500),
}
"""Settings of the shipped pairs, by geometry encoder."""
