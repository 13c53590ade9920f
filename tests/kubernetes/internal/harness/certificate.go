package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// Certificate is what a server on 127.0.0.1 shows, as files in PEM, and the authority that vouches for it.
type Certificate struct{ CA, Certificate, Key string }

// NewCertificate makes a certificate under an authority of its own: who checks with care takes none that signed itself.
func NewCertificate(t testing.TB, dir string) Certificate {
	t.Helper()
	authority := template("authority")
	authority.IsCA, authority.KeyUsage = true, x509.KeyUsageCertSign
	signer, ca := issue(t, authority, authority, nil)
	server := template("server")
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	server.KeyUsage, server.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	key, certificate := issue(t, server, authority, signer)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, content []byte) string {
		path := filepath.Join(dir, name)
		WriteFile(t, path, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content})))
		return path
	}
	return Certificate{
		CA:          write("ca.pem", "CERTIFICATE", ca),
		Certificate: write("certificate.pem", "CERTIFICATE", certificate),
		Key:         write("key.pem", "PRIVATE KEY", private),
	}
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true,
	}
}

// issue makes a key and its certificate, which signer signs; nil: the key itself.
func issue(t testing.TB, subject, issuer *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	certificate, err := x509.CreateCertificate(rand.Reader, subject, issuer, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return key, certificate
}
