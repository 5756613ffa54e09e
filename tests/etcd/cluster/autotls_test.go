package cluster

import (
	"crypto/tls"
	"net/http"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"tenure.dev/tests/harness"
)

// Certificates that members make for themselves, for clients and for each other: nobody can check them, so a client that
// does is not served, nor one without TLS, and one that does not check is, by each member, also after a restart.
func TestAutoTLS(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil, append([]string{"--auto-tls", "--peer-auto-tls"}, calm...)...)
		trusting := &tls.Config{InsecureSkipVerify: true}
		client := func(endpoint string) *clientv3.Client {
			client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, TLS: trusting, Logger: zap.NewNop()})
			must(t, err)
			t.Cleanup(func() { _ = client.Close() })
			return client
		}
		put(t, client(c.Members[0].Endpoint()), "key", "value")
		c.Members[1].Kill()
		c.Members[1].Start()
		for _, m := range c.Members {
			resp := get(t, client(m.Endpoint()), "key")
			equal(t, "value at "+m.Name, string(resp.Kvs[0].Value), "value")
		}

		address := strings.TrimPrefix(c.Members[2].Endpoint(), "https://")
		if conn, err := tls.Dial("tcp", address, &tls.Config{ServerName: "localhost"}); err == nil {
			_ = conn.Close()
			t.Error("the certificate passes a check")
		}
		conn, err := tls.Dial("tcp", address, trusting)
		must(t, err)
		defer conn.Close()
		leaf := conn.ConnectionState().PeerCertificates[0]
		must(t, leaf.VerifyHostname("127.0.0.1"))
		if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
			t.Errorf("the certificate is good from %v to %v", leaf.NotBefore, leaf.NotAfter)
		}
		if resp, err := http.Get("http://" + address + "/health"); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				t.Error("a client without TLS is served")
			}
		}
	})
}
