#!/usr/bin/env bash
# Two proxies behind HAProxy with TLS, four servers registered with both, and clients that come
# through TLS, while a proxy is killed and comes back, a server is killed, and a proxy stops in order.
#
#   examples/cluster.sh [-b FOLDER] [-s SECONDS]
#
#   -b FOLDER   where the programs are, such as target/debug; without it they are built, optimized
#   -s SECONDS  of load around each event; 1 to 10; 6 unless given
#
# HAProxy runs with examples/deploy/haproxy.cfg, on free ports. Prints an account of the messages of
# clients that send one again (-wait) and of such that do not, and last how many the former lost: it
# ends with 1 if any. The others lose what is on their connections when a proxy is killed, and may lose
# what they send on a connection that was kept just as a stopping proxy ends it.
#
# Needs haproxy and openssl; on Debian: apt-get install haproxy openssl
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

programs=
seconds=6
while getopts b:s:h option; do
    case $option in
        b) programs=$OPTARG ;;
        s) seconds=$OPTARG ;;
        h) usage 0 ;;
        *) usage 2 >&2 ;;
    esac
done
[ "$OPTIND" -gt $# ] && [[ $seconds =~ ^([1-9]|10)$ ]] || usage 2 >&2
PATH=$PATH:/usr/sbin # where Debian has haproxy
for needed in haproxy openssl; do
    command -v $needed >/dev/null || fail "this needs $needed; on Debian: apt-get install $needed"
done
if [ -z "$programs" ]; then
    echo "building the three programs and examples/load ..."
    cargo build --quiet --release --locked --bins --example load
    programs=${CARGO_TARGET_DIR:-target}/release
fi

folder=$(mktemp -d)
declare -A pid # of each program that runs, by its name
clean_up() {
    # shellcheck disable=SC2046 # the ids are words
    kill $(jobs -p) 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME COMMAND...: in the background, its output in a file.
start() {
    local name=$1
    shift
    "$@" >>"$folder/$name" 2>&1 &
    pid[$name]=$!
}

# end SIGNAL NAME: and waits for it.
end() {
    kill "-$1" "${pid[$2]}"
    { wait "${pid[$2]}" || true; } 2>/dev/null
    unset "pid[$2]"
}

# Waits until a file has so many lines with a text, 20 s at most.
wait_for() {
    local lines
    for ((tries = 0; tries < 400; tries++)); do
        # It may not be there yet.
        lines=$(grep -cs "$3" "$folder/$1" || true)
        [ "${lines:-0}" -lt "$2" ] || return 0
        sleep 0.05
    done
    fail "waited in vain for '$3' from $1: $(<"$folder/$1")"
}

is_free() {
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Ports that nobody listens on, below those that the system hands out to clients.
next=$((10000 + RANDOM % 20000))
take_port() {
    until is_free $((++next)); do :; done
    case $1 in
        *_STATUS) export "$1=$next" ;;
        *) export "$1=127.0.0.1:$next" ;;
    esac
}
for name in RP_BIND RP_PLAIN RP_ONE RP_ONE_STATUS RP_TWO RP_TWO_STATUS; do take_port $name; done
export RP_TLS=$RP_BIND RP_CERTIFICATE=$folder/edge.pem RP_CA=$folder/certificate

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost -keyout "$folder/key" -out "$RP_CA" 2>/dev/null
cat "$RP_CA" "$folder/key" >"$RP_CERTIFICATE"
# Whoever comes through HAProxy comes from this host, so who may register is not left to that.
token=$folder/token
openssl rand -hex 16 >"$token"

start_proxy() {
    local address=RP_$1 status=RP_$1_STATUS
    start "proxy $1" "$programs/revproc" -port "${!address##*:}" -status "${!status}" -quiet \
        -token-file "$token" -stop-delay 1
}
start_proxy ONE
start_proxy TWO
for server in 1 2 3 4; do
    start "server $server" "$programs/server" -id $server -pp PP_1 -listen 0 -quiet \
        -token-file "$token" -revproc "$RP_ONE" -revproc "$RP_TWO"
done
wait_for 'proxy ONE' 4 'setup message'
wait_for 'proxy TWO' 4 'setup message'
start haproxy haproxy -db -f examples/deploy/haproxy.cfg
while is_free "${RP_PLAIN##*:}"; do
    kill -0 "${pid[haproxy]}" 2>/dev/null || fail "HAProxy ended: $(<"$folder/haproxy")"
    sleep 0.05
done

# load KIND OPTION...: clients whose account goes to a file.
load() {
    local kind=$1
    shift
    timeout $((seconds + 25)) "$programs/examples/load" -to "$RP_PLAIN" -line -seconds "$seconds" "$@" \
        >>"$folder/$kind" 2>>"$folder/complaints" &
    loads+=("$!")
}

# sum FIELD KIND...: over all accounts, which are pairs such as sent=12.
sum() {
    local field=$1
    shift
    (cd "$folder" && cat "$@") | tr ' ' '\n' \
        | awk -F= -v field="$field" '$1 == field { sum += $2 } END { print sum + 0 }'
}

row() {
    printf '%-25s %9s %9s %11s %7s %13s %7s\n' "$@"
}

# around EVENT COMMAND...: clients of all kinds, and the command when a third of their time is over.
around() {
    local event=$1 third=$((seconds * 1000 / 3))
    shift
    rm -f "$folder"/{waiting,without}
    loads=()
    for mode in fresh kept; do
        load waiting -mode $mode -connections 8 -wait 20
        load without -mode $mode -connections 4
    done
    sleep "$((third / 1000)).$(printf %03d $((third % 1000)))"
    "$@"
    for load in "${loads[@]}"; do
        wait "$load" || true # it lost some, and says so
    done
    row "$event" "$(sum sent waiting)" "$(sum acks waiting)" "$(sum resent waiting)" \
        "$(sum lost waiting)" "$(sum sent without)" "$(sum lost without)"
    (cd "$folder" && cat waiting >>all.waiting && cat without >>all.without)
}

# Says how many messages each server has acked through a proxy since that one's start.
say_servers() {
    local status=RP_$1_STATUS
    exec 3<>"/dev/tcp/127.0.0.1/${!status}"
    printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
    echo "  through proxy $1: $(sed -n \
        's/^revproc_messages_total{.*server="\(.*\)",outcome="ack"} \(.*\)/server \1: \2/p' <&3 \
        | sort | paste -sd , | sed 's/,/, /g')"
    exec 3>&-
}

haproxy -v | sed -n 1p
row "8 + 8 clients (-wait 20)" sent acked "sent again" lost "4 + 4 without" lost
around "proxy ONE is killed" end KILL 'proxy ONE'
around "proxy ONE comes back" start_proxy ONE
say_servers ONE
say_servers TWO
around "server 4 is killed" end KILL 'server 4'
around "proxy TWO stops in order" end TERM 'proxy TWO'

# What a proxy that was killed had acked, nobody can ask it: it is what the other one had not.
end TERM 'proxy ONE'
[ "$(grep -c sent= "$folder/all.waiting")" = 8 ] \
    || fail "some clients gave no account: $(cat "$folder/complaints")"
acked=$(sum acks all.waiting all.without)
two=$(sed -n 's/.*stopped after .*: \([0-9]*\) acked.*/\1/p' "$folder/proxy TWO")
echo "acked $acked: through proxy ONE $((acked - two)), through proxy TWO $two"
lost=$(sum lost all.waiting)
echo "lost $lost"
[ "$lost" = 0 ]
