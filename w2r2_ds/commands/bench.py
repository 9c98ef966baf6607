"""Run a benchmark: ``w2r2 bench step_time [--json FILE]``. docs/research/measurements.md has the results.

Every benchmark is a function here: its parameters are the options, its docstring is the help. The functions import the
modules of `w2r2_ds.bench`, and with them torch, only when they run. On a GPU the same commands use CUDA events;
``--shape 3b --frames [8,16,24]`` selects the real architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from w2r2_ds.commands.common import command_words, description, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.config.cli import Parser
from w2r2_ds.config.numbers import check_numbers
from w2r2_ds.training.fault_tolerance.exit_codes import FAILED
from w2r2_ds.utils.files.output_folder import check_writable


@reports_errors("bench")
def main(args: list[str] | None = None) -> int | None:
    """Run one benchmark, print its report and save it with ``--json``; returns the exit code."""
    parser = Parser(prog="w2r2 bench", description="Benchmarks of speed and memory.")
    commands = parser.add_subcommands(dest="benchmark")
    words = command_words(args)
    chosen = next((word for word in words if word in BENCHMARKS), "")
    for name, benchmark in BENCHMARKS.items():
        # The others get an empty parser: jsonargparse takes milliseconds for the options of a function.
        command = function_parser(benchmark, f"w2r2 bench {name}") if name == chosen else Parser()
        command.add_argument("--json", type=Path | None, help="File for the report in JSON.")
        commands.add_subcommand(name, command, help=description(benchmark))
    values = parse(parser, words)
    options = values[values["benchmark"]]
    for name in ("rounds", "ranks", "frames", "questions"):
        check_numbers(options.get(name), f"--{name}", minimum=1)
    target = options.pop("json")
    if target is not None:
        if target.is_dir():
            raise ValueError(f"--json {target} is a folder; pass a file.")
        check_writable(target.parent, option="--json")
    report = BENCHMARKS[values["benchmark"]](**options)
    report.show()
    if target is not None:
        report.save(target)
    return FAILED if report.failed else None


def baseline(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 3) -> Any:
    """Training step of Hugging Face's Trainer on stock Qwen2.5-VL: logits at all positions, all layers of VGGT.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of steps.
    """
    from w2r2_ds.bench.hf_baseline.baseline import run

    return run(shape, frames, rounds)


def step_time(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 3, memory: bool = True) -> Any:
    """Training step of W2R2, relative to a single pass and to the HF Trainer baseline, with and without caches.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of runs per case, interleaved.
        memory: on the CPU, also measure peak memory in a process per case; on a GPU it is always measured.
    """
    from w2r2_ds.bench.step_time import run

    return run(shape, frames, rounds, memory)


def scene_packing(
    shape: str = "cpu", frames: list[int] | None = None, questions: tuple[int, ...] = (1, 4, 8), rounds: int = 3
) -> Any:
    """Time per sample of W2R2 with K questions in one sequence, relative to the HF Trainer baseline.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (the real architectures with random weights).
        frames: numbers of frames per sample; default: the shape's own.
        questions: values of K; the last one also runs without caches and as a single pass.
        rounds: number of runs per case, interleaved.
    """
    from w2r2_ds.bench.scene_packing import run

    return run(shape, frames, questions, rounds)


def feature_cache(
    shape: str = "cpu", frames: list[int] | None = None, rounds: int = 5, folder: Path | None = None
) -> Any:
    """Time per frame set to read geometry features from the feature cache, relative to computing them.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (VGGT-1B with random weights).
        frames: numbers of frames per set; default: the shape's own.
        rounds: number of runs per case, interleaved.
        folder: a folder on the disk to measure; default: the system's folder for temporary files. Files that were just
            written are read from the page cache.
    """
    from w2r2_ds.bench.feature_cache import run

    return run(shape, frames, rounds, folder)


def loader(
    shape: str = "cpu", frames: list[int] | None = None, size: tuple[int, int] = (1296, 968), rounds: int = 5
) -> Any:
    """Time to load the frames of a sample, on one or more threads, and its bytes.

    Args:
        shape: cpu, tiny, or 3b or 7b (the width of real frames).
        frames: numbers of frames per sample; default: the shape's own.
        size: width and height of the JPEG files in pixels; ScanNet's have 1296 x 968.
        rounds: number of runs per case, interleaved.
    """
    from w2r2_ds.bench.loader import run

    return run(shape, frames, size, rounds)


def zero3_gathers(shape: str = "cpu", ranks: int = 2, rounds: int = 5) -> Any:
    """Bytes that ZeRO-3 gathers per training step for each `train.pass_order`, and wall-clock seconds.

    Args:
        shape: cpu or tiny; the features of both towers come from the cache.
        ranks: number of processes on this machine.
        rounds: number of timed steps per pass order, interleaved.
    """
    from w2r2_ds.bench.zero3_gathers import run

    return run(shape, ranks, rounds)


def kernels(shape: str = "cpu", frames: list[int] | None = None, rounds: int = 15) -> Any:
    """Forward and backward of every kernel, relative to PyTorch. Triton's and Liger's kernels run on a GPU only.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b.
        frames: numbers of frames per sample; default: the shape's own.
        rounds: number of runs per case, interleaved.
    """
    from w2r2_ds.bench.kernels import run

    return run(shape, frames, rounds)


def bring_up(
    parts: list[str] | None = None,
    shapes: list[str] | None = None,
    frames: list[int] | None = None,
    questions: list[int] = [1, 8],  # noqa: B006
    rounds: int = 3,
    steps: int = 50,
    seconds: float = 270.0,
) -> Any:
    """First checks and measurements on a new GPU, in under 5 minutes: tests, kernels, rooflines, ZeRO-3, steps, memory.

    Exits with 1 if a part fails. docs/get-started/gpu-quickstart.md explains the tables.

    Args:
        parts: parts to run: gpu_tests, step_equivalence, sdpa_backends, modules, zero3, steps; default: all.
        shapes: names of shapes; default: 3b and 7b on a GPU, tiny on a CPU.
        frames: numbers of frames per sample; default: 8, 16 and 24 on a GPU, 2 on a CPU.
        questions: numbers K of questions per packed sequence.
        rounds: number of runs per case, interleaved.
        steps: number of steps of varying lengths, for the comparison of SDPA backends.
        seconds: nothing more is measured after this time.
    """
    from w2r2_ds.bench.bring_up.run import run
    from w2r2_ds.bench.bring_up.settings import Settings

    return run(Settings.of(shapes, frames, questions, rounds, steps, seconds), parts)


BENCHMARKS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (baseline, step_time, scene_packing, feature_cache, loader, zero3_gathers, kernels, bring_up)
}
"""Name -> function that returns a `w2r2_ds.bench.report.BenchReport`, or a report with the same methods."""
