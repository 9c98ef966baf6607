"""The run configuration: typed, nested, strict. Every field is an option of `launchers/train.py`.

Unknown keys are errors. The command line wins over `--config RECIPE.yaml`, which wins over the defaults below; without
`--config` the recipe is `demo.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from w2r2_ds.config.checks import check


@dataclass
class SourceConfig:
    """One prepared data set of a mixture.

    Args:
        path: folder that launchers/prepare.py wrote for one task and split, relative to data.root.
        weight: how often an epoch shows each of its samples; of 0.5, a random half of them, another in every epoch.
        cap: the most samples an epoch shows of it; 0 for no limit.
    """

    path: str
    weight: float = 1.0
    cap: int = 0


@dataclass
class DataConfig:
    """Where the data lie and what the model is shown of them.

    Args:
        root: folder in ScanNet's layout (posed_images/, scans/, ...; docs/guides/own-dataset.md).
        train: prepared training sets, a list of path, weight and cap.
        val: prepared validation sets, all shown whole.
        frame_width: width in pixels to which a frame is resized for VGGT, whose own is 518; a multiple of its patch 14.
            The VLM merges patches two by two: of an odd number, as in 518, it does not see the last column.
        visual: every frame an `<image>` with its index, or all frames one `<video>`.
        video_fps: nominal rate of the sampled frames, for the temporal positions of a `<video>`.
        max_length: longest sequence in tokens; a longer sample is an error, never cut.
        workers: loader processes per rank; 0 loads in the training process.
        questions_per_scene: samples that see the same frames come together in bins of so many, and share one visual
            prefix in one sequence; train.micro_batch is a multiple. Losses and gradients of each are as they are alone,
            but other samples make a batch, and dropout draws a shared prefix's mask once for all of them. 1 orders
            samples freely.
        packing: the samples of a micro-batch make one sequence, without padding, as they do where questions share
            frames; for samples of unequal length.
        prefetch: micro-batches that each loader process makes ahead, in shared memory; `data_s` in metrics.jsonl is
            what a step still waited for data.
        cache: folder for features of the frozen encoders, so that they are computed once; empty for none. Any number of
            runs may share it; `launchers/prepare.py geometry` fills it ahead.
        cache_gib: the most that this folder may hold, in GiB; what was used longest ago goes first.
        cached_features: what is kept there: the geometry encoder's features, or also the vision tower's, which then
            sees no
            image twice.
    """

    root: str = "data/scannet"
    train: list[SourceConfig] = field(default_factory=lambda: [SourceConfig("prepared/scanrefer/train")])
    val: list[SourceConfig] = field(default_factory=lambda: [SourceConfig("prepared/scanrefer/val")])
    frame_width: int = 518
    visual: Literal["images", "video"] = "images"
    video_fps: float = 2.0
    max_length: int = 9216
    workers: int = 4
    questions_per_scene: int = 1
    packing: bool = False
    prefetch: int = 2
    cache: str = ""
    cache_gib: float = 100.0
    cached_features: Literal["geometry", "geometry+2d"] = "geometry"


@dataclass
class ModelConfig:
    """The video LLM, its geometry branch, and what of it is trained.

    Args:
        vlm: Qwen2.5-VL directory or hub id.
        vggt: VGGT directory or hub id.
        geometry_layer: alternating-attention layer of VGGT whose patch tokens are used, counted from 0.
        reference_frame: frame whose camera is VGGT's origin; `last` shows VGGT the frames in reverse, as VG-LLM can.
        merger_hidden: width of the geometry merger's hidden layer.
        fusion: Phi, how merged geometry joins the visual tokens: added, concatenated and projected, attended to within
            an image, or added through a gate.
        merger: geometry_merger.safetensors to start from, of an export or an imported VG-LLM; empty starts afresh.
        zero_geometry: what `Phi(F2D, 0)` zeroes: the merged geometry (then it equals the stock VLM) or VGGT's features.
        lora_rank: rank of the LoRA update of the language model's seven projections.
        lora_alpha: LoRA scale is lora_alpha / lora_rank.
        lora_dropout: dropout in the LoRA branch, fused pass only.
        dtype: weights and activations; auto is bfloat16 on a GPU and float32 without.
        attention: attention implementation of transformers, for example sdpa or flash_attention_2; auto is
            flash_attention_2 on a GPU in bfloat16 where flash_attn is installed, else sdpa.
        kernels: torch, or triton with our own and Liger's kernels (`pip install "w2r2-ds[kernels]"`); auto is triton
            where there is a CUDA device and both are installed. The results are equal up to rounding.
    """

    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    vggt: str = "facebook/VGGT-1B"
    geometry_layer: int = 22
    reference_frame: Literal["first", "last"] = "first"
    merger_hidden: int = 4096
    fusion: Literal["add", "concat", "cross_attention", "gated"] = "add"
    merger: str = ""
    zero_geometry: Literal["merged", "features"] = "merged"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: str = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"


@dataclass
class ObjectiveConfig:
    """L = L_align + push, where push is one reading of the paper's lambda * L_det (docs/concepts/objective.md).

    Args:
        push: reading of Eq. 6: none, literal, reweight, downweight, margin, pseudo_label, soft_iou, representation, poe
            or unblocked.
        lambda_det: lambda, the weight of the push term.
        mu: similarity above which the shortcut counts as having solved the sample.
        margin: of push margin, log-likelihood in nats by which the fused pass must beat the shortcut on where tokens.
        iou_margin: of push soft_iou, IoU by which the fused pass's expected box must beat the shortcut's.
        cosine: of push representation, cosine of fused and shortcut states that is far enough apart at where tokens.
        visual_mask_ratio: share of the 2D tokens that the fused pass loses in training, a baseline; 0 masks none.
        shortcut_decode: how the shortcut's answer is read: greedy decoding, which defines s, or the teacher-forced
            approximation, which costs nothing.
        gap_every: optimizer steps between measurements of what teacher reading changes; 0 never measures.
        gap_samples: training samples on which it is measured, always the same.
        caption_similarity: s of a caption.
        answer_similarity: s of a short answer.
        reduction: sums over samples divided by the global sample count, or by the global token count (VG-LLM).
    """

    push: str = "margin"
    lambda_det: float = 1.5
    mu: float = 0.7
    margin: float = 1.0
    iou_margin: float = 0.1
    cosine: float = 0.5
    visual_mask_ratio: float = 0.0
    shortcut_decode: Literal["teacher", "greedy"] = "teacher"
    gap_every: int = 0
    gap_samples: int = 32
    caption_similarity: Literal["rouge_l", "token_f1"] = "rouge_l"
    answer_similarity: Literal["exact_match", "token_f1"] = "exact_match"
    reduction: Literal["sample", "token"] = "sample"


@dataclass
class TrainConfig:
    """The optimisation.

    Args:
        steps: optimizer steps.
        global_batch: samples per optimizer step over all ranks and accumulation steps.
        micro_batch: samples per forward per rank.
        lr: peak learning rate of the LoRA weights.
        merger_lr: peak learning rate of the geometry merger and the fusion.
        weight_decay: AdamW's weight decay.
        warmup_ratio: share of the steps with rising learning rate; a cosine to zero follows.
        activation_checkpointing: recompute decoder layers in the backward pass, so that each keeps only its input.
        recompute_every: of these only every n-th, from the first; the others keep all they compute, and are faster.
        offload_activations: keep the inputs of recomputed layers in the host's memory; slower.
        pass_order: how the two passes take turns: sequential, the shortcut first, or lockstep, both in every layer, so
            that ZeRO-3 gathers it once for both; auto is lockstep under ZeRO-3. Losses and gradients are equal.
        save_every: optimizer steps between checkpoints; the last step is always saved.
        keep_last: checkpoints kept, besides the best.
        eval_every: optimizer steps between validations, greedy answers of a fixed part of data.val; the last step is
            always validated. 0 never validates. A step that is the best so far is saved, whatever save_every says.
        eval_samples: validation samples, drawn once by the seed, the same for every world size; one that data.val does
            not hold is not missed. Answers of micro_batch samples are decoded at once.
        eval_max_new_tokens: longest answer in validation; under ZeRO-3 every token gathers the weights once.
        best_by: metric whose highest value is the best checkpoint, as scan2cap/CIDEr@0.5; empty for the main metric of
            the first set's task (docs/reference/metrics/).
        seed: of initialisation, data order, dropout and validation samples.
        hang_seconds: a rank that stands still for so long ends the job, with what every rank was doing; more than the
            longest pause of a healthy run (a save, a batch from a slow disk).
        trackers: where metrics are logged besides metrics.jsonl: wandb, tensorboard, trackio, or a plugin's.
    """

    steps: int = 2000
    global_batch: int = 16
    micro_batch: int = 1
    lr: float = 1e-4
    merger_lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    activation_checkpointing: bool = True
    recompute_every: int = 1
    offload_activations: bool = False
    pass_order: Literal["auto", "sequential", "lockstep"] = "auto"
    save_every: int = 200
    keep_last: int = 2
    eval_every: int = 0
    eval_samples: int = 64
    eval_max_new_tokens: int = 128
    best_by: str = ""
    seed: int = 0
    hang_seconds: float = 600.0
    trackers: list[str] = field(default_factory=list)


@dataclass
class DemoConfig:
    """What stands in for data and weights where there are none; used only when `enabled`.

    Args:
        enabled: make synthetic scenes and the tiny model where they are missing.
        train_scenes: synthetic training scenes.
        val_scenes: synthetic validation scenes.
        frames_per_scene: frames rendered along each camera path.
        frames: frames per sample.
        seed: of scenes and tiny model.
        warmup_steps: full-weight steps of the tiny language model on 2D input; stands for pre-training.
        warmup_batch: samples per warm-up step.
        warmup_lr: peak learning rate of the warm-up.
    """

    enabled: bool = False
    train_scenes: int = 48
    val_scenes: int = 12
    frames_per_scene: int = 16
    frames: int = 4
    seed: int = 0
    warmup_steps: int = 240
    warmup_batch: int = 8
    warmup_lr: float = 3e-3


@dataclass
class RunConfig:
    """One run.

    Args:
        out: folder of the run: checkpoints, metrics.jsonl, the resolved configuration.
        resume: auto goes on from the newest checkpoint in `out`; none refuses a folder that has one.
        data: what the model is shown.
        model: what is trained.
        objective: what it is trained for.
        train: how.
        demo: what stands in for missing data and weights.
    """

    out: str = "runs/run"
    resume: Literal["auto", "none"] = "none"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        check(self)
