#!/usr/bin/env bash
# Runs a command with what the container tests need: a Docker daemon and the image of a control-plane host. Starts
# Debian's daemon if none runs, and ends what it started; what it leaves behind is the image's file in the cache.
set -euo pipefail
# shellcheck source=packaging/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../packaging/common.sh"

if [[ ${1--h} == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: tests/containers/run.sh COMMAND [ARGUMENT]...

Runs the command with $TROUSSEAU_CONTAINER_IMAGE, the name of an image in which systemd starts. Where no container can
run, the command gets $TROUSSEAU_CONTAINERS_LACK instead, the reason, and the container tests skip. Its exit code is
the command's.

    tests/containers/run.sh cargo test --locked --test containers
USAGE
    exit
fi

# The image: this release of Debian, since the plugin is built against its libraries, with a token and systemd,
# and rpm, which installs the other package beside dpkg.
release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
packages=systemd,systemd-sysv,dbus,softhsm2,opensc,rpm
make_image() {
    local root=$work/root mirror
    # Where this machine has its packages from.
    # shellcheck disable=SC2016 # apt replaces it
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Component: main' "Codename: $release" | sed -n 1p)
    debootstrap --variant=minbase --include="$packages" "$release" "$root" ${mirror:+"$mirror"}
    rm -rf -- "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man}
    tar -C "$root" --numeric-owner -cf "$image_file.$$" .
    mv -- "$image_file.$$" "$image_file"
    rm -rf -- "$root"
}
recipe=$(declare -f make_image)$packages$release
hash=$(sha256sum <<<"$recipe" | cut -c1-16)
image=trousseau-test:$hash
image_file=$cache/container-$hash.tar

mkdir -p -- "$cache"
work=$(mktemp -d /var/tmp/trousseau-containers.XXXXXX) # not /tmp, which may be too small for images
log=$work/log
daemon=   # its pid, if it is ours
imported= # whether the image was brought into the daemon

finish() {
    failed_step 40 || true
    if [[ $imported ]]; then
        docker ps -aq --filter "ancestor=$image" | xargs -r docker rm -f >>"$log" 2>&1 || true
        docker rmi -f "$image" >>"$log" 2>&1 || true
    fi
    if [[ $daemon ]]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" || true
    fi
    rm -rf --one-file-system -- "$work"
}
trap finish EXIT

# start_daemon: one that touches neither the network's set-up nor another daemon's data. A session of its own keeps
# Ctrl-C from ending it before its containers.
start_daemon() {
    local deadline=$((SECONDS + 60))
    export DOCKER_HOST=unix://$work/docker.sock
    setsid dockerd --host "$DOCKER_HOST" --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" \
        --iptables=false --ip6tables=false --bridge=none >"$work/dockerd.log" 2>&1 3>&- </dev/null &
    daemon=$!
    until docker version; do
        ((SECONDS < deadline)) && kill -0 "$daemon" || return 0 # the caller asks again
        sleep 0.2
    done
}

# lack REASON: the tests are to skip.
lack() {
    export TROUSSEAU_CONTAINERS_LACK=$1
    say "containers cannot run here: $1"
}

# prepare: everything up to $TROUSSEAU_CONTAINER_IMAGE or $TROUSSEAU_CONTAINERS_LACK.
prepare() {
    local why
    ((EUID == 0)) || { lack "root, who reaches the sockets of a container's users" && return; }
    step "installing Docker and debootstrap, where missing" install_packages docker.io debootstrap
    docker version >>"$log" 2>&1 || step "starting Debian's Docker daemon" start_daemon
    if ! docker version >>"$log" 2>&1; then
        lack "a Docker daemon: $(grep -v level=info "$work/dockerd.log" | tail -n 1)" && return
    fi
    [[ -e $image_file ]] || step "making the image of a host" make_image
    imported=yes
    step "importing the image of a host" docker import "$image_file" "$image"
    # What the tests ask for: a bind mount, and the right to mount.
    if ! why=$(docker run --rm --network none --cap-add SYS_ADMIN --security-opt seccomp=unconfined \
        --security-opt apparmor=unconfined -v "$work:/mnt:ro" "$image" \
        sh -c 'mount --make-rshared / && test -e /mnt/log' 2>&1); then
        lack "a daemon whose containers may mount, and see this machine's files: $why" && return
    fi
    export TROUSSEAU_CONTAINER_IMAGE=$image
}

unset TROUSSEAU_CONTAINER_IMAGE TROUSSEAU_CONTAINERS_LACK
prepare
"$@"
