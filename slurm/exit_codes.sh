# shellcheck shell=bash disable=SC2034
# Exit codes of a rank, equal to those of w2r2_ds/training/fault_tolerance/exit_codes.py.
EXIT_DONE=0
EXIT_FAILED=1
EXIT_LOST=75
EXIT_REQUEUE=85
EXIT_INTERRUPTED=130
EXIT_TERMINATED=143
