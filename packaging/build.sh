#!/usr/bin/env bash
# Builds the deb and the rpm, both from the tree that packaging/files lists.
set -euo pipefail
# shellcheck source=packaging/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'USAGE'
usage: packaging/build.sh [--revision N] [DIRECTORY]

Builds trousseau_VERSION-N_ARCH.deb and trousseau-VERSION-N.ARCH.rpm into DIRECTORY (default: target/packages), for this
machine, and for arm64 (or amd64, on arm64) where that Rust target and its linker are installed.
  --revision N  of the packages, for another build of the same version (default: 1)

What it needs and is not there is installed from Debian, as root or with sudo; cargo-auditable goes into the cache.
The same commit and tools give the same packages, byte for byte. Where the sources are not a clone, as in an archive,
TROUSSEAU_COMMIT tells the commit.
USAGE
}

revision=1
directory=
while (($#)); do
    case $1 in
        --revision) revision=${2?--revision needs a number} && shift ;;
        -h | --help) usage && exit ;;
        -*) usage >&2 && exit 2 ;;
        *) directory=$1 ;;
    esac
    shift
done
[[ $revision =~ ^[1-9][0-9]*$ ]] || die "--revision $revision is not a number"

cd -- "$repository"
mkdir -p -- "$cache"
directory=$(realpath -m -- "${directory:-$CARGO_TARGET_DIR/packages}")
work=$(mktemp -d)
log=$work/log
finish() {
    failed_step 40 || true
    rm -rf -- "$work"
}
trap finish EXIT

version=$(sed -n 's/^version *= *"\(.*\)"$/\1/p' Cargo.toml | head -n 1)
# git of these sources; it fails where they are not in a repository of their own.
own_git() {
    [[ $(git -c 'safe.directory=*' rev-parse --show-toplevel 2>/dev/null) == "$(realpath -- "$repository")" ]] &&
        git -c 'safe.directory=*' "$@"
}
commit=${TROUSSEAU_COMMIT:-$(own_git describe --always --dirty --exclude='*' --abbrev=12 || true)}
export TROUSSEAU_COMMIT=$commit
# What bears a date bears that of the sources.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(own_git log -1 --format=%ct || stat -c %Y Cargo.toml)}
export SOURCE_DATE_EPOCH

# Puts into the binary from which crates it was made: the bill of materials and the licences are read out of it.
auditable_version=0.7.0
ensure_auditable() {
    local home=$cache/cargo-auditable-$auditable_version
    [[ -x $home/bin/cargo-auditable ]] ||
        cargo install --locked --root "$home" "cargo-auditable@$auditable_version"
    PATH=$home/bin:$PATH
}

# names TARGET: sets what Debian, rpm and the linker call it.
names() {
    target=$1
    case $target in
        x86_64-*) deb=amd64 rpm=x86_64 linker=x86_64-linux-gnu-gcc ;;
        aarch64-*) deb=arm64 rpm=aarch64 linker=aarch64-linux-gnu-gcc ;;
        *) die "packages are made for x86_64 and aarch64, not for $target" ;;
    esac
    made=$work/$deb/made
    tree=$work/$deb/tree
}
has_target() { [[ -d $(rustc --print target-libdir --target "$1") ]] && command -v "$linker" >/dev/null; }

# build_binary: where the sources and crates lie here is nobody's business.
build_binary() {
    local place=$CARGO_TARGET_DIR upper=${target^^} arguments=()
    export RUSTFLAGS="--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$repository=/trousseau"
    RUSTFLAGS+=" --remap-path-prefix=$CARGO_TARGET_DIR=/target"
    if [[ $target != "$host" ]]; then
        export "CARGO_TARGET_${upper//-/_}_LINKER=$linker"
        arguments=(--target "$target")
        place+=/$target
    fi
    cargo auditable build --locked --release --bin trousseau "${arguments[@]}"
    unset RUSTFLAGS
    mkdir -p -- "$made"
    cp -- "$place/release/trousseau" "$made/trousseau"
}

# The rest of what packaging/files calls made.
make_rest() {
    cargo run --locked --example pages -- "$made"
    cargo metadata --locked --format-version 1 --filter-platform "$target" |
        packaging/bill.py "$made/trousseau" "${commit:-none: built without git}" "$made/sbom.cdx.json" "$made/licences.txt"
    checkmodule -M -m -o "$work/trousseau.mod" packaging/selinux/trousseau.te
    semodule_package -o "$made/trousseau.pp" -m "$work/trousseau.mod" -f packaging/selinux/trousseau.fc
}

