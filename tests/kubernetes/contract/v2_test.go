package contract

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	stored "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	api "k8s.io/kms/apis/v2"

	"trousseau/tests/kubernetes/internal/harness"
)

const (
	maximumCiphertext = 1024             // what the API server stores at most
	rotationLimit     = 90 * time.Second // a plugin looks for new KEKs every 30 s
	healLimit         = 30 * time.Second
)

// v2 is a client that fails the test wherever an answer breaks the API server's contract.
type v2 struct {
	*testing.T
	api.KeyManagementServiceClient
}

func newV2(t *testing.T, plugin *harness.Plugin) v2 {
	return v2{t, api.NewKeyManagementServiceClient(plugin.Dial("localhost"))}
}

func (c v2) status() *api.StatusResponse {
	c.Helper()
	answer, err := c.Status(c.Context(), &api.StatusRequest{})
	if err != nil {
		c.Fatalf("Status: %v", err)
	}
	if answer.Version != "v2" || answer.Healthz != "ok" {
		c.Errorf("Status says version %q and healthz %q", answer.Version, answer.Healthz)
	}
	return answer
}

func (c v2) encrypt(plaintext []byte) *api.EncryptResponse {
	c.Helper()
	answer, err := c.Encrypt(c.Context(), &api.EncryptRequest{Plaintext: plaintext, Uid: "contract"})
	if err != nil {
		c.Fatalf("Encrypt of %d bytes: %v", len(plaintext), err)
	}
	err = kmsv2.ValidateEncryptedObject(&stored.EncryptedObject{
		EncryptedData:      []byte{0}, // the API server's part
		EncryptedDEKSource: answer.Ciphertext,
		KeyID:              answer.KeyId,
		Annotations:        answer.Annotations,
	})
	if err != nil {
		c.Errorf("the API server would refuse the answer to Encrypt of %d bytes: %v", len(plaintext), err)
	}
	return answer
}

func (c v2) decrypt(request *api.DecryptRequest) ([]byte, error) {
	answer, err := c.Decrypt(c.Context(), request, grpc.MaxCallSendMsgSize(16<<20))
	return answer.GetPlaintext(), err
}

// awaitKeyID waits until Status tells this key_id.
func (c v2) awaitKeyID(want string) {
	c.Helper()
	harness.Await(c, rotationLimit, "Status tells the new key_id", func() error {
		if got := c.status().KeyId; got != want {
			return fmt.Errorf("it is %q, the new one is %q", got, want)
		}
		return nil
	})
}

