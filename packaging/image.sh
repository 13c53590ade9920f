#!/usr/bin/env bash
# Makes a container image out of the deb: the plugin and the shared libraries that it is linked with, and no shell.
set -euo pipefail
# shellcheck source=packaging/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'USAGE'
usage: packaging/image.sh [--library FILE]... DEB NAME

Imports an image of the name NAME into Docker or Podman, from the package DEB. Run it on the release of Debian that the
package was built on: the shared libraries are this machine's.
  --library FILE  a PKCS#11 library, which goes to the same place in the image, with what it is linked with
USAGE
}

libraries=()
arguments=()
while (($#)); do
    case $1 in
        --library) libraries+=("$(realpath --no-symlinks -e -- "${2?--library needs a file}")") && shift ;;
        -h | --help) usage && exit ;;
        -*) usage >&2 && exit 2 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
((${#arguments[@]} == 2)) || { usage >&2 && exit 2; }
package=${arguments[0]}
name=${arguments[1]}
engine=$(command -v docker || command -v podman) || die "neither docker nor podman is here"

root=$(mktemp -d)
trap 'rm -rf -- "$root"' EXIT

# add FILE: to its own place, whatever it is called by.
add() { install -D -m 0755 -- "$1" "$root$1"; }
# linked FILE...: the shared libraries that they want, the loader among them, by the names that they use.
linked() { ldd -- "$@" | sed -nE 's/^\t.*=> (\/[^ ]+) \(.*/\1/p; s/^\t(\/[^ ]+) \(.*/\1/p' | sort -u; }

mkdir -- "$root/package"
dpkg-deb --extract "$package" "$root/package"
install -D -m 0755 -- "$root/package/usr/bin/trousseau" "$root/usr/bin/trousseau"
for file in copyright licences.txt.gz sbom.cdx.json.gz; do
    install -D -m 0644 -- "$root/package/usr/share/doc/trousseau/$file" "$root/usr/share/doc/trousseau/$file"
done
rm -r -- "$root/package"
for file in "${libraries[@]}"; do add "$file"; done
while read -r file; do add "$file"; done < <(linked "$root/usr/bin/trousseau" "${libraries[@]}")
install -d -m 0755 -- "$root/etc/trousseau" "$root/run/trousseau" "$root/var/lib/trousseau"
install -d -m 1777 -- "$root/tmp"

tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(stat -c %Y "$package")" -c . |
    "$engine" import --change 'ENTRYPOINT ["/usr/bin/trousseau"]' --change 'CMD ["serve"]' - "$name"
