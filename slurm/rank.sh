#!/usr/bin/env bash
# One rank: srun starts `slurm/rank.sh STATE COMMAND...` once per GPU, in the repository root (slurm/common.sh).
# In the folder STATE it leaves COMMAND's process id while it runs (pid-RANK-NODE), then its exit code (exit-RANK-NODE).
state=$1
shift
me=$SLURM_PROCID-$SLURMD_NODENAME

# The names that torch.distributed knows. MASTER_ADDR and MASTER_PORT come from the batch shell.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)": as many on every node
export PYTHONUNBUFFERED=1                                   # a rank's last words are in its log when it is killed

# Kernels are compiled into a folder of this start alone: the lock of a killed build would hang every later run.
jit=${TMPDIR:-/tmp}/w2r2-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -m 700 "$jit" 2>/dev/null || [ -O "$jit" ] || { # -O: code is loaded from there, so it has to be ours
    echo "rank.sh: $jit on $SLURMD_NODENAME belongs to somebody else; remove it or set TMPDIR in slurm/cluster.env." >&2
    exit 1
}
export TORCH_EXTENSIONS_DIR=$jit/torch TRITON_CACHE_DIR=$jit/triton

# shellcheck source=slurm/cluster.env
. slurm/cluster.env
activate
if [ "${state##*/}" != doctor ]; then # all ranks of the doctor share a log
    echo "== $(date '+%F %T') rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, start ${SLURM_RESTART_COUNT:-0}"
fi

# scancel signals every process of the job. This shell outlives the signal, to tell how the command ended;
# `:` and not '': the command must not inherit an ignored signal.
trap : USR1 TERM
"$@" &
child=$!
echo "$child" >"$state/pid-$me"
until
    wait "$child"
    ! kill -0 "$child" 2>/dev/null # still there: a signal ended the wait, not the command
do :; done
wait "$child"
status=$?
if ((status < 0 || status > 255)); then status=137; fi # bash lost it: srun killed the step in that moment
echo "$status" >"$state/exit-$me"
rm -f "$state/pid-$me" # after the other: a rank without both was lost with its node
[ "$LOCAL_RANK" != 0 ] || rm -rf "$jit"

# These are told by the file alone: for another code than 0 srun would kill the ranks that are still putting things away.
case $status in 75 | 85 | 143) exit 0 ;; esac
exit "$status"
