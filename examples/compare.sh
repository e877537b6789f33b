#!/usr/bin/env bash
# Compares the reverse proxy with HAProxy and nginx as TCP proxies before the same two servers.
#
#   examples/compare.sh [-r ROUNDS] [-s SECONDS] [WORK...]
#
# Works (all of them unless some are named):
#   fresh8 fresh64   8 or 64 clients, a connection per message of 32 bytes
#   kept8 kept64     8 or 64 kept connections
#   pipe16           8 connections with 16 messages in flight on each
#   64k 1m           4 kept connections, payloads of 64 KiB or 1,000,000 bytes
#   single           1 kept connection; also directly to a server
#   lines            8 kept connections; the proxy with its lines written to a file, and -quiet
#
# In each round all programs are started anew, since where the threads of a process happen to lie at
# first matters for as long as it lives. The targets take turns, in another order in each round, so
# that whatever else the machine does meets all of them. Each figure is the median of the rounds; "x"
# is ours divided by theirs, the median of the rounds' ratios. CPU is the proxy's own, kernel
# included, per message.
#
# HAProxy has a thread and nginx a worker on each CPU, bound to it: they are faster so, since to wake
# a thread on another CPU is dear (the reverse proxy sees to that by itself).
#
# HAProxy and nginx are left out where they are not installed; on Debian:
#   apt-get install haproxy nginx-light libnginx-mod-stream
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

rounds=5
seconds=2
while getopts r:s:h option; do
    case $option in
        r) rounds=$OPTARG ;;
        s) seconds=$OPTARG ;;
        h) usage 0 ;;
        *) usage 2 >&2 ;;
    esac
done
shift $((OPTIND - 1))
works=("$@")
[ $# -gt 0 ] || works=(fresh8 fresh64 kept8 kept64 pipe16 64k 1m single lines)

# What a work asks of the load generator.
load_options() {
    case $1 in
        fresh8) echo "-mode fresh -connections 8" ;;
        fresh64) echo "-mode fresh -connections 64" ;;
        kept8 | lines) echo "-mode kept -connections 8" ;;
        kept64) echo "-mode kept -connections 64" ;;
        pipe16) echo "-mode pipe16 -connections 8" ;;
        64k) echo "-mode kept -connections 4 -size 65536" ;;
        1m) echo "-mode kept -connections 4 -size 1000000" ;;
        single) echo "-mode kept -connections 1" ;;
        *) return 1 ;;
    esac
}

for work in "${works[@]}"; do
    load_options "$work" >/dev/null || usage 2 >&2
done

cargo build --quiet --release --bins --example load
programs=${CARGO_TARGET_DIR:-target}/release
cores=$(nproc)
# Every proxy gets all the files that the system allows; each takes its share by itself.
ulimit -n "$(ulimit -Hn)"

# shellcheck source=examples/started.sh
. examples/started.sh

fail() {
    echo "compare.sh: $*" >&2
    exit 1
}

# Waits for something to be so, 10 s at most.
wait_until() {
    for ((tries = 0; tries < 200; tries++)); do
        if "$@"; then return; fi
        sleep 0.05
    done
    fail "waited in vain for: $*"
}

# A port that nobody listens on, below those that the system hands out to clients.
free_port() {
    local port
    until port=$((10000 + RANDOM % 20000)) && ! is_listening "$port"; do :; done
    echo "$port"
}

is_listening() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

declare -A port pid

# start NAME COMMAND...: in the background, with its output in a file.
start() {
    local name=$1
    shift
    "$@" >>"$directory/$name.out" 2>>"$directory/$name.err" &
    pid[$name]=$!
    started+=("$!")
}

# Starts one of our programs and learns its port from the line that announces it.
start_ours() {
    local name=$1
    start "$@"
    wait_until grep -qs 'on port [1-9]' "$directory/$name.out"
    port[$name]=$(sed -n 's/.* on port \([1-9][0-9]*\)$/\1/p' "$directory/$name.out" | head -1)
}

start_haproxy() {
    port[haproxy]=$(free_port)
    cat >"$directory/haproxy.cfg" <<END
global
    nbthread $cores
    cpu-map auto:1/1-$cores 0-$((cores - 1))
    maxconn 8000
defaults
    mode tcp
    balance roundrobin
    backlog 4096
    maxconn 8000
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen front
    bind 127.0.0.1:${port[haproxy]}
    server one 127.0.0.1:${port[one]}
    server two 127.0.0.1:${port[two]}
END
    start haproxy haproxy -db -f "$directory/haproxy.cfg"
    wait_until is_listening "${port[haproxy]}"
}

start_nginx() {
    port[nginx]=$(free_port)
    local modules
    modules=$(nginx -V 2>&1 | sed -n 's/.*--modules-path=\([^ ]*\).*/\1/p')
    : >"$directory/nginx.conf"
    if [ -e "$modules/ngx_stream_module.so" ]; then
        echo "load_module $modules/ngx_stream_module.so;" >"$directory/nginx.conf"
    fi
    cat >>"$directory/nginx.conf" <<END
daemon off;
pid nginx.pid;
error_log stderr crit;
worker_processes $cores;
worker_cpu_affinity auto;
worker_rlimit_nofile $(ulimit -n);
events {
    worker_connections 8000;
}
stream {
    access_log off;
    tcp_nodelay on;
    proxy_connect_timeout 5s;
    proxy_timeout 1h;
    upstream servers {
        server 127.0.0.1:${port[one]};
        server 127.0.0.1:${port[two]};
    }
    server {
        listen 127.0.0.1:${port[nginx]} backlog=4096 reuseport;
        proxy_pass servers;
    }
}
END
    start nginx nginx -e stderr -p "$directory" -c nginx.conf
    wait_until is_listening "${port[nginx]}"
}

