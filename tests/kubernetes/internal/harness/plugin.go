package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsv2 "k8s.io/kms/apis/v2"
)

// Cluster is the name that every test's plugin gives to its cluster.
const Cluster = "test-1"

const readyLimit = 20 * time.Second

// Plugin is the real plugin, with a token, a keyring and a configuration of its own.
type Plugin struct {
	Token   *Token
	Socket  string
	t       testing.TB
	dir     string
	binary  string
	config  string
	process *Process
}

// Key is what `key generate` says of the KEK that it made.
type Key struct {
	Identity  string    `json:"identity"`
	ID        string    `json:"id"`
	NotBefore time.Time `json:"not-before"`
}

// NewPlugin makes a token and a configuration. Nothing runs yet, and there is no KEK.
func NewPlugin(t testing.TB) *Plugin {
	t.Helper()
	// Not t.TempDir: the test's name would make the socket's path longer than the 107 bytes that are allowed.
	dir, err := os.MkdirTemp("", "trousseau-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary := os.Getenv("TROUSSEAU_BIN")
	if binary == "" {
		binary = "../../../target/debug/trousseau"
	}
	p := &Plugin{
		t:      t,
		dir:    dir,
		binary: Program(t, binary, "build it with `cargo build`, or set TROUSSEAU_BIN"),
		Socket: filepath.Join(dir, "kms.sock"),
		config: filepath.Join(dir, "trousseau.toml"),
		Token:  NewToken(t, dir),
	}
	p.writeConfig()
	return p
}

func (p *Plugin) writeConfig() {
	p.t.Helper()
	module := ""
	if p.Token.Module != "" {
		module = fmt.Sprintf("module = %q\n", p.Token.Module)
	}
	WriteFile(p.t, p.config, fmt.Sprintf(`version = "v1"
[listen]
socket = %q
mode = "0600"
allow-uids = [%d]
v1beta1 = true
[keyring]
cluster = %q
state = %q
[[provider]]
name = "hsm"
type = "pkcs11"
profile = %q
%stokens = ["pkcs11:token=%s"]
pin-file = %q
sessions = 4
`, p.Socket, os.Getuid(), Cluster, MakeDir(p.t, filepath.Join(p.dir, "state")), p.Token.Profile, module, tokenLabel, p.Token.PINFile))
}

// StartPlugin is the usual beginning of a test: a plugin that serves with one KEK.
func StartPlugin(t testing.TB) (*Plugin, Key) {
	t.Helper()
	p := NewPlugin(t)
	key := p.Generate()
	p.Start()
	p.AwaitReady()
	return p, key
}

// Start runs the daemon and waits for its socket only: it may have no usable token yet.
func (p *Plugin) Start() {
	p.t.Helper()
	process := StartProcess(p.t, p.dir, "plugin", p.Token.Env, p.binary, "serve", "--config", p.config)
	p.process = process
	p.t.Cleanup(func() { p.stop(process) }) // before the process's own clean-up, which does not judge
	Await(p.t, readyLimit, "the plugin's socket accepts", func() error {
		p.t.Helper()
		if err := process.Running(); err != nil {
			p.t.Fatal(err)
		}
		connection, err := net.Dial("unix", p.Socket)
		if err == nil {
			connection.Close()
		}
		return err
	})
}

// AwaitReady waits until Status says ok.
func (p *Plugin) AwaitReady() {
	p.t.Helper()
	client := kmsv2.NewKeyManagementServiceClient(p.Dial("localhost"))
	Await(p.t, readyLimit, "the plugin is healthy", func() error {
		p.t.Helper()
		if err := p.process.Running(); err != nil {
			p.t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(p.t.Context(), 3*time.Second)
		defer cancel()
		answer, err := client.Status(ctx, &kmsv2.StatusRequest{})
		if err == nil && answer.Healthz != "ok" {
			err = fmt.Errorf("healthz is %q", answer.Healthz)
		}
		return err
	})
}

// Stop ends the daemon, which must drain and exit with 0.
func (p *Plugin) Stop() {
	p.t.Helper()
	p.stop(p.process)
}

func (p *Plugin) stop(process *Process) {
	p.t.Helper()
	if err := process.Stop(); err != nil {
		p.t.Errorf("the plugin ended with: %v", err)
	}
}

// Run runs one verb of the plugin with this configuration and returns what it prints.
func (p *Plugin) Run(verb ...string) []byte {
	p.t.Helper()
	command := exec.Command(p.binary, append(verb, "--config", p.config)...)
	command.Env = append(os.Environ(), p.Token.Env...)
	output, err := command.Output()
	if err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			err = fmt.Errorf("%w\n%s", err, exit.Stderr)
		}
		p.t.Fatalf("trousseau %v: %v", verb, err)
	}
	return output
}

// Generate makes a KEK in the token. A test machine's clock need not be synchronized.
func (p *Plugin) Generate(arguments ...string) Key {
	p.t.Helper()
	output := p.Run(append([]string{"key", "generate", "--unsynchronized-clock-ok", "--output", "json"}, arguments...)...)
	var key Key
	if err := json.Unmarshal(output, &key); err != nil || key.ID == "" {
		p.t.Fatalf("key generate printed no KEK (%v): %s", err, output)
	}
	return key
}

// Dial opens one gRPC connection to the plugin under the given `:authority`, as grpc-go writes it.
func (p *Plugin) Dial(authority string, options ...grpc.DialOption) *grpc.ClientConn {
	p.t.Helper()
	options = append(options, grpc.WithAuthority(authority), grpc.WithTransportCredentials(insecure.NewCredentials()))
	connection, err := grpc.NewClient("unix:"+p.Socket, options...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { connection.Close() })
	return connection
}
