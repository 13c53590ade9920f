package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	kmsv2 "k8s.io/kms/apis/v2"

	"trousseau/tests/kubernetes/internal/harness"
)

var firstSeed = []byte("first")

// caller calls a plugin with the API server's patience.
type caller struct {
	*testing.T
	kmsv2.KeyManagementServiceClient
}

func newCaller(t *testing.T, p *harness.Plugin) caller {
	t.Helper()
	return caller{t, kmsv2.NewKeyManagementServiceClient(p.Dial("localhost"))}
}

func (c caller) patience() (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), 3*time.Second)
}

func (c caller) encrypt(seed []byte) (*kmsv2.EncryptResponse, error) {
	ctx, cancel := c.patience()
	defer cancel()
	envelope, err := c.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: seed, Uid: "test"}, grpc.WaitForReady(true))
	if err != nil {
		err = fmt.Errorf("encrypt: %w", err)
	}
	return envelope, err
}

// first encrypts what a load reads.
func (c caller) first() *kmsv2.EncryptResponse {
	c.Helper()
	envelope, err := c.encrypt(firstSeed)
	if err != nil {
		c.Fatal(err)
	}
	return envelope
}

func (c caller) opens(envelope *kmsv2.EncryptResponse, want []byte) error {
	ctx, cancel := c.patience()
	defer cancel()
	request := &kmsv2.DecryptRequest{Ciphertext: envelope.Ciphertext, KeyId: envelope.KeyId, Uid: "test"}
	opened, err := c.Decrypt(ctx, request, grpc.WaitForReady(true))
	switch {
	case err != nil:
		return fmt.Errorf("decrypt: %w", err)
	case !bytes.Equal(opened.Plaintext, want):
		return errors.New("decrypt: another seed came back")
	}
	return nil
}

// load are writes and reads that go on: through the API server, and, since that asks the plugin seldom, of the plugin.
type load struct {
	*server
	plugin   caller
	first    *kmsv2.EncryptResponse // from before whatever happens
	end      context.CancelFunc
	waiting  sync.WaitGroup
	lock     sync.Mutex
	done     int
	failures []error
}

// startLoad starts it; what is read of the plugin again and again is first.
func startLoad(s *server, p *harness.Plugin, first *kmsv2.EncryptResponse) *load {
	s.Helper()
	ctx, end := context.WithCancel(s.Context())
	l := &load{server: s, plugin: newCaller(s.T, p), first: first, end: end}
	for _, work := range []func() error{l.thereAndBack, l.thereAndBack, l.back, func() error { return s.change(0) }, l.list} {
		l.waiting.Go(func() {
			for ctx.Err() == nil {
				err := work()
				l.lock.Lock()
				l.done++
				if err != nil {
					l.failures = append(l.failures, err)
				}
				l.lock.Unlock()
			}
		})
	}
	return l
}

// more waits for so many more rounds.
func (l *load) more(rounds int) {
	l.Helper()
	before := l.rounds()
	harness.Await(l, noticeLimit, fmt.Sprintf("%d rounds of the load", rounds), func() error {
		if n := l.rounds() - before; n < rounds {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
}

func (l *load) rounds() int {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.done
}

// stop ends it. Not one request may have failed.
func (l *load) stop() {
	l.Helper()
	l.end()
	l.waiting.Wait()
	if n := len(l.failures); n > 0 {
		l.Errorf("%d of %d rounds of the load failed, the first: %v; the last: %v", n, l.done, l.failures[0], l.failures[n-1])
	}
}

// awaitRecipients waits until new envelopes are sealed under so many KEKs.
func (l *load) awaitRecipients(want int) {
	l.Helper()
	harness.Await(l, noticeLimit, fmt.Sprintf("envelopes have %d recipients", want), func() error {
		envelope, err := l.plugin.encrypt(harness.RandomBytes(32))
		if err != nil {
			return err
		}
		n, err := harness.Recipients(envelope.Ciphertext)
		if err == nil && n != want {
			err = fmt.Errorf("they have %d", n)
		}
		return err
	})
}

func (l *load) thereAndBack() error {
	seed := harness.RandomBytes(32)
	envelope, err := l.plugin.encrypt(seed)
	if err != nil {
		return err
	}
	return l.plugin.opens(envelope, seed)
}

func (l *load) back() error { return l.plugin.opens(l.first, firstSeed) }

func (l *load) list() error {
	_, err := l.CoreV1().Secrets(namespace).List(l.Context(), list)
	return err
}
