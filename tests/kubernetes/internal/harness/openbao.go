package harness

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// OpenBao is a real OpenBao: on loopback, over TLS, unsealed, with Transit. Its data are in files, so that it can be
// stopped and started.
type OpenBao struct {
	Address   string
	CA        string
	t         testing.TB
	dir       string
	program   string
	client    *http.Client
	root      string // a token
	unsealKey string
	process   *Process
}

// StartOpenBao starts the program that TROUSSEAU_BAO names.
func StartOpenBao(t testing.TB) *OpenBao {
	t.Helper()
	program := os.Getenv("TROUSSEAU_BAO")
	if program == "" {
		Lacking(t, "TROUSSEAU_BAO: set it to what tests/transit/openbao.sh prints")
	}
	dir := t.TempDir()
	certificate := NewCertificate(t, dir)
	address, clusterAddress := FreeAddress(t), FreeAddress(t)
	WriteFile(t, filepath.Join(dir, "bao.hcl"), fmt.Sprintf(`
storage "raft" {
  path = %q
  node_id = "only"
  performance_multiplier = 1
}
listener "tcp" {
  address = %q
  cluster_address = %q
  tls_cert_file = %q
  tls_key_file = %q
}
api_addr = "https://%s"
cluster_addr = "https://%s"
`, MakeDir(t, filepath.Join(dir, "data")), address, clusterAddress, certificate.Certificate, certificate.Key, address, clusterAddress))
	b := &OpenBao{t: t, dir: dir, program: program, Address: "https://" + address, CA: certificate.CA, client: clientThatTrusts(t, certificate.CA)}
	b.Start()
	made := b.Call("POST", "sys/init", object{"secret_shares": 1, "secret_threshold": 1})
	b.root = made["root_token"].(string)
	b.unsealKey = made["keys"].([]any)[0].(string)
	b.Unseal()
	b.Call("POST", "sys/mounts/transit", object{"type": "transit"})
	return b
}

func clientThatTrusts(t testing.TB, ca string) *http.Client {
	t.Helper()
	content, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(content)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authorities}, MaxIdleConnsPerHost: 16}
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

type object = map[string]any

// Start starts it; with data from before, it is sealed then.
func (b *OpenBao) Start() {
	b.t.Helper()
	b.process = StartProcess(b.t, b.dir, "openbao", nil, b.program, "server", "-config", filepath.Join(b.dir, "bao.hcl"))
	b.awaitHealth(http.StatusNotImplemented, http.StatusServiceUnavailable) // not initialized, sealed
}

// Stop ends it.
func (b *OpenBao) Stop() {
	b.t.Helper()
	if err := b.process.Stop(); err != nil {
		b.t.Errorf("OpenBao ended with: %v", err)
	}
}

// Seal seals it: it answers, and does nothing.
func (b *OpenBao) Seal() {
	b.t.Helper()
	b.Call("PUT", "sys/seal", nil)
}

// Unseal unseals it and waits until it serves.
func (b *OpenBao) Unseal() {
	b.t.Helper()
	b.Call("POST", "sys/unseal", object{"key": b.unsealKey})
	b.awaitHealth(http.StatusOK)
}

func (b *OpenBao) awaitHealth(wanted ...int) {
	b.t.Helper()
	Await(b.t, readyLimit, fmt.Sprintf("OpenBao's health is %v", wanted), func() error {
		b.t.Helper()
		if err := b.process.Running(); err != nil {
			b.t.Fatal(err)
		}
		status, _, err := b.ask("GET", "sys/health", nil)
		for _, wanted := range wanted {
			if err == nil && status == wanted {
				return nil
			}
		}
		return fmt.Errorf("health %d: %v", status, err)
	})
}

// Pause has it answer nothing from now on, though it still takes connections.
func (b *OpenBao) Pause() {
	b.t.Helper()
	b.process.Signal(syscall.SIGSTOP)
}

// Resume ends that.
func (b *OpenBao) Resume() {
	b.t.Helper()
	b.process.Signal(syscall.SIGCONT)
}

// CreateKey makes a key of Transit.
func (b *OpenBao) CreateKey(key string) {
	b.t.Helper()
	b.Call("POST", "transit/keys/"+key, object{})
}

