# shellcheck shell=bash
# Functions of the batch scripts: start the ranks, forward signals to them, and requeue or end the job.
# Sourced in the repository root, by the batch shell on the first node of the job.

# shellcheck source=slurm/cluster.env
. slurm/cluster.env
# shellcheck source=slurm/exit_codes.sh
. slurm/exit_codes.sh
shopt -s extglob

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID of a task may name the whole array
job=${job:-${SLURM_JOB_ID:-JOBID}}
starts=${SLURM_RESTART_COUNT:-0}
logs=logs/$job
nodes=${SLURM_JOB_NUM_NODES:-1}
per_node=${SLURM_NTASKS_PER_NODE:-1}
dry=   # 1: print what would be started
received= # the signal that this shell received
state= # where the ranks leave process ids and exit codes; empty before the first ones

log() { printf '%(%F %T)T job %s: %s\n' -1 "$job" "$*"; }
die() {
    log "$*" >&2
    exit 1
}

# begin WORD...: parse the options that every script has, leave the others in `rest`, and set up the job.
begin() {
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
        die "$SLURM_GPUS_ON_NODE GPUs and $per_node ranks on a node; give sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE."
    fi
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 61 + starts) % 20000)) # below the ports that Linux gives out by itself
    export MASTER_ADDR MASTER_PORT
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # else srun gives 1
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM
    log "start $starts on $SLURM_JOB_NODELIST; the ranks write $logs/rank-*.log"
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
    if [ -n "$doctor" ]; then ranks doctor python launchers/doctor.py "${words[@]}"; fi
    ranks train python launchers/train.py "${words[@]}"
}

# ranks NAME COMMAND...: run COMMAND as one rank per GPU; returns if all of them exit with 0, else ends the job.
ranks() {
    local name=$1 output=() line step
    if [ "$name" != doctor ]; then output=(--output="$logs/rank-%t.log" --open-mode=append); fi # the doctor writes to the job's log
    state=$logs/start-$starts/$name
    line=(srun --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --export=ALL
        --kill-on-bad-exit=1 --wait=60 "${output[@]}" "${SRUN_EXTRA[@]}"
        "${CONTAINER[@]}" slurm/rank.sh "$state" "${@:2}")
    if [ -n "$dry" ]; then
        printf '%q ' "${line[@]}" && echo
        return
    fi
    if [ -n "$received" ]; then leave; fi # a signal came between the doctor and this step
    log "$name: ${*:2:2} with $(($# - 3)) words of options" # not the words themselves: one may be an access token
    mkdir -p "$state"
    "${line[@]}" &
    step=$!
    until
        wait "$step"
        ! kill -0 "$step" 2>/dev/null # srun still runs: a signal ended the wait
    do :; done
    wait "$step"
    conclude $?
    log "$name: done"
}

# forward SIGNAL: send it to the ranks of this node only; it would kill srun and the data loader's workers.
# The ranks of all nodes agree on it at the next step boundary (w2r2_ds/training/fault_tolerance/signals.py).
forward() {
    local file
    log "SIG$1"
    if [ "$received" != TERM ]; then received=$1; fi
    for _ in {1..30}; do # wait for the process ids of ranks that are just being started
        if [ -z "$state" ] || compgen -G "$state/*-$SLURMD_NODENAME" >/dev/null; then break; fi
        sleep 1
    done
    for file in "$state"/pid-+([0-9])-"$SLURMD_NODENAME"; do
        if [ -e "$file" ]; then kill -s "$1" "$(<"$file")"; fi
    done
}

