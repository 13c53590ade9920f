package apiserver

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"trousseau/tests/kubernetes/internal/harness"
)

const (
	providerName = "trousseau" // part of the data in etcd

	// The API server asks for the Status every 20 s while its /readyz is polled.
	noticeLimit = 90 * time.Second
	// Its gRPC client's back-off after an outage of half a minute, and more on a busy machine.
	healLimit = 90 * time.Second
	// A plugin looks for new KEKs every 30 s; then the API server has to ask.
	rotationLimit = 90 * time.Second
)

func provider(apiVersion, name, socket string) string {
	return fmt.Sprintf("  - kms: {apiVersion: %s, name: %s, endpoint: \"unix://%s\"}\n", apiVersion, name, socket)
}

// TestSecrets follows one cluster through its life; each step needs the one before.
func TestSecrets(t *testing.T) {
	const secrets = 1000
	c := newCluster(t)
	plugin := harness.NewPlugin(t)
	watched := harness.FreeAddress(t)
	plugin.Configure(plugin.HSM(), fmt.Sprintf("[observe]\nhttp = %q\n", watched))
	first := plugin.Generate()
	plugin.Start()
	plugin.AwaitReady()
	v2 := provider("v2", providerName, plugin.Socket)

	server := c.start(v2)
	server.awaitReady(startLimit)
	server.create(secrets)
	server.readsAll(secrets)
	old := harness.KeyID(t, harness.Cluster, first.ID)
	c.allUnder(old, secrets)
	hash := server.sharesKeyIDHash(watched)

	t.Log("cold start of the API server")
	server = c.restart(server, secrets, v2)

	t.Log("the plugin stops under the API server")
	plugin.Stop()
	server.await("the API server is no longer ready", noticeLimit, func() error {
		if err := server.probe("/readyz"); !errors.As(err, new(*unhealthy)) {
			return fmt.Errorf("/readyz: %v", err)
		}
		return nil
	})
	if err := server.probe("/livez"); err != nil {
		t.Errorf("without the plugin: %v", err)
	}
	server.readsAll(secrets)
	if err := server.change(0); err != nil { // it goes on under its seed for 3 minutes
		t.Errorf("without the plugin: %v", err)
	}
	plugin.Start()
	server.awaitReady(healLimit)
	server.readsAll(secrets)

	t.Log("the API server starts before the plugin")
	server.stop()
	plugin.Stop()
	server = c.start(v2)
	server.await("the API server cannot read Secrets", startLimit, func() error {
		_, err := server.CoreV1().Secrets(namespace).Get(t.Context(), secret(0).Name, get)
		if err == nil || !strings.Contains(err.Error(), "not transformable") {
			return fmt.Errorf("get a Secret: %v", err)
		}
		return nil
	})
	plugin.Start()
	server.awaitReady(healLimit)
	server.readsAll(secrets)

	t.Log("rotation")
	second := plugin.Generate("--activate-in", "5s")
	renewed := harness.KeyID(t, harness.Cluster, second.ID)
	server.awaitKeyID(c, renewed)
	server.rewrite(secrets)
	server.readsAll(secrets)
	c.allUnder(renewed, secrets)

	t.Log("cold start after the rotation")
	server = c.restart(server, secrets, v2)
	if server.sharesKeyIDHash(watched) == hash {
		t.Errorf("%s is the hash of the new key_id, and was the old one's", hash)
	}
}

// sharesKeyIDHash is the hash of the only key_id of which this API server knows, by its own metrics. The plugin that is
// watched at this address must show the same.
func (s *server) sharesKeyIDHash(watched string) string {
	s.Helper()
	own, err := s.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(s.Context())
	if err != nil {
		s.Fatalf("the API server's metrics: %v", err)
	}
	seen := keyIDHashes("apiserver_envelope_encryption_key_id_hash_total", own)
	shown := keyIDHashes("trousseau_key_id_info", fetch(s.T, "http://"+watched+"/metrics"))
	if len(seen) != 1 || !maps.Equal(seen, shown) {
		s.Fatalf("the API server knows the hashes %v, and the plugin shows %v", seen, shown)
	}
	return slices.Collect(maps.Keys(seen))[0]
}

// keyIDHashes are the values of the label `key_id_hash` in this metric's samples.
func keyIDHashes(metric string, text []byte) map[string]bool {
	hashes := map[string]bool{}
	for _, sample := range regexp.MustCompile(`(?m)^`+metric+`\{.*?\bkey_id_hash="([^"]*)"`).FindAllSubmatch(text, -1) {
		hashes[string(sample[1])] = true
	}
	return hashes
}

func fetch(t *testing.T, address string) []byte {
	t.Helper()
	response, err := http.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s: %v", address, err)
	}
	return body
}

// awaitKeyID waits until the API server writes under this key_id. Meanwhile no request may fail.
func (s *server) awaitKeyID(c *cluster, want string) {
	s.Helper()
	s.await("the API server writes under the new key_id", rotationLimit, func() error {
		s.Helper()
		// This keeps it asking for the Status every 20 s, and must stay ok.
		if err := s.probe("/readyz"); err != nil {
			s.Fatalf("while the key is rotated: %v", err)
		}
		if err := s.change(0); err != nil {
			s.Fatalf("while the key is rotated: %v", err)
		}
		if got := c.keyIDOf(0); got != want {
			return fmt.Errorf("it writes under %s, the new one is %s", got, want)
		}
		return nil
	})
}

// TestMigrationFromV1beta1 moves a cluster from KMS v1 to v2 with one and the same plugin.
func TestMigrationFromV1beta1(t *testing.T) {
	const secrets = 100
	c := newCluster(t)
	plugin, key := harness.StartPlugin(t)
	v1, v2 := provider("v1", "trousseau-v1", plugin.Socket), provider("v2", providerName, plugin.Socket)

	server := c.start(v1)
	server.awaitReady(startLimit)
	server.create(secrets)
	if n := len(c.values("", "k8s:enc:kms:v1:trousseau-v1:")); n != secrets {
		t.Errorf("%d Secrets in etcd, %d were created", n, secrets)
	}

	server = c.restart(server, secrets, v2, v1)
	server.rewrite(secrets)
	server.readsAll(secrets)
	c.allUnder(harness.KeyID(t, harness.Cluster, key.ID), secrets)

	c.restart(server, secrets, v2)
}