// straddle asks as an API server does, until Status tells this key_id: an Encrypt right after a Status must be
// under the key_id that this Status told, or the API server drops it. The pause lets the activation fall in between.
func (c v2) straddle(want string) error {
	for start := time.Now(); time.Since(start) < rotationLimit; {
		status, err := c.Status(c.Context(), &api.StatusRequest{})
		if err != nil {
			return fmt.Errorf("Status while the key is rotated: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
		encrypted, err := c.Encrypt(c.Context(), &api.EncryptRequest{Plaintext: harness.RandomBytes(32)})
		if err != nil {
			return fmt.Errorf("Encrypt while the key is rotated: %w", err)
		}
		if encrypted.KeyId != status.KeyId {
			return fmt.Errorf("Encrypt answers under %s, the Status before it told %s", encrypted.KeyId, status.KeyId)
		}
		if status.KeyId == want {
			return nil
		}
	}
	return fmt.Errorf("%v after the rotation Status does not tell %s", rotationLimit, want)
}

// opens fails the test unless the plugin decrypts what it encrypted.
func (c v2) opens(encrypted *api.EncryptResponse, plaintext []byte) {
	c.Helper()
	got, err := c.decrypt(requestFor(encrypted))
	if err != nil || !bytes.Equal(got, plaintext) {
		c.Errorf("Decrypt of what was encrypted: the same plaintext %v, %v", bytes.Equal(got, plaintext), err)
	}
}

func requestFor(encrypted *api.EncryptResponse) *api.DecryptRequest {
	return &api.DecryptRequest{
		Ciphertext: encrypted.Ciphertext, KeyId: encrypted.KeyId, Annotations: encrypted.Annotations, Uid: "contract",
	}
}

func TestV2Contract(t *testing.T) {
	plugin, key := harness.StartPlugin(t)
	t.Run("answers", func(t *testing.T) { v2Answers(t, newV2(t, plugin), key) })
	t.Run("plaintext limits", func(t *testing.T) { v2PlaintextLimits(t, newV2(t, plugin)) })
	t.Run("truncated", func(t *testing.T) {
		c := newV2(t, plugin)
		encrypted := c.encrypt(harness.RandomBytes(32))
		refusesEveryLength(t, encrypted.Ciphertext, func(ciphertext []byte) ([]byte, error) {
			return c.decrypt(&api.DecryptRequest{Ciphertext: ciphertext, KeyId: encrypted.KeyId})
		})
	})
	t.Run("refused decrypts", func(t *testing.T) { v2RefusedDecrypts(t, newV2(t, plugin)) })
	t.Run("the same decrypt, many at once", func(t *testing.T) { v2IdenticalDecrypts(t, newV2(t, plugin)) })
}

func v2Answers(t *testing.T, c v2, key harness.Key) {
	want := harness.KeyID(t, harness.Cluster, key.ID)
	if got := c.status().KeyId; got != want {
		t.Errorf("Status's key_id is %q; from its definition it is %q", got, want)
	}
	for _, size := range []int{1, 4, 16, 31, 32, 33, 64, 255, 256} {
		plaintext := harness.RandomBytes(size)
		first, second := c.encrypt(plaintext), c.encrypt(plaintext)
		if first.KeyId != want {
			t.Errorf("Encrypt's key_id %q is not Status's %q: the API server would drop the answer", first.KeyId, want)
		}
		if bytes.Equal(first.Ciphertext, second.Ciphertext) {
			t.Errorf("two Encrypts of the same %d bytes gave the same ciphertext", size)
		}
		if size >= 16 && bytes.Contains(first.Ciphertext, plaintext) {
			t.Errorf("the ciphertext of %d bytes contains them", size)
		}
		c.opens(first, plaintext)
		c.opens(second, plaintext)
	}
}

var number = regexp.MustCompile(`\d+`)

// v2PlaintextLimits takes the limit from the refusal of far too much, and then stands on both sides of it.
func v2PlaintextLimits(t *testing.T, c v2) {
	encrypt := func(size int) (*api.EncryptResponse, error) {
		return c.Encrypt(t.Context(), &api.EncryptRequest{Plaintext: make([]byte, size)}, grpc.MaxCallSendMsgSize(16<<20))
	}
	_, err := encrypt(0)
	dataAtFault(t, "an empty plaintext", err, codes.InvalidArgument)

	_, err = encrypt(2000)
	refusal := dataAtFault(t, "2000 bytes", err, codes.InvalidArgument).Message()
	limit := 0
	for _, digits := range number.FindAllString(refusal, -1) {
		if n, _ := strconv.Atoi(digits); n > limit && n < maximumCiphertext {
			limit = n
		}
	}
	if limit == 0 {
		t.Fatalf("the refusal of 2000 bytes does not say the limit: %q", refusal)
	}
	atLimit := c.encrypt(make([]byte, limit))
	c.opens(atLimit, make([]byte, limit))
	t.Logf("%d bytes of plaintext are the limit: %d of ciphertext", limit, len(atLimit.Ciphertext))

	for _, size := range []int{limit + 1, maximumCiphertext, maximumCiphertext + 1, 100_000} {
		_, err := encrypt(size)
		answer := dataAtFault(t, fmt.Sprintf("%d bytes", size), err, codes.InvalidArgument)
		if !strings.Contains(answer.Message(), strconv.Itoa(limit)) {
			t.Errorf("the refusal of %d bytes does not say the limit %d: %q", size, limit, answer.Message())
		}
	}
	// More than a message may hold (128 KiB): refused before it is a request, in whatever code; the connection lives.
	if _, err := encrypt(3 << 20); err == nil {
		t.Error("a message of 3 MiB was answered")
	}
	c.opens(c.encrypt([]byte("after")), []byte("after"))
}

func v2RefusedDecrypts(t *testing.T, c v2) {
	seed := harness.RandomBytes(32)
	good := c.encrypt(seed)
	otherKeyID := good.KeyId[:len(good.KeyId)-32] + strings.Repeat("0", 32)
	annotation := map[string][]byte{"a.example": []byte("x")}
	for _, refused := range []struct {
		name    string
		request *api.DecryptRequest
		want    codes.Code
	}{
		{"unknown key_id", &api.DecryptRequest{Ciphertext: good.Ciphertext, KeyId: otherKeyID}, codes.FailedPrecondition},
		{"empty key_id", &api.DecryptRequest{Ciphertext: good.Ciphertext}, codes.FailedPrecondition},
		{"key_id of 2 kB", &api.DecryptRequest{Ciphertext: good.Ciphertext, KeyId: strings.Repeat("k", 2000)}, codes.FailedPrecondition},
		{"key_id in upper case", &api.DecryptRequest{Ciphertext: good.Ciphertext, KeyId: strings.ToUpper(good.KeyId)}, codes.FailedPrecondition},
		{"key_id with a space", &api.DecryptRequest{Ciphertext: good.Ciphertext, KeyId: good.KeyId + " "}, codes.FailedPrecondition},
		{"an annotation nobody sent", &api.DecryptRequest{Ciphertext: good.Ciphertext, KeyId: good.KeyId, Annotations: annotation}, codes.InvalidArgument},
		{"empty ciphertext", &api.DecryptRequest{KeyId: good.KeyId}, codes.InvalidArgument},
		{"random bytes", &api.DecryptRequest{Ciphertext: harness.RandomBytes(len(good.Ciphertext)), KeyId: good.KeyId}, codes.InvalidArgument},
		{"zeros", &api.DecryptRequest{Ciphertext: make([]byte, len(good.Ciphertext)), KeyId: good.KeyId}, codes.InvalidArgument},
		{"ciphertext over the limit", &api.DecryptRequest{Ciphertext: make([]byte, maximumCiphertext+1), KeyId: good.KeyId}, codes.InvalidArgument},
		{"ciphertext of 100 kB", &api.DecryptRequest{Ciphertext: make([]byte, 100_000), KeyId: good.KeyId}, codes.InvalidArgument},
	} {
		_, err := c.decrypt(refused.request)
		answer := dataAtFault(t, refused.name, err, refused.want)
		t.Logf("%s: %v: %s", refused.name, answer.Code(), answer.Message())
	}
	c.status()
	c.opens(good, seed)
}

// v2IdenticalDecrypts is what an API server does at cold start, several times over.
func v2IdenticalDecrypts(t *testing.T, c v2) {
	seed := harness.RandomBytes(32)
	encrypted := c.encrypt(seed)
	var waiting sync.WaitGroup
	for range 100 {
		waiting.Go(func() { c.opens(encrypted, seed) })
	}
	waiting.Wait()
}

func TestV2Rotation(t *testing.T) {
	plugin, first := harness.StartPlugin(t)
	c := newV2(t, plugin)
	seed := harness.RandomBytes(32)
	old := c.encrypt(seed)

	second := plugin.Generate("--activate-in", "1s")
	want := harness.KeyID(t, harness.Cluster, second.ID)
	var waiting sync.WaitGroup
	for range 8 {
		server := newV2(t, plugin)
		waiting.Go(func() {
			if err := server.straddle(want); err != nil {
				t.Error(err)
			}
		})
	}
	waiting.Wait()
	renewed := c.encrypt(seed)
	if old.KeyId != harness.KeyID(t, harness.Cluster, first.ID) || renewed.KeyId != want {
		t.Errorf("Encrypt's key_ids: %q before, %q after; the KEKs' are of %s and %s", old.KeyId, renewed.KeyId, first.ID, second.ID)
	}
	c.opens(old, seed)
	c.opens(renewed, seed)

	// Both key_ids are known now, so a ciphertext under the other one is not unknown but re-bound.
	_, err := c.decrypt(&api.DecryptRequest{Ciphertext: old.Ciphertext, KeyId: renewed.KeyId})
	dataAtFault(t, "old ciphertext under the new key_id", err, codes.InvalidArgument)
	_, err = c.decrypt(&api.DecryptRequest{Ciphertext: renewed.Ciphertext, KeyId: old.KeyId})
	dataAtFault(t, "new ciphertext under the old key_id", err, codes.InvalidArgument)
}

// TestTokenAway: with no token in reach the socket serves, blames the token, and heals by itself.
func TestTokenAway(t *testing.T) {
	plugin, _ := harness.StartPlugin(t)
	c := newV2(t, plugin)
	seed := harness.RandomBytes(32)
	encrypted := c.encrypt(seed)
	plugin.Stop()
	plugin.Token.Hide(t)

	plugin.Start()
	waitForReady := grpc.WaitForReady(true) // this connection broke with the first daemon
	_, err := c.Status(t.Context(), &api.StatusRequest{}, waitForReady)
	tokenAtFault(t, "Status", err)
	_, err = c.Encrypt(t.Context(), &api.EncryptRequest{Plaintext: seed})
	tokenAtFault(t, "Encrypt", err)
	_, err = c.decrypt(requestFor(encrypted))
	tokenAtFault(t, "Decrypt", err)

	plugin.Token.Show(t)
	harness.Await(t, healLimit, "the plugin heals", func() error {
		_, err := c.Status(t.Context(), &api.StatusRequest{})
		if code := status.Code(err); err != nil && code != codes.Unavailable {
			t.Fatalf("Status while the token comes back: %v", err)
		}
		return err
	})
	c.opens(encrypted, seed)
}
