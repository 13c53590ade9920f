#!/usr/bin/env bash
# tpm2.sh DIR: a TPM 2.0 in software (swtpm), and the resource manager before it (tpm2-abrmd) on a bus of its own,
# DIR/bus. It ends when it is told to, or when one of them does, and is ready when DIR/ready is there. tpm2-pkcs11 finds it with
#     TPM2_PKCS11_TCTI=tabrmd:bus_type=session DBUS_SESSION_BUS_ADDRESS=unix:path=DIR/bus TPM2_PKCS11_STORE=DIR/store
# Needs Debian's packages swtpm, tpm2-abrmd, libtss2-tcti-tabrmd0 and dbus.
set -euo pipefail

directory=$1
started=()
finish() { ((${#started[@]} == 0)) || kill -- "${started[@]}" 2>/dev/null || true; }
trap finish EXIT
trap 'exit 0' TERM INT

mkdir -- "$directory"/{tpm,store}
# until_there FILE PID: waits while the process lives.
until_there() {
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        [[ ! -e $1 ]] || return 0
        kill -0 "$2" 2>/dev/null || return 1
        sleep 0.05
    done
    return 1
}

# The resource manager knows the TPM by a port, and takes the next one for control.
for ((tries = 0; tries < 20; tries++)); do
    port=$((20000 + RANDOM % 5000 * 2))
    swtpm socket --tpm2 --tpmstate "dir=$directory/tpm" --pid "file=$directory/swtpm.pid" \
        --server "type=tcp,port=$port,bindaddr=127.0.0.1" --ctrl "type=tcp,port=$((port + 1)),bindaddr=127.0.0.1" \
        --flags not-need-init,startup-clear &
    swtpm=$!
    until_there "$directory/swtpm.pid" "$swtpm" && break
done
started+=("$swtpm")
dbus-daemon --session --nofork "--address=unix:path=$directory/bus" &
started+=($!)
until_there "$directory/bus" $!
DBUS_SESSION_BUS_ADDRESS=unix:path=$directory/bus tpm2-abrmd --session --allow-root \
    "--tcti=swtpm:host=127.0.0.1,port=$port" >"$directory/abrmd.log" 2>&1 &
abrmd=$!
started+=("$abrmd")
for ((tries = 0; tries < 200; tries++)); do
    if dbus-send "--bus=unix:path=$directory/bus" --print-reply --dest=org.freedesktop.DBus /org/freedesktop/DBus \
        org.freedesktop.DBus.NameHasOwner string:com.intel.tss2.Tabrmd 2>/dev/null | grep -q 'boolean true'; then
        touch -- "$directory/ready"
        break
    fi
    sleep 0.05
done
wait -n
