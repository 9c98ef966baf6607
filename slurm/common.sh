# shellcheck shell=bash
# Functions of the batch scripts: start the ranks, forward signals to them, and requeue or end the job.
# Sourced in the repository root, by the batch shell on the first node of the job.
#
# A job is started again after every requeue; its starts are numbered from 0 and share the job id and the log files.

# shellcheck source=slurm/cluster.env
. slurm/cluster.env
# shellcheck source=slurm/exit_codes.sh
. slurm/exit_codes.sh
shopt -s extglob

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # a task's SLURM_JOB_ID may be that of the array
job=${job:-${SLURM_JOB_ID:-JOBID}}
start=${SLURM_RESTART_COUNT:-0} # number of this start
logs=logs/$job
nodes=${SLURM_JOB_NUM_NODES:-1}
per_node=${SLURM_NTASKS_PER_NODE:-1}
dry=      # 1: print the srun lines and start nothing
received= # USR1 or TERM, once the job has received it; TERM takes precedence
state=    # folder with the process ids and exit codes of the ranks (slurm/rank.sh); empty before the first srun

log() { printf '%(%F %T)T job %s: %s\n' -1 "$job" "$*"; }
die() {
    log "$*" >&2
    exit 1
}

# set_up WORD...: parse the options that all scripts have, store the others in `rest`, and set up the job.
set_up() {
    local word
    rest=()
    for word; do
        case $word in
        --help | -h) usage && exit ;;
        --dry-run | --dry_run) dry=1 ;;
        *) rest+=("$word") ;;
        esac
    done
    if [ -n "$dry" ]; then return; fi
    if [ -z "${SLURM_JOB_ID:-}" ]; then die "start it with sbatch; only --help and --dry-run work without Slurm."; fi
    if [ "${SLURM_GPUS_ON_NODE:-$per_node}" != "$per_node" ]; then
        die "a node has $SLURM_GPUS_ON_NODE GPUs, but $per_node rank(s); pass --ntasks-per-node=$SLURM_GPUS_ON_NODE to sbatch."
    fi
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Another port for every job and start, below the ephemeral ports of Linux (32768 and up).
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 61 + start) % 20000))
    export MASTER_ADDR MASTER_PORT
    # srun does not inherit --cpus-per-task: every rank would get one CPU.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM
    log "start $start on $SLURM_JOB_NODELIST; the ranks write $logs/rank-*.log"
}

# train OPTION...: check every node with the doctor, then train.
train() {
    local word doctor=1 deepspeed=(--deepspeed ds_configs/zero3.json) words=()
    for word; do
        case $word in
        --skip-doctor | --skip_doctor) doctor= ;;
        --deepspeed | --deepspeed=*) deepspeed=() && words+=("$word") ;;
        *) words+=("$word") ;;
        esac
    done
    words=("${deepspeed[@]}" "${words[@]}" --resume auto)
    if [ -n "$doctor" ]; then run_ranks doctor python launchers/doctor.py "${words[@]}"; fi
    run_ranks train python launchers/train.py "${words[@]}"
}

# run_ranks NAME COMMAND...: run COMMAND as one rank per GPU. Returns if all ranks exit with 0, else requeues or ends the
# job.
run_ranks() {
    local name=$1 output=() line step
    # Every rank has a log of its own; the doctor writes to the job's log.
    if [ "$name" != doctor ]; then output=(--output="$logs/rank-%t.log" --open-mode=append); fi
    state=$logs/start-$start/$name
    line=(srun --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --export=ALL
        --kill-on-bad-exit=1 --wait=60 "${output[@]}" "${SRUN_EXTRA[@]}"
        "${CONTAINER[@]}" slurm/rank.sh "$state" "${@:2}")
    if [ -n "$dry" ]; then
        printf '%q ' "${line[@]}" && echo
        return
    fi
    if [ -n "$received" ]; then end_after_signal; fi # it came between the doctor and training
    log "$name: ${*:2:2} with $(($# - 3)) words of options" # not the words themselves: one may be an access token
    mkdir -p "$state"
    # In the background, because bash runs a trap only after the foreground command has ended. A trapped signal ends
    # `wait`, so wait again until srun itself has ended.
    "${line[@]}" &
    step=$!
    until
        wait "$step"
        ! kill -0 "$step" 2>/dev/null
    do :; done
    wait "$step" # the status of srun, not of the wait that a signal ended
    handle_exit $?
    log "$name: done"
}

# forward SIGNAL: send it to the training processes on this node. Not to the whole job step: the signal would kill srun
# and the data loader's workers. This node is enough, because all ranks agree on the signal at the next step boundary
# (w2r2_ds/training/fault_tolerance/signals.py).
forward() {
    local file
    log "SIG$1"
    if [ "$received" != TERM ]; then received=$1; fi
    for _ in {1..30}; do # ranks that srun is just starting have no process ids yet
        if [ -z "$state" ] || compgen -G "$state/*-$SLURMD_NODENAME" >/dev/null; then break; fi
        sleep 1
    done
    for file in "$state"/pid-+([0-9])-"$SLURMD_NODENAME"; do
        if [ -s "$file" ]; then kill -s "$1" "$(<"$file")"; fi
    done
}

