"""Sizes of the models and samples of the benchmarks: small ones for the CPU, the real architectures for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from w2r2_ds.models.vggt.config import VGGTConfig

PATCH, MERGE = 14, 2
"""Side of a patch of both towers in pixels; patches per side that the VLM's tower merges into a token."""
IGNORED = -100
"""Label of a position without a loss, as in transformers."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a VLM, a VGGT and a sample.

    Attributes:
        name: name in reports, and value of the option `--shape`.
        hidden, layers, heads, kv_heads, intermediate, vocabulary, tied: language model, as in its config.json.
        vision_hidden, vision_depth, vision_heads, vision_intermediate, vision_window, vision_full: vision tower.
        vggt: sizes of VGGT. The features are those of its last but one layer, as in VG-LLM.
        merger_hidden: width of the geometry merger's hidden layer.
        frames: number of frames per sample.
        frame_size: width and height of a frame for VGGT, in pixels.
        grid: columns and rows of patches of a frame for the VLM, both even.
        prompt_tokens: number of text tokens before the answer: start and end token of every frame, and the question.
        answer_tokens: number of tokens of the answer, including the end of turn.
        lora_rank: rank of LoRA on the seven projections of every layer.
        dtype: dtype of weights and activations.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int
    vision_window: int
    vision_full: tuple[int, ...]
    vggt: VGGTConfig
    merger_hidden: int
    frames: int
    frame_size: tuple[int, int]
    grid: tuple[int, int]
    prompt_tokens: int
    answer_tokens: int
    lora_rank: int
    dtype: str

    @property
    def label(self) -> str:
        """Name of the shape in a table or a criterion."""
        return f"{self.name}, {self.frames} frames"

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens of a sample in the language model."""
        return self.frames * self.grid[0] * self.grid[1] // MERGE**2

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens that all questions about a frame set share: visual tokens, and the frames' start and end."""
        return self.visual_tokens + 2 * self.frames

    @property
    def tokens(self) -> int:
        """Number of tokens of a sample: visual, prompt and answer."""
        return self.visual_tokens + self.prompt_tokens + self.answer_tokens

    @property
    def geometry_layer(self) -> int:
        """Index of the layer of VGGT whose features are used."""
        return self.vggt.depth - 2


# 704 visual tokens and 64 text tokens, 40 of them the answer. VGGT encodes 8 frames of 392 x 294 pixels. Whole frames
# would be 1120 visual tokens, so the VLM encodes only the upper left 308 x 224 pixels (22 x 16 patches) of each.
CPU = Shape(
    name="cpu",
    hidden=512,
    layers=8,
    heads=8,
    kv_heads=2,
    intermediate=1536,
    vocabulary=32768,
    tied=True,
    vision_hidden=256,
    vision_depth=4,
    vision_heads=4,
    vision_intermediate=512,
    vision_window=112,
    vision_full=(3,),
    vggt=VGGTConfig(embed_dim=384, depth=6, num_heads=6, vit_depth=6, vit_num_heads=6),
    merger_hidden=1024,
    frames=8,
    frame_size=(392, 294),
    grid=(22, 16),
    prompt_tokens=24,
    answer_tokens=40,
    lora_rank=16,
    dtype="float32",
)
# Runs in a second, for the tests.
TINY = replace(
    CPU,
    name="tiny",
    hidden=64,
    layers=2,
    heads=4,
    intermediate=128,
    vocabulary=1024,
    vision_hidden=32,
    vision_depth=2,
    vision_intermediate=64,
    vision_window=56,
    vision_full=(1,),
    vggt=VGGTConfig(embed_dim=32, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2),
    merger_hidden=32,
    frames=2,
    frame_size=(84, 70),
    grid=(4, 4),
    prompt_tokens=10,
    lora_rank=4,
)
# Sizes of Qwen2.5-VL and VGGT-1B. Frames as in VG-LLM for ScanNet: 518 x 392, of which the VLM encodes 36 x 28 patches.
QWEN_3B = replace(
    CPU,
    name="3b",
    hidden=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    intermediate=11008,
    vocabulary=151936,
    vision_hidden=1280,
    vision_depth=32,
    vision_heads=16,
    vision_intermediate=3420,
    vision_window=112,
    vision_full=(7, 15, 23, 31),
    vggt=VGGTConfig(),
    merger_hidden=4096,
    frames=8,
    frame_size=(518, 392),
    grid=(36, 28),
    prompt_tokens=160,
    answer_tokens=96,
    dtype="bfloat16",
)
QWEN_7B = replace(
    QWEN_3B,
    name="7b",
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    tied=False,
)
SHAPES = {shape.name: shape for shape in (CPU, TINY, QWEN_3B, QWEN_7B)}


def find_shapes(name: str, frames: list[int] | None = None) -> list[Shape]:
    """Find the shape `name`, once per number of frames; without numbers, once with its default.

    Raises:
        ValueError: unknown shape, or more frames than its prompt has start and end tokens for.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape is {name!r}; it is one of {', '.join(SHAPES)}.")
    shape = SHAPES[name]
    frames = frames or [shape.frames]
    for count in frames:
        most = (shape.prompt_tokens - 1) // 2  # every frame has a start and an end token; one is left for the question
        if not 1 <= count <= most:
            raise ValueError(f"--frames is {count}; shape {name} allows 1 to {most}.")
    return [replace(shape, frames=count) for count in frames]
