package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsv2 "k8s.io/kms/apis/v2"
)

// Cluster is the name that every test's plugin gives to its cluster.
const Cluster = "test-1"

const readyLimit = 60 * time.Second

// Plugin is the real plugin, with a configuration and a state of its own.
type Plugin struct {
	Token   *Token // nil: it has none
	Socket  string
	Config  string
	Dir     string
	Env     []string // what the daemon and every verb need
	t       testing.TB
	binary  string
	client  kmsv2.KeyManagementServiceClient
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
	p := BarePlugin(t)
	p.AddToken()
	p.Configure(p.HSM())
	return p
}

// BarePlugin has neither a token nor a configuration.
func BarePlugin(t testing.TB) *Plugin {
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
	return &Plugin{
		t:      t,
		Dir:    dir,
		binary: Program(t, binary, "build it with `cargo build`, or set TROUSSEAU_BIN"),
		Socket: filepath.Join(dir, "kms.sock"),
		Config: filepath.Join(dir, "trousseau.toml"),
	}
}

// AddToken makes a token, in which there is no KEK.
func (p *Plugin) AddToken() {
	p.t.Helper()
	p.Token = NewToken(p.t, p.Dir)
	p.Env = append(p.Env, p.Token.Env...)
}

// AddOtherToken makes another vendor's token, in which there is no KEK, for a provider of its own.
func (p *Plugin) AddOtherToken() *Token {
	p.t.Helper()
	profile := "kryoptic"
	if p.Token.Profile == profile {
		profile = "softhsm"
	}
	token := newToken(p.t, MakeDir(p.t, filepath.Join(p.Dir, "other")), profile)
	p.Env = append(p.Env, token.Env...)
	return token
}

// Beside is another control plane's plugin, with the same tokens and configuration, and a state of its own.
func (p *Plugin) Beside() *Plugin {
	p.t.Helper()
	other := BarePlugin(p.t)
	other.Token, other.Env = p.Token, p.Env
	other.Configure(p.HSM())
	return other
}

// Configure writes the usual configuration, with these tables: `[[provider]]` and others.
func (p *Plugin) Configure(tables ...string) {
	p.t.Helper()
	WriteFile(p.t, p.Config, fmt.Sprintf(`version = "v1"
[listen]
%smode = "0600"
v1beta1 = true
[keyring]
cluster = %q
%s%s`, p.Listen(), Cluster, p.State(), strings.Join(tables, "")))
}

// Listen is what of `[listen]` belongs to this test and machine.
func (p *Plugin) Listen() string {
	return fmt.Sprintf("socket = %q\nallow-uids = [%d]\n", p.Socket, os.Getuid())
}

// State is what of `[keyring]` belongs to this test.
func (p *Plugin) State() string {
	p.t.Helper()
	return fmt.Sprintf("state = %q\n", MakeDir(p.t, filepath.Join(p.Dir, "state")))
}

// HSM is the `[[provider]]` of the token, with more lines of it.
func (p *Plugin) HSM(more ...string) string { return p.Token.Provider("hsm", more...) }

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
	process := StartProcess(p.t, p.Dir, "plugin", p.Env, p.binary, "serve", "--config", p.Config)
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
	Await(p.t, readyLimit, "the plugin is healthy", func() error {
		p.t.Helper()
		if err := p.process.Running(); err != nil {
			p.t.Fatal(err)
		}
		_, err := p.status()
		return err
	})
}

// KeyID is the key_id that Status says.
func (p *Plugin) KeyID() string {
	p.t.Helper()
	keyID, err := p.status()
	if err != nil {
		p.t.Fatal(err)
	}
	return keyID
}

// AwaitOtherKeyID waits until Status says another key_id than this one, and returns it.
func (p *Plugin) AwaitOtherKeyID(old string) (keyID string) {
	p.t.Helper()
	Await(p.t, readyLimit, "the plugin has another key_id", func() (err error) {
		if keyID, err = p.status(); err == nil && keyID == old {
			err = errors.New("it is still " + old)
		}
		return err
	})
	return keyID
}

func (p *Plugin) status() (string, error) {
	p.t.Helper()
	if p.client == nil {
		p.client = kmsv2.NewKeyManagementServiceClient(p.Dial("localhost"))
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), 3*time.Second)
	defer cancel()
	answer, err := p.client.Status(ctx, &kmsv2.StatusRequest{}, grpc.WaitForReady(true))
	if err == nil && answer.Healthz != "ok" {
		err = fmt.Errorf("healthz is %q", answer.Healthz)
	}
	return answer.GetKeyId(), err
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
	if p.Token == nil {
		return
	}
	pin, err := os.ReadFile(p.Token.PINFile)
	if err == nil && strings.Contains(process.Log(), string(pin)) {
		p.t.Errorf("the plugin's log shows the PIN:\n%s", process.Log())
	}
}

// Reload has the daemon read its configuration again, which it must take.
func (p *Plugin) Reload() {
	p.t.Helper()
	const taken, refused = "configuration read again", "the new configuration is not used"
	before := strings.Count(p.process.Log(), taken)
	p.process.Signal(syscall.SIGHUP)
	Await(p.t, readyLimit, "the plugin takes its new configuration", func() error {
		p.t.Helper()
		log := p.process.Log()
		if strings.Contains(log, refused) {
			p.t.Fatal(refused)
		}
		if strings.Count(log, taken) == before {
			return errors.New("nothing in its log")
		}
		return nil
	})
}

// Run runs one verb of the plugin with this configuration and returns what it prints.
func (p *Plugin) Run(verb ...string) []byte {
	p.t.Helper()
	return p.RunAlone(append(verb, "--config", p.Config)...)
}

// RunAlone runs one verb of the plugin and returns what it prints.
func (p *Plugin) RunAlone(verb ...string) []byte {
	p.t.Helper()
	command := exec.Command(p.binary, verb...)
	command.Env = append(os.Environ(), p.Env...)
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
