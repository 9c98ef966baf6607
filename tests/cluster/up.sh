#!/usr/bin/env bash
# Brings up a real Slurm (munged, slurmctld, a slurmd per node) on one Debian machine: up.sh DIR PREFIX NODES [GPUS]
#
# Needs root, network namespaces and Debian's packages slurmctld, slurmd, slurm-client, munge, iproute2, util-linux; no
# systemd. Every node has its own network, host name, processes, IPC and /dev/shm; files are shared, as on a cluster.
# The bridge between the nodes is in its own namespace, without a connection to the host's network.
#
#   DIR/in-cluster CMD...           on the login node: DIR/in-cluster sbatch job.sbatch
#   DIR/node-power off|on NODE      SIGKILL for every process of the node / boot it again
#   DIR/node-link down|up NODE      the node's port of the switch
#   down.sh DIR                     stops all recorded processes
set -euo pipefail
DIR=$1 PREFIX=$2 NODES=$3 GPUS=${4:-2}
NET=10.231.78 # exists only inside the namespaces
[ ! -e "$DIR/run/pids" ] || { echo "$DIR is in use: run down.sh $DIR first" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------ configuration
umask 022
mkdir -p "$DIR"/{run,log,state,spool,gpu}
: >"$DIR/run/pids"
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$DIR/nsswitch.conf" # the namespaces have no DNS
cp /etc/hosts "$DIR/hosts"
echo "$NET.1 login" >>"$DIR/hosts"
names=() lines=''
for i in $(seq "$NODES"); do
    names+=("n$i")
    echo "$NET.$((10 + i)) n$i" >>"$DIR/hosts"
    mkdir -p "$DIR/spool/n$i"
    lines+="NodeName=n$i NodeHostname=n$i NodeAddr=$NET.$((10 + i)) CPUs=4 RealMemory=8000 Gres=gpu:$GPUS State=UNKNOWN"$'\n'
done
for i in $(seq 0 $((GPUS - 1))); do mknod -m 666 "$DIR/gpu/fake$i" c 1 3; done # Slurm needs device files: copies of /dev/null
echo "Name=gpu File=$DIR/gpu/fake[0-$((GPUS - 1))]" >"$DIR/gres.conf"
# slurmd does not start without a supported cgroup plugin. This one is loaded but not used.
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$DIR/cgroup.conf"
(umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
cat >"$DIR/slurm.conf" <<END
ClusterName=$PREFIX
SlurmctldHost=login($NET.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is the delay of a requeued job; the default is 120 s, also for values below 5
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
# the configured CPUs and memory may exceed the machine's
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# a scheduling pass is every 60 s by default
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
MessageTimeout=5
TCPTimeout=2
# a node without heartbeat is down after this time, and its jobs are requeued; 300 s by default
SlurmdTimeout=9
InactiveLimit=0
Waittime=0
${lines}PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

# ---------------------------------------------------------------------------------------------------- commands
printf 'DIR=%q PREFIX=%q\nexport SLURM_CONF=%q\n' "$DIR" "$PREFIX" "$DIR/slurm.conf" >"$DIR/vars.sh"

cat >"$DIR/in-cluster" <<'END'
#!/usr/bin/env bash
. "$(dirname "$0")/vars.sh"
exec ip netns exec "$PREFIX-login" unshare --uts sh -c 'hostname login; mount --bind "$0/hosts" /etc/hosts
    mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf; exec "$@"' "$DIR" "$@"
END

cat >"$DIR/node-main" <<'END'
#!/usr/bin/env bash
# node-main DIR NODE: the first process of a node (pid 1 in there). Sets it up, runs slurmd, reaps orphans.
. "$1/vars.sh"
hostname "$2"
mount --make-rprivate /
mount --bind "$DIR/hosts" /etc/hosts
mount --bind "$DIR/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=4g tmpfs /dev/shm
slurmd -D -N "$2" &
slurmd=$!
trap 'kill -TERM $slurmd' TERM
while kill -0 $slurmd 2>/dev/null; do wait $slurmd; done
END

cat >"$DIR/node-power" <<'END'
#!/usr/bin/env bash
. "$(dirname "$0")/vars.sh"
file=$DIR/run/$2.pid
if [ "$1" = on ]; then
    setsid ip netns exec "$PREFIX-$2" unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc \
        "$DIR/node-main" "$DIR" "$2" </dev/null >>"$DIR/log/$2.out" 2>&1 &
    echo $! >"$file"
    echo "$! node-main $DIR $2" >>"$DIR/run/pids"
else
    pid=$(<"$file") # unshare's: killing it kills every process of the node
    kill -KILL "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
    rm -f "$file" "$DIR/run/slurmd.$2.pid"
    sed -i "/^$pid /d" "$DIR/run/pids"
fi
END

cat >"$DIR/node-link" <<'END'
#!/usr/bin/env bash
. "$(dirname "$0")/vars.sh"
exec ip -n "$PREFIX-login" link set "$2" "$1"
END
chmod 755 "$DIR"/{in-cluster,node-main,node-power,node-link}

# ------------------------------------------------------------------------------------------ network and daemons
ip netns add "$PREFIX-login"
ip -n "$PREFIX-login" link set lo up
ip -n "$PREFIX-login" link add bridge0 type bridge
ip -n "$PREFIX-login" addr add "$NET.1/24" dev bridge0
ip -n "$PREFIX-login" link set bridge0 up
for i in "${!names[@]}"; do
    n=${names[i]}
    ip netns add "$PREFIX-$n"
    ip -n "$PREFIX-$n" link set lo up
    ip link add "$n" netns "$PREFIX-login" type veth peer name eth0 netns "$PREFIX-$n"
    ip -n "$PREFIX-login" link set "$n" master bridge0 up
    ip -n "$PREFIX-$n" addr add "$NET.$((11 + i))/24" dev eth0
    ip -n "$PREFIX-$n" link set eth0 up
done

setsid munged --foreground --force --socket="$DIR/run/munge.socket" --key-file="$DIR/munge.key" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" \
    --num-threads=2 </dev/null >>"$DIR/log/munged.out" 2>&1 &
echo "$! munged --foreground --force --socket=$DIR/run/munge.socket" >>"$DIR/run/pids"
for _ in $(seq 100); do
    if [ -S "$DIR/run/munge.socket" ]; then break; fi
    sleep 0.05
done
setsid "$DIR/in-cluster" slurmctld -D -c </dev/null >>"$DIR/log/slurmctld.out" 2>&1 &
echo "$! slurmctld -D -c" >>"$DIR/run/pids"
for _ in $(seq 100); do
    if "$DIR/in-cluster" scontrol ping 2>/dev/null | grep -q 'is UP'; then break; fi
    sleep 0.1
done
for n in "${names[@]}"; do "$DIR/node-power" on "$n"; done
for _ in $(seq 150); do
    if [ "$("$DIR/in-cluster" sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" = "$NODES" ]; then exit 0; fi
    sleep 0.2
done
tail -n 8 "$DIR"/log/*.out >&2
echo "the nodes did not come up; see $DIR/log" >&2
exit 1
