#!/usr/bin/env bash
# Run one rank: srun starts `slurm/rank.sh STATE COMMAND...` once per GPU, in the repository root (slurm/common.sh).
# Writes COMMAND's process id to STATE/pid-RANK-NODE while it runs, and afterwards its exit code to STATE/exit-RANK-NODE.
state=$1
shift
id=$SLURM_PROCID-$SLURMD_NODENAME

# The variables of torchrun. MASTER_ADDR and MASTER_PORT come from the batch shell (slurm/common.sh).
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)": 8 ranks on each of 2 nodes
export PYTHONUNBUFFERED=1                                   # complete logs of killed ranks

# Folder for kernels compiled in this start. In a folder that starts share, the lock of a killed build would block every
# later run. Code is loaded from there, so this user must own it (-O).
jit=${TMPDIR:-/tmp}/w2r2-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -m 700 "$jit" 2>/dev/null || [ -O "$jit" ] || {
    echo "rank.sh: $jit on $SLURMD_NODENAME belongs to another user; remove it or set TMPDIR in slurm/cluster.env." >&2
    exit 1
}
export TORCH_EXTENSIONS_DIR=$jit/torch TRITON_CACHE_DIR=$jit/triton

# shellcheck source=slurm/cluster.env
. slurm/cluster.env
# shellcheck source=slurm/exit_codes.sh
. slurm/exit_codes.sh
activate
if [ "${state##*/}" != doctor ]; then # the ranks of the doctor share a log
    echo "== $(date '+%F %T') rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, start ${SLURM_RESTART_COUNT:-0}"
fi

# scancel signals every process of the job, also this shell, which has to record the command's exit code. The traps do
# nothing (:); with '' the signals would be ignored, and the command would inherit that.
trap : USR1 TERM INT
"$@" &
child=$!
echo "$child" >"$state/.pid-$id"
mv "$state/.pid-$id" "$state/pid-$id" # atomically: the batch shell may read the file at any time
until # a signal ends `wait`, so wait again until the command itself has ended
    wait "$child"
    ! kill -0 "$child" 2>/dev/null
do :; done
wait "$child"
status=$?
if ((status < 0 || status > 255)); then status=137; fi # srun killed the step at that moment
echo "$status" >"$state/exit-$id"
rm -f "$state/pid-$id" # after writing exit-*, so that a rank that has started always has one of the two files
[ "$LOCAL_RANK" != 0 ] || rm -rf "$jit"

# The batch shell reads these codes from the file. With a status other than 0, srun (--kill-on-bad-exit) would kill ranks
# that are still writing their checkpoint.
case $status in "$EXIT_LOST" | "$EXIT_REQUEUE" | "$EXIT_TERMINATED") exit 0 ;; esac
exit "$status"
