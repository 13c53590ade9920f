#!/usr/bin/env bash
# Builds one of the test modules here, `kryoptic` or `fault`, and prints the path of the .so on stdout.
# Installs nothing: cargo and a C linker must be there and, for kryoptic, libclang and the headers of OpenSSL and SQLite
# (tests/run.sh sees to that). The result is cached by a hash of its recipe.
set -euo pipefail

name=$1
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/$name" && pwd)
library=libtrousseau_test_$name.so

hash=$(cd -- "$recipe" && { rustc -V; sha256sum Cargo.toml Cargo.lock ../build.sh src/*.rs; } |
    sha256sum | cut -c1-16)
home=${XDG_CACHE_HOME:-$HOME/.cache}/trousseau/$name-$hash

if [[ ! -e $home/$library ]]; then
    mkdir -p -- "${home%/*}"
    # Written aside and renamed: an interrupted build never looks like a finished one.
    aside=$(mktemp -d "$home.XXXXXX")
    trap 'rm -rf -- "$aside"' EXIT
    cargo build --release --locked --manifest-path "$recipe/Cargo.toml" \
        --target-dir "$aside/target" >&2
    mkdir -- "$aside/done"
    cp -- "$aside/target/release/$library" "$aside/done/"
    # Another build of the same recipe may have finished first; both are alike.
    mv -T -- "$aside/done" "$home" 2>/dev/null || [[ -e $home/$library ]]
fi
printf '%s\n' "$home/$library"
