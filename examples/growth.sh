#!/usr/bin/env bash
# Shows what grows with the number of servers, policies and connections, and with the messages' size.
#
#   examples/growth.sh [-b FOLDER] [-s SECONDS]
#
# Each row has a proxy of its own and, unless it says otherwise, one server, 8 kept connections and
# messages of 32 bytes, for SECONDS (2): messages a second, the 99th percentile of their times in µs,
# and the proxy's memory afterwards in MB. With -b the programs are taken from FOLDER, else built.
# Takes a minute, and 4 GB of memory for a thousand servers.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=
seconds=2
while getopts b:s: option; do
    case $option in
        b) programs=$OPTARG ;;
        s) seconds=$OPTARG ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
if [ -z "$programs" ]; then
    cargo build --quiet --release --locked --bins --example load
    programs=${CARGO_TARGET_DIR:-target}/release
fi
load=$programs/load
[ -x "$load" ] || load=$programs/examples/load
ulimit -n "$(ulimit -Hn)"

# shellcheck source=examples/started.sh
. examples/started.sh

# Waits until a command says so, 60 s at most.
wait_until() {
    for ((tries = 0; tries < 600; tries++)); do
        if "$@"; then return; fi
        sleep 0.1
    done
    echo "growth.sh: waited in vain for: $*" >&2
    exit 1
}

# Whether so many servers are registered with the proxy of this status page.
are_registered() {
    local count
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nConnection: close\r\n\r\n' "$1" >&3
    count=$(sed -n 's/^revproc_registered_servers //p' <&3)
    exec 3>&-
    [ "${count%$'\r'}" = "$2" ]
}

# row NAME SERVERS POLICIES LOAD-OPTIONS...
row() {
    local name=$1 servers=$2 policies=$3 out=$directory/out port page proxy
    shift 3
    : >"$out"
    "$programs/revproc" -port 0 -status 0 -quiet -max-packet 16M -max-servers 2000 -max-policies 2000 \
        >"$out" 2>"$directory/err" &
    proxy=$!
    started+=("$proxy")
    wait_until grep -q 'status page on' "$out"
    port=$(sed -n 's/.* on port //p' "$out" | head -1)
    page=$(sed -n 's/.* on http:.*:\([0-9]*\)\/$/\1/p' "$out")
    for ((server = 1; server <= servers; server++)); do
        "$programs/server" -id "$server" -pp "PP_$((server % policies + 1))" -listen 0 \
            -revproc "$port" -quiet -max-packet 16M >/dev/null 2>&1 &
        started+=("$!")
    done
    wait_until are_registered "$page" "$servers"
    local line
    line=$("$load" -to "$port" -seconds "$seconds" -line "$@")
    local rate=${line#*rate=} p99=${line#*p99=}
    printf '%-34s %9s %9s %7s\n' "$name" "${rate%% *}" "${p99%% *}" \
        "$(awk '/VmRSS/ { printf "%.1f", $2 / 1024 }' "/proc/$proxy/status")"
    stop_all
}

printf '%-34s %9s %9s %7s\n' '' 'rate' 'p99' 'MB'
kept=(-mode kept -connections 8)
for count in 1 10 100 1000; do row "$count servers of one policy" "$count" 1 "${kept[@]}"; done
row "1000 servers of 1000 policies" 1000 1000 "${kept[@]}"
for size in 32 1K 16K 64K 1M 4M; do
    row "payloads of $size" 1 1 "${kept[@]}" -size "$size"
done
for count in 1 10 100 1000 5000; do
    row "$count kept connections" 1 1 -mode kept -connections "$count"
done
for count in 1 10 100 1000; do
    row "$count clients, each time a new one" 1 1 -mode fresh -connections "$count"
done
