#!/bin/sh
# Builds kube-apiserver and etcd from the Go module proxy, once for each state of what they are made of,
# and prints the directory that holds them. The first build takes minutes; progress goes to stderr.
set -eu
cd "$(dirname "$0")"

inputs="go.mod go.sum build.sh cmd/kube-apiserver/main.go cmd/etcd/main.go"
# shellcheck disable=SC2086
hash=$(cat $inputs | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/trousseau
directory=$cache/kubernetes-$hash
if [ -d "$directory" ]; then
    echo "$directory"
    exit 0
fi

# The API server refuses features that its own version, read from here, does not know.
version=$(CGO_ENABLED=0 go list -m -f '{{.Version}}' k8s.io/kubernetes)
package=k8s.io/component-base/version
minor=${version#v1.}
minor=${minor%%.*}
flags="-s -w -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$minor"

# Built aside and renamed, so that a build that broke off never looks complete.
mkdir -p "$cache"
aside=$(mktemp -d "$cache/building-XXXXXX")
trap 'rm -rf "$aside"' EXIT
for server in etcd kube-apiserver; do
    echo "building $server ($version)" >&2
    # Without cgo the servers are static. With no -trimpath the tests share the compiler's cache with them.
    CGO_ENABLED=0 nice -n 10 go build -p 2 -tags servers -ldflags "$flags" -o "$aside/$server" "./cmd/$server" >&2
done
chmod 755 "$aside"
# Another build may have finished first: then its result stands.
mv -T "$aside" "$directory" 2>/dev/null || [ -d "$directory" ]
echo "$directory"