# lay_out: the tree that packaging/files lists.
lay_out() {
    local mode place from file
    while read -r mode place from; do
        case $mode in
            '' | '#'*) ;;
            dir) install -d -m 0755 -- "$tree$place" ;;
            link) install -d -m 0755 -- "$(dirname -- "$tree$place")" && ln -s -- "$from" "$tree$place" ;;
            *)
                [[ $from != made/* ]] || from=$work/$deb/$from
                # The last field may be a pattern.
                for file in $from; do lay "$mode" "$file" "$place"; done
                ;;
        esac
    done <packaging/files
    find "$tree" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
}
# lay MODE FILE PLACE: a directory, or `*` in a name, takes the file's own name.
lay() {
    local place=$3
    [[ $place != */ ]] || place+=$(basename -- "$2")
    place=$tree${place//\*/$(basename -- "$2")}
    if [[ $place == *.gz ]]; then
        gzip -9nc -- "$2" >"$work/compressed"
        install -D -m "$1" -- "$work/compressed" "$place"
    else
        install -D -m "$1" -- "$2" "$place"
    fi
}

# The newest of glibc's symbol versions that the binary wants.
glibc_of() { readelf --version-info "$1" | grep -o 'GLIBC_[0-9.]*' | sed s/GLIBC_// | sort -uV | tail -n 1; }

build_deb() {
    local root=$work/$deb/deb
    cp -a -- "$tree" "$root"
    # Two files are Debian's alone.
    install -D -m 0644 -- packaging/deb/lintian-overrides "$root/usr/share/lintian/overrides/trousseau"
    printf 'trousseau (%s-%s) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- %s  %s\n' "$version" "$revision" \
        "$(sed -n 's/^Maintainer: //p' packaging/deb/control)" "$(date -uRd "@$SOURCE_DATE_EPOCH")" |
        gzip -9nc >"$root/usr/share/doc/trousseau/changelog.Debian.gz"
    mkdir -- "$root/DEBIAN"
    install -m 0755 -- packaging/deb/{postinst,prerm,postrm} "$root/DEBIAN/"
    (cd -- "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) >"$work/md5sums"
    install -m 0644 -- "$work/md5sums" "$root/DEBIAN/md5sums"
    sed -e "s/@VERSION@/$version-$revision/; s/@ARCHITECTURE@/$deb/; s/@GLIBC@/$(glibc_of "$made/trousseau")/" \
        -e "s/@SIZE@/$(du -sk --apparent-size "$tree" | cut -f1)/" packaging/deb/control >"$root/DEBIAN/control"
    find "$root" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
    dpkg-deb --root-owner-group --build "$root" "$directory/trousseau_$version-${revision}_$deb.deb"
}

build_rpm() {
    # Files, and of the directories those that are ours alone.
    {
        (cd -- "$tree" && find . \( -type f -o -type l \) -printf '"/%P"\n' | sort | sed 's|^"/usr/share/doc/|%doc &|')
        (cd -- "$tree" && find . -type d -path '*/trousseau*' -printf '%%dir "/%P"\n' | sort)
    } >"$work/$deb/rpm-files"
    rpmbuild -bb --target "$rpm-linux" \
        -D "_topdir $work/$deb/rpm" -D "_rpmdir $work/$deb" -D "_rpmfilename trousseau.rpm" \
        -D "trousseau_version $version" -D "trousseau_release $revision" -D "trousseau_tree $tree" \
        -D "trousseau_files $work/$deb/rpm-files" \
        -D "trousseau_date $(LC_ALL=C date -ud "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')" packaging/rpm/trousseau.spec
    mv -- "$work/$deb/trousseau.rpm" "$directory/trousseau-$version-$revision.$rpm.rpm"
}

# package TARGET: both packages for it.
package() {
    names "$1"
    step "compiling for $deb" build_binary
    step "man pages, licences, bill of materials, SELinux module" make_rest
    step "laying out the files" lay_out
    step "packing the deb" build_deb
    step "packing the rpm" build_rpm
}

step "installing packages, where missing" install_packages \
    binutils ca-certificates checkpolicy git python3 rpm semodule-utils
step "finding Rust $(rust_wanted) or newer, else installing Debian's" ensure_rust
step "finding cargo-auditable, else building it" ensure_auditable
mkdir -p -- "$directory"
host=$(rustc -vV | sed -n 's/^host: //p')
package "$host"
case $host in
    x86_64-*) other=aarch64-unknown-linux-gnu ;;
    *) other=x86_64-unknown-linux-gnu ;;
esac
names "$other"
if has_target "$other"; then
    package "$other"
else
    say "not built for $deb: the Rust target $other or its linker $linker is not installed"
fi
say "" "in $directory:"
(cd -- "$directory" && ls -1sh -- *-"$revision"[._]*)
