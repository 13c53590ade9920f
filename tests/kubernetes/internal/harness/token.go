package harness

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const tokenLabel = "trousseau"

// Token is a PKCS#11 token in software, made for one test. All that it stores lies in one directory.
type Token struct {
	Env     []string // what every process that loads the module needs
	Profile string
	Module  string // empty: where the profile says
	PINFile string
	store   string
	aside   string
}

// NewToken makes the token that TROUSSEAU_TEST_TOKEN names: softhsm (the default) or kryoptic.
func NewToken(t testing.TB, dir string) *Token {
	t.Helper()
	return newToken(t, dir, cmp.Or(os.Getenv("TROUSSEAU_TEST_TOKEN"), "softhsm"))
}

func newToken(t testing.TB, dir, profile string) *Token {
	t.Helper()
	token := &Token{
		Profile: profile,
		PINFile: filepath.Join(dir, "pin"),
		store:   MakeDir(t, filepath.Join(dir, "token")),
		aside:   MakeDir(t, filepath.Join(dir, "token-aside")),
	}
	conf := filepath.Join(dir, "token.conf")
	switch profile {
	case "softhsm":
		token.Env = []string{"SOFTHSM2_CONF=" + conf}
		WriteFile(t, conf, fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", token.store))
	case "kryoptic":
		if token.Module = os.Getenv("TROUSSEAU_KRYOPTIC_MODULE"); token.Module == "" {
			Lacking(t, "TROUSSEAU_KRYOPTIC_MODULE: set it to what tests/tokens/build.sh kryoptic prints")
		}
		token.Env = []string{"KRYOPTIC_CONF=" + conf}
		WriteFile(t, conf, fmt.Sprintf("[[slots]]\nslot = 1\ndbtype = \"sqlite\"\ndbargs = %q\n", filepath.Join(token.store, "token.sql")))
	default:
		t.Fatalf("TROUSSEAU_TEST_TOKEN=%s: softhsm and kryoptic are known", profile)
	}
	token.initialize(t)
	return token
}

func (token *Token) initialize(t testing.TB) {
	t.Helper()
	pin := hex.EncodeToString(RandomBytes(6))
	WriteFile(t, token.PINFile, pin)
	arguments := []string{"--init-token", "--free", "--label", tokenLabel, "--so-pin", pin + "so", "--pin", pin}
	if token.Module != "" {
		arguments = append(arguments, "--module", token.Module)
	}
	command := exec.Command(Program(t, "softhsm2-util", "install the package softhsm2"), arguments...)
	command.Env = append(os.Environ(), token.Env...)
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, output)
	}
}

// Provider is the `[[provider]]` of the token under this name, with more lines of it.
func (token *Token) Provider(name string, more ...string) string {
	module := ""
	if token.Module != "" {
		module = fmt.Sprintf("module = %q\n", token.Module)
	}
	return fmt.Sprintf(`[[provider]]
name = %q
type = "pkcs11"
profile = %q
%stokens = ["pkcs11:token=%s"]
pin-file = %q
sessions = 4
%s
`, name, token.Profile, module, tokenLabel, token.PINFile, strings.Join(more, "\n"))
}

// Hide takes the token away from processes that look for it from now on.
func (token *Token) Hide(t testing.TB) {
	t.Helper()
	moveAll(t, token.store, token.aside)
}

// Show brings a hidden token back.
func (token *Token) Show(t testing.TB) {
	t.Helper()
	moveAll(t, token.aside, token.store)
}

func moveAll(t testing.TB, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil || len(entries) == 0 {
		t.Fatalf("nothing of the token is in %s (%v)", from, err)
	}
	for _, entry := range entries {
		if err := os.Rename(filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
}
