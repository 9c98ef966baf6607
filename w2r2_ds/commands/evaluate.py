"""Evaluate a trained model: ``w2r2 evaluate --checkpoint RUN --task scanrefer --geometry fused``.

With several processes (``torchrun --standalone --nproc_per_node 4 launchers/evaluate.py``, or ``deepspeed``) each
process answers a part of the samples. ``--evaluations`` evaluates a model several times and loads it once.
``--score_only FILE`` scores saved predictions of this or another project without a model.
"""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from w2r2_ds.commands.common import command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.config.cli import Parser
from w2r2_ds.config.io import read_yaml
from w2r2_ds.config.options import decoded
from w2r2_ds.utils.logging import stdout_to_stderr

PROTOCOL = (
    "Names of scoring protocols (docs/reference/metrics/), separated by commas, or all; the option may be repeated. "
    "Default: the default protocol of the task."
)
"""Help of ``--protocol``."""
OF_ALL = (
    *("checkpoint", "out", "vlm", "geometry_path", "reuse"),
    *("evaluations", "score_only", "format", "local_rank", "plugin", "help"),
)
"""Options that one of several evaluations cannot have."""


@reports_errors("evaluate")
def main(args: list[str] | None = None) -> None:
    """Run the command; returns the exit code."""
    values = parse(evaluation_parser(), command_words(args))
    with stdout_to_stderr():
        scores = run(**_with_protocols(values))
    if scores:
        print(json.dumps(scores, indent=2))


def evaluation_parser() -> Parser:
    """Parser of the command line."""
    parser = function_parser(run, "w2r2 evaluate", skip=("protocols",))
    parser.add_argument("--protocol", action="append", metavar="NAME", help=PROTOCOL)
    return parser


def evaluations_of(text: str) -> dict[str, dict[str, Any]]:
    """Name -> options of several evaluations, as they are in YAML text or in a file.

    Raises:
        ValueError: an option or a value that w2r2 evaluate does not have, or an option that holds for all evaluations.
    """
    value = decoded(text) if text.lstrip().startswith("{") else read_yaml(text)
    if not isinstance(value, Mapping) or not value or not all(isinstance(each, Mapping) for each in value.values()):
        raise ValueError("--evaluations must be {name: {option: value, ...}, ...}, such as {fused: {geometry: fused}}.")
    for name, chosen in value.items():
        for option in chosen:
            if option in OF_ALL:
                raise ValueError(f"--evaluations: {name} has the option {option}, which holds for all evaluations.")
        try:
            parsed_options(chosen)
        except ValueError as error:
            raise ValueError(f"--evaluations: {name}: {error}") from None
    return {str(name): dict(chosen) for name, chosen in value.items()}


def parsed_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `run` that the options of one evaluation set.

    Args:
        chosen: option -> value, as on the command line or as in YAML.

    Raises:
        ValueError: w2r2 evaluate has no such option or value.
    """
    parser = evaluation_parser()
    parser.exit_on_error = False
    try:
        values = parse(parser, [f"--{option}={value}" for option, value in chosen.items()])
    except (ArgumentError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return _with_protocols({option: values[option] for option in chosen})


def _with_protocols(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the parser as parameters of `run`: the texts of ``--protocol`` become names of protocols."""
    parameters = dict(values)
    given = ",".join(parameters.pop("protocol", None) or [])
    names = [name.strip() for name in given.split(",") if name.strip()]
    return {**parameters, "protocols": names} if "protocol" in values else parameters


def run(
    checkpoint: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    geometry: Literal["fused", "zero", "shuffle", "no_image"] = "fused",
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
    limit: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    root: Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    reuse: bool = False,
    evaluations: str | None = None,
    score_only: Path | None = None,
    format: Literal["ours", "vgllm", "video3dllm"] = "ours",
    local_rank: int = 0,
) -> dict[str, Any]:
    """Generate greedy answers to a validation set and score them; returns the scores, on rank 0 only.

    With several evaluations, the result has the scores of each under its name.

    Args:
        checkpoint: folder of a run, checkpoint or exported adapter, or RUN/checkpoints/best.
        task: task whose validation sets are evaluated (scanrefer, scan2cap, scanqa, detection or another registered
            task); optional if all sets of the run are of one task.
        data: prepared folder instead of the run's own sets; may be relative to the root.
        geometry: fused; zero for 2D only; shuffle for the geometry of another scene; or no_image for gray frames
            without geometry.
        protocols: names of scoring protocols (docs/reference/metrics/), or all; the task's default if empty.
        proposals: file of detected boxes, for the protocol vgllm_refined.
        out: folder for predictions and scores; default: CHECKPOINT/evaluation.
        limit: number of samples, the first ones; 0 for all.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        root: data root, if it has moved since training.
        vlm: directory or hub id of the VLM, if it has moved since training.
        geometry_path: directory or hub id of the geometry encoder, if it has moved since training.
        reuse: keep the answers of a finished evaluation of the same weights, data and options.
        evaluations: several evaluations of the model, which is loaded once, {name: {option: value, ...}, ...} as YAML
            text or a file. An option that an evaluation does not have is that of the command line. The results are
            in OUT/NAME.
        score_only: predictions file to score without a model; scores are printed, and written into --out if given.
        format: format of the --score_only file; those of other projects require --data.
        local_rank: set by the deepspeed launcher.
    """
    # Imported here because torch and transformers are slow to import, and --help and wrong options do not need them.
    from w2r2_ds.evaluation.options import EvaluationOptions
    from w2r2_ds.evaluation.predictions.rescore import score_file
    from w2r2_ds.evaluation.runner import evaluate, evaluate_all
    from w2r2_ds.training.checkpoint.manifest import find_checkpoint
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group

    if score_only is not None:
        if checkpoint is not None:
            raise ValueError("--score_only needs no --checkpoint; omit one of the two.")
        if evaluations is not None:
            raise ValueError("--evaluations needs a model; pass --checkpoint instead of --score_only.")
        return score_file(score_only, format, data, root, task, protocols, proposals, out)
    if checkpoint is None:
        raise ValueError("pass a run, a checkpoint or an adapter with --checkpoint, or predictions with --score_only.")
    options = EvaluationOptions(
        geometry=geometry,
        task=task,
        data=data,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        protocols=protocols,
        proposals=proposals,
        root=root,
        vlm=vlm,
        geometry_path=geometry_path,
        reuse=reuse,
    )
    several: dict[str, EvaluationOptions] = {}
    if evaluations is not None:
        for name, chosen in evaluations_of(evaluations).items():
            try:
                several[name] = replace(options, **parsed_options(chosen))
            except ValueError as error:
                raise ValueError(f"--evaluations: {name}: {error}") from None
    folder = out or (find_checkpoint(checkpoint) if checkpoint.is_file() else checkpoint) / "evaluation"
    ranks = RankInfo.from_environment()
    with gloo_process_group(ranks):
        if several:
            return evaluate_all(checkpoint, folder, several, ranks)
        return evaluate(checkpoint, folder, options, ranks=ranks)