# conclude STATUS: decide from the exit codes of srun and of the ranks (slurm/exit_codes.sh) how the job continues.
# Returns if every rank exited with 0; else requeues or ends the job.
conclude() {
    local file code seen=0 done=0 failed='' lost='' stopped=''
    for file in "$state"/exit-*; do
        if [ ! -e "$file" ]; then break; fi
        read -r code <"$file"
        seen=$((seen + 1))
        case $code in
        '') ;; # the disk was full
        "$EXIT_DONE") done=$((done + 1)) ;;
        "$EXIT_REQUEUE") received=${received:-USR1} ;;
        "$EXIT_TERMINATED") stopped=1 ;;
        *) if ((code == EXIT_LOST || code > 128)); then lost=${file##*/exit-}; else failed=${file##*/exit-}; fi ;;
        esac
    done
    if [ "$name" != train ] && [ -n "$received" ] && ((done < nodes * per_node)); then
        leave # only training handles signals; they end other commands, and ranks that wait for those fail
    elif [ -n "$failed" ]; then
        if [ "$name" = doctor ] && ((starts > 0)); then again "not fit to train, see above"; fi # other nodes may be fit
        if [ "$name" = doctor ]; then die "not fit to train; not requeued. The report above names the problem and the node."; fi
        tail -n 15 "$logs/rank-${failed%%-*}.log"
        die "$(ended "$failed"); not requeued. The end of its log is above."
    elif ((done == nodes * per_node)); then
        return
    elif [ -z "$received$lost" ] && [ -n "$stopped" ]; then
        received=TERM # by scancel, which signals the ranks and not this shell
    fi
    if [ "$received" = TERM ]; then
        leave
    elif [ -n "$lost" ]; then
        again "$(ended "$lost")"
    elif [ -n "$received" ]; then
        leave
    elif ((seen == 0)) && ! compgen -G "$state/pid-*" >/dev/null; then
        die "srun could not start the ranks and ended with $1; its message is above."
    fi
    again "srun ended with $1, and a rank left no exit code"
}

# again REASON: requeue a job that lost a rank. After three starts in a row that each ended within a quarter of an hour,
# the cause is not one bad machine: end the job.
again() {
    if ((SECONDS < 900)); then
        : >"$logs/start-$starts/early"
        if [ -e "$logs/start-$((starts - 1))/early" ] && [ -e "$logs/start-$((starts - 2))/early" ]; then
            die "$1; not requeued: the third start in a row that was lost within minutes. See $logs/rank-*.log."
        fi
    fi
    requeue "$1"
}

# leave: requeue (SIGUSR1: time limit or preemption) or end (SIGTERM) a job that a signal stopped.
leave() {
    if [ "$received" = USR1 ]; then requeue "stopped by SIGUSR1"; fi
    log "stopped by SIGTERM; not requeued. The same command resumes the run."
    exit "$EXIT_TERMINATED"
}

# ended RANK-NODE: print how that rank ended.
ended() { echo "rank ${1%%-*} on ${1#*-} ended with $(<"$state/exit-$1")"; }

# requeue REASON: put the job back into the queue, at most MAX_REQUEUES times. Not if Slurm has already restarted it on
# other nodes because this one was unreachable: a requeue from this shell would stop the new ranks.
requeue() {
    local now
    if ((starts >= MAX_REQUEUES)); then
        die "$1; not requeued: this was start $starts, and MAX_REQUEUES in slurm/cluster.env is $MAX_REQUEUES."
    fi
    for _ in {1..30}; do # a controller that does not answer may be back in minutes
        if now=$(scontrol --oneliner show job "$job"); then
            if [[ $now != *" Restarts=$starts "* || $now != *" JobState=RUNNING "* ]]; then
                die "$1; not requeued: Slurm has ended this job or started it anew."
            fi
            if [[ $now == *" Requeue=0 "* ]]; then
                die "$1; not requeued: the job was submitted with --no-requeue. The same command resumes the run."
            fi
            log "$1; requeued"
            trap '' TERM # scontrol requeue sends SIGTERM to this shell
            if scontrol requeue "$job"; then exit 0; fi
        fi
        sleep 10
    done
    die "$1; not requeued: the controller does not answer. Submit the same command again."
}
