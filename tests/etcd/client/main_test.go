// Package client holds expectations of etcd's own Go client on a server.
//
// Every test runs twice, on a real etcd and on tenured, so that what it expects is what etcd does. What Tenure does
// differently on purpose (docs/compatibility.md) is left out, with a comment where it would have been tested.
package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"tenure.dev/tests/harness"
)

// hang bounds a wait that should long be over; it judges nothing.
const hang = 3 * time.Minute

func TestMain(m *testing.M) { harness.Main(m) }

// member is one running server and a client of it.
type member struct {
	*clientv3.Client
	server *harness.Server
}

// onBoth runs a test on a fresh etcd and on a fresh tenured, each started with flags, which both understand.
func onBoth(t *testing.T, flags []string, test func(t *testing.T, m *member)) {
	for name, start := range starts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newMember(t, start(t, flags...)))
		})
	}
}

// caseOn is one case of a group of cases that share the two servers. Its keys start with prefix, which no other case
// of the group uses.
type caseOn struct {
	name string
	test func(t *testing.T, m *member, prefix string)
}

// casesOnBoth runs cases one after the other on the same fresh etcd, and beside it on the same fresh tenured.
func casesOnBoth(t *testing.T, flags []string, cases []caseOn) {
	onBoth(t, flags, func(t *testing.T, m *member) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) { c.test(t, m, c.name+"/") })
		}
	})
}

// concurrentCasesOnBoth is casesOnBoth for cases that mostly wait: all of them run at the same time.
func concurrentCasesOnBoth(t *testing.T, flags []string, cases []caseOn) {
	onBoth(t, flags, func(t *testing.T, m *member) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.test(t, m, c.name+"/")
			})
		}
	})
}

var starts = map[string]func(t testing.TB, flags ...string) *harness.Server{
	"etcd": harness.StartEtcd,
	"tenured": func(t testing.TB, flags ...string) *harness.Server {
		return harness.StartTenured(t, nil, flags...)
	},
}

func newMember(t *testing.T, server *harness.Server) *member {
	t.Helper()
	return &member{Client: newClient(t, server), server: server}
}

// newClient gives a connection of its own.
func newClient(t *testing.T, server *harness.Server) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{server.Endpoint()},
		Logger:    zap.NewNop(),
		// The tests send and receive what is far above the client's own limits.
		MaxCallSendMsgSize: 64 << 20,
		MaxCallRecvMsgSize: 256 << 20,
	})
	must(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	return ctx
}

// restart is kill -9 and a start; the client is connected again when it returns, so that also a write, which the client
// does not repeat, may follow.
func (m *member) restart(t *testing.T) {
	t.Helper()
	m.server.Restart()
	_, err := etcdserverpb.NewKVClient(m.ActiveConnection()).Range(
		testContext(t), &etcdserverpb.RangeRequest{Key: []byte("restart")}, grpc.WaitForReady(true))
	must(t, err)
}

// put writes a key and returns the revision.
func (m *member) put(t *testing.T, key, value string, opts ...clientv3.OpOption) int64 {
	t.Helper()
	resp, err := m.Put(testContext(t), key, value, opts...)
	must(t, err)
	return resp.Header.Revision
}

func (m *member) delete(t *testing.T, key string, opts ...clientv3.OpOption) int64 {
	t.Helper()
	resp, err := m.Delete(testContext(t), key, opts...)
	must(t, err)
	return resp.Header.Revision
}

func (m *member) get(t *testing.T, key string, opts ...clientv3.OpOption) *clientv3.GetResponse {
	t.Helper()
	resp, err := m.Get(testContext(t), key, opts...)
	must(t, err)
	return resp
}

// revision is the store's current one.
func (m *member) revision(t *testing.T) int64 {
	t.Helper()
	return m.get(t, "revision").Header.Revision
}

func (m *member) grant(t *testing.T, ttl int64) clientv3.LeaseID {
	t.Helper()
	resp, err := m.Grant(testContext(t), ttl)
	must(t, err)
	return resp.ID
}

// commit runs a txn that must not be refused.
func commit(t *testing.T, txn clientv3.Txn) *clientv3.TxnResponse {
	t.Helper()
	resp, err := txn.Commit()
	must(t, err)
	return resp
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

// refused checks an error as programs do, by the client's error, which stands for a text; codes are compared in
// pair_test.go, because the client takes them from its own table.
func refused(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

// keys names the keys of a response in its order, without prefix.
func keys(kvs []*mvccpb.KeyValue, prefix string) string {
	names := make([]string, 0, len(kvs))
	for _, kv := range kvs {
		names = append(names, strings.TrimPrefix(string(kv.Key), prefix))
	}
	return strings.Join(names, " ")
}

// shown is one KeyValue with revisions counted from base: "k=v create+1 mod+2 version 2 lease 0".
func shown(kv *mvccpb.KeyValue, base int64) string {
	if kv == nil {
		return "none"
	}
	return fmt.Sprintf("%s=%s create+%d mod+%d version %d lease %x",
		kv.Key, kv.Value, kv.CreateRevision-base, kv.ModRevision-base, kv.Version, kv.Lease)
}

// fullHeader checks what every outermost response header holds.
func fullHeader(t testing.TB, header *etcdserverpb.ResponseHeader, revision int64) {
	t.Helper()
	equal(t, "header revision", header.GetRevision(), revision)
	if header.GetClusterId() == 0 || header.GetMemberId() == 0 || header.GetRaftTerm() == 0 {
		t.Errorf("header lacks cluster, member or term: %v", header)
	}
}

// repeat is a value of size bytes.
func repeat(size int) string { return strings.Repeat("v", size) }

// sorted is a sorted copy.
func sorted(values []string) []string {
	values = slices.Clone(values)
	slices.Sort(values)
	return values
}

// only is the key of a response of at most one, nil for none.
func only(kvs []*mvccpb.KeyValue) *mvccpb.KeyValue {
	switch len(kvs) {
	case 0:
		return nil
	case 1:
		return kvs[0]
	default:
		panic(fmt.Sprintf("%d keys where one was asked for", len(kvs)))
	}
}

// leaseKeys are the keys of a lease, in order.
func (m *member) leaseKeys(t *testing.T, id clientv3.LeaseID) []string {
	t.Helper()
	resp, err := m.TimeToLive(testContext(t), id, clientv3.WithAttachedKeys())
	must(t, err)
	var names []string
	for _, key := range resp.Keys {
		names = append(names, string(key))
	}
	return sorted(names)
}
