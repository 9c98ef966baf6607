"""Train a model: ``deepspeed launchers/train.py --deepspeed ds_configs/zero3.json [--config RECIPE.yaml] ...``.

Without --config it runs the demo recipe, which makes its synthetic scenes first.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from w2r2_ds.commands.common import add_plugin_option, command_words
from w2r2_ds.commands.errors import report_error, reports_errors
from w2r2_ds.commands.report import report_of_finished_run
from w2r2_ds.config.io import parse_run, run_parser
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, LOST, RetryableError
from w2r2_ds.utils.logging import ignore_write_errors
from w2r2_ds.utils.sanitize import message

if TYPE_CHECKING:
    from w2r2_ds.training.fault_tolerance.signals import StopSignals

logger = logging.getLogger(__name__)


@reports_errors("train")
def main(args: list[str] | None = None) -> int:
    """Train; returns an exit code of training/fault_tolerance/exit_codes.py, which decides whether Slurm requeues."""
    ignore_write_errors("stdout")  # progress lines; a full disk under the log must not end a run
    config, ds_path = read_arguments(command_words(args))
    # Imported after the command line is parsed: these import torch, DeepSpeed and transformers.
    from w2r2_ds.training.fault_tolerance.signals import StopSignals
    from w2r2_ds.training.fault_tolerance.watchdog import MISTAKES

    try:
        with StopSignals() as signals:
            return run(config, ds_path, signals)
    except MISTAKES as error:
        return report_error("train", error)
    except RetryableError as error:
        print(f"w2r2 train: {message(error)}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return LOST


def read_arguments(args: list[str]) -> tuple[RunConfig, str]:
    """Parse a command line: run configuration and path of the DeepSpeed JSON."""
    parser = run_parser("Train a video LLM with W2R2.", "w2r2 train")
    add_plugin_option(parser)
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed JSON: ZeRO, precision, offload, clipping.")
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher.")
    config, options = parse_run(parser, args)
    return config, options.deepspeed


def run(config: RunConfig, ds_path: str, signals: StopSignals) -> int:
    """Initialise the process group, prepare the demo if it is enabled, and train; returns the exit code."""
    import torch
    import torch.distributed as dist

    from w2r2_ds.demo.assets import prepare_demo
    from w2r2_ds.evaluation.validator import AnswerValidation
    from w2r2_ds.objective.push_terms import check_push_term
    from w2r2_ds.training.deepspeed.config import load_ds_config
    from w2r2_ds.training.deepspeed.process_group import init_process_group
    from w2r2_ds.training.trainer import train

    # Checked first, because preparing the demo takes minutes.
    check_push_term(config)
    load_ds_config(ds_path)
    init_process_group(config.train.hang_seconds)
    if not torch.cuda.is_available():
        logger.info("no CUDA device: training on the CPU")
    if config.demo.enabled:
        if dist.get_rank() == 0:
            prepare_demo(config)
        dist.barrier()
    result = train(config, ds_path, AnswerValidation, signals)
    if dist.get_rank() == 0:
        print(f"checkpoint: {result.checkpoint}" if result.checkpoint else "no checkpoint was written", flush=True)
        if result.exit_code != DONE:
            logger.warning("stopped by a signal; --resume auto continues the run (exit code %d)", result.exit_code)
    # Without the barrier, a rank that ends while another one still writes would be reported as lost.
    dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    # After the last collective: the other ranks do not wait for the report.
    if rank == 0 and result.exit_code == DONE:
        print(f"report: {report_of_finished_run(Path(config.out), config.train.report)}", flush=True)
    return result.exit_code
