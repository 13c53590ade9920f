# shellcheck shell=bash
# What the set-up scripts share: Debian packages, a Rust toolchain, steps that are timed and can fail.
# Sourced by packaging/quickstart.sh, tests/run.sh and .ci/run.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # for the scripts that source this
cache=${XDG_CACHE_HOME:-$HOME/.cache}/trousseau
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$repository/target}

exec 3>&1     # where the reader looks, even when a step ends the script
log=/dev/null # where steps write; set by the script
current=      # the step under way

say() { printf '%s\n' "$@"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# step TEXT COMMAND...: runs the command in this shell and says how long it took. What it prints goes
# to $log; should the script end in the middle of it, failed_step shows the log's end.
step() {
    local start=$SECONDS
    current=$1
    shift
    printf '%-62s ' "$current"
    "$@" >>"$log" 2>&1 </dev/null
    printf '%4d s\n' $((SECONDS - start))
    current=
}

# failed_step LINES: whether a step was under way; if so, shows the end of the log.
failed_step() {
    [[ -n $current ]] || return 1
    exec >&3
    printf 'failed\n\n'
    tail -n "$1" "$log" | sed 's/^/    /'
    say "" "The whole log: $log"
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo "$@"
    fi
}

# missing_packages NAME...: prints those that are not installed.
missing_packages() {
    local name
    for name; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || printf '%s\n' "$name"
    done
}

# install_packages NAME...: installs what is missing, and never removes a package for it.
install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || die "this is not Debian; install these by hand, then run this again: ${missing[*]}"
    ((EUID == 0)) || command -v sudo >/dev/null ||
        die "neither root nor sudo; have these installed, then run this again: ${missing[*]}"
    as_root apt-get -o DPkg::Lock::Timeout=120 -q update &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -q -y \
            --no-install-recommends --no-remove install "${missing[@]}"
}

# at_least WANTED HAVE: compares versions.
at_least() { [[ -n $2 ]] && printf '%s\n%s\n' "$1" "$2" | sort -V -C; }

rust_wanted() { sed -n 's/^rust-version *= *"\(.*\)"$/\1/p' "$repository/Cargo.toml"; }
rust_here() { rustc --version 2>/dev/null | cut -d' ' -f2; }

# ensure_rust: leaves a toolchain that is new enough alone, else installs Debian's current one, which
# bookworm-security serves as rustc-web (for browsers) beside the old rustc of bookworm.
ensure_rust() {
    local wanted
    wanted=$(rust_wanted)
    find_rust
    if ! at_least "$wanted" "$(rust_here)" || ! command -v cargo >/dev/null; then
        install_packages rustc-web cargo-web || die "rustc-web and cargo-web could not be installed (see above); install Rust $wanted or newer, then run this again"
        find_rust
    fi
    # rustc links with cc.
    command -v cc >/dev/null || install_packages gcc libc6-dev
    at_least "$wanted" "$(rust_here)" ||
        die "Rust $wanted or newer is needed, this is $(rust_here); is bookworm-security among apt's sources?"
}

# find_rust: puts the toolchain that is new enough on PATH, wherever it lies.
find_rust() {
    local place
    for place in "" "$HOME/.cargo/bin" /usr/bin; do
        if at_least "$(rust_wanted)" "$(PATH=${place:+$place:}$PATH rust_here)"; then
            export PATH=${place:+$place:}$PATH
            return
        fi
    done
}

parts=() # one line for each part that ran, for the summary
failures=0

# part NAME COMMAND...: runs a part of the tests, in a subshell where any failure ends it, and goes on.
part() {
    local name=$1 start=$SECONDS status
    shift
    say "" "== $name"
    set +e
    (
        set -e
        "$@"
    ) </dev/null
    status=$?
    set -e
    local result=passed
    if ((status)); then
        result=failed
        failures=$((failures + 1))
    fi
    parts+=("$(printf '%-44s %s %6d s' "$name" "$result" $((SECONDS - start)))")
}

# summary: what ran; its result is the script's.
summary() {
    say "" "${parts[@]}" "" "parts: $((${#parts[@]} - failures)) passed, $failures failed"
    ((failures == 0))
}
