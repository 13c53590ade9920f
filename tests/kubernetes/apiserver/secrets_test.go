package apiserver

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"maps"
	"path"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	stored "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
)

const (
	namespace = "trousseau-test"
	marker    = "the-plaintext-that-must-not-be-stored" // in each Secret
	writers   = 8
)

func secret(i int) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("secret-%04d", i), Namespace: namespace},
		Data:       map[string][]byte{"content": fmt.Appendf(nil, "%s-%d", marker, i)},
	}
}

// each calls f(0) … f(n-1), a few at a time, and fails the test if any of them fails.
func each(t *testing.T, what string, n int, f func(i int) error) {
	t.Helper()
	numbers := make(chan int, n)
	for i := range n {
		numbers <- i
	}
	close(numbers)
	var waiting sync.WaitGroup
	failures := make(chan error, n)
	for range writers {
		waiting.Go(func() {
			for i := range numbers {
				if err := f(i); err != nil {
					failures <- fmt.Errorf("%s: number %d: %w", what, i, err)
				}
			}
		})
	}
	waiting.Wait()
	if n := len(failures); n > 0 {
		t.Fatalf("%d failed, the first: %v", n, <-failures)
	}
}

// create makes n Secrets, the first ones with their namespace.
func (s *server) create(n int) {
	s.Helper()
	_, err := s.CoreV1().Namespaces().Create(s.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil {
		s.Fatal(err)
	}
	s.createMore(0, n)
}

// createMore makes n Secrets beside those that are there.
func (s *server) createMore(there, n int) {
	s.Helper()
	each(s.T, "create a Secret", n, func(i int) error {
		_, err := s.CoreV1().Secrets(namespace).Create(s.Context(), secret(there+i), metav1.CreateOptions{})
		return err
	})
}

// readsAll fails the test unless n Secrets are listed as they were created, and one is got by name.
func (s *server) readsAll(n int) []corev1.Secret {
	s.Helper()
	secrets, err := s.CoreV1().Secrets(namespace).List(s.Context(), list)
	if err != nil {
		s.Fatalf("list the Secrets: %v", err)
	}
	if len(secrets.Items) != n {
		s.Errorf("%d Secrets are listed, %d were created", len(secrets.Items), n)
	}
	for i, got := range secrets.Items {
		if want := secret(i); got.Name != want.Name || !bytes.Equal(got.Data["content"], want.Data["content"]) {
			s.Errorf("Secret %s has another content than the one created", got.Name)
		}
	}
	if _, err := s.CoreV1().Secrets(namespace).Get(s.Context(), secret(0).Name, get); err != nil {
		s.Errorf("get a Secret: %v", err)
	}
	return secrets.Items
}

// rewrite updates each of n Secrets without a change, as a storage migration does.
func (s *server) rewrite(n int) {
	s.Helper()
	secrets := s.readsAll(n)
	each(s.T, "rewrite a Secret", n, func(i int) error {
		_, err := s.CoreV1().Secrets(namespace).Update(s.Context(), &secrets[i], metav1.UpdateOptions{})
		return err
	})
}

// change writes one Secret anew under a changed annotation.
func (s *server) change(i int) error {
	secrets := s.CoreV1().Secrets(namespace)
	changed, err := secrets.Get(s.Context(), secret(i).Name, get)
	if err != nil {
		return fmt.Errorf("read a Secret: %w", err)
	}
	changed.Annotations = map[string]string{"changed": time.Now().String()}
	if _, err := secrets.Update(s.Context(), changed, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("write a Secret: %w", err)
	}
	return nil
}

// mustChange writes one Secret anew.
func (s *server) mustChange(i int) {
	s.Helper()
	if err := s.change(i); err != nil {
		s.Fatal(err)
	}
}

// objects are what the v2 provider of this name has in etcd of Secrets whose name begins so; all must be its.
func (c *cluster) objects(provider, name string) map[string]*stored.EncryptedObject {
	c.Helper()
	objects := map[string]*stored.EncryptedObject{}
	for key, value := range c.values(name, "k8s:enc:kms:v2:"+provider+":") {
		object := &stored.EncryptedObject{}
		if err := proto.Unmarshal(value, object); err != nil {
			c.Errorf("%s in etcd: %v", key, err)
		}
		objects[path.Base(key)] = object
	}
	return objects
}

// keyIDs counts the Secrets in etcd under each key_id. All must be of the v2 provider of this name.
func (c *cluster) keyIDs(provider string) map[string]int {
	c.Helper()
	count := map[string]int{}
	for _, object := range c.objects(provider, "") {
		count[object.KeyID]++
	}
	return count
}

// keyIDOf is the key_id under which one Secret is in etcd.
func (c *cluster) keyIDOf(i int) string {
	c.Helper()
	name := secret(i).Name
	return c.objects(providerName, name)[name].GetKeyID()
}

// allUnder fails the test unless n Secrets are in etcd, all under this key_id.
func (c *cluster) allUnder(keyID string, n int) {
	c.Helper()
	if got, want := c.keyIDs(providerName), (map[string]int{keyID: n}); !maps.Equal(got, want) {
		c.Errorf("Secrets in etcd by key_id: %v instead of %v", got, want)
	}
}

// values are the Secrets in etcd whose name begins so, less this prefix of the value, which each must have.
// None may show its plaintext.
func (c *cluster) values(name, prefix string) map[string][]byte {
	c.Helper()
	answer, err := c.etcd.Get(c.Context(), "/registry/secrets/"+namespace+"/"+name, clientv3.WithPrefix())
	if err != nil {
		c.Fatal(err)
	}
	values := map[string][]byte{}
	for _, stored := range answer.Kvs {
		encrypted, ok := bytes.CutPrefix(stored.Value, []byte(prefix))
		if !ok {
			c.Errorf("%s in etcd begins with %q instead of %q", stored.Key, stored.Value[:min(len(stored.Value), len(prefix))], prefix)
		}
		for _, plaintext := range []string{marker, base64.StdEncoding.EncodeToString([]byte(marker))} {
			if bytes.Contains(stored.Value, []byte(plaintext)) {
				c.Errorf("%s in etcd shows its plaintext", stored.Key)
			}
		}
		values[string(stored.Key)] = encrypted
	}
	return values
}
