#!/usr/bin/env bash
# opencryptoki.sh DIR: becomes openCryptoki's daemon, pkcsslotd, with two soft tokens of its own, whose state lies under
# DIR. openCryptoki has fixed places for all that, so this runs in mount and IPC namespaces of its own:
#     unshare --mount --ipc --propagation private opencryptoki.sh DIR
# and so must who uses the tokens (nsenter --target PID --mount --ipc). It is ready when DIR/run/pkcsslotd.socket is there.
# Needs root, and Debian's package opencryptoki.
set -euo pipefail

directory=$1
mkdir -p -- "$directory"/{etc,lib,run,log/opencryptoki}
for name in first second; do
    # Who makes a token makes its directories only if pkcsconf was asked to.
    mkdir -p -- "$directory/lib/$name/TOK_OBJ" "$directory/run/lock/opencryptoki/$name"
done
mkdir -- "$directory/run/opencryptoki"
chgrp -R pkcs11 -- "$directory"/{lib,run,log}
chmod -R g+rwX -- "$directory"/{lib,run,log}
cat >"$directory/etc/opencryptoki.conf" <<'CONF'
version opencryptoki-3.1
slot 0
{
stdll = libpkcs11_sw.so
tokname = first
}
slot 1
{
stdll = libpkcs11_sw.so
tokname = second
}
CONF
mount --bind "$directory/etc" /etc/opencryptoki
mount --bind "$directory/lib" /var/lib/opencryptoki
# The package has no /var/log/opencryptoki: the daemon that its installation starts, where it starts one, makes it.
mount --bind "$directory/log" /var/log
mount --bind "$directory/run" /run
mount -t tmpfs none /dev/shm
exec pkcsslotd -f
