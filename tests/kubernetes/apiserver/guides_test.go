package apiserver

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path"
	"strconv"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// guide is one of packaging/guides. What the tests do stands in it, so that it is the guide that is tried.
type guide struct {
	*testing.T
	text string
}

func readGuide(t *testing.T, name string) guide {
	t.Helper()
	content, err := os.ReadFile(path.Join("../../../packaging/guides", name))
	if err != nil {
		t.Fatal(err)
	}
	return guide{t, string(content)}
}

// block is the first block of code with this in it.
func (g guide) block(marker string) string {
	g.Helper()
	for i, part := range strings.Split(g.text, "```") {
		if i%2 == 1 && strings.Contains(part, marker) {
			_, code, _ := strings.Cut(part, "\n") // the first line has the language
			return code
		}
	}
	g.Fatalf("the guide has no block with %q", marker)
	return ""
}

// rules are those of the policy.
func (g guide) rules() string {
	g.Helper()
	_, rules, _ := strings.Cut(g.block("vault policy write"), "POLICY'\n")
	rules, _, _ = strings.Cut(rules, "POLICY")
	return rules
}

// providers are those of the EncryptionConfiguration below this heading, with other sockets.
func (g guide) providers(heading string, sockets ...string) string {
	g.Helper()
	_, below, _ := strings.Cut(g.text, "\n"+heading)
	_, providers, _ := strings.Cut(guide{g.T, below}.block("providers:"), "providers:\n")
	return strings.NewReplacer(sockets...).Replace(strings.ReplaceAll("\n"+providers, "\n    ", "\n"))
}

// stored fails the test unless the guide's command counts these beginnings of Secrets in etcd.
func (c *cluster) stored(g guide, want map[string]int) {
	c.Helper()
	answer, err := c.etcd.Get(c.Context(), "/registry/secrets", clientv3.WithPrefix())
	if err != nil {
		c.Fatal(err)
	}
	var values bytes.Buffer // as `etcdctl get --print-value-only` prints them
	for _, stored := range answer.Kvs {
		values.Write(append(stored.Value, '\n'))
	}
	_, command, _ := strings.Cut(g.block("--print-value-only"), "--print-value-only |")
	count := exec.Command("sh", "-c", command)
	count.Stdin, count.Stderr = &values, os.Stderr
	output, err := count.Output()
	if err != nil {
		c.Fatalf("%s: %v", command, err)
	}
	got := map[string]int{}
	for line := range strings.Lines(string(output)) {
		if fields := strings.Fields(line); len(fields) == 2 {
			got[fields[1]], _ = strconv.Atoi(fields[0])
		}
	}
	if !maps.Equal(got, want) {
		c.Errorf("Secrets in etcd begin with: %v instead of %v", got, want)
	}
}

// kmsReady fails the test unless all KMS providers are well, as the API server says.
func (s *server) kmsReady() {
	s.Helper()
	body, err := s.Discovery().RESTClient().Get().AbsPath("/readyz").Param("verbose", "true").DoRaw(s.Context())
	checks := 0
	for line := range strings.Lines(string(body)) {
		if strings.Contains(line, "kms-provider") {
			checks++
			if !strings.HasSuffix(strings.TrimSpace(line), " ok") {
				s.Error(line)
			}
		}
	}
	if checks == 0 {
		s.Errorf("/readyz?verbose says nothing of kms-provider (%v): %s", err, body)
	}
}
