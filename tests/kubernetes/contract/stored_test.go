package contract

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	stored "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	"k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"

	"trousseau/tests/kubernetes/internal/harness"
)

func init() { klog.SetLogger(klog.Logger{}) } // the API server's packages log each damaged value

// where is the path in etcd, which the API server authenticates.
var where = value.DefaultContext("/registry/secrets/default/one")

const (
	v2Prefix = "k8s:enc:kms:v2:trousseau:"
	v1Prefix = "k8s:enc:kms:v1:trousseau:"
)

// apiServer is the half of an API server that speaks to a KMS plugin: its loader, transformers and health checks.
type apiServer struct {
	value.Transformer
	*testing.T
	check func() error
}

// startAPIServer does what an API server does at its start, and again at each restart.
func startAPIServer(t *testing.T, plugin *harness.Plugin, apiVersion string) apiServer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "encryption.yaml")
	cache := ""
	if apiVersion == "v1" {
		cache = ", cachesize: 1000"
	}
	harness.WriteFile(t, path, fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: %s, name: trousseau, endpoint: "unix://%s", timeout: 10s%s}
`, apiVersion, plugin.Socket, cache))
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, path, false, "test")
	if err != nil {
		t.Fatalf("the API server refuses the configuration: %v", err)
	}
	return apiServer{config.Transformers[schema.GroupResource{Resource: "secrets"}], t, func() error {
		return config.HealthChecks[0].Check(httptest.NewRequest("GET", "/readyz", nil))
	}}
}

func (s apiServer) write(plaintext []byte) []byte {
	s.Helper()
	value, err := s.TransformToStorage(s.Context(), plaintext, where)
	if err != nil {
		s.Fatalf("the API server cannot write: %v", err)
	}
	return value
}

// reads fails the test unless the stored value opens, and is stale or not, as said.
func (s apiServer) reads(value, plaintext []byte, wantStale bool) {
	s.Helper()
	got, stale, err := s.TransformFromStorage(s.Context(), value, where)
	if err != nil || !bytes.Equal(got, plaintext) || stale != wantStale {
		s.Errorf("read: %v, the same plaintext: %v, stale: %v instead of %v", err, bytes.Equal(got, plaintext), stale, wantStale)
	}
}

func decodeV2(t *testing.T, value []byte) *stored.EncryptedObject {
	t.Helper()
	encoded, ok := bytes.CutPrefix(value, []byte(v2Prefix))
	object := &stored.EncryptedObject{}
	if err := proto.Unmarshal(encoded, object); err != nil || !ok {
		t.Fatalf("stored value is not of %s: %v", v2Prefix, err)
	}
	return object
}

func encodeV2(t *testing.T, object *stored.EncryptedObject) []byte {
	t.Helper()
	encoded, err := proto.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte(v2Prefix), encoded...)
}

func TestStoredV2(t *testing.T) {
	plugin, key := harness.StartPlugin(t)
	server := startAPIServer(t, plugin, "v2")
	if err := server.check(); err != nil {
		t.Errorf("health check: %v", err)
	}
	plaintext := []byte("the content of a Secret")
	value := server.write(plaintext)
	object := decodeV2(t, value)
	keyID := harness.KeyID(t, harness.Cluster, key.ID)
	if object.KeyID != keyID {
		t.Errorf("stored under key_id %q, the KEK's is %q", object.KeyID, keyID)
	}
	identity := harness.Identity(t, key.ID)
	if got := object.EncryptedDEKSource[identityAt:algorithmAt]; !bytes.Equal(got, identity) {
		t.Errorf("the envelope names KEK %x, the token's is %x", got, identity)
	}

	restarted := startAPIServer(t, plugin, "v2")
	restarted.reads(value, plaintext, false)
	refusesEveryBit(t, object.EncryptedDEKSource, func(ciphertext []byte) ([]byte, error) {
		damaged := proto.CloneOf(object)
		damaged.EncryptedDEKSource = ciphertext
		opened, _, err := restarted.TransformFromStorage(t.Context(), encodeV2(t, damaged), where)
		return opened, err
	})
	// No damage is remembered against the token: a server that starts now reads and writes.
	after := startAPIServer(t, plugin, "v2")
	after.reads(value, plaintext, false)
	if err := after.check(); err != nil {
		t.Errorf("health check after damaged values: %v", err)
	}
}

func TestStoredV2Rotation(t *testing.T) {
	plugin, _ := harness.StartPlugin(t)
	plaintext := []byte("the content of a Secret")
	before := startAPIServer(t, plugin, "v2")
	old := before.write(plaintext)
	second := plugin.Generate("--activate-in", "1s")
	newV2(t, plugin).awaitKeyID(harness.KeyID(t, harness.Cluster, second.ID))

	before.reads(old, plaintext, false) // has not asked for the Status since
	after := startAPIServer(t, plugin, "v2")
	after.reads(old, plaintext, true)
	after.reads(after.write(plaintext), plaintext, false)
	before.reads(after.write(plaintext), plaintext, true)
}

func TestStoredV1(t *testing.T) {
	if err := feature.DefaultMutableFeatureGate.Set("KMSv1=true"); err != nil {
		t.Fatal(err)
	}
	plugin, _ := harness.StartPlugin(t)
	server := startAPIServer(t, plugin, "v1")
	if err := server.check(); err != nil { // encrypts and decrypts the four bytes `ping`
		t.Errorf("health check: %v", err)
	}
	plaintext := []byte("the content of a Secret")
	value := server.write(plaintext)
	rest, ok := bytes.CutPrefix(value, []byte(v1Prefix))
	if !ok {
		t.Fatalf("stored value is not of %s", v1Prefix)
	}
	length := binary.BigEndian.Uint16(rest)
	wrapped, data := rest[2:2+length], rest[2+length:]

	restarted := startAPIServer(t, plugin, "v1")
	restarted.reads(value, plaintext, false)
	refusesEveryBit(t, wrapped, func(ciphertext []byte) ([]byte, error) {
		damaged := binary.BigEndian.AppendUint16([]byte(v1Prefix), uint16(len(ciphertext)))
		damaged = append(append(damaged, ciphertext...), data...)
		opened, _, err := restarted.TransformFromStorage(t.Context(), damaged, where)
		return opened, err
	})
	after := startAPIServer(t, plugin, "v1")
	after.reads(value, plaintext, false)
	if err := after.check(); err != nil {
		t.Errorf("health check after damaged values: %v", err)
	}
}
