# For the scripts here that start programs: a folder of their own, and an end of all that they started,
# however they end themselves. The process ids go into "started".
# shellcheck shell=bash
directory=$(mktemp -d)
started=()
stop_all() {
    for process in "${started[@]}"; do
        kill "$process" 2>/dev/null || true
    done
    wait
    started=()
}
clean_up() {
    stop_all
    rm -rf "$directory"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
