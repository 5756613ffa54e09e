// Package cluster holds expectations of clusters of three and five members, as real processes.
//
// TestFault is tenured's: members crash, stop, restart and lose their network under a load like that of kube-apiservers, and
// what all clients saw is then judged by package history. What a cluster answers (membership, loss of quorum) runs on
// a real etcd too, so that what is expected is what etcd does. The environment may say otherwise:
//
//	TENURE_CLUSTER       etcd or tenured: run everything on this one only
//	TENURE_FAULT_ROUNDS  how often each fault is run (1), each time with another seed
//	TENURE_FAULT_SEED    the first seed (1)
package cluster

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"tenure.dev/tests/harness"
)

// hang bounds a wait that should long be over; it judges nothing.
const hang = 2 * time.Minute

// tenants beside default, of a tenured.
var tenants = []string{"acme"}

// onBoth runs a test on etcd and on tenured.
func onBoth(t *testing.T, test func(t *testing.T, kind harness.Kind)) {
	for _, kind := range chosen(harness.Etcd, harness.Tenured) {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			test(t, kind)
		})
	}
}

// chosen is the kind that the environment names, or these.
func chosen(kinds ...harness.Kind) []harness.Kind {
	if kind := os.Getenv("TENURE_CLUSTER"); kind != "" {
		return []harness.Kind{harness.Kind(kind)}
	}
	return kinds
}

// number of the environment, or this one.
func number(t testing.TB, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// newClient gives a connection of its own to some endpoints.
func newClient(t testing.TB, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints,
		Logger:    zap.NewNop(),
		// As a kube-apiserver has it.
		DialKeepAliveTime:    30 * time.Second,
		DialKeepAliveTimeout: 10 * time.Second,
		// A member that comes back is soon used again.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		})},
	})
	must(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// each gives one client a member, in the order of the cluster's members.
func each(t testing.TB, c *harness.Cluster, tenant string) []*clientv3.Client {
	t.Helper()
	var clients []*clientv3.Client
	for _, endpoint := range c.Endpoints(tenant) {
		clients = append(clients, newClient(t, endpoint))
	}
	return clients
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	return ctx
}

// statusOf asks a member for its status; what it does not answer in a second it does not know.
func statusOf(t testing.TB, m *harness.Member) (*clientv3.StatusResponse, error) {
	t.Helper()
	client := newClient(t, m.Endpoint())
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return client.Status(ctx, m.Endpoint())
}

// leaderAmong waits until all of these members know the same leader, which is one of them, and returns it.
func leaderAmong(t testing.TB, members []*harness.Member) *harness.Member {
	t.Helper()
	var leader *harness.Member
	await(t, "a leader that all know", func() bool {
		leader = nil
		known := map[uint64]bool{}
		for _, m := range members {
			status, err := statusOf(t, m)
			if err != nil || status.Leader == 0 {
				return false
			}
			known[status.Leader] = true
			if status.Leader == status.Header.MemberId {
				leader = m
			}
		}
		return leader != nil && len(known) == 1
	})
	return leader
}

// without is members except some.
func without(members []*harness.Member, except ...*harness.Member) []*harness.Member {
	var rest []*harness.Member
next:
	for _, m := range members {
		for _, other := range except {
			if m == other {
				continue next
			}
		}
		rest = append(rest, m)
	}
	return rest
}

// await asks until it is so.
func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(hang); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// refused checks an error by its text, which is etcd's.
func refused(t testing.TB, what string, err error, want string) {
	t.Helper()
	if got := fmt.Sprint(err); got != want {
		t.Errorf("%s: got error %q, want %q", what, got, want)
	}
}
