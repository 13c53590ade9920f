// Package older stands in for the plugins from which clusters come to this one: it writes what they wrote.
package older

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"k8s.io/kms/apis/v1beta1"
	"k8s.io/kms/apis/v2"

	"trousseau/tests/kubernetes/internal/harness"
)

// Format is how a plugin writes what Transit answered.
type Format string

// As `[legacy]` names them.
const (
	TrousseauV1        Format = "trousseau-v1"
	TrousseauV2        Format = "trousseau-v2"
	TrousseauV2Proxy   Format = "trousseau-v2-proxy"
	VaultKubernetesKMS Format = "vault-kubernetes-kms"
)

// Plugin serves v1beta1, and v2 as vault-kubernetes-kms does.
type Plugin struct {
	Socket string
	bao    *harness.OpenBao
	key    string
	format atomic.Value
	server *grpc.Server
}

// Start starts a plugin that encrypts under this key of Transit.
func Start(t testing.TB, bao *harness.OpenBao, key string, format Format) *Plugin {
	t.Helper()
	dir, err := os.MkdirTemp("", "older-") // t.TempDir would be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &Plugin{Socket: filepath.Join(dir, "kms.sock"), bao: bao, key: key, server: grpc.NewServer()}
	p.Write(format)
	listener, err := net.Listen("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	v1beta1.RegisterKeyManagementServiceServer(p.server, ofV1beta1{Plugin: p})
	v2.RegisterKeyManagementServiceServer(p.server, ofV2{Plugin: p})
	go p.server.Serve(listener)
	t.Cleanup(p.Stop)
	return p
}

// Write has it write in this format from now on. It reads them all.
func (p *Plugin) Write(format Format) { p.format.Store(format) }

// Stop ends it.
func (p *Plugin) Stop() { p.server.Stop() }

func (p *Plugin) encrypt(plaintext []byte) ([]byte, error) {
	ciphertext, err := p.bao.Encrypt(p.key, plaintext)
	if err != nil {
		return nil, err
	}
	encoded := base64.StdEncoding.EncodeToString([]byte(ciphertext))
	switch p.format.Load() {
	case TrousseauV2:
		ciphertext = encoded
	case TrousseauV2Proxy:
		ciphertext = fmt.Sprintf("awskms:-:%s\nvault:-:%s\n", base64.StdEncoding.EncodeToString([]byte("of another service")), encoded)
	}
	return []byte(ciphertext), nil
}

func (p *Plugin) decrypt(ciphertext string) ([]byte, error) {
	encoded := ciphertext
	for line := range strings.Lines(ciphertext) {
		if rest, ok := strings.CutPrefix(line, "vault:-:"); ok {
			encoded = strings.TrimSuffix(rest, "\n")
		}
	}
	if !strings.HasPrefix(encoded, "vault:v") {
		decoded, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return nil, errors.New("nothing that an older plugin wrote")
		}
		encoded = string(decoded)
	}
	return p.bao.Decrypt(p.key, encoded)
}

type ofV1beta1 struct {
	v1beta1.UnimplementedKeyManagementServiceServer
	*Plugin
}

func (ofV1beta1) Version(context.Context, *v1beta1.VersionRequest) (*v1beta1.VersionResponse, error) {
	return &v1beta1.VersionResponse{Version: "v1beta1", RuntimeName: "older", RuntimeVersion: "1"}, nil
}

func (p ofV1beta1) Encrypt(_ context.Context, request *v1beta1.EncryptRequest) (*v1beta1.EncryptResponse, error) {
	cipher, err := p.encrypt(request.Plain)
	return &v1beta1.EncryptResponse{Cipher: cipher}, err
}

func (p ofV1beta1) Decrypt(_ context.Context, request *v1beta1.DecryptRequest) (*v1beta1.DecryptResponse, error) {
	plain, err := p.decrypt(string(request.Cipher))
	return &v1beta1.DecryptResponse{Plain: plain}, err
}

// ofV2 names the latest version of the key in its key_id, whichever version encrypted.
type ofV2 struct {
	v2.UnimplementedKeyManagementServiceServer
	*Plugin
}

func (p ofV2) Status(context.Context, *v2.StatusRequest) (*v2.StatusResponse, error) {
	version, err := p.bao.LatestVersion(p.key)
	return &v2.StatusResponse{Version: "v2", Healthz: "ok", KeyId: version}, err
}

func (p ofV2) Encrypt(_ context.Context, request *v2.EncryptRequest) (*v2.EncryptResponse, error) {
	ciphertext, err := p.encrypt(request.Plaintext)
	if err != nil {
		return nil, err
	}
	version, err := p.bao.LatestVersion(p.key)
	return &v2.EncryptResponse{Ciphertext: ciphertext, KeyId: version}, err
}

func (p ofV2) Decrypt(_ context.Context, request *v2.DecryptRequest) (*v2.DecryptResponse, error) {
	plaintext, err := p.decrypt(string(request.Ciphertext))
	return &v2.DecryptResponse{Plaintext: plaintext}, err
}