# handle_exit STATUS: decide from the status of srun and the exit codes of the ranks (slurm/exit_codes.sh) how the job
# continues. Returns if every rank exited with 0; else requeues or ends the job. Precedence: a user error (never
# requeued), all ranks done, SIGTERM, a lost rank, SIGUSR1.
handle_exit() {
    local file code seen=0 done=0 failed='' lost='' stopped=''
    for file in "$state"/exit-*; do
        if [ ! -e "$file" ]; then break; fi # no match: the pattern itself
        read -r code <"$file"
        seen=$((seen + 1))
        case $code in
        '') ;; # the disk was full: like a rank without a file
        "$EXIT_DONE") done=$((done + 1)) ;;
        "$EXIT_REQUEUE") received=${received:-USR1} ;;
        "$EXIT_TERMINATED" | "$EXIT_INTERRUPTED") stopped=1 ;;
        *) if ((code == EXIT_LOST || code > 128)); then lost=${file##*/exit-}; else failed=${file##*/exit-}; fi ;;
        esac
    done
    if [ "$name" != train ] && [ -n "$received" ] && ((done < nodes * per_node)); then
        end_after_signal # only training handles signals; they kill other commands, and ranks that wait for those fail
    elif [ -n "$failed" ]; then
        if [ "$name" = doctor ]; then
            # The first start passed: a node has broken since, and the next start may run on others.
            if ((start > 0)); then requeue_lost "not fit to train, see above"; fi
            die "not fit to train; not requeued. The report above names the problem and the node."
        fi
        tail -n 15 "$logs/rank-${failed%%-*}.log"
        die "$(describe_exit "$failed"); not requeued. The end of its log is above."
    elif ((done == nodes * per_node)); then
        return
    elif [ -z "$received$lost" ] && [ -n "$stopped" ]; then
        received=TERM # by scancel, which signals the ranks but not this shell
    fi
    if [ "$received" = TERM ]; then
        end_after_signal
    elif [ -n "$lost" ]; then
        requeue_lost "$(describe_exit "$lost")"
    elif [ -n "$received" ]; then
        end_after_signal
    elif ((seen == 0)) && ! compgen -G "$state/pid-*" >/dev/null; then
        die "srun could not start the ranks and ended with $1; its message is above."
    fi
    requeue_lost "srun ended with $1, and a rank left no exit code"
}

# requeue_lost REASON: requeue a job that lost a rank. If three starts in a row end within 15 minutes, the cause is not a
# single bad node: end the job.
requeue_lost() {
    if ((SECONDS < 900)); then # since this shell was started
        : >"$logs/start-$start/early"
        if [ -e "$logs/start-$((start - 1))/early" ] && [ -e "$logs/start-$((start - 2))/early" ]; then
            die "$1; not requeued: the third start in a row that was lost within minutes. See $logs/rank-*.log."
        fi
    fi
    requeue "$1"
}

# end_after_signal: requeue (SIGUSR1: time limit or preemption) or end (SIGTERM) a job that a signal stopped.
end_after_signal() {
    if [ "$received" = USR1 ]; then requeue "stopped by SIGUSR1"; fi
    log "stopped by SIGTERM; not requeued. The same command resumes the run."
    exit "$EXIT_TERMINATED"
}

# describe_exit RANK-NODE: print the exit code of that rank.
describe_exit() { echo "rank ${1%%-*} on ${1#*-} ended with $(<"$state/exit-$1")"; }

# requeue REASON: put the job back into the queue, at most MAX_REQUEUES times. Not if this node was unreachable and Slurm
# has already restarted the job on others: a requeue from this shell would stop the new ranks.
requeue() {
    local now
    if ((start >= MAX_REQUEUES)); then
        die "$1; not requeued: this was start $start, and MAX_REQUEUES in slurm/cluster.env is $MAX_REQUEUES."
    fi
    for _ in {1..30}; do # for five minutes: the controller may be restarting
        if now=$(scontrol --oneliner show job "$job"); then
            if [[ $now != *" Restarts=$start "* || $now != *" JobState=RUNNING "* ]]; then
                die "$1; not requeued: Slurm has ended this job or restarted it."
            fi
            if [[ $now == *" Requeue=0 "* ]]; then
                die "$1; not requeued: the job was submitted with --no-requeue. The same command resumes the run."
            fi
            log "$1; requeued"
            trap '' TERM # scontrol requeue sends SIGTERM to this shell, which has to exit with 0
            if scontrol requeue "$job"; then exit 0; fi
        fi
        sleep 10
    done
    die "$1; not requeued: the controller does not answer. Submit the same command again."
}
