// Package cluster holds expectations of clusters of three and five members, as real processes.
//
// TestFault is tenured's: members crash, stop, restart and lose their network under a load like that of kube-apiservers, and
// what all clients saw is then judged by package history. TestPlanted does wrong to clients of a cluster that does none, and wants
// that found. What a cluster answers (membership, loss of quorum) runs on
// a real etcd too, so that what is expected is what etcd does. The environment may say otherwise:
//
//	TENURE_CLUSTER       etcd or tenured: run everything on this one only
//	TENURE_FAULT_ROUNDS  how often each fault is run (1), each time with another seed
//	TENURE_FAULT_SEED    the first seed (1)
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tenure.dev/tests/harness"
)

// hang bounds a wait that should long be over; it judges nothing.
const hang = 3 * time.Minute

const (
	// statusTimeout is for a question that a member answers by itself.
	statusTimeout = 5 * time.Second
	// attemptTimeout is for what may be asked again: more than etcd waits for a leader. For a change of members it has no limit, and
	// one that raft drops, because the one before is not applied yet, is never answered.
	attemptTimeout = 20 * time.Second
)

// tenants beside default, of a tenured.
var tenants = []string{"acme"}

// calm lets a member be silent for some seconds before another one is elected, as those of a busy machine are: for tests in which
// an election that they did not ask for says nothing. One that they do ask for may then take ten seconds.
var calm = []string{"--heartbeat-interval=500", "--election-timeout=5000"}

func TestMain(m *testing.M) { harness.Main(m) }

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
	return dialled(t, endpoints)
}

// dialled is newClient with options of its connections.
func dialled(t testing.TB, endpoints []string, options ...grpc.DialOption) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints,
		Logger:    zap.NewNop(),
		// As a kube-apiserver has it.
		DialKeepAliveTime:    30 * time.Second,
		DialKeepAliveTimeout: 10 * time.Second,
		// A member that comes back is soon used again.
		DialOptions: append(options, grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		})),
	})
	must(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// each gives one client a member, in the order of the cluster's members.
func each(t testing.TB, c *harness.Cluster, tenant string, options ...grpc.DialOption) []*clientv3.Client {
	t.Helper()
	var clients []*clientv3.Client
	for _, endpoint := range c.Endpoints(tenant) {
		clients = append(clients, dialled(t, []string{endpoint}, options...))
	}
	return clients
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	return ctx
}

// statusOf asks a member for its status; what it does not answer soon it does not know.
func statusOf(t testing.TB, m *harness.Member) (*clientv3.StatusResponse, error) {
	t.Helper()
	client := newClient(t, m.Endpoint())
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	return client.Status(ctx, m.Endpoint())
}

// leaderAmong waits until all of these members know the same leader, which is one of them, and returns it.
func leaderAmong(t testing.TB, members []*harness.Member) *harness.Member {
	t.Helper()
	leader, _ := leadership(t, members)
	return leader
}

// leadership is leaderAmong with the term in which it leads.
func leadership(t testing.TB, members []*harness.Member) (*harness.Member, uint64) {
	t.Helper()
	var leader *harness.Member
	var term uint64
	await(t, "a leader that all know", func() bool {
		leader = nil
		known := map[[2]uint64]bool{}
		for _, m := range members {
			status, err := statusOf(t, m)
			if err != nil || status.Leader == 0 {
				return false
			}
			known[[2]uint64{status.Leader, status.RaftTerm}] = true
			if status.Leader == status.Header.MemberId {
				leader, term = m, status.RaftTerm
			}
		}
		return leader != nil && len(known) == 1
	})
	return leader, term
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
	awaitNoError(t, what, func() error {
		if is() {
			return nil
		}
		return errors.New("it is not so")
	})
}

// awaitNoError asks until nothing is against it.
func awaitNoError(t testing.TB, what string, ask func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(hang); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = ask(); err == nil {
			return
		}
	}
	t.Fatalf("waited in vain for %s: %v", what, err)
}

// mayPass says whether an error is of a cluster that has no leader or got another one, of a connection, or of a deadline: the same
// call may have an answer later. Whether it was carried out, it does not say.
func mayPass(err error) bool {
	var ofEtcd rpctypes.EtcdError
	code := status.Code(err)
	if errors.As(err, &ofEtcd) {
		code = ofEtcd.Code()
	}
	return code == codes.Unavailable || code == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded)
}

// attempt makes a call that may be made again.
func attempt(call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), attemptTimeout)
	defer cancel()
	return call(ctx)
}

// settled repeats a call until its answer is not one that may pass. It may then have been done before: doubtful says so.
func settled[Answer any](t testing.TB, what string, call func(context.Context) (Answer, error)) (answer Answer, doubtful bool, err error) {
	t.Helper()
	awaitNoError(t, what, func() error {
		err = attempt(func(ctx context.Context) (err error) {
			answer, err = call(ctx)
			return err
		})
		if !mayPass(err) {
			return nil
		}
		// These two refuse.
		if text := fmt.Sprint(err); text != unhealthy && text != noLeader {
			doubtful = true
		}
		return err
	})
	return answer, doubtful, err
}

// answered is settled for what may be done twice and must not be refused.
func answered[Answer any](t testing.TB, what string, call func(context.Context) (Answer, error)) Answer {
	t.Helper()
	answer, _, err := settled(t, what, call)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return answer
}

// refusedAtLast checks the last answer to a call: the refusal that is wanted, which may be one that passes, or the first that
// does not pass.
func refusedAtLast(t testing.TB, what, want string, call func(context.Context) error) {
	t.Helper()
	var err error
	awaitNoError(t, what, func() error {
		if err = attempt(call); fmt.Sprint(err) == want || !mayPass(err) {
			return nil
		}
		return err
	})
	refused(t, what, err, want)
}

func put(t testing.TB, client *clientv3.Client, key, value string) *clientv3.PutResponse {
	t.Helper()
	return answered(t, "put of "+key, func(ctx context.Context) (*clientv3.PutResponse, error) { return client.Put(ctx, key, value) })
}

func get(t testing.TB, client *clientv3.Client, key string, opts ...clientv3.OpOption) *clientv3.GetResponse {
	t.Helper()
	return answered(t, "get of "+key, func(ctx context.Context) (*clientv3.GetResponse, error) { return client.Get(ctx, key, opts...) })
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