// Rotate makes a new version of the key.
func (b *OpenBao) Rotate(key string) {
	b.t.Helper()
	b.Call("POST", "transit/keys/"+key+"/rotate", object{})
}

// Encrypt has Transit encrypt, as any of its clients does.
func (b *OpenBao) Encrypt(key string, plaintext []byte) (string, error) {
	return b.transit("encrypt", key, "plaintext", base64.StdEncoding.EncodeToString(plaintext), "ciphertext")
}

// Decrypt is the way back.
func (b *OpenBao) Decrypt(key, ciphertext string) ([]byte, error) {
	encoded, err := b.transit("decrypt", key, "ciphertext", ciphertext, "plaintext")
	if err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(encoded)
}

func (b *OpenBao) transit(verb, key, name, value, wanted string) (string, error) {
	answer, err := b.try("POST", "transit/"+verb+"/"+key, object{name: value})
	if err != nil {
		return "", err
	}
	return answer["data"].(object)[wanted].(string), nil
}

// LatestVersion is the number of the key's newest version.
func (b *OpenBao) LatestVersion(key string) (string, error) {
	answer, err := b.try("GET", "transit/keys/"+key, nil)
	if err != nil {
		return "", err
	}
	return fmt.Sprint(answer["data"].(object)["latest_version"]), nil
}

// Provider makes a key, and is the `[[provider]]` of a plugin that uses it, with more lines of it.
func (b *OpenBao) Provider(key string) func(more ...string) string {
	b.t.Helper()
	b.CreateKey(key)
	role := b.AppRole(key, fmt.Sprintf(`
path "transit/encrypt/%[1]s" { capabilities = ["update"] }
path "transit/decrypt/%[1]s" { capabilities = ["update"] }
path "transit/keys/%[1]s" { capabilities = ["read"] }
`, key))
	roleID, secretID := filepath.Join(b.dir, "role-id"), filepath.Join(b.dir, "secret-id")
	WriteFile(b.t, roleID, role.RoleID)
	WriteFile(b.t, secretID, role.SecretID)
	return func(more ...string) string {
		return fmt.Sprintf(`[[provider]]
name = "vault"
type = "transit"
address = %q
key = %q
ca-file = %q
auth = { method = "approle", role-id-file = %q, secret-id-file = %q }
%s
`, b.Address, key, b.CA, roleID, secretID, strings.Join(more, "\n"))
	}
}

// AppRole are the credentials of somebody who can do with one key what a plugin must, and no more.
type AppRole struct{ RoleID, SecretID string }

// AppRole makes a role that is named like the key, with a policy of these rules, and its credentials.
func (b *OpenBao) AppRole(key, rules string) AppRole {
	b.t.Helper()
	b.Call("POST", "sys/policies/acl/"+key, object{"policy": rules})
	b.Call("POST", "sys/auth/approle", object{"type": "approle"})
	role := "auth/approle/role/" + key
	b.Call("POST", role, object{"token_policies": key, "token_ttl": "1h"})
	id := b.Call("GET", role+"/role-id", nil)["data"].(object)["role_id"].(string)
	secret := b.Call("POST", role+"/secret-id", object{})["data"].(object)["secret_id"].(string)
	return AppRole{id, secret}
}

// Call asks as root for something that must succeed.
func (b *OpenBao) Call(method, path string, body any) map[string]any {
	b.t.Helper()
	answer, err := b.try(method, path, body)
	if err != nil {
		b.t.Fatal(err)
	}
	return answer
}

func (b *OpenBao) try(method, path string, body any) (object, error) {
	status, answer, err := b.ask(method, path, body)
	if err == nil && status/100 != 2 {
		err = fmt.Errorf("%d %v", status, answer["errors"])
	}
	if err != nil {
		return nil, fmt.Errorf("OpenBao: %s %s: %w", method, path, err)
	}
	return answer, nil
}

func (b *OpenBao) ask(method, path string, body any) (int, object, error) {
	content, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	request, err := http.NewRequest(method, b.Address+"/v1/"+path, bytes.NewReader(content))
	if err != nil {
		return 0, nil, err
	}
	request.Header.Set("X-Vault-Token", b.root)
	response, err := b.client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	answer := object{}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil && err != io.EOF {
		return 0, nil, err
	}
	return response.StatusCode, answer, nil
}

// FreeAddress is a loopback address on which nobody listens just now.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
