package apiserver

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kms/apis/v1beta1"

	"trousseau/tests/kubernetes/internal/harness"
	"trousseau/tests/kubernetes/internal/older"
)

const (
	transitKey = "KEY" // as the guides name it
	ourSocket  = "/run/trousseau/kms.sock"
)

// TestFromTrousseau goes the way of packaging/guides/from-trousseau.md, with data in each format of the older Trousseau.
func TestFromTrousseau(t *testing.T) {
	const each, encrypted, secrets = 100, 300, 301 // one was there before any encryption
	g := readGuide(t, "from-trousseau.md")
	bao := harness.StartOpenBao(t)
	bao.CreateKey(transitKey)
	old := older.Start(t, bao, transitKey, older.TrousseauV1)
	p := harness.BarePlugin(t)
	p.AddToken() // for the last step: a process sees only tokens whose place it was told when it started
	c := newCluster(t)

	t.Log("step 0: the old plugin, and what it wrote")
	server := c.start(provider("v1", "vaultprovider", old.Socket), "  - identity: {}\n")
	server.awaitReady(startLimit)
	server.create(0)
	for i, format := range []older.Format{older.TrousseauV1, older.TrousseauV2, older.TrousseauV2Proxy} {
		old.Write(format)
		server.createMore(i*each, each)
	}
	c.formats(map[string]int{"vault:v1:": each, "dmF1bHQ6djE6": each, "awskms:-:": each})
	c.putPlain(encrypted)
	c.stored(g, map[string]int{"k8s:enc:kms:v1:vaultprovider:": encrypted})

	t.Log("step 1: its configuration")
	way := &wayOver{T: t, guide: g, plugin: p, bao: bao}
	way.convert()

	t.Log("step 2: this plugin beside it")
	way.check("v2 and v1beta1")
	p.Start()
	p.AwaitReady()
	p.RunAlone("probe", "--socket", p.Socket)
	if said := string(p.RunAlone("status", "--socket", p.Socket)); !strings.Contains(said, p.KeyID()) {
		t.Errorf("status says %q, the key_id is %s", said, p.KeyID())
	}

	t.Log("step 3: the new provider behind the old one")
	third := g.providers("## 3.", "/opt/vault-kms/vaultkms.socket", old.Socket, ourSocket, p.Socket)
	server = c.roll(server, secrets, third)
	server.kmsReady()
	server.mustChange(0)
	c.stored(g, map[string]int{"k8s:enc:kms:v1:vaultprovider:": encrypted})

	t.Log("step 4: the new provider first, and the old data with this plugin; undone, and done again")
	fourth := g.providers("## 4.", ourSocket, p.Socket)
	server = c.roll(server, secrets, fourth)
	server.mustChange(0)
	server = c.roll(server, secrets, third)
	server.mustChange(1)
	server = c.roll(server, secrets, fourth)
	server.kmsReady()
	old.Stop()
	server.mustChange(2)
	c.stored(g, map[string]int{"k8s:enc:kms:v1:vaultprovider:": encrypted - 2, "k8s:enc:kms:v2:trousseau:": 2})

	t.Log("step 5: everything rewritten")
	server.rewrite(secrets)
	c.stored(g, map[string]int{"k8s:enc:kms:v2:trousseau:": secrets})

	t.Log("step 6: the old provider dropped")
	v2 := provider("v2", providerName, p.Socket)
	server = c.roll(server, secrets, v2)
	way.endLegacy()
	server = c.restart(server, secrets, v2)

	t.Log("step 7: the old versions of the key left behind")
	before := p.KeyID()
	bao.Rotate(transitKey)
	p.Reload() // sooner than its next look
	renewed := p.AwaitOtherKeyID(before)
	server = c.restart(server, secrets, v2)
	server.rewrite(secrets)
	c.allUnder(renewed, secrets)
	bao.Call("POST", "transit/keys/"+transitKey+"/config", map[string]any{"min_decryption_version": 2})
	p.Reload()
	server = c.restart(server, secrets, v2)

	t.Log("step 8: on to an HSM")
	vault := way.configuration
	way.configure(vault + p.HSM())
	key := p.Generate("--provider", "hsm")
	p.Reload()
	server = c.restart(server, secrets, v2)
	server.rewrite(secrets)
	c.allUnder(p.KeyID(), secrets)
	way.configure(strings.Replace(vault, "auth = ", "seal = false\nauth = ", 1) + p.HSM())
	p.Reload()
	server = c.restart(server, secrets, v2)
	server.rewrite(secrets)
	p.Configure(p.HSM())
	p.Reload()
	bao.Stop()
	server = c.restart(server, secrets, v2)
	server.mustChange(3)
	c.allUnder(harness.KeyID(t, harness.Cluster, key.ID), secrets)
}