# The clock ticks that a target and its workers have used.
cpu_ticks() {
    local total=0 stat fields process
    for process in ${pid[$1]:-} $(pgrep -P "${pid[$1]:-none}" 2>/dev/null); do
        stat=$(<"/proc/$process/stat")
        # After the name, which may contain anything: user and system time are the 12th and 13th.
        read -ra fields <<<"${stat##*) }"
        total=$((total + fields[11] + fields[12]))
    done
    echo "$total"
}

# Runs a work against a target and adds a line to the results.
measure() {
    local work=$1 target=$2 round=$3 before line after
    before=$(cpu_ticks "$target")
    # shellcheck disable=SC2046 # the options are words
    line=$(timeout 120 "$programs/examples/load" -to "${port[$target]}" -line \
        -seconds "$seconds" $(load_options "$work")) || echo "$work on $target: errors" >&2
    after=$(cpu_ticks "$target")
    echo "work=$work target=$target round=$round ticks=$((after - before)) $line" >>"$directory/results"
}

report() {
    awk -v work="$1" -v targets="$2" -v rounds="$rounds" -v ticks="$(getconf CLK_TCK)" '
        function median(list, count,    i, j, value) {
            for (i = 2; i <= count; i++) {
                value = list[i]
                for (j = i - 1; j > 0 && list[j] > value; j--) list[j + 1] = list[j]
                list[j + 1] = value
            }
            return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
        }
        function figure(target, key,    round, list) {
            for (round = 1; round <= rounds; round++) list[round] = seen[target, key, round]
            return median(list, rounds)
        }
        function ratio(target, key,    round, list, theirs) {
            for (round = 1; round <= rounds; round++) {
                theirs = seen[target, key, round]
                list[round] = theirs ? seen[ours, key, round] / theirs : 0
            }
            return median(list, rounds)
        }
        function cell(target, key, form,    text) {
            text = sprintf(form, figure(target, key))
            return target == ours ? text "       " : text sprintf(" %5.2fx", ratio(target, key))
        }
        {
            for (i = 1; i <= NF; i++) {
                split($i, pair, "=")
                field[pair[1]] = pair[2]
            }
            if (field["work"] != work) next
            for (key in field) seen[field["target"], key, field["round"]] = field[key]
            errors[field["target"]] += field["errors"]
            if (field["acks"])
                seen[field["target"], "cpu", field["round"]] = \
                    field["ticks"] / ticks * 1e6 / field["acks"]
        }
        END {
            count = split(targets, names, " ")
            ours = names[1]
            printf "\n%-8s %16s %18s %18s %18s %16s %s\n", work, "messages/s    ", \
                "p50 µs       ", "p99 µs       ", "p99.9 µs       ", "CPU µs/msg    ", "errors"
            for (i = 1; i <= count; i++)
                printf "%-8s %s  %s  %s  %s  %s %6d\n", names[i], cell(names[i], "rate", "%9d"), \
                    cell(names[i], "p50", "%10.1f"), cell(names[i], "p99", "%10.1f"), \
                    cell(names[i], "p999", "%10.1f"), cell(names[i], "cpu", "%8.2f"), \
                    errors[names[i]]
        }
    ' "$directory/results"
}

start_all() {
    rm -f "$directory"/*.out "$directory"/*.err
    start_ours revproc "$programs/revproc" -port 0 -quiet
    start_ours loud "$programs/revproc" -port 0
    for server in one two; do
        start_ours "$server" "$programs/server" -id "$server" -pp PP_1 -listen 0 -quiet \
            -revproc "${port[revproc]}" -revproc "${port[loud]}"
    done
    for other in "${others[@]}"; do
        "start_$other"
    done
    port[direct]=${port[one]}
    for proxy in revproc loud; do
        wait_until test "$(grep -c 'setup message' "$directory/$proxy.out")" = 2
    done
}

targets_of() {
    case $1 in
        single) echo revproc "${others[@]}" direct ;;
        lines) echo loud revproc ;;
        *) echo revproc "${others[@]}" ;;
    esac
}

others=()
for other in haproxy nginx; do
    if command -v "$other" >/dev/null; then others+=("$other"); fi
done

{ haproxy -v 2>/dev/null || echo "no HAProxy"; } | sed -n 1p
{ nginx -v 2>&1 || echo "no nginx"; } | sed -n 1p
rustc --version
uname -sr
echo "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $cores cores"
echo "$rounds rounds of $seconds s; load average before: $(cut -d' ' -f1-3 /proc/loadavg)"

for ((round = 1; round <= rounds; round++)); do
    start_all
    for work in "${works[@]}"; do
        read -ra targets <<<"$(targets_of "$work")"
        for ((turn = 0; turn < ${#targets[@]}; turn++)); do
            measure "$work" "${targets[(turn + round) % ${#targets[@]}]}" "$round"
            : >"$directory/loud.out"
        done
    done
    stop_all
done
for work in "${works[@]}"; do
    report "$work" "$(targets_of "$work")"
done
