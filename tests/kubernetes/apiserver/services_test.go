package apiserver

import (
	"maps"
	"testing"

	"trousseau/tests/kubernetes/internal/harness"
)

// twoServices is a plugin with a token and an OpenBao, whose `[[provider]]` comes with it. It does not serve yet.
func twoServices(t *testing.T) (*harness.Plugin, *harness.OpenBao, func(more ...string) string) {
	t.Helper()
	bao := harness.StartOpenBao(t)
	p := harness.NewPlugin(t)
	p.Generate()
	return p, bao, bao.Provider("kek")
}

// TestEitherServiceAway loses the token and OpenBao in turn, and has the API server restarted without them.
func TestEitherServiceAway(t *testing.T) {
	const secrets, written, rounds = 200, 50, 100
	p, bao, vault := twoServices(t)
	if p.Token.Profile != "softhsm" {
		t.Skip("lacking: a token that is gone when its files are; kryoptic holds them open")
	}
	p.Configure(p.HSM(), vault())
	p.Start()
	p.AwaitReady()
	c := newCluster(t)
	v2 := provider("v2", providerName, p.Socket)
	server := c.start(v2)
	server.awaitReady(startLimit)
	server.create(secrets)
	c.sealedFor(map[int]int{2: secrets})

	for _, outage := range []struct {
		what       string
		begin, end func()
	}{
		{"the token is gone", func() { p.Token.Hide(t) }, func() { p.Token.Show(t) }},
		{"OpenBao is sealed", bao.Seal, bao.Unseal},
		{"OpenBao hangs", bao.Pause, bao.Resume},
		{"OpenBao is stopped", bao.Stop, func() { bao.Start(); bao.Unseal() }},
	} {
		t.Log(outage.what)
		keyID := p.KeyID()
		load := startLoad(server, p, newCaller(t, p).first())
		load.more(rounds)
		outage.begin()
		load.awaitRecipients(1)
		load.more(rounds)
		load.stop()
		p.Stop() // as at a boot, both start without it
		p.Start()
		server = c.restart(server, secrets, v2)
		each(t, "write a Secret", written, server.change)
		c.sealedFor(map[int]int{1: written, 2: secrets - written})

		t.Log("it is back")
		load = startLoad(server, p, newCaller(t, p).first())
		outage.end()
		load.awaitRecipients(2)
		load.more(rounds)
		load.stop()
		c.allUnder(keyID, secrets)

		t.Log("a rotation replaces what only one of the two can open")
		p.Generate("--provider", "hsm", "--activate-in", "0s")
		p.Reload() // sooner than its next look
		server = c.restart(server, secrets, v2)
		server.rewrite(secrets)
		c.allUnder(p.AwaitOtherKeyID(keyID), secrets)
		c.sealedFor(map[int]int{2: secrets})
	}
}

// service is one to which a plugin moves from its token.
type service struct {
	provider func(more ...string) string // its `[[provider]]`
	makeKEK  func()                      // once it is in the configuration
}

// TestMoveToAnotherService goes the way of packaging/guides/to-another-service.md from a token.
func TestMoveToAnotherService(t *testing.T) {
	for _, to := range []struct {
		what string
		make func(*testing.T, *harness.Plugin) service
	}{
		{"OpenBao", func(t *testing.T, _ *harness.Plugin) service {
			return service{harness.StartOpenBao(t).Provider("kek"), func() {}} // the key is one
		}},
		{"another vendor's token", func(_ *testing.T, p *harness.Plugin) service {
			token := p.AddOtherToken()
			provider := func(more ...string) string { return token.Provider("other", more...) }
			return service{provider, func() { p.Generate("--provider", "other") }}
		}},
	} {
		t.Run(to.what, func(t *testing.T) {
			p := harness.NewPlugin(t)
			p.Generate()
			move(t, p, to.make(t, p))
		})
	}
}

// move does it under one running plugin and one running API server. Another control plane's plugin is always a step behind.
func move(t *testing.T, p *harness.Plugin, to service) {
	const secrets = 200
	other := p.Beside()
	for _, plugin := range []*harness.Plugin{p, other} {
		plugin.Start()
		plugin.AwaitReady()
	}
	c := newCluster(t)
	v2 := provider("v2", providerName, p.Socket)
	server := c.start(v2)
	server.awaitReady(startLimit)
	server.create(secrets)

	oldest := newCaller(t, p).first() // under the KEK in the token alone
	step := func(what string, makeKEK func(), providers ...string) {
		t.Log(what)
		load := startLoad(server, p, oldest)
		p.Configure(providers...)
		makeKEK()
		p.Reload()
		load.more(100)
		load.stop()
		eachOpensTheOthers(t, p, other)
		other.Configure(providers...)
		other.Reload()
		eachOpensTheOthers(t, p, other)
		if p.KeyID() != other.KeyID() {
			t.Errorf("two plugins, two key_ids: %s and %s", p.KeyID(), other.KeyID())
		}
	}
	rewriteAll := func(recipients int) {
		server.awaitKeyID(c, p.KeyID())
		server.rewrite(secrets)
		c.allUnder(p.KeyID(), secrets)
		c.sealedFor(map[int]int{recipients: secrets})
	}
	none := func() {}
	before := p.KeyID()
	step("add", to.makeKEK, p.HSM(), to.provider())
	rewriteAll(2)
	both := p.KeyID()
	step("seal = false", none, p.HSM("seal = false"), to.provider())
	rewriteAll(1)
	after := p.KeyID()
	if before == both || both == after || after == before {
		t.Errorf("a key_id has come back: %s, %s, %s", before, both, after)
	}
	oldest = newCaller(t, p).first() // which takes the place of the other one, as the rewritings did
	step("remove", none, to.provider())
	p.Token.Hide(t)
	server.mustChange(0)
	server = c.restart(server, secrets, v2)
	server.mustChange(1)
	c.allUnder(after, secrets)
}

// eachOpensTheOthers fails the test unless what one plugin encrypts now the other one decrypts.
func eachOpensTheOthers(t *testing.T, one, other *harness.Plugin) {
	t.Helper()
	seed := harness.RandomBytes(32)
	for _, pair := range [][2]*harness.Plugin{{one, other}, {other, one}} {
		envelope, err := newCaller(t, pair[0]).encrypt(seed)
		if err == nil {
			err = newCaller(t, pair[1]).opens(envelope, seed)
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// sealedFor fails the test unless so many Secrets in etcd are sealed under so many KEKs each.
func (c *cluster) sealedFor(want map[int]int) {
	c.Helper()
	got := map[int]int{}
	for name, object := range c.objects(providerName, "") {
		n, err := harness.Recipients(object.EncryptedDEKSource)
		if err != nil {
			c.Errorf("%s in etcd: %v", name, err)
		}
		got[n]++
	}
	if !maps.Equal(got, want) {
		c.Errorf("Secrets in etcd by recipients: %v instead of %v", got, want)
	}
}