// wayOver is what of the guide is done on the hosts.
type wayOver struct {
	*testing.T
	guide         guide
	plugin        *harness.Plugin
	bao           *harness.OpenBao
	configuration string
}

// convert does step 1 for both generations: what the verb does, and what it leaves to be seen to. The second goes the
// rest of the way.
func (w *wayOver) convert() {
	w.Helper()
	role := w.bao.AppRole(transitKey, w.guide.rules())
	credentials := fmt.Sprintf("roleID: %s, secretID: %s, vaultCACert: %s", role.RoleID, role.SecretID, w.bao.CA)
	first := fmt.Sprintf("provider: vault\nvault: {keynames: [%s], address: %s, %s}\n", transitKey, w.bao.Address, credentials)
	second := fmt.Sprintf("{keyNames: [%s], address: %s, %s, transitPath: transit, authPath: auth}\n", transitKey, w.bao.Address, credentials)
	w.migrate("first", first)
	w.check("v2 and v1beta1")
	const toAdd = `if version 1 served this cluster before, add "trousseau-v1" to legacy.formats`
	if said := w.migrate("second", second); !strings.Contains(said, toAdd) {
		w.Errorf("the verb does not say %q: %s", toAdd, said)
	}
	w.configure(strings.Replace(w.configuration, `formats = [`, `formats = ["trousseau-v1", `, 1))
}

// migrate has the verb convert an old configuration, and adds to what it made what belongs to this test.
func (w *wayOver) migrate(name, old string) (said string) {
	w.Helper()
	from, out := filepath.Join(w.plugin.Dir, name+".yaml"), filepath.Join(w.plugin.Dir, name)
	harness.WriteFile(w, from, old)
	said = string(w.plugin.RunAlone("migrate", "from-trousseau", "--config", from, "--cluster", harness.Cluster, "--out", out))
	w.plugin.Env = append(w.plugin.Env, "CREDENTIALS_DIRECTORY="+filepath.Join(out, "credentials"))
	converted, err := os.ReadFile(filepath.Join(out, "trousseau.toml"))
	if err != nil {
		w.Fatal(err)
	}
	w.configure(strings.NewReplacer(
		"[listen]\n", "[listen]\n"+w.plugin.Listen(),
		"[keyring]\n", "[keyring]\n"+w.plugin.State(),
		"auth = ", "activation-delay = \"1s\"\nauth = ", // ten minutes are too long for a test
	).Replace(string(converted)))
	return said
}

func (w *wayOver) configure(text string) {
	w.Helper()
	w.configuration = text
	harness.WriteFile(w, w.plugin.Config, text)
}

// check fails the test unless the configuration is good, with these versions of KMS.
func (w *wayOver) check(versions string) {
	w.Helper()
	if said := string(w.plugin.Run("check")); !strings.Contains(said, "("+versions+")") {
		w.Errorf("check does not say %s: %s", versions, said)
	}
}

// endLegacy does what step 6 says of this plugin's configuration.
func (w *wayOver) endLegacy() {
	w.Helper()
	text, _, _ := strings.Cut(w.configuration, "\n# Gone again")
	w.configure(strings.Replace(text, "v1beta1 = true\n", "", 1) + "\n")
	w.check("v2")
	w.plugin.Stop()
	w.plugin.Start()
	w.plugin.AwaitReady()
	client := v1beta1.NewKeyManagementServiceClient(w.plugin.Dial("localhost"))
	_, err := client.Version(w.Context(), &v1beta1.VersionRequest{Version: "v1beta1"})
	if status.Code(err) != codes.Unimplemented {
		w.Errorf("v1beta1 is still served: %v", err)
	}
}

// putPlain puts a Secret into etcd as an API server without encryption does.
func (c *cluster) putPlain(i int) {
	c.Helper()
	plain := secret(i)
	plain.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
	content, err := json.Marshal(plain)
	if err == nil {
		_, err = c.etcd.Put(c.Context(), "/registry/secrets/"+namespace+"/"+plain.Name, string(content))
	}
	if err != nil {
		c.Fatal(err)
	}
}

// formats fails the test unless so many of the old plugin's ciphertexts in etcd begin so.
func (c *cluster) formats(want map[string]int) {
	c.Helper()
	got := map[string]int{}
	for _, value := range c.values("", "k8s:enc:kms:v1:vaultprovider:") {
		for beginning := range want {
			if bytes.HasPrefix(value[min(2, len(value)):], []byte(beginning)) { // behind its length
				got[beginning]++
			}
		}
	}
	if !maps.Equal(got, want) {
		c.Errorf("the old plugin's ciphertexts in etcd begin with: %v instead of %v", got, want)
	}
}
