#!/usr/bin/env bash
# Stops what up.sh started in DIR, by the process ids that it recorded: down.sh DIR
set -u
DIR=$1
# shellcheck source=/dev/null
. "$DIR/vars.sh"
ours() { # PID WORDS...: whether PID still is the process that up.sh started; process ids are reused
    tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF "${*:2}"
}
for signal in TERM KILL; do
    while read -r pid what; do # nodes first: they were recorded last
        case $what in node-main*) hard=KILL ;; *) hard=$signal ;; esac # kills every process of the node
        if ours "$pid" "$what"; then kill -s "$hard" "$pid"; fi
    done < <(tac "$DIR/run/pids")
    for _ in $(seq 50); do
        left=0
        while read -r pid what; do if ours "$pid" "$what"; then left=1; fi; done <"$DIR/run/pids"
        if [ $left = 0 ]; then break 2; fi
        sleep 0.1
    done
done
for name in $(ip netns list | awk '{print $1}'); do
    case $name in "$PREFIX"-login | "$PREFIX"-n[0-9]*) ip netns del "$name" ;; esac
done
rm -f "$DIR/run/pids"
exit "$left"
