package harness

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"testing"
)

// Identity is the KEK identity of the key with this CKA_ID, computed from its definition and not by the plugin.
func Identity(t testing.TB, ckaID string) []byte {
	t.Helper()
	id, err := hex.DecodeString(ckaID)
	if err != nil {
		t.Fatalf("CKA_ID %q: %v", ckaID, err)
	}
	return truncatedHash("trousseau kek v1\x00pkcs11\x00" + string(id))
}

// KeyID is the key_id of a cluster whose active KEKs have these CKA_IDs.
func KeyID(t testing.TB, cluster string, ckaIDs ...string) string {
	t.Helper()
	var identities [][]byte
	for _, id := range ckaIDs {
		identities = append(identities, Identity(t, id))
	}
	slices.SortFunc(identities, bytes.Compare)
	set := truncatedHash("trousseau key set v1\x00" + cluster + "\x00" + string(bytes.Join(identities, nil)))
	return "tr1-" + hex.EncodeToString(set)
}

func truncatedHash(text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return sum[:16]
}
