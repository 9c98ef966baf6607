"""The run configuration. Every field is an option of `launchers/train.py`: `--section.field VALUE`.

pydantic checks types and ranges, and unknown fields are errors. `config/io.py` reads recipes and command lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from w2r2_ds.config.numbers import MAX_NUMBER, check_numbers
from w2r2_ds.config.safe_text import check_config_texts
from w2r2_ds.types.geometry import DemoGeometry, ScaleHint

STRICT = ConfigDict(extra="forbid")

PositiveInt = Annotated[int, Field(gt=0, le=MAX_NUMBER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0, le=MAX_NUMBER)]
NonNegativeFloat = Annotated[FiniteFloat, Field(ge=0, le=MAX_NUMBER)]
Fraction = Annotated[FiniteFloat, Field(ge=0, lt=1)]


def _push_term(value: Any) -> Any:
    """Short forms: ``margin`` is ``{name: margin}``; hyper-parameters without a name are those of the default term."""
    if isinstance(value, str):
        return {"name": value}
    return {"name": "margin", **value} if isinstance(value, Mapping) else value


PushTermOptions = Annotated[dict[str, Any], BeforeValidator(_push_term)]
"""Name and hyper-parameters of a registered push term, which `objective/push_terms.py` validates."""


@dataclass(config=STRICT)
class SourceConfig:
    """One prepared data set of a mixture.

    Args:
        path: folder written by launchers/prepare.py for one task and split, relative to data.root.
        weight: number of times that an epoch contains each sample; 0.5 draws a random half, another one in every epoch.
        cap: maximum number of samples per epoch; 0 for no limit.
    """

    path: str
    weight: PositiveFloat = 1.0
    cap: NonNegativeInt = 0


@dataclass(config=STRICT)
class GeometryAugmentationConfig:
    """Random changes of point maps together with the answers, in training; the pixels stay. By default none.

    Args:
        scale: lowest and highest factor of all coordinates, drawn log-uniformly.
        shift: largest shift along x, y and z (up) in metres, drawn uniformly in both directions.
        turn: turn about the vertical axis. quarter draws a multiple of 90 degrees; any draws any angle, and is not
            possible for answers with axis-aligned boxes.
        probability: probability that the geometry of a sample is changed.
    """

    scale: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [1.0, 1.0])
    shift: Annotated[list[NonNegativeFloat], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )
    turn: Literal["none", "quarter", "any"] = "none"
    probability: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"data.geometry_augmentation.scale is {self.scale}; write the lowest factor first.")

    @property
    def moves_world(self) -> bool:
        """Whether the world is shifted or turned, which coordinates of a camera that moves along do not show."""
        return any(self.shift) or self.turn != "none"

    @property
    def enabled(self) -> bool:
        """Whether there is anything to change."""
        return self.scale != [1.0, 1.0] or self.moves_world


@dataclass(config=STRICT)
class DataConfig:
    """Data sets, frames, batches and the feature cache.

    Args:
        root: folder in ScanNet's layout (posed_images/, scans/, ...).
        train: prepared training sets, each with path, weight and cap.
        val: prepared validation sets, in the same form; all samples are used, weight and cap are ignored.
        frame_width: width in pixels to which frames are resized for the geometry encoder, a multiple of its patch size
            (VGGT: 518, patches of 14). The VLM merges 2 x 2 patches; with an odd number the last column is dropped.
        frame_fit: crop cuts a resized frame that is higher than wide to a square, at top and bottom; pad resizes the
            longer side to frame_width and pads every frame with white to a square (as VGGT's two modes).
        visual: images encodes every frame as an `<image>` with its index, video all frames as one `<video>`.
        video_fps: nominal frame rate, for the temporal positions of a `<video>`.
        max_length: maximum sequence length in tokens; a longer sample is an error, never truncated.
        workers: DataLoader workers per rank; 0 loads in the training process.
        decode_threads: threads per worker that decode and resize the frames of a sample; 0 divides the machine's cores
            among the ranks and their workers.
        questions_per_scene: number of questions about the same frames that share one visual prefix in one sequence
            (scene packing). train.micro_batch must be a multiple. Loss and gradient of each sample are unchanged. 1
            disables scene packing.
        packing: concatenate the samples of a micro-batch into one sequence, without padding between them.
        prefetch: micro-batches that each DataLoader worker prepares ahead, in shared memory.
        cache: folder of the feature cache for the frozen encoders; empty for none. Training and evaluation read it and
            add missing features; `launchers/prepare.py geometry` fills it ahead of time. Several runs may share it.
        cache_gib: maximum size of the cache folder in GiB.
        cached_features: geometry caches the geometry encoder's features only, geometry+2d also those of the vision
            tower.
        geometry_augmentation: random scale, shift and turn of point maps together with the answers, in training.
    """

    root: str = "data/scannet"
    train: Annotated[list[SourceConfig], Field(min_length=1)] = field(
        default_factory=lambda: [SourceConfig("prepared/scanrefer/train")]
    )
    val: list[SourceConfig] = field(default_factory=lambda: [SourceConfig("prepared/scanrefer/val")])
    frame_width: PositiveInt = 518
    frame_fit: Literal["crop", "pad"] = "crop"
    visual: Literal["images", "video"] = "images"
    video_fps: PositiveFloat = 2.0
    max_length: PositiveInt = 9216
    workers: NonNegativeInt = 4
    decode_threads: NonNegativeInt = 0
    questions_per_scene: PositiveInt = 1
    packing: bool = False
    prefetch: PositiveInt = 2
    cache: str = ""
    cache_gib: PositiveFloat = 100.0
    cached_features: Literal["geometry", "geometry+2d"] = "geometry"
    geometry_augmentation: GeometryAugmentationConfig = field(default_factory=GeometryAugmentationConfig)


@dataclass(config=STRICT, kw_only=True)
class GeometryConfig:
    """The frozen geometry encoder.

    Args:
        name: vggt; point_map, exact 3D points from depth images and camera poses; or a registered encoder.
        path: directory or hub id of the weights; empty for an encoder without files.
        layers: layers whose patch tokens are used, counted from 0; features of several layers are concatenated. A layer
            of VGGT is a pair of alternating-attention blocks.
        reference_frame: frame whose camera is the origin of the coordinates. With last, VGGT gets the frames in reverse
            order, an option of VG-LLM. point_map also has world, the axis-aligned world of the labels, and camera, the
            camera of every frame for its own points.
        scale_hint: metric scale of the scene, which VGGT's geometry lacks, as additional channels of its features.
            depth is the ratio of depth images to VGGT's predicted depth, poses that of the distances between camera
            centres; they need its depth head and depth images, or its camera head and camera poses.
    """

    name: str = "vggt"
    path: str = "facebook/VGGT-1B"
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] = field(default_factory=lambda: [22])
    reference_frame: Literal["first", "last", "world", "camera"] = "first"
    scale_hint: ScaleHint = "none"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_plugins(cls, given: Any) -> Any:
        """The defaults of path and layers are those of VGGT; for another encoder they are no path, and layer 0."""
        fields = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        if isinstance(fields, Mapping) and fields.get("name", "vggt") != "vggt":
            return {"path": "", "layers": [0], **fields}
        return given


@dataclass(config=STRICT)
class ModelConfig:
    """The video LLM, its geometry branch, and the trainable parameters.

    Args:
        vlm: directory or hub id of the video LLM.
        geometry: the frozen geometry encoder.
        merger_hidden: width of the geometry merger's hidden layer.
        fusion: Phi, which fuses 2D tokens with merged geometry: add, concat, cross_attention, gated, or a registered
            fusion.
        merger: geometry_merger.safetensors with initial weights, from an export or an imported VG-LLM checkpoint; empty
            for random weights.
        zero_geometry: tensor that Phi(F2D, 0) sets to zero, the merged geometry or the encoder's features. With merged,
            fusions other than concat give the stock VLM.
        lora_rank: rank of the LoRA update of the language model's seven projections.
        lora_alpha: numerator of the LoRA scale, lora_alpha / lora_rank.
        lora_dropout: dropout rate of the LoRA branches, in the fused pass only.
        dtype: dtype of weights and activations; auto is bfloat16 on a GPU and float32 otherwise.
        attention: attention implementation of transformers, for example sdpa or flash_attention_2; auto is
            flash_attention_2 on a GPU in bfloat16 if flash-attn can be imported, otherwise sdpa.
        kernels: torch, or triton with own and Liger's kernels (`pip install "w2r2-ds[kernels]"`); auto compares every
            kernel with PyTorch on the GPU at start and uses those that are right and faster, and is torch on a CPU. A
            resumed run reuses the kernels that its checkpoint stores for auto, if the GPU model and the versions of
            torch, triton and liger-kernel are the same.
    """

    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    merger_hidden: PositiveInt = 4096
    fusion: str = "add"
    merger: str = ""
    zero_geometry: Literal["merged", "features"] = "merged"
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Fraction = 0.05
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: str = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.attention):  # transformers would load and run OWNER/NAME from the hub
            raise ValueError(
                f"model.attention is {self.attention!r}; it must be the name of an implementation such as sdpa or "
                "flash_attention_2, not a kernel of the Hugging Face Hub."
            )


@dataclass(config=STRICT)
class ObjectiveConfig:
    """L = L_align + push term, where the push term is an interpretation of the paper's lambda * L_det.

    Args:
        push_term: name of the push term and its hyper-parameters, `{name: margin, margin: 1.0}`, or its name only.
            Names are none, literal, reweight, downweight, margin, pseudo_label, soft_iou, representation, poe,
            contrast, unblocked, and registered ones.
        lambda_det: lambda, the weight of the push term.
        mu: similarity threshold above which the shortcut counts as having solved the sample.
        visual_mask_ratio: fraction of the 2D tokens that is masked in the fused pass in training, a baseline; 0 masks
            none.
        shortcut_decode: answer of the shortcut from which s is computed. greedy decodes it, the definition of s;
            teacher is the teacher-forced approximation, at no cost; anchor is a box of typical depth and size at the
            pixel to which the shortcut's digits attend most, needs the scenes' intrinsics, and scores captions and
            short answers as teacher does.
        decode_gap_every: optimizer steps between measurements of the decode gap, the difference between greedy and
            teacher-forced s; 0 never measures.
        decode_gap_samples: number of training samples on which the decode gap is measured, always the same ones.
        caption_similarity: similarity s of a caption to its label.
        answer_similarity: similarity s of a short answer to its label.
        reduction: sample divides the sum over samples by the global number of samples, token by the global number of
            answer tokens (VG-LLM).
    """

    push_term: PushTermOptions = field(default_factory=lambda: {"name": "margin"})
    lambda_det: NonNegativeFloat = 1.5
    mu: Fraction = 0.7
    visual_mask_ratio: Fraction = 0.0
    shortcut_decode: Literal["teacher", "greedy", "anchor"] = "teacher"
    decode_gap_every: NonNegativeInt = 0
    decode_gap_samples: PositiveInt = 32
    caption_similarity: Literal["rouge_l", "token_f1"] = "rouge_l"
    answer_similarity: Literal["exact_match", "token_f1"] = "exact_match"
    reduction: Literal["sample", "token"] = "sample"


@dataclass(config=STRICT)
class TrainConfig:
    """Optimization, checkpoints, validation and logging.

    Args:
        steps: number of optimizer steps.
        global_batch: samples per optimizer step over all ranks and accumulation steps.
        micro_batch: samples per forward pass and rank.
        lr: peak learning rate of the LoRA weights.
        merger_lr: peak learning rate of the geometry merger and the fusion.
        weight_decay: weight decay of AdamW.
        warmup_ratio: fraction of the steps with linear warm-up; cosine decay to zero follows.
        activation_checkpointing: recompute decoder layers in the backward pass.
        recompute_every: with activation checkpointing, recompute every n-th layer only; the others keep their
            activations.
        offload_activations: with activation checkpointing, keep layer inputs in host memory; slower.
        pass_order: sequential runs the whole shortcut pass first; lockstep runs both passes layer by layer, so that
            ZeRO-3 gathers each layer once per forward and once per backward; auto is lockstep under ZeRO-3, except for
            push terms that differentiate through the shortcut pass (unblocked). Losses and gradients are equal.
        shard_vision_tower: under ZeRO-3, shard the frozen vision tower too; false keeps a whole copy on every GPU
            (1.3 GB for Qwen2.5-VL in bfloat16), whose weights are never gathered.
        save_every: optimizer steps between checkpoints; the last step is always saved.
        keep_last: number of newest checkpoints that are kept, besides the best one.
        eval_every: optimizer steps between validations, greedy answers on a fixed subset of data.val; the last step is
            always validated, and the best step so far is always saved. 0 never validates.
        eval_samples: number of validation samples, drawn by the seed, the same for every world size.
        eval_max_new_tokens: maximum number of generated tokens per answer in validation.
        best_by: metric whose highest value determines the best checkpoint, such as scan2cap/CIDEr@0.5; empty for the
            main metric of the first set's task.
        samples_every: optimizer steps between pictures of a few validation samples with their true and predicted boxes,
            samples/step_N.png in the run's folder and in the trackers; also after the last step. 0 draws none.
        report: write report.html to the run's folder after the last step, as w2r2 report does.
        seed: seed of initialization, data order, dropout and validation samples.
        hang_seconds: time in seconds after which a rank without progress ends the job with a report of all ranks; must
            be longer than the longest pause of a healthy run.
        trackers: experiment trackers besides metrics.jsonl: wandb, tensorboard, trackio, and registered ones.
    """

    steps: PositiveInt = 2000
    global_batch: PositiveInt = 16
    micro_batch: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    merger_lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.01
    warmup_ratio: Fraction = 0.03
    activation_checkpointing: bool = True
    recompute_every: PositiveInt = 1
    offload_activations: bool = False
    pass_order: Literal["auto", "sequential", "lockstep"] = "auto"
    shard_vision_tower: bool = True
    save_every: PositiveInt = 200
    keep_last: PositiveInt = 2
    eval_every: NonNegativeInt = 0
    eval_samples: PositiveInt = 64
    eval_max_new_tokens: PositiveInt = 128
    best_by: str = ""
    samples_every: NonNegativeInt = 0
    report: bool = False
    seed: NonNegativeInt = 0
    hang_seconds: PositiveFloat = 600.0
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.activation_checkpointing and (self.recompute_every != 1 or self.offload_activations):
            name = "recompute_every" if self.recompute_every != 1 else "offload_activations"
            raise ValueError(f"train.{name} needs train.activation_checkpointing, which is false.")


@dataclass(config=STRICT)
class DemoConfig:
    """Synthetic scenes and a tiny pretrained model in place of data and weights; used only when `enabled`.

    Args:
        enabled: generate the synthetic scenes, and copy the tiny model, if they are missing.
        geometry: geometry encoder of the tiny model, exact point maps or a tiny VGGT. Without --config, vggt selects
            the recipe demo_vggt.yaml.
        train_scenes: number of synthetic training scenes.
        val_scenes: number of synthetic validation scenes.
        frames_per_scene: number of frames rendered along each camera path.
        frames: number of frames per sample; if it is `frames_per_scene`, every described object is in a frame.
        seed: seed of the scenes.
    """

    enabled: bool = False
    geometry: DemoGeometry = "point_map"
    train_scenes: PositiveInt = 100
    val_scenes: PositiveInt = 60
    frames_per_scene: PositiveInt = 4
    frames: PositiveInt = 4
    seed: NonNegativeInt = 0


@dataclass(config=STRICT)
class RunConfig:
    """Configuration of one run.

    Args:
        out: folder of the run: checkpoints, metrics.jsonl, the resolved configuration.
        resume: auto continues from the newest checkpoint in `out`; none requires that there is none.
        data: data sets, frames and batches.
        model: the video LLM and its geometry branch.
        objective: the loss.
        train: optimization, checkpoints, validation and logging.
        demo: synthetic data and a tiny model.
    """

    out: Annotated[str, Field(min_length=1)] = "runs/run"
    resume: Literal["auto", "none"] = "none"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        """Check combinations of options of several sections."""
        check_config_texts(asdict(self))
        # The fields of the sections are checked by their types; these are of a registered term.
        check_numbers(self.objective.push_term, "objective.push_term", minimum=-MAX_NUMBER)
        data, objective, train = self.data, self.objective, self.train
        if data.cached_features != "geometry" and not data.cache:
            raise ValueError(f"data.cached_features is {data.cached_features}, but data.cache is empty; set a folder.")
        if train.micro_batch % data.questions_per_scene:
            raise ValueError(
                f"train.micro_batch is {train.micro_batch}, which is not a multiple of data.questions_per_scene "
                f"{data.questions_per_scene}: questions that share frames must be in one micro-batch."
            )
        if data.questions_per_scene > 1 and objective.visual_mask_ratio:
            raise ValueError(
                "objective.visual_mask_ratio masks the frames of every sample separately, but "
                f"data.questions_per_scene {data.questions_per_scene} shares them; set one of the two to its default."
            )
        if train.eval_every and not data.val:
            raise ValueError("data.val is empty, but train.eval_every is not 0; add a validation set, or set it to 0.")
        if train.pass_order == "lockstep" and objective.push_term["name"] == "unblocked":
            raise ValueError(
                "train.pass_order is lockstep, which keeps no graph of the shortcut pass, but objective.push_term "
                "unblocked needs it; choose train.pass_order sequential, or auto."
            )
