package client

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestTxn(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"compares", txnCompares},
		{"branches", txnBranches},
		{"ranges", txnRangeCompares},
		{"nested", txnNested},
		{"revision", txnOneRevision},
		{"limits", txnLimits},
		{"duplicates", txnDuplicates},
		{"refused", txnRefusedWhole},
	})
}

func txnCompares(t *testing.T, m *member, prefix string) {
	key, missing := prefix+"a", prefix+"missing"
	lease := m.grant(t, 600)
	created := m.put(t, key, "1")
	modified := m.put(t, key, "2", clientv3.WithLease(lease))
	for _, c := range []struct {
		what string
		cmp  clientv3.Cmp
		want bool
	}{
		{"value =", clientv3.Compare(clientv3.Value(key), "=", "2"), true},
		{"value !=", clientv3.Compare(clientv3.Value(key), "!=", "2"), false},
		{"value <", clientv3.Compare(clientv3.Value(key), "<", "3"), true},
		{"value >", clientv3.Compare(clientv3.Value(key), ">", "19"), true},
		{"version", clientv3.Compare(clientv3.Version(key), "=", 2), true},
		{"version >", clientv3.Compare(clientv3.Version(key), ">", 2), false},
		{"create", clientv3.Compare(clientv3.CreateRevision(key), "=", created), true},
		{"mod", clientv3.Compare(clientv3.ModRevision(key), "=", modified), true},
		{"mod <", clientv3.Compare(clientv3.ModRevision(key), "<", modified), false},
		{"lease", clientv3.Compare(clientv3.LeaseValue(key), "=", lease), true},
		{"no lease", clientv3.Compare(clientv3.LeaseValue(key), "=", 0), false},
		{"missing, version", clientv3.Compare(clientv3.Version(missing), "=", 0), true},
		{"missing, create", clientv3.Compare(clientv3.CreateRevision(missing), "=", 0), true},
		{"missing, mod >", clientv3.Compare(clientv3.ModRevision(missing), ">", 0), false},
		{"missing, value =", clientv3.Compare(clientv3.Value(missing), "=", ""), false},
		{"missing, value !=", clientv3.Compare(clientv3.Value(missing), "!=", "x"), false},
	} {
		resp := commit(t, m.Txn(testContext(t)).If(c.cmp))
		equal(t, c.what, resp.Succeeded, c.want)
	}
	both := commit(t, m.Txn(testContext(t)).If(
		clientv3.Compare(clientv3.Version(key), "=", 2), clientv3.Compare(clientv3.Version(missing), ">", 0)))
	equal(t, "all must hold", both.Succeeded, false)
}

func txnBranches(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	create := func(value string) *clientv3.TxnResponse {
		return commit(t, m.Txn(testContext(t)).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, value)).
			Else(clientv3.OpGet(key)))
	}
	first := create("first")
	equal(t, "created", first.Succeeded, true)
	equal(t, "a put is answered", first.Responses[0].GetResponsePut() != nil, true)
	second := create("second")
	equal(t, "created again", second.Succeeded, false)
	equal(t, "what is there", string(only(second.Responses[0].GetResponseRange().Kvs).Value), "first")
	equal(t, "a read makes no revision", second.Header.Revision, first.Header.Revision)

	other := prefix + "b"
	base := m.put(t, other, "old")
	resp := commit(t, m.Txn(testContext(t)).Then(
		clientv3.OpPut(key, "third", clientv3.WithPrevKV()),
		clientv3.OpGet(key),
		clientv3.OpDelete(other, clientv3.WithPrevKV()),
		clientv3.OpGet(other, clientv3.WithCountOnly()),
	))
	equal(t, "put's previous", string(resp.Responses[0].GetResponsePut().PrevKv.Value), "first")
	equal(t, "a read sees the put", string(only(resp.Responses[1].GetResponseRange().Kvs).Value), "third")
	equal(t, "deleted", resp.Responses[2].GetResponseDeleteRange().Deleted, 1)
	equal(t, "deleted's previous", string(resp.Responses[2].GetResponseDeleteRange().PrevKvs[0].Value), "old")
	equal(t, "a read sees the delete", resp.Responses[3].GetResponseRange().Count, 0)
	equal(t, "one revision", resp.Header.Revision, base+1)
}

func txnRangeCompares(t *testing.T, m *member, prefix string) {
	for _, key := range []string{"a", "b", "c"} {
		m.put(t, prefix+key, "1")
	}
	m.put(t, prefix+"c", "2")
	for _, c := range []struct {
		what string
		cmp  clientv3.Cmp
		want bool
	}{
		{"all", clientv3.Compare(clientv3.Version(prefix), ">", 0).WithPrefix(), true},
		{"not all", clientv3.Compare(clientv3.Version(prefix), "=", 1).WithPrefix(), false},
		{"half open", clientv3.Compare(clientv3.Value(prefix+"a"), "=", "1").WithRange(prefix + "c"), true},
		{"nothing there", clientv3.Compare(clientv3.Version(prefix+"x"), ">", 0).WithPrefix(), false},
		{"nothing there, like a missing key", clientv3.Compare(clientv3.Version(prefix+"x"), "=", 0).WithPrefix(), true},
	} {
		equal(t, c.what, commit(t, m.Txn(testContext(t)).If(c.cmp)).Succeeded, c.want)
	}
}

