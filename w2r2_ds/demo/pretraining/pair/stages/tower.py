"""Stage 1: the vision tower alone learns what every visual token shows, as soft labels.

A visual token learns class and colour of its pixels as sums of the language model's word embeddings, so that the
language model can compare it with words from the start. Heads, which are dropped afterwards, learn the same per patch,
and a monocular depth and box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from w2r2_ds.demo.pretraining.muon import Muon
from w2r2_ds.demo.pretraining.pair.rooms.room_set import (
    BACKGROUND,
    CLASSES,
    COLORS,
    GRID,
    TOKEN_GRID,
    TOKENS,
    RoomSet,
)
from w2r2_ds.demo.pretraining.pair.settings import HIDDEN, ROOM_FRAMES, Settings
from w2r2_ds.demo.pretraining.schedule import set_learning_rates, warm_up_and_decay
from w2r2_ds.models.qwen2_5_vl.pixels import patchify

PATCH_GRID = torch.tensor([[1, *GRID]])
"""``grid_thw`` of an image."""
MIRROR = np.array([-1.0, 1.0, 1.0])
LOGIT_SCALE = 8.0
"""Factor on the product of a token and a word vector."""
MIN_PIXELS = 120
"""Pixels of an object in a visual token (of 784) from which the token learns the object's box."""
FINAL_SCALE = 0.5
"""Factor on the outputs of the tower after stage 1: a norm near 1, as word embeddings and merged geometry."""


def pixel_values(images: np.ndarray) -> Tensor:
    """``[n, height, width, 3]`` uint8 -> the tower's input."""
    return patchify(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))


def encode(tower: nn.Module, images: np.ndarray) -> Tensor:
    """Visual tokens ``[n, tokens, hidden]`` of images ``[n, height, width, 3]`` uint8."""
    output = tower(pixel_values(images), grid_thw=PATCH_GRID.expand(len(images), 3)).pooler_output
    return output.view(len(images), TOKENS, -1)


@torch.no_grad()
def encode_rooms(tower: nn.Module, rooms: RoomSet, dtype: torch.dtype = torch.float16) -> Tensor:
    """``[rooms, 2, frames, tokens, hidden]`` in `dtype`: visual tokens of all frames, as they are and mirrored."""
    features = torch.zeros(len(rooms), 2, ROOM_FRAMES, TOKENS, HIDDEN, dtype=dtype)
    for index in range(len(rooms)):
        images = rooms.images[index]
        both = encode(tower, np.concatenate([images, images[:, :, ::-1]]))
        features[index] = both.unflatten(0, (2, ROOM_FRAMES)).to(dtype)
    return features


