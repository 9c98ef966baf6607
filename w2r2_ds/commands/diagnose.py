"""Diagnose a trained model: ``w2r2 diagnose --checkpoint RUN``.

``--predictions LABEL=FILE`` diagnoses saved answers of this or another project instead, without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from w2r2_ds.commands.common import command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.commands.evaluate import PROTOCOL
from w2r2_ds.utils.logging import stdout_to_stderr

PREDICTIONS = (
    "A row of the table from saved answers: LABEL=FILE, for example '2D only=zero.jsonl'. The option is repeated for "
    "every row, and replaces --checkpoint."
)
"""Help of ``--predictions``."""


@reports_errors("diagnose")
def main(args: list[str] | None = None) -> None:
    """Run the command; returns the exit code."""
    parser = function_parser(run, "w2r2 diagnose", skip=("protocols", "predictions"))
    parser.add_argument("--protocol", action="append", metavar="NAME", help=PROTOCOL)
    parser.add_argument("--predictions", action="append", metavar="LABEL=FILE", help=PREDICTIONS)
    values = parse(parser, command_words(args))
    names = ",".join(values.pop("protocol") or []).split(",")
    predictions = values.pop("predictions") or []
    with stdout_to_stderr():
        results = run(**values, protocols=[name.strip() for name in names if name.strip()], predictions=predictions)
    if results:
        from w2r2_ds.diagnostics.print_tables import print_causality, print_cues, print_table1

        for result in results:
            print_table1(result)
            print_causality(result)
            print_cues(result)


def run(
    checkpoint: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    predictions: Sequence[str] = (),
    format: Literal["ours", "vgllm", "video3dllm"] = "ours",
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
    limit: int = 0,
    draws: int = 20,
    resamples: int = 2000,
    seed: int = 0,
    causality: bool = True,
    causality_limit: int = 200,
    paired: list[Path] = [],  # noqa: B006
    features: bool = False,
    attention: bool = False,
    perplexity: float = 30.0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    root: Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    local_rank: int = 0,
) -> list[dict[str, Any]]:
    """Score a model with and without geometry, with shuffled geometry, without image, and against a random guess.

    Scores are per task and group, with bootstrap intervals over scenes. Returns the results, on rank 0 only.

    Args:
        checkpoint: folder of a run, checkpoint, exported adapter or imported VG-LLM, or RUN/checkpoints/best.
        task: task to diagnose; default: all tasks of the run's validation sets.
        data: prepared folder instead of the run's own sets; may be relative to the root. Requires --out.
        predictions: rows of the table from saved answers, LABEL=FILE each.
        format: format of the --predictions files; those of other projects require --data.
        protocols: names of scoring protocols (docs/reference/metrics/), or all; the task's default if empty.
        proposals: file of detected boxes, for the protocol vgllm_refined.
        out: folder for diagnosis-TASK.json and answers; default: CHECKPOINT/evaluation, whose answers are reused.
        limit: number of samples, the first ones; 0 for all.
        draws: number of draws of the random guess, which are averaged.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap and the random guess.
        causality: also answer with scaled, shifted and turned geometry, and measure how far answers follow it.
        causality_limit: number of samples for this, the first ones; 0 for all.
        paired: prepared shifted splits of w2r2 prepare synthetic --shift, e.g. [prepared/scanrefer/val_room_scale]; the
            samples of val are also answered with the geometry of their paired rooms.
        features: also make the feature map of 2D, geometry and fused tokens (features-TASK.json).
        attention: also measure to which visual tokens the digits of answers attend (attention-TASK.json, heat maps).
        perplexity: perplexity of the t-SNE of the feature map.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        root: data root, if it has moved since training.
        vlm: directory or hub id of the VLM, if it has moved since training.
        geometry_path: directory or hub id of the geometry encoder, if it has moved since training.
        local_rank: set by the deepspeed launcher.
    """
    if (checkpoint is None) == (not predictions):
        raise ValueError("pass either a model with --checkpoint, or saved answers with --predictions LABEL=FILE.")
    if out is None and (data is not None or predictions):
        raise ValueError("pass a folder for the results with --out; --data and --predictions have no default for it.")
    if predictions and (features or attention):
        raise ValueError("--features and --attention need a model; pass --checkpoint instead of --predictions.")
    if predictions and paired:
        raise ValueError("--paired needs a model, which answers again; pass --checkpoint instead of --predictions.")
    files = _files(predictions)
    # Imported here because torch and transformers are slow to import, and --help and wrong options do not need them.
    from w2r2_ds.diagnostics.reliance import DiagnosisOptions, diagnose_files, diagnose_model
    from w2r2_ds.evaluation.options import EvaluationOptions
    from w2r2_ds.training.checkpoint.manifest import find_checkpoint
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group, raise_on_all_ranks
    from w2r2_ds.utils.files.output_folder import check_writable, make_folder

    options = DiagnosisOptions(draws, resamples, seed, causality, causality_limit, paired)
    evaluation = EvaluationOptions(
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
    )
    if checkpoint is None:
        assert out is not None, "checked above"
        check_writable(out)
        make_folder(out)
        return [diagnose_files(files, format, out, evaluation, options)]
    ranks = RankInfo.from_environment()
    folder = out or (find_checkpoint(checkpoint) if checkpoint.is_file() else checkpoint) / "evaluation"
    where: dict[str, Any] = {"data": data, "root": root, "vlm": vlm, "geometry_path": geometry_path}
    parts = [name for name, wanted in (("features", features), ("attention", attention)) if wanted]
    with gloo_process_group(ranks):
        # First, because these parts take minutes and generation takes hours.
        with raise_on_all_ranks():
            if parts and ranks.rank == 0:
                _diagnose_visual_tokens(checkpoint, folder, parts, perplexity, seed, task, where)
        return diagnose_model(checkpoint, folder, evaluation, options, ranks)


def _diagnose_visual_tokens(
    checkpoint: Path,
    out: Path,
    parts: Sequence[str],
    perplexity: float,
    seed: int,
    task: str | None,
    where: dict[str, Any],
) -> None:
    """`diagnose_visual_tokens` of one task, or of all tasks of the run's validation sets."""
    from w2r2_ds.diagnostics.feature_map import FeatureMapOptions
    from w2r2_ds.diagnostics.reliance import tasks_of
    from w2r2_ds.diagnostics.visual_tokens import VisualOptions, diagnose_visual_tokens
    from w2r2_ds.evaluation.loading import run_config

    options = VisualOptions(parts, FeatureMapOptions(perplexity=perplexity, seed=seed), seed=seed)
    one = task is not None or where["data"] is not None
    config = run_config(checkpoint, where["root"], where["vlm"], where["geometry_path"])
    for name in [task] if one else tasks_of(config.data):
        diagnose_visual_tokens(checkpoint, out, options, task=name, **where)


def _files(predictions: Sequence[str]) -> dict[str, Path]:
    """Label -> file of the option ``--predictions``."""
    files: dict[str, Path] = {}
    for text in predictions:
        label, equals, file = text.partition("=")
        if not (label and equals and file):
            raise ValueError(f"--predictions is {text!r}; write LABEL=FILE.")
        if label in files:
            raise ValueError(f"--predictions has the label {label!r} twice; rows need different labels.")
        files[label] = Path(file)
    return files
