#!/usr/bin/env bash
# From a fresh Debian 12 to a serving plugin with a development token: installs what is missing, builds,
# makes a SoftHSM token and a KEK, serves, and sends a value out and back. Safe to run again.
set -euo pipefail
# shellcheck source=packaging/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'USAGE'
usage: packaging/quickstart.sh [--dir DIR]

Sets up and starts a development plugin (root, or sudo for packages). Nothing of it is for production.
  --dir DIR   where its token, KEK, configuration and socket lie
              (default: ~/.local/share/trousseau/dev)
USAGE
}

dir=${XDG_DATA_HOME:-$HOME/.local/share}/trousseau/dev
while (($#)); do
    case $1 in
        --dir) dir=${2:?--dir needs a directory} && shift ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done

install -d -m 0700 -- "$dir"
dir=$(realpath -- "$dir") # as the plugin names itself, below
binary=$CARGO_TARGET_DIR/release/trousseau
socket=$dir/kms.sock
pid_file=$dir/quickstart.pid
serve_log=$dir/quickstart.log
log=$cache/quickstart.log
mkdir -p -- "$cache"
: >"$log"

explain() {
    failed_step 15 || return 0
    say "Put right what it says, then run this again: what is done already is not done twice."
}
trap explain EXIT

build() {
    cd -- "$repository"
    cargo build --release --locked
}

# serving_pid: the plugin that an earlier run left serving in this directory.
serving_pid() {
    local pid
    pid=$(cat -- "$pid_file" 2>/dev/null) || return 1
    # Pids are used again: it must be this plugin in this directory.
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "dev --dir $dir " || return 1
    printf '%s' "$pid"
}

# stop_old: ends a plugin older than the binary, or one that no longer answers.
stop_old() {
    local pid deadline=$((SECONDS + 30))
    pid=$(serving_pid) || return 0
    if [[ $pid_file -nt $binary ]] && "$binary" probe --socket "$socket"; then return 0; fi
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do
        ((SECONDS < deadline)) || die "the earlier plugin (pid $pid) does not end; kill -9 $pid, then run this again"
        sleep 0.1
    done
}

# serve: starts the plugin, in a session of its own so that it outlives this terminal, and waits until
# a value goes out and comes back.
serve() {
    local pid deadline=$((SECONDS + 60))
    if ! pid=$(serving_pid); then
        setsid nohup "$binary" dev --dir "$dir" >"$serve_log" 2>&1 3>&- </dev/null &
        pid=$!
        printf '%s\n' "$pid" >"$pid_file"
    fi
    until "$binary" probe --socket "$socket"; do
        if ! kill -0 "$pid" 2>/dev/null || ((SECONDS > deadline)); then
            cat -- "$serve_log"
            die "the plugin does not serve; what it said stands above"
        fi
        sleep 0.2
    done
}

step "installing SoftHSM and certificates, where missing" install_packages softhsm2 ca-certificates
step "finding Rust $(rust_wanted) or newer, else installing Debian's" ensure_rust
step "building (a first build takes two to five minutes)" build
step "stopping an older plugin, if one serves here" stop_old
step "making the token and KEK, where missing, and serving" serve

pid=$(serving_pid)
say "" "A value went out and came back:" ""
"$binary" probe --socket "$socket"
cat <<NEXT

The plugin serves (pid $pid). Its KEK lies in a SoftHSM token in $dir:
for development only. What to do next:

  trousseau=$binary
  \$trousseau status --socket $socket
  \$trousseau encryption-config --socket $socket --for kubeadm   # what the API server needs
  tail -f $serve_log                # the plugin's log
  kill $pid                         # stops it; this script starts it again

For a real HSM, read "Production" in README.md.
NEXT
