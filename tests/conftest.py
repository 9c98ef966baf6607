"""Shared fixtures: a tiny model, hand-made samples, batches of them, and one short training run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from depth_scenes import with_depth
from runs import World, make_world, train_once, world_folder
from shared_fixtures import once, shared_base

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A script's shell ignores SIGINT in background commands, and the processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Hypothesis: the same examples in every run, and no time limit per example, because the machine may be busy.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

LONG_FIRST = (
    "training/test_trainer.py",
    "training/deepspeed/test_zero3.py",  # does not need `trained` or `world`, which another worker creates meanwhile
    "doctor/test_run.py",  # the same
    "cluster/test_jobs.py",
    "faults/test_save_kills.py",
    "evaluation/test_validator.py",
    "faults/test_bad_day.py",
    "evaluation/test_multi_rank.py",
    "training/fault_tolerance/test_signals.py",
    "test_end_to_end.py",
    "evaluation/test_runner.py",
    "convert/test_peft_adapter.py",
    "faults/test_disk_full.py",
    "training/fault_tolerance/test_watchdog.py",
)
"""The slowest test files. They run first, so that no worker begins one when the others are finished."""

BOX = np.array([0.4, 3.0, 0.8, 1.2, 0.9, 1.6, 0.0, 0.0, 0.0])


STARTS_PROCESSES = re.compile(
    r"^\s*(?:import|from) (?:subprocess|multiprocessing|fork_server|rank_processes|watched_ranks|training_jobs|"
    r"stopped_runs|sharded_ranks|zero3_cases|slurm_cluster)\b"
    r"|^from runs import .*\b(?:run_jobs|run_ranks|launch|train_once)\b",
    re.MULTILINE,
)
"""Matches an import that means that the test file starts processes."""
PROCESS_FIXTURES = {"trained", "world"}
"""Fixtures that start processes or train the tiny model, which takes minutes."""
PROCESS_FOLDERS = {"cluster", "faults"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the slowest files first, and mark every test that starts processes as `distributed`."""
    tests = Path(__file__).parent
    order = {tests / name: index for index, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    starts = {path: bool(STARTS_PROCESSES.search(path.read_text())) for path in {item.path for item in items}}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        folder = item.path.relative_to(tests).parts[0]
        if starts[item.path] or fixtures & PROCESS_FIXTURES or folder in PROCESS_FOLDERS:
            item.add_marker("distributed")


def camera_pose(step: int) -> np.ndarray:
    """``[4, 4]`` camera-to-world pose near the origin that faces +y, turned left and down a little with every step."""
    yaw, pitch = 0.1 * step - 0.3, 0.05 * step
    level = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn @ level @ tilt, [0.1 * step, -0.2, 1.4]
    return pose


def make_sample(folder: Path, name: str, frames: int, size: tuple[int, int], frame: int, description: str) -> Any:
    """A ScanRefer sample with `frames` noise images of `size` (width, height), whose answer has frame index `frame`."""
    from w2r2_ds.boxes3d.transforms import world_to_camera
    from w2r2_ds.data.tasks.scanrefer import answer_text, description_span, question_text
    from w2r2_ds.types.sample import Sample, Target

    noise = np.random.default_rng(len(name) + frames)
    paths = []
    for index in range(frames):
        paths.append(folder / f"{name}_{index}.png")
        Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(paths[-1])
    poses = np.stack([camera_pose(index) for index in range(frames)])
    return Sample(
        id=name,
        task="scanrefer",
        scene_id="scene0000_00",
        frames=tuple(paths),
        cam_to_world=poses,
        question=question_text(description),
        answer=answer_text(frame, world_to_camera(BOX, poses[frame])),
        target=Target(BOX, 3, "chair", "unique"),
        what=description_span(description),
    )


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Three samples with 4, 3 and 12 frames; resized, 56 x 42, 56 x 56 and 56 x 42. The last answer has frame 11."""
    folder = tmp_path_factory.mktemp("frames")
    return [
        make_sample(folder, "four", 4, (80, 60), 2, "the red chair."),
        make_sample(folder, "three", 3, (64, 64), 0, "a small brown table beside the white door of the room."),
        make_sample(folder, "twelve", 12, (80, 60), 11, "the sofa."),
    ]


@pytest.fixture(scope="session")
def depth_samples(tmp_path_factory: pytest.TempPathFactory, samples: list[Any]) -> list[Any]:
    """The three samples with depth images, each in a scene of its own."""
    return with_depth(tmp_path_factory.mktemp("depth"), samples)


@pytest.fixture(scope="session")
def caption_sample(samples: list[Any]) -> Any:
    """A Scan2Cap sample with three frames; no box, no *what*."""
    return replace(
        samples[1],
        id="caption",
        task="scan2cap",
        question="Describe the object in one sentence.\n",
        answer="the door, 2 m wide - and 1 chair.",
        target=None,
        kind="caption",
        what=(0, 0),
    )


@pytest.fixture(scope="session")
def answer_sample(samples: list[Any]) -> Any:
    """A ScanQA sample with four frames; no box, no *what*."""
    return replace(
        samples[0],
        id="answer",
        task="scanqa",
        question="How many chairs are beside the door?\n",
        answer="2 chairs",
        target=None,
        kind="answer",
        what=(0, 0),
    )


@pytest.fixture(scope="session")
def text_samples(answer_sample: Any, samples: list[Any]) -> list[Any]:
    """Two samples without frames: a short answer, and a box whose question has a *what*."""
    no_frames: dict[str, Any] = {"frames": (), "cam_to_world": np.zeros((0, 4, 4))}
    return [
        replace(answer_sample, id="text answer", **no_frames),
        replace(samples[2], id="text box", **no_frames),
    ]


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory, samples: list[Any]) -> Any:
    """Configuration of a tiny Qwen2.5-VL and a tiny VGGT, both random."""
    from w2r2_ds.config.schema import GeometryConfig, ModelConfig
    from w2r2_ds.demo.tiny_models import build_tiny_vggt, build_tiny_vlm

    folder = tmp_path_factory.mktemp("tiny_models")
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    sizes = {"hidden": 64, "layers": 2, "intermediate": 128, "vision_hidden": 32, "vision_depth": 2}
    build_tiny_vlm(folder / "vlm", texts, 3, **sizes)
    build_tiny_vggt(folder / "vggt", 3, embed_dim=32, depth=2, num_heads=2)
    return ModelConfig(
        vlm=str(folder / "vlm"),
        geometry=GeometryConfig(path=str(folder / "vggt"), layers=[1]),
        merger_hidden=32,
        lora_rank=4,
        lora_alpha=8,
        lora_dropout=0.0,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def frontend(model_config: Any) -> Any:
    """Frontend of the tiny VLM: tokenizer, vision spec and a model on the meta device."""
    from w2r2_ds.models.build import load_frontend

    return load_frontend(model_config)


@pytest.fixture(scope="session")
def data_config() -> Any:
    """Function `data_config(**changes)`: a `DataConfig` with small frames and no DataLoader workers."""
    from w2r2_ds.config.schema import DataConfig

    def make(**changes: Any) -> Any:
        return DataConfig(**{"frame_width": 56, "max_length": 512, "workers": 0, **changes})

    return make


@pytest.fixture(scope="session")
def batch_of(frontend: Any, data_config: Any) -> Callable[..., Any]:
    """Function `batch_of(samples, with_answer, with_prompts, **data_config_changes)`: the collated batch."""
    from w2r2_ds.data.batching.collate import Collator
    from w2r2_ds.data.loader import make_position_ids, make_processor, visual_kind

    def make(chosen: Sequence[Any], with_answer: bool = True, with_prompts: bool = False, **changes: Any) -> Any:
        config = data_config(**changes)
        processor = make_processor(frontend, config)
        positions = make_position_ids(frontend, config) if with_answer else None
        collate = Collator(
            frontend.tokenizer.pad_token_id,
            visual_kind(config),
            positions,
            frontend.vision,
            frontend.geometry,
            frontend.family,
            with_prompts,
        )
        return collate([processor(sample, with_answer) for sample in chosen])

    return make


@pytest.fixture(scope="session")
def tables(frontend: Any) -> Any:
    """Token tables of the tiny tokenizer."""
    from w2r2_ds.data.answer_tokens import token_tables

    return token_tables(frontend.tokenizer, frontend.meta.config.get_text_config().vocab_size)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Synthetic scenes and warmed-up tiny models, created once for all pytest workers."""
    base = shared_base(tmp_path_factory.getbasetemp())
    world = World(world_folder(base))
    once(base, "world", partial(make_world, world.folder))
    return world


@pytest.fixture(scope="session")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 30 steps on one rank, created once for all pytest workers. Tests must change only copies of it."""
    once(shared_base(tmp_path_factory.getbasetemp()), "trained", partial(train_once, world))
    return world.folder / "run"
