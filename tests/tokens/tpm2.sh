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
# until_it PID COMMAND...: waits until the command succeeds, while the process lives.
until_it() {
    local tries pid=$1
    for ((tries = 0; tries < 600; tries++)); do
        ! "${@:2}" >/dev/null 2>&1 || return 0
        kill -0 "$pid" 2>/dev/null || return 1
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
    until_it "$swtpm" test -e "$directory/swtpm.pid" && break
    kill "$swtpm" 2>/dev/null || true # the port is taken
    wait "$swtpm" || true
done
started+=("$swtpm")

# call NAME OBJECT METHOD ARGUMENT...: asks somebody on the bus.
call() { dbus-send "--bus=unix:path=$directory/bus" --print-reply --reply-timeout=20000 "--dest=$1" "${@:2}"; }
dbus-daemon --session --nofork "--address=unix:path=$directory/bus" &
started+=($!)
until_it "$!" call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus.GetId

# It has its name before it serves, and before it has spoken to the TPM: so a connection is made.
DBUS_SESSION_BUS_ADDRESS=unix:path=$directory/bus tpm2-abrmd --session --allow-root \
    "--tcti=swtpm:host=127.0.0.1,port=$port" >"$directory/abrmd.log" 2>&1 &
started+=($!)
if ! until_it "$!" call com.intel.tss2.Tabrmd /com/intel/tss2/Tabrmd/Tcti com.intel.tss2.TctiTabrmd.CreateConnection; then
    cat -- "$directory/abrmd.log" >&2
    exit 1
fi
touch -- "$directory/ready"
wait -n