class TowerTrainer:
    """Losses and optimizers of stage 1.

    Args:
        tower: the vision tower, trained in place.
        words: word vectors of classes and of colours, see `model.word_vectors`.
        rooms: training rooms.
        settings: lengths, learning rates and seed.
    """

    def __init__(self, tower: Any, words: tuple[Tensor, Tensor], rooms: RoomSet, settings: Settings) -> None:
        self.tower, self.words, self.rooms, self.settings = tower, words, rooms, settings
        self.rng = np.random.default_rng([settings.seed, 11])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 11)
            self.patch_head = nn.Linear(HIDDEN, 4 * sum(len(each) for each in words))
            self.box_head = nn.Linear(HIDDEN, 7)
        self.class_of = _one_hot(rooms.classes, len(CLASSES))
        self.color_of = _one_hot(rooms.colors, len(COLORS))
        self.token_pixels = rooms.token_pixels()[..., BACKGROUND:]
        matrices = [p for p in tower.parameters() if p.ndim == 2]
        others = [p for p in tower.parameters() if p.ndim != 2]
        others += [*self.patch_head.parameters(), *self.box_head.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, settings.muon_lr),
            torch.optim.AdamW(others, settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self.rates = [settings.muon_lr, settings.adamw_lr]
        whiten_patches(tower, rooms)

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns the losses."""
        factor = warm_up_and_decay(number, self.settings.tower_steps, warm_up=30, decay=0.5)
        set_learning_rates(self.optimizers, self.rates, factor)
        losses = self.losses(*self.draw())
        total: Tensor = sum(losses.values(), torch.zeros(()))
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def draw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rooms, frames, and whether each is mirrored."""
        count = self.settings.tower_frames
        rooms = self.rng.integers(len(self.rooms), size=count)
        return rooms, self.rng.integers(ROOM_FRAMES, size=count), self.rng.random(count) < 0.5

    def losses(self, rooms: np.ndarray, frames: np.ndarray, mirrored: np.ndarray) -> dict[str, Tensor]:
        """Weighted losses of a batch of frames."""
        images = self.rooms.images[rooms, frames].copy()
        images[mirrored] = images[mirrored][:, :, ::-1]
        tokens = encode(self.tower, images)
        targets = [patch_labels(self, rooms, frames, mirrored, kind) for kind in ("class", "color")]
        patch_logits = self.patch_head(tokens).unflatten(-1, (4, -1)).split([len(each) for each in self.words], -1)
        token_loss, patch_loss = torch.zeros(()), torch.zeros(())
        object_share = 1 - _normalised(targets[0].sum(2))[..., len(CLASSES) :].sum(-1)
        for target, words, logits in zip(targets, self.words, patch_logits, strict=True):
            of_tokens = cross_entropy(LOGIT_SCALE * tokens @ words.T, _normalised(target.sum(2)))
            token_loss = token_loss + (of_tokens * (1 + 2 * object_share)).mean()
            patch_loss = patch_loss + cross_entropy(logits, _normalised(target)).mean()
        boxes, mask = monocular_boxes(self, rooms, frames, mirrored)
        error = (self.box_head(tokens) - boxes).square()
        box_loss = error[..., 0].mean() + (error[..., 1:].sum(-1) * mask).sum() / mask.sum().clamp(min=1)
        excess = (tokens.norm(dim=-1) - 2).clamp(min=0).square().mean()
        return {"tokens": token_loss, "patches": 0.5 * patch_loss, "boxes": 0.5 * box_loss, "norm": 0.05 * excess}


def patch_labels(
    trainer: TowerTrainer, rooms: np.ndarray, frames: np.ndarray, mirrored: np.ndarray, kind: str
) -> Tensor:
    """``[n, tokens, 4, labels]`` float32: pixels of each label in the patches of every token, objects counted twice.

    The labels of kind ``class`` are the classes, walls or ceiling, and floor; those of kind ``color`` are the colours
    and no colour.
    """
    pixels = trainer.rooms.pixels[rooms, frames].astype(np.float32)  # [n, rows, columns, owners]
    pixels[mirrored] = pixels[mirrored][:, :, ::-1]
    background, objects = pixels[..., :BACKGROUND], pixels[..., BACKGROUND:]
    one_hot = (trainer.class_of if kind == "class" else trainer.color_of)[rooms]  # [n, objects, labels]
    of_objects = 2 * np.einsum("nrco,nol->nrcl", objects, one_hot)
    of_background = background if kind == "class" else background.sum(-1, keepdims=True)
    labels = np.concatenate([of_objects, of_background], axis=-1)
    cells = labels.reshape(len(rooms), TOKEN_GRID[0], 2, TOKEN_GRID[1], 2, -1).swapaxes(2, 3)
    return torch.from_numpy(cells.reshape(len(rooms), TOKENS, 4, -1))


def monocular_boxes(
    trainer: TowerTrainer, rooms: np.ndarray, frames: np.ndarray, mirrored: np.ndarray
) -> tuple[Tensor, Tensor]:
    """What one image tells about depth and boxes.

    Returns:
        ``[n, tokens, 7]`` float32: logarithm of the mean depth in metres; for the object with most pixels, the centre
        in the camera divided by 3 m, the larger and the smaller horizontal side, and the height, metres;
        ``[n, tokens]`` float32, 1 where that object has at least `MIN_PIXELS` pixels.
    """
    data, each = trainer.rooms, np.arange(len(rooms))
    cameras = data.cameras[rooms, frames]
    rotations, origins = cameras[:, :3, :3], cameras[:, :3, 3]
    forward = rotations[:, :, 2]
    depths = (
        np.einsum("nrcpx,nx->nrcp", data.points[rooms, frames], forward)
        - (origins * forward).sum(-1)[:, None, None, None]
    )
    depth = depths.reshape(len(rooms), TOKEN_GRID[0], 2, TOKEN_GRID[1], 2 * 4).mean((2, 4)).reshape(len(rooms), TOKENS)
    pixels = trainer.token_pixels[rooms, frames]
    main = pixels.argmax(-1)  # [n, tokens]
    boxes = data.boxes[rooms[:, None], main]
    centers = np.einsum("ntx,nxy->nty", boxes[..., :3] - origins[:, None], rotations) / 3
    centers[mirrored] *= MIRROR
    sides = np.stack([boxes[..., 3:5].max(-1), boxes[..., 3:5].min(-1), boxes[..., 5]], axis=-1)
    values = np.concatenate([np.log(depth)[..., None], centers, sides], axis=-1)
    mask = pixels[each[:, None], np.arange(TOKENS), main] >= MIN_PIXELS
    values[mirrored] = _mirror_tokens(values[mirrored])
    mask[mirrored] = _mirror_tokens(mask[mirrored])
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(mask.astype(np.float32))


def _mirror_tokens(values: np.ndarray) -> np.ndarray:
    """``[n, tokens, ...]`` with the columns of the token grid reversed."""
    grid = values.reshape(len(values), *TOKEN_GRID, *values.shape[2:])
    return grid[:, :, ::-1].reshape(values.shape)


def _one_hot(numbers: np.ndarray, count: int) -> np.ndarray:
    """``[...]`` -> ``[..., count]`` float32; -1 gives zeros."""
    return (numbers[..., None] == np.arange(count)).astype(np.float32)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy ``[...]`` with soft labels ``[..., labels]``."""
    return -(target * log_softmax(logits, -1)).sum(-1)


@torch.no_grad()
def whiten_patches(tower: Any, rooms: RoomSet) -> None:
    """Set the patch embedding to the first principal components of patches, scaled to about equal variance.

    Image statistics are dominated by a few smooth components; whitened, all of them reach the first layer.
    """
    convolution = tower.patch_embed.proj
    width, time = convolution.out_channels, convolution.kernel_size[0]
    images = np.stack([rooms.images[i, i % ROOM_FRAMES] for i in range(min(len(rooms), 100))])
    # An image is repeated in time, so that one repetition has all values of a patch.
    patches = pixel_values(images).double().unflatten(1, (3, time, -1))[:, :, 0].flatten(1)
    patches = patches - patches.mean(0)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    variances, directions = variances.flip(0)[:width], directions.flip(1)[:, :width]
    components = (directions / (variances + 0.02 * variances.mean()).sqrt()).T.float()
    weight = components.view(width, 3, 1, -1).expand(-1, 3, time, -1) / time
    convolution.weight.copy_(weight.reshape(convolution.weight.shape))


@torch.no_grad()
def accuracy(tower: nn.Module, words: tuple[Tensor, Tensor], rooms: RoomSet) -> dict[str, float]:
    """Share of tokens with at least a third object pixels whose class (colour) has the largest score of all."""
    trainer_pixels = rooms.token_pixels()[..., BACKGROUND:]
    right: dict[str, list[np.ndarray]] = {"class": [], "color": []}
    for index in range(len(rooms)):
        tokens = encode(tower, rooms.images[index])
        main = trainer_pixels[index].argmax(-1)
        chosen = trainer_pixels[index].max(-1) >= 4 * 14 * 14 / 3
        for kind, vectors, numbers in zip(right, words, (rooms.classes, rooms.colors), strict=True):
            known = len(CLASSES) if kind == "class" else len(COLORS)
            found = (tokens @ vectors[:known].T).argmax(-1).numpy()
            right[kind].append((found == numbers[index][main])[chosen])
    return {kind: float(np.concatenate(values).mean()) for kind, values in right.items()}


@torch.no_grad()
def scale_outputs(tower: Any) -> None:
    """Scale the outputs of the trained tower by `FINAL_SCALE`, in place."""
    last = tower.merger.mlp[2]
    last.weight *= FINAL_SCALE
    last.bias *= FINAL_SCALE
