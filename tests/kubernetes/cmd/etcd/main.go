//go:build servers

// Command etcd is the real etcd, built as a dependency of these tests.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
