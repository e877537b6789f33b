#!/usr/bin/env bash
# The whole system in one terminal, for a class to watch: the proxy, two servers each of two
# policies, and a client of each that sends the sample packets, round after round. Ends when a key
# is pressed in a client's pane, when the terminal is detached (Ctrl-b d) or closed, or after SECONDS.
#
#     examples/terminals.sh [-seconds SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=
case "$#:${1-}" in
    0:) ;;
    2:-seconds) seconds=$2 ;;
    *) echo "usage: examples/terminals.sh [-seconds SECONDS]" >&2; exit 2 ;;
esac
if ! command -v tmux >/dev/null; then
    echo "terminals.sh: this needs tmux: apt-get install tmux, dnf install tmux or brew install tmux" >&2
    exit 1
fi
echo "building the programs revproc, server and client; the first time takes a minute or two" >&2
cargo build --release --locked --bins
bin=$PWD/target/release

# A server of its own, without anybody's settings, so that nothing else of tmux is touched.
name=revproc-$$
tmux() { TMUX='' command tmux -L "$name" -f /dev/null "$@"; }
# A pane that is gone hangs up on its program, which ends in good order by that.
pids=()
finish() {
    tmux kill-server 2>/dev/null || true
    for _ in {1..100}; do
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then sleep 0.1; continue 2; fi
        done
        return
    done
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

# The proxy says which port it took; the others wait for that word.
port="until port=\$(tmux -L $name show-options -gqv @port) && [ -n \"\$port\" ]; do sleep 0.1; done"
server() { echo "$port; exec $bin/server -id $1 -pp $2 -listen 0 -revproc \$port"; }

size=(-x "$(tput cols 2>/dev/null || echo 80)" -y "$(tput lines 2>/dev/null || echo 24)")
# The pane's title says where the status page is.
proxy="title() { printf '\e]2;%s\e\\\\' \"\$1\"; }; title 'reverse proxy'
exec $bin/revproc -port 0 -status 0 > >(while IFS= read -r line; do
    printf '%s\n' \"\$line\"
    case \$line in
        'Running the reverse proxy on port '*) tmux -L $name set-option -g @port \"\${line##* }\" ;;
        'Serving the status page on '*) title \"proxy: \${line##* }\" ;;
    esac
done)"
# The sample packets ask for PP_1, and the homework's own for 999.
client() { echo "$port; while :; do
    for file in packets/*.json; do
        sed 's/PP_1/$2/; s/Id\": 999/Id\": \"$2\"/' \"\$file\" | $bin/client -id $1 -revproc \$port -wait 10 -pkt -
        if read -rsn 1 -t 1; then tmux -L $name kill-server; fi
    done
done"; }

# pane TITLE FORMAT-OF-SPLIT... COMMAND: splits, names the new pane and prints its id.
pane() {
    local title=$1; shift
    local id; id=$(tmux split-window -P -F '#{pane_id}' "$@")
    tmux select-pane -t "$id" -T "$title"
    echo "$id"
}

first=$(tmux new-session -d -s main "${size[@]}" -P -F '#{pane_id}' bash -c "$proxy")
tmux set-option -g pane-border-status top \; set-option -g pane-border-format ' #{pane_title} ' \
    \; set-option -g status off \; set-option -g mouse on \; set-option -g destroy-unattached off
right=$(pane 'server 100 of PP_1' -h -t "$first" -l 50% bash -c "$(server 100 PP_1)")
below=$(pane 'server 101 of PP_1' -v -t "$right" -l 75% bash -c "$(server 101 PP_1)")
below=$(pane 'server 200 of PP_2' -v -t "$below" -l 67% bash -c "$(server 200 PP_2)")
pane 'server 201 of PP_2' -v -t "$below" -l 50% bash -c "$(server 201 PP_2)" >/dev/null
left=$(pane 'client 50 (any key ends all)' -v -t "$first" -l 67% bash -c "$(client 50 PP_1)")
last=$(pane 'client 60 (any key ends all)' -v -t "$left" -l 50% bash -c "$(client 60 PP_2)")
tmux select-pane -t "$last"
mapfile -t pids < <(tmux list-panes -s -t main -F '#{pane_pid}')

if [ -n "$seconds" ]; then
    sleep "$seconds"
    tmux display-message -p -t "$first" '#{pane_title}' | grep -q 'proxy: http://'
    tmux capture-pane -p -t "$last" | grep -q 'Hash of payload is correct'
else
    tmux attach-session -t main || true # killed, by a key
fi
