package contract

import (
	"bytes"
	"fmt"
	"net/url"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	api "k8s.io/kms/apis/v1beta1"

	"trousseau/tests/kubernetes/internal/harness"
)

const maximumWrapped = 65535 // a u16 holds the wrapped DEK's length in etcd

func TestV1beta1Contract(t *testing.T) {
	plugin, _ := harness.StartPlugin(t)
	// The authority that the API server's own client sends.
	client := api.NewKeyManagementServiceClient(plugin.Dial(url.PathEscape(plugin.Socket)))
	decrypt := func(ciphertext []byte) ([]byte, error) {
		answer, err := client.Decrypt(t.Context(), &api.DecryptRequest{Version: "v1beta1", Cipher: ciphertext}, grpc.MaxCallSendMsgSize(16<<20))
		return answer.GetPlain(), err
	}
	encrypt := func(plaintext []byte) ([]byte, error) {
		answer, err := client.Encrypt(t.Context(), &api.EncryptRequest{Version: "v1beta1", Plain: plaintext}, grpc.MaxCallSendMsgSize(16<<20))
		return answer.GetCipher(), err
	}

	version, err := client.Version(t.Context(), &api.VersionRequest{Version: "v1beta1"})
	if err != nil || version.Version != "v1beta1" || version.RuntimeName == "" || version.RuntimeVersion == "" {
		t.Errorf("Version: %v, %v", version, err)
	}
	for _, plaintext := range [][]byte{[]byte("ping"), harness.RandomBytes(1), harness.RandomBytes(32), harness.RandomBytes(64)} {
		ciphertext, err := encrypt(plaintext)
		if err != nil || len(ciphertext) == 0 || len(ciphertext) > maximumWrapped {
			t.Fatalf("Encrypt of %d bytes: %d bytes, %v", len(plaintext), len(ciphertext), err)
		}
		if got, err := decrypt(ciphertext); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("Decrypt of what was encrypted: the same plaintext %v, %v", bytes.Equal(got, plaintext), err)
		}
	}
	t.Run("truncated", func(t *testing.T) {
		ciphertext, _ := encrypt(harness.RandomBytes(32))
		refusesEveryLength(t, ciphertext, decrypt)
	})
	t.Run("sizes", func(t *testing.T) {
		for _, size := range []int{0, maximumWrapped, 100_000} {
			_, err := encrypt(make([]byte, size))
			dataAtFault(t, fmt.Sprintf("Encrypt of %d bytes", size), err, codes.InvalidArgument)
			_, err = decrypt(make([]byte, size))
			dataAtFault(t, fmt.Sprintf("Decrypt of %d zeros", size), err, codes.InvalidArgument)
		}
	})
}
