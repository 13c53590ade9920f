// Package authority sends what grpc-go really puts into `:authority` on a path socket, which stock h2 refuses,
// in thousands of requests on one connection, so that HPACK's dynamic table turns over many times.
package authority

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"k8s.io/kms/apis/v1beta1"
	"k8s.io/kms/apis/v2"

	"trousseau/tests/kubernetes/internal/harness"
)

const (
	requests = 4032 // for each form and each version of the API
	streams  = 32
	// The three requests of a round are the version's own question (Status, Version), Encrypt and Decrypt.
	rounds    = requests / streams / 3
	turnovers = 100 // of the dynamic table, at least
)

func TestAuthority(t *testing.T) {
	plugin, _ := harness.StartPlugin(t)
	for _, form := range []struct{ name, authority string }{
		{"localhost", "localhost"},
		{"escaped path", "%2Frun%2Ftrousseau%2Fkms.sock"},
		{"path", "/run/trousseau/kms.sock"},
		{"this socket", url.PathEscape(plugin.Socket)},
	} {
		for version, newRound := range map[string]func(*grpc.ClientConn) round{"v2": roundV2, "v1beta1": roundV1beta1} {
			t.Run(form.name+", "+version, func(t *testing.T) { load(t, plugin, form.authority, newRound) })
		}
	}
}

// round makes three requests on a connection: `with` gives each its context.
type round func(with func() (context.Context, context.CancelFunc)) error

func load(t *testing.T, plugin *harness.Plugin, authority string, newRound func(*grpc.ClientConn) round) {
	var connections, literals atomic.Int32
	literal := hpack.AppendHuffmanString(nil, authority)
	dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		connections.Add(1)
		connection, err := (&net.Dialer{}).DialContext(ctx, "unix", plugin.Socket)
		return watched{connection, literal, &literals}, err
	})
	round := newRound(plugin.Dial(authority, dialer))
	var failed atomic.Int32
	var waiting sync.WaitGroup
	for stream := range streams {
		// Seeded, so that a failure can be repeated.
		random := rand.New(rand.NewPCG(1, uint64(stream)))
		waiting.Go(func() {
			for i := range rounds {
				err := round(func() (context.Context, context.CancelFunc) { return varied(t, random) })
				if err != nil && failed.Add(1) <= 5 {
					t.Errorf("stream %d, round %d of %d: %v", stream, i, rounds, err)
				}
			}
		})
	}
	waiting.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d rounds failed", n, streams*rounds)
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections were made: the first one did not last", n)
	}
	// Written out anew each time that it has fallen out of the dynamic table.
	if n := literals.Load(); n < turnovers {
		t.Errorf("`:authority` went out as a literal only %d times: the table did not turn over", n)
	} else {
		t.Logf("`:authority` went out as a literal %d times", n)
	}
}

// watched counts the literals among the bytes that the client sends.
type watched struct {
	net.Conn
	literal []byte
	seen    *atomic.Int32
}

func (w watched) Write(b []byte) (int, error) {
	w.seen.Add(int32(bytes.Count(b, w.literal)))
	return w.Conn.Write(b)
}

// varied is a context with its own deadline, mostly a few headers, and at times so many
// that the whole dynamic table (4 KiB) is replaced at once.
func varied(t *testing.T, random *rand.Rand) (context.Context, context.CancelFunc) {
	var pairs []string
	for range random.IntN(4) {
		pairs = append(pairs, fmt.Sprintf("x-test-%d", random.IntN(50)), text(random, random.IntN(120)))
	}
	switch random.IntN(20) {
	case 0:
		for i := range 5 {
			pairs = append(pairs, fmt.Sprintf("x-large-%d", i), text(random, 900))
		}
	case 1:
		pairs = append(pairs, "x-too-large-for-the-table", text(random, 5000))
	case 2:
		pairs = append(pairs, "x-test-bin", string(harness.RandomBytes(random.IntN(200))))
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), pairs...)
	return context.WithTimeout(ctx, time.Duration(60_000+random.IntN(60_000))*time.Millisecond)
}

func text(random *rand.Rand, length int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789-_/%. ABCXYZ~{}"
	var b strings.Builder
	for range length {
		b.WriteByte(letters[random.IntN(len(letters))])
	}
	return strings.TrimSpace(b.String())
}

func roundV2(connection *grpc.ClientConn) round {
	client := v2.NewKeyManagementServiceClient(connection)
	return func(with func() (context.Context, context.CancelFunc)) error {
		if _, err := call(with, client.Status, &v2.StatusRequest{}); err != nil {
			return err
		}
		seed := harness.RandomBytes(32)
		encrypted, err := call(with, client.Encrypt, &v2.EncryptRequest{Plaintext: seed, Uid: "authority"})
		if err != nil {
			return err
		}
		decrypted, err := call(with, client.Decrypt, &v2.DecryptRequest{Ciphertext: encrypted.Ciphertext, KeyId: encrypted.KeyId, Uid: "authority"})
		return same(seed, decrypted.GetPlaintext(), err)
	}
}

func roundV1beta1(connection *grpc.ClientConn) round {
	client := v1beta1.NewKeyManagementServiceClient(connection)
	return func(with func() (context.Context, context.CancelFunc)) error {
		if _, err := call(with, client.Version, &v1beta1.VersionRequest{Version: "v1beta1"}); err != nil {
			return err
		}
		key := harness.RandomBytes(32)
		encrypted, err := call(with, client.Encrypt, &v1beta1.EncryptRequest{Version: "v1beta1", Plain: key})
		if err != nil {
			return err
		}
		decrypted, err := call(with, client.Decrypt, &v1beta1.DecryptRequest{Version: "v1beta1", Cipher: encrypted.Cipher})
		return same(key, decrypted.GetPlain(), err)
	}
}

func call[Request, Answer any](
	with func() (context.Context, context.CancelFunc),
	method func(context.Context, *Request, ...grpc.CallOption) (*Answer, error),
	request *Request,
) (*Answer, error) {
	ctx, cancel := with()
	defer cancel()
	answer, err := method(ctx, request)
	if err != nil {
		err = fmt.Errorf("%T: %w", request, err)
	}
	return answer, err
}

func same(want, got []byte, err error) error {
	if err == nil && !bytes.Equal(want, got) {
		err = fmt.Errorf("another plaintext came back")
	}
	return err
}