func txnNested(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	// Conditions of all levels look at what was before the txn.
	inner := clientv3.OpTxn(
		[]clientv3.Cmp{clientv3.Compare(clientv3.Value(prefix+"a"), "=", "1")},
		[]clientv3.Op{clientv3.OpPut(prefix+"b", "inner"), clientv3.OpGet(prefix + "a")},
		[]clientv3.Op{clientv3.OpPut(prefix+"b", "else")},
	)
	resp := commit(t, m.Txn(testContext(t)).Then(clientv3.OpPut(prefix+"a", "2"), inner, clientv3.OpGet(prefix+"b")))
	nested := resp.Responses[1].GetResponseTxn()
	equal(t, "inner branch", nested.Succeeded, true)
	equal(t, "inner read", string(only(nested.Responses[1].GetResponseRange().Kvs).Value), "2")
	equal(t, "outer read", string(only(resp.Responses[2].GetResponseRange().Kvs).Value), "inner")
	equal(t, "one revision", resp.Header.Revision, base+1)
}

func txnOneRevision(t *testing.T, m *member, prefix string) {
	watcher := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	created := <-watcher
	ops := make([]clientv3.Op, 100)
	for i := range ops {
		ops[i] = clientv3.OpPut(fmt.Sprintf("%s%03d", prefix, i), "v")
	}
	resp := commit(t, m.Txn(testContext(t)).Then(ops...))
	equal(t, "revision", resp.Header.Revision, created.Header.Revision+1)
	events := <-watcher
	equal(t, "events in one response", len(events.Events), len(ops))
	for i, event := range events.Events {
		equal(t, "order", string(event.Kv.Key), fmt.Sprintf("%s%03d", prefix, i))
		equal(t, "mod", event.Kv.ModRevision, resp.Header.Revision)
	}
}

func txnLimits(t *testing.T, m *member, prefix string) {
	ops := make([]clientv3.Op, 129)
	for i := range ops {
		ops[i] = clientv3.OpPut(fmt.Sprintf("%s%03d", prefix, i), "v")
	}
	_, err := m.Txn(testContext(t)).Then(ops...).Commit()
	refused(t, err, rpctypes.ErrTooManyOps)
	_, err = m.Txn(testContext(t)).Else(ops...).Commit()
	refused(t, err, rpctypes.ErrTooManyOps)
	commit(t, m.Txn(testContext(t)).Then(ops[:128]...))
}

func txnDuplicates(t *testing.T, m *member, prefix string) {
	a, b := prefix+"a", prefix+"b"
	nested := func(ops ...clientv3.Op) clientv3.Op { return clientv3.OpTxn(nil, ops, nil) }
	for _, c := range []struct {
		what string
		ops  []clientv3.Op
		want error
	}{
		{"two puts", []clientv3.Op{clientv3.OpPut(a, "1"), clientv3.OpPut(a, "2")}, rpctypes.ErrDuplicateKey},
		{"put and nested put", []clientv3.Op{clientv3.OpPut(a, "1"), nested(clientv3.OpPut(a, "2"))}, rpctypes.ErrDuplicateKey},
		{"put under a delete", []clientv3.Op{clientv3.OpDelete(prefix, clientv3.WithPrefix()), clientv3.OpPut(b, "1")}, rpctypes.ErrDuplicateKey},
		{"delete and get", []clientv3.Op{clientv3.OpDelete(a), clientv3.OpGet(a)}, nil},
		{"two deletes", []clientv3.Op{clientv3.OpDelete(a), clientv3.OpDelete(a)}, nil},
		{"put and get", []clientv3.Op{clientv3.OpPut(a, "1"), clientv3.OpGet(a), clientv3.OpPut(b, "1")}, nil},
	} {
		_, err := m.Txn(testContext(t)).Then(c.ops...).Commit()
		if c.want == nil {
			must(t, err)
		} else {
			refused(t, err, c.want)
		}
	}
}

// What is refused in the middle has not happened at all.
func txnRefusedWhole(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	for _, bad := range []clientv3.Op{
		clientv3.OpPut(prefix+"b", "1", clientv3.WithLease(12345)),
		clientv3.OpPut(prefix+"b", "", clientv3.WithIgnoreValue()),
		clientv3.OpGet(prefix+"a", clientv3.WithRev(base+100)),
	} {
		_, err := m.Txn(testContext(t)).Then(clientv3.OpPut(prefix+"a", "2"), bad).Commit()
		if err == nil {
			t.Errorf("not refused")
		}
	}
	equal(t, "value", string(only(m.get(t, prefix+"a").Kvs).Value), "1")
	equal(t, "revision", m.revision(t), base)
}

// Random txns, also such as the client cannot make, are answered alike.
func TestTxnSame(t *testing.T) {
	p := newPair(t)
	for seed := range 400 {
		p.same(t, randomTxn(newRandom(uint64(seed)), 2))
	}
	p.same(t, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	p.same(t, &pb.HashKVRequest{})
}
