// Package harness runs the real plugin beside a throw-away token, for tests that speak to it over its socket.
package harness

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Lacking skips the test for want of a part of the machine, or fails it where every part is meant to be there.
func Lacking(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" || os.Getenv("TROUSSEAU_TEST_REQUIRE") == "1" {
		t.Fatalf("lacking: "+format, args...)
	}
	t.Skipf("lacking: "+format, args...)
}

// Program finds a program by path or name, as a shell would.
func Program(t testing.TB, program, remedy string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		Lacking(t, "%v: %s", err, remedy)
	}
	return path
}

// Await polls until condition returns nil, and fails the test with its last error when that takes too long.
func Await(t testing.TB, limit time.Duration, what string, condition func() error) {
	t.Helper()
	start := time.Now()
	for {
		err := condition()
		if err == nil {
			t.Logf("%s after %v", what, time.Since(start).Round(time.Millisecond))
			return
		}
		if time.Since(start) > limit {
			t.Fatalf("waited %v for: %s; last: %v", limit, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// WriteFile writes a file that only its owner may read or write.
func WriteFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// MakeDir makes a directory that only its owner may enter, and its parents.
func MakeDir(t testing.TB, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// RandomBytes returns n random bytes.
func RandomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}
