// Package apiserver runs the real Kubernetes API server and etcd with the plugin.
package apiserver

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"trousseau/tests/kubernetes/internal/harness"
)

const (
	startLimit = 90 * time.Second // for the API server on a busy machine; 4 s on an idle one
	token      = "a-token-for-loopback-only"
)

// cluster is a store and what an API server needs beside it; API servers come and go.
type cluster struct {
	*testing.T
	etcd     *clientv3.Client
	endpoint string
	dir      string
	programs string
	shown    harness.Certificate
}

// newCluster starts an empty etcd.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	programs := os.Getenv("KUBERNETES_BIN")
	if programs == "" {
		harness.Lacking(t, "KUBERNETES_BIN: set it to what tests/kubernetes/build.sh prints")
	}
	c := &cluster{T: t, dir: t.TempDir(), programs: programs}
	client, peer := harness.FreeAddress(t), harness.FreeAddress(t)
	c.endpoint = "http://" + client
	harness.StartProcess(t, c.dir, "etcd", nil, c.program("etcd"),
		"--data-dir", filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", c.endpoint, "--advertise-client-urls", c.endpoint,
		"--listen-peer-urls", "http://"+peer, "--initial-advertise-peer-urls", "http://"+peer,
		"--initial-cluster", "default=http://"+peer)
	var err error
	c.etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{c.endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.etcd.Close() })
	harness.Await(t, startLimit, "etcd answers", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.etcd.Get(ctx, "any")
		return err
	})
	c.shown = harness.NewCertificate(t, c.dir)
	harness.WriteFile(t, c.path("tokens.csv"), token+`,admin,admin,"system:masters"`+"\n")
	return c
}

func (c *cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) program(name string) string {
	return harness.Program(c, filepath.Join(c.programs, name), "set KUBERNETES_BIN to what tests/kubernetes/build.sh prints")
}

// server is one running API server.
type server struct {
	*testing.T
	*kubernetes.Clientset
	process *harness.Process
}

// start runs an API server whose Secrets go through these providers (of an EncryptionConfiguration, in order),
// and waits until it answers at all: to be live and ready, it needs the plugin.
func (c *cluster) start(providers ...string) *server {
	c.Helper()
	harness.WriteFile(c, c.path("encryption.yaml"), `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
`+strings.Join(providers, ""))
	address := harness.FreeAddress(c)
	_, port, _ := net.SplitHostPort(address)
	s := &server{T: c.T, process: harness.StartProcess(c, c.dir, "kube-apiserver", nil, c.program("kube-apiserver"),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port="+port,
		"--etcd-servers="+c.endpoint,
		"--encryption-provider-config="+c.path("encryption.yaml"),
		"--feature-gates=KMSv1=true", // off since 1.29
		"--tls-cert-file="+c.shown.Certificate, "--tls-private-key-file="+c.shown.Key,
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.shown.Certificate, "--service-account-signing-key-file="+c.shown.Key,
		"--token-auth-file="+c.path("tokens.csv"), "--authorization-mode=RBAC",
		"--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
	)}
	var err error
	s.Clientset, err = kubernetes.NewForConfig(&rest.Config{
		Host:            "https://" + address,
		BearerToken:     token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: c.shown.CA},
		QPS:             -1, // no limit
		Timeout:         30 * time.Second,
	})
	if err != nil {
		c.Fatal(err)
	}
	s.await("the API server answers", startLimit, func() error {
		if err := s.probe("/livez"); !errors.As(err, new(*unhealthy)) {
			return err
		}
		return nil
	})
	return s
}

// restart ends the API server and starts another one, with these providers. It must become ready, and read from etcd
// the n Secrets that are there.
func (c *cluster) restart(s *server, n int, providers ...string) *server {
	c.Helper()
	s.stop()
	s = c.start(providers...)
	s.awaitReady(startLimit)
	s.readsAll(n)
	return s
}

// roll has an API server with these providers take over, as control planes are changed one after the other: for a while
// there are both, and each reads what the other one writes.
func (c *cluster) roll(old *server, n int, providers ...string) *server {
	c.Helper()
	s := c.start(providers...)
	s.awaitReady(startLimit)
	for _, writer := range []*server{s, old} {
		writer.mustChange(n / 2)
		s.readsAll(n)
		old.readsAll(n)
	}
	old.stop()
	return s
}

// unhealthy is the answer of a health endpoint that is not ok.
type unhealthy struct{ path, failed string }

func (u *unhealthy) Error() string { return u.path + " fails: " + u.failed }

// probe asks one of the API server's health endpoints.
func (s *server) probe(path string) error {
	body, err := s.Discovery().RESTClient().Get().AbsPath(path).DoRaw(s.Context())
	if err == nil || len(body) == 0 {
		return err
	}
	var failed []string
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "[-]") {
			failed = append(failed, strings.TrimSpace(line))
		}
	}
	return &unhealthy{path, strings.Join(failed, ", ")}
}

// await waits for a condition that this API server must live to see.
func (s *server) await(what string, limit time.Duration, condition func() error) {
	s.Helper()
	harness.Await(s, limit, what, func() error {
		s.Helper()
		if err := s.process.Running(); err != nil {
			s.Fatal(err)
		}
		return condition()
	})
}

func (s *server) awaitReady(limit time.Duration) {
	s.Helper()
	s.await("the API server is ready", limit, func() error { return s.probe("/readyz") })
}

func (s *server) stop() {
	s.Helper()
	if err := s.process.Stop(); err != nil {
		s.Errorf("the API server ended with: %v", err)
	}
}

var (
	get  = metav1.GetOptions{}
	list = metav1.ListOptions{}
)
