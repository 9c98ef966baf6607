#!/usr/bin/env bash
# Run one rank: srun starts `slurm/rank.sh STATE COMMAND...` once per GPU, in the repository root (slurm/common.sh).
# Writes COMMAND's process id to STATE/pid-RANK-NODE while it runs, then its exit code to STATE/exit-RANK-NODE.
state=$1
shift
me=$SLURM_PROCID-$SLURMD_NODENAME

# Slurm's variables under torchrun's names. MASTER_ADDR and MASTER_PORT come from the batch shell.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)": 8 ranks on each of 2 nodes
export PYTHONUNBUFFERED=1                                   # the log of a killed rank is complete

# Compile kernels into a folder of this start: in a shared one, the lock of a killed build would hang every later run.
jit=${TMPDIR:-/tmp}/w2r2-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -m 700 "$jit" 2>/dev/null || [ -O "$jit" ] || { # -O: code is loaded from there, so this user must own it
    echo "rank.sh: $jit on $SLURMD_NODENAME belongs to another user; remove it or set TMPDIR in slurm/cluster.env." >&2
    exit 1
}
export TORCH_EXTENSIONS_DIR=$jit/torch TRITON_CACHE_DIR=$jit/triton

# shellcheck source=slurm/cluster.env
. slurm/cluster.env
# shellcheck source=slurm/exit_codes.sh
. slurm/exit_codes.sh
activate
if [ "${state##*/}" != doctor ]; then # all ranks of the doctor share a log
    echo "== $(date '+%F %T') rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, start ${SLURM_RESTART_COUNT:-0}"
fi

# scancel signals every process of the job. This shell survives the signal to record the command's exit code.
# `:` instead of '': the command would inherit an ignored signal.
trap : USR1 TERM
"$@" &
child=$!
echo "$child" >"$state/pid-$me"
until
    wait "$child"
    ! kill -0 "$child" 2>/dev/null # the command still runs: a signal ended the wait
do :; done
wait "$child"
status=$?
if ((status < 0 || status > 255)); then status=137; fi # srun killed the step at that moment
echo "$status" >"$state/exit-$me"
rm -f "$state/pid-$me" # after exit-*: a rank with neither file was lost with its node
[ "$LOCAL_RANK" != 0 ] || rm -rf "$jit"

# The file alone passes these on: with a code other than 0, srun would kill ranks that still write their checkpoint.
case $status in "$EXIT_LOST" | "$EXIT_REQUEUE" | "$EXIT_TERMINATED") exit 0 ;; esac
exit "$status"
