// Package contract holds the plugin to what the API server's own client packages demand, without an API server.
package contract

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// open asks the plugin, by one of the ways there are, to decrypt a ciphertext that an earlier Encrypt answered.
type open func(ciphertext []byte) (plaintext []byte, err error)

// The beginning of an envelope of one recipient, up to its wrapped DEK.
const (
	keySetAt     = 2
	recipientsAt = 18
	identityAt   = 19
	algorithmAt  = 35
	wrappedAt    = 38
)

func field(offset int) string {
	switch {
	case offset < keySetAt:
		return "format and suite"
	case offset < recipientsAt:
		return "key set"
	case offset < identityAt:
		return "number of recipients"
	case offset < algorithmAt:
		return "KEK identity"
	case offset < wrappedAt:
		return "wrap algorithm and length"
	default:
		return "wrapped DEK and what follows"
	}
}

// refusesEveryBit flips each bit in turn. Only a damaged identity may look like another KEK's envelope;
// everything else is refused as damaged, in one text that does not help to guess where.
func refusesEveryBit(t *testing.T, ciphertext []byte, open open) {
	t.Helper()
	texts := map[string]int{}
	for bit := range len(ciphertext) * 8 {
		damaged := bytes.Clone(ciphertext)
		damaged[bit/8] ^= 1 << (bit % 8)
		want := codes.InvalidArgument
		if field(bit/8) == "KEK identity" {
			want = codes.FailedPrecondition
		}
		_, err := open(damaged)
		answer := dataAtFault(t, fmt.Sprintf("bit %d of byte %d (%s) flipped", bit%8, bit/8, field(bit/8)), err, want)
		if want == codes.InvalidArgument {
			texts[answer.Message()] = bit
		}
	}
	if len(texts) != 1 {
		t.Errorf("damage is answered in %d texts instead of one (text: a bit that gave it): %v", len(texts), texts)
	}
}

// refusesEveryLength sends each proper beginning, and one byte too many.
func refusesEveryLength(t *testing.T, ciphertext []byte, open open) {
	t.Helper()
	for length := range len(ciphertext) {
		_, err := open(ciphertext[:length])
		dataAtFault(t, fmt.Sprintf("truncated to %d of %d bytes", length, len(ciphertext)), err, codes.InvalidArgument)
	}
	_, err := open(append(bytes.Clone(ciphertext), 0))
	dataAtFault(t, "one byte appended", err, codes.InvalidArgument)
}

// dataAtFault wants this code, and a text that does not blame the provider.
func dataAtFault(t *testing.T, what string, err error, want codes.Code) *status.Status {
	t.Helper()
	answer, _ := status.FromError(err)
	if answer.Code() != want {
		t.Errorf("%s: %v instead of %v: %v", what, answer.Code(), want, err)
	}
	if strings.Contains(answer.Message(), "intact") {
		t.Errorf("%s: the text says that the data is intact: %q", what, answer.Message())
	}
	return answer
}

// tokenAtFault wants UNAVAILABLE, and a text that blames the provider and names its token; for a Decrypt also that the object is intact.
func tokenAtFault(t *testing.T, what string, err error) {
	t.Helper()
	answer, _ := status.FromError(err)
	text := answer.Message()
	if answer.Code() != codes.Unavailable || !strings.HasPrefix(text, "the provider is at fault") || !strings.Contains(text, "token") {
		t.Errorf("%s: want UNAVAILABLE and a text that blames the provider and names its token, got %v: %q", what, answer.Code(), text)
	}
	if what == "Decrypt" && !strings.Contains(text, "intact") {
		t.Errorf("%s: the text does not say that the object is intact: %q", what, text)
	}
}
