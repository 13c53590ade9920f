package apiserver

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"trousseau/tests/kubernetes/internal/harness"
	"trousseau/tests/kubernetes/internal/older"
)

// TestFromVaultKubernetesKMS goes the way of packaging/guides/from-vault-kubernetes-kms.md, with data of KMS v2 under
// two versions of the key.
func TestFromVaultKubernetesKMS(t *testing.T) {
	const each, secrets, oldName, key = 50, 100, "vault-kms", "kms"
	way, g := readGuide(t, "from-trousseau.md"), readGuide(t, "from-vault-kubernetes-kms.md")
	bao := harness.StartOpenBao(t)
	bao.CreateKey(key)
	old := older.Start(t, bao, key, older.VaultKubernetesKMS)
	p := harness.BarePlugin(t)
	c := newCluster(t)

	t.Log("step 0: the old plugin, and what it wrote")
	server := c.start(provider("v2", oldName, old.Socket))
	server.awaitReady(startLimit)
	server.create(each)
	bao.Rotate(key)
	server = c.restart(server, each, provider("v2", oldName, old.Socket))
	server.createMore(each, each)
	if got, want := c.keyIDs(oldName), (map[string]int{"1": each, "2": each}); !maps.Equal(got, want) {
		t.Errorf("the old plugin's key_ids in etcd: %v instead of %v", got, want)
	}

	t.Log("steps 1 and 2: the configuration from the guide, and this plugin beside the old one")
	role := bao.AppRole(key, strings.ReplaceAll(way.rules(), transitKey, key))
	credentials := harness.MakeDir(t, filepath.Join(p.Dir, "credentials"))
	harness.WriteFile(t, filepath.Join(credentials, "vault-role-id"), role.RoleID+"\n")
	harness.WriteFile(t, filepath.Join(credentials, "vault-secret-id"), role.SecretID+"\n")
	p.Env = append(p.Env, "CREDENTIALS_DIRECTORY="+credentials)
	configuration := strings.NewReplacer(
		"https://vault.example:8200", bao.Address,
		"/etc/trousseau/vault-ca.pem", bao.CA,
		"[listen]\n", "[listen]\n"+p.Listen(),
		"[keyring]\n", "[keyring]\n"+p.State(),
	).Replace(g.block("[legacy]"))
	harness.WriteFile(t, p.Config, configuration)
	p.Run("check")
	p.Start()
	p.AwaitReady()

	t.Log("step 3: the new provider behind the old one")
	ours := provider("v2", providerName, p.Socket)
	server = c.roll(server, secrets, provider("v2", oldName, old.Socket), ours)
	server.kmsReady()

	t.Log("step 4: the new provider first, and the old data with this plugin")
	server = c.roll(server, secrets, ours, provider("v2", oldName, p.Socket))
	server.kmsReady()
	old.Stop()
	server.mustChange(0)
	c.stored(way, map[string]int{"k8s:enc:kms:v2:" + oldName + ":": secrets - 1, "k8s:enc:kms:v2:trousseau:": 1})

	t.Log("step 5: everything rewritten")
	server.rewrite(secrets)
	c.allUnder(p.KeyID(), secrets)

	t.Log("step 6: the old provider dropped")
	server = c.roll(server, secrets, ours)
	configuration, _, _ = strings.Cut(configuration, "[legacy]")
	harness.WriteFile(t, p.Config, configuration)
	p.Run("check")
	p.Reload()
	c.restart(server, secrets, ours)
}
