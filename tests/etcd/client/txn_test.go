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
		{"branches", txnBranches},
		{"compares", txnCompares},
		{"range-compares", txnRangeCompares},
		{"revision", txnRevision},
		{"own-writes", txnSeesOwnWrites},
		{"nested", txnNested},
		{"read-only", txnReadOnly},
		{"all-or-nothing", txnAllOrNothing},
		{"duplicates", txnDuplicates},
		{"limits", txnLimits},
		{"one-response", txnEventsInOneResponse},
	})
}

func txnBranches(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	txn := func() *clientv3.TxnResponse {
		return commit(t, m.Txn(testContext(t)).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "1"), clientv3.OpGet(key)).
			Else(clientv3.OpGet(key), clientv3.OpDelete(key, clientv3.WithPrevKV()), clientv3.OpGet(key, clientv3.WithCountOnly())))
	}
	base := m.revision(t) + 1

	resp := txn()
	equal(t, "succeeded", resp.Succeeded, true)
	fullHeader(t, resp.Header, base)
	equal(t, "responses", len(resp.Responses), 2)
	equal(t, "put", resp.Responses[0].GetResponsePut().Header.Revision, base)
	equal(t, "get", shown(only(resp.Responses[1].GetResponseRange().Kvs), base), key+"=1 create+0 mod+0 version 1 lease 0")

	resp = txn()
	equal(t, "succeeded", resp.Succeeded, false)
	fullHeader(t, resp.Header, base+1)
	equal(t, "responses", len(resp.Responses), 3)
	equal(t, "get", resp.Responses[0].GetResponseRange().Header.Revision, base)
	equal(t, "delete", keys(resp.Responses[1].GetResponseDeleteRange().PrevKvs, prefix), "a")
	equal(t, "count behind the delete", resp.Responses[2].GetResponseRange().Count, 0)
	if header := resp.Responses[0].GetResponseRange().Header; header.MemberId != 0 || header.ClusterId != 0 || header.RaftTerm != 0 {
		t.Errorf("an inner header holds a revision only, got %v", header)
	}
}

// Every target with every operator, on a key that exists and on one that does not.
func txnCompares(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	lease := m.grant(t, 600)
	create := m.put(t, key, "m")
	mod := m.put(t, key, "m", clientv3.WithLease(lease))
	holds := func(cmp clientv3.Cmp) bool {
		return commit(t, m.Txn(testContext(t)).If(cmp)).Succeeded
	}
	for _, target := range []struct {
		name               string
		of                 func(string) clientv3.Cmp
		below, same, above any
		ofMissing          any
	}{
		{"value", clientv3.Value, "l", "m", "n", nil},
		{"version", clientv3.Version, 1, 2, 3, 0},
		{"create", clientv3.CreateRevision, create - 1, create, create + 1, 0},
		{"mod", clientv3.ModRevision, mod - 1, mod, mod + 1, 0},
		{"lease", clientv3.LeaseValue, lease - 1, lease, lease + 1, 0},
	} {
		for _, c := range []struct {
			operator           string
			below, same, above bool
		}{
			{"=", false, true, false},
			{"!=", true, false, true},
			{">", true, false, false},
			{"<", false, false, true},
		} {
			what := target.name + " " + c.operator
			equal(t, what+" a lower", holds(clientv3.Compare(target.of(key), c.operator, target.below)), c.below)
			equal(t, what+" the same", holds(clientv3.Compare(target.of(key), c.operator, target.same)), c.same)
			equal(t, what+" a higher", holds(clientv3.Compare(target.of(key), c.operator, target.above)), c.above)
			missing := prefix + "missing"
			if target.ofMissing == nil {
				// A key that is not there has no value to compare, not even for inequality.
				equal(t, what+" of nothing", holds(clientv3.Compare(target.of(missing), c.operator, "m")), false)
				equal(t, what+" of nothing", holds(clientv3.Compare(target.of(missing), c.operator, "")), false)
				continue
			}
			equal(t, what+" of nothing", holds(clientv3.Compare(target.of(missing), c.operator, target.ofMissing)), c.same)
		}
	}
	equal(t, "all must hold", commit(t, m.Txn(testContext(t)).If(
		clientv3.Compare(clientv3.Version(key), "=", 2),
		clientv3.Compare(clientv3.Value(key), "=", "n"))).Succeeded, false)
	equal(t, "nothing to hold", commit(t, m.Txn(testContext(t))).Succeeded, true)
}

// A compare with a range must hold for each key of it.
func txnRangeCompares(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"a", "1")
	m.put(t, prefix+"b", "2")
	m.put(t, prefix+"b", "2")
	for _, c := range []struct {
		cmp  clientv3.Cmp
		want bool
	}{
		{clientv3.Compare(clientv3.Version(prefix), ">", 0).WithPrefix(), true},
		{clientv3.Compare(clientv3.Version(prefix), ">", 1).WithPrefix(), false},
		{clientv3.Compare(clientv3.Version(prefix+"b"), ">", 1).WithPrefix(), true},
		{clientv3.Compare(clientv3.Version(prefix+"a"), "=", 1).WithRange(prefix + "b"), true},
		{clientv3.Compare(clientv3.Value(prefix), "!=", "3").WithPrefix(), true},
		{clientv3.Compare(clientv3.Value(prefix), "!=", "2").WithPrefix(), false},
		// An empty range is compared as one missing key.
		{clientv3.Compare(clientv3.CreateRevision(prefix+"z"), "=", 0).WithPrefix(), true},
		{clientv3.Compare(clientv3.CreateRevision(prefix+"z"), ">", 0).WithPrefix(), false},
		{clientv3.Compare(clientv3.Value(prefix+"z"), "!=", "1").WithPrefix(), false},
		{clientv3.Compare(clientv3.Version(prefix+"b"), "=", 0).WithRange(prefix + "a"), true},
	} {
		got := commit(t, m.Txn(testContext(t)).If(c.cmp)).Succeeded
		equal(t, fmt.Sprint(c.cmp.GetCompare()), got, c.want)
	}
}

// All changes of a txn have one revision; a txn that changes nothing has none.
func txnRevision(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"old", "1")
	base := m.revision(t)
	resp := commit(t, m.Txn(testContext(t)).Then(
		clientv3.OpGet(prefix+"a"),
		clientv3.OpPut(prefix+"a", "1"),
		clientv3.OpPut(prefix+"b", "1"),
		clientv3.OpDelete(prefix+"old"),
		clientv3.OpGet(prefix, clientv3.WithPrefix())))
	equal(t, "one revision", resp.Header.Revision, base+1)
	equal(t, "get before the change", resp.Responses[0].GetResponseRange().Header.Revision, base)
	equal(t, "get behind it", resp.Responses[4].GetResponseRange().Header.Revision, base+1)
	for _, kv := range m.get(t, prefix, clientv3.WithPrefix()).Kvs {
		equal(t, "mod revision", kv.ModRevision, base+1)
	}

	for what, ops := range map[string][]clientv3.Op{
		"no operation":       nil,
		"get":                {clientv3.OpGet(prefix + "a")},
		"delete of nothing":  {clientv3.OpDelete(prefix + "missing")},
		"nested get":         {clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet(prefix + "a")}, nil)},
		"nested no deletion": {clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpDelete(prefix + "missing")}, nil)},
	} {
		fullHeader(t, commit(t, m.Txn(testContext(t)).Then(ops...)).Header, base+1)
		equal(t, what, m.revision(t), base+1)
	}
}

// An operation sees those before it in its txn; a compare, also a nested one, sees the store before the txn.
func txnSeesOwnWrites(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	base := m.put(t, key, "old")
	resp := commit(t, m.Txn(testContext(t)).Then(
		clientv3.OpGet(key, clientv3.WithSerializable()),
		clientv3.OpPut(key, "new", clientv3.WithPrevKV()),
		clientv3.OpGet(key),
		clientv3.OpGet(key, clientv3.WithRev(base)),
		clientv3.OpTxn(
			[]clientv3.Cmp{clientv3.Compare(clientv3.Value(key), "=", "new")},
			nil,
			[]clientv3.Op{clientv3.OpGet(key)})))
	equal(t, "before", string(only(resp.Responses[0].GetResponseRange().Kvs).Value), "old")
	equal(t, "previous", string(resp.Responses[1].GetResponsePut().PrevKv.Value), "old")
	equal(t, "behind", string(only(resp.Responses[2].GetResponseRange().Kvs).Value), "new")
	equal(t, "in the past", string(only(resp.Responses[3].GetResponseRange().Kvs).Value), "old")
	nested := resp.Responses[4].GetResponseTxn()
	equal(t, "nested compare", nested.Succeeded, false)
	equal(t, "nested get", string(only(nested.Responses[0].GetResponseRange().Kvs).Value), "new")

	_, err := m.Txn(testContext(t)).Then(clientv3.OpPut(key, "future"), clientv3.OpGet(key, clientv3.WithRev(base+2))).Commit()
	refused(t, err, rpctypes.ErrFutureRev)
	equal(t, "nothing written", m.revision(t), base+1)
}

func txnNested(t *testing.T, m *member, prefix string) {
	missing := []clientv3.Cmp{clientv3.Compare(clientv3.Version(prefix+"a"), "=", 0)}
	base := m.revision(t)
	inner := clientv3.OpTxn(missing, []clientv3.Op{clientv3.OpPut(prefix+"c", "3")}, []clientv3.Op{clientv3.OpPut(prefix+"c", "not")})
	middle := clientv3.OpTxn(missing, []clientv3.Op{clientv3.OpPut(prefix+"b", "2"), inner}, nil)
	resp := commit(t, m.Txn(testContext(t)).If(missing...).Then(clientv3.OpPut(prefix+"a", "1"), middle))
	equal(t, "revision", resp.Header.Revision, base+1)
	second := resp.Responses[1].GetResponseTxn()
	equal(t, "second level", second.Succeeded, true)
	equal(t, "header of the second level", second.Header.Revision, 0)
	equal(t, "third level", second.Responses[1].GetResponseTxn().Succeeded, true)
	all := m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithMinModRev(base+1), clientv3.WithMaxModRev(base+1))
	equal(t, "written", keys(all.Kvs, prefix), "a b c")
	equal(t, "value", string(all.Kvs[2].Value), "3")
}

func txnReadOnly(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	resp := commit(t, m.Txn(testContext(t)).Then(
		clientv3.OpGet(prefix+"a", clientv3.WithRev(base)),
		clientv3.OpGet(prefix+"a"),
		clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithSerializable())))
	fullHeader(t, resp.Header, base+1)
	equal(t, "past", string(only(resp.Responses[0].GetResponseRange().Kvs).Value), "1")
	equal(t, "now", string(only(resp.Responses[1].GetResponseRange().Kvs).Value), "2")
	equal(t, "key", string(only(resp.Responses[2].GetResponseRange().Kvs).Value), "")

	_, err := m.Txn(testContext(t)).Then(clientv3.OpGet(prefix+"a", clientv3.WithRev(base+2))).Commit()
	refused(t, err, rpctypes.ErrFutureRev)
}

// An error of one operation undoes those before it; the branch that is not taken cannot fail.
func txnAllOrNothing(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	for _, c := range []struct {
		op   clientv3.Op
		want error
	}{
		{clientv3.OpPut(prefix+"b", "1", clientv3.WithLease(4711)), rpctypes.ErrLeaseNotFound},
		{clientv3.OpPut(prefix+"b", "", clientv3.WithIgnoreValue()), rpctypes.ErrKeyNotFound},
		{clientv3.OpGet(prefix+"a", clientv3.WithRev(base+1)), rpctypes.ErrFutureRev},
		{clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(prefix+"b", "1", clientv3.WithLease(4711))}, nil), rpctypes.ErrLeaseNotFound},
	} {
		_, err := m.Txn(testContext(t)).Then(clientv3.OpPut(prefix+"a", "2"), clientv3.OpDelete(prefix+"c"), c.op).Commit()
		refused(t, err, c.want)
		equal(t, "revision", m.revision(t), base)
		equal(t, "value", string(only(m.get(t, prefix+"a").Kvs).Value), "1")
		commit(t, m.Txn(testContext(t)).Then(clientv3.OpGet(prefix+"a")).Else(c.op))
	}
	// What is wrong with the request itself counts in the other branch too.
	_, err := m.Txn(testContext(t)).Then(clientv3.OpGet(prefix + "a")).Else(clientv3.OpPut("", "1")).Commit()
	refused(t, err, rpctypes.ErrEmptyKey)
	_, err = m.Txn(testContext(t)).If(clientv3.Compare(clientv3.Version(""), "=", 0)).Commit()
	refused(t, err, rpctypes.ErrEmptyKey)
}

func txnDuplicates(t *testing.T, m *member, prefix string) {
	put := clientv3.OpPut(prefix+"a", "1")
	del := clientv3.OpDelete(prefix + "a")
	delAll := clientv3.OpDelete(prefix, clientv3.WithPrefix())
	nest := func(then, otherwise []clientv3.Op) clientv3.Op { return clientv3.OpTxn(nil, then, otherwise) }
	for _, c := range []struct {
		what   string
		ops    []clientv3.Op
		refuse bool
	}{
		{"two puts", []clientv3.Op{put, put}, true},
		{"put and delete", []clientv3.Op{put, del}, true},
		{"delete and put", []clientv3.Op{del, put}, true},
		{"put in a deleted range", []clientv3.Op{delAll, put}, true},
		{"two deletes", []clientv3.Op{delAll, del, delAll}, false},
		{"put and get", []clientv3.Op{put, clientv3.OpGet(prefix+"a", clientv3.WithPrefix())}, false},
		{"put and nested put", []clientv3.Op{put, nest([]clientv3.Op{put}, nil)}, true},
		{"nested put and put", []clientv3.Op{nest(nil, []clientv3.Op{put}), put}, true},
		{"put and nested delete", []clientv3.Op{put, nest([]clientv3.Op{delAll}, nil)}, true},
		{"both branches of a nested txn", []clientv3.Op{nest([]clientv3.Op{put}, []clientv3.Op{put})}, false},
		{"delete in the other branch", []clientv3.Op{nest([]clientv3.Op{put}, []clientv3.Op{del})}, false},
		{"two nested siblings", []clientv3.Op{nest([]clientv3.Op{put}, nil), nest(nil, []clientv3.Op{put})}, true},
	} {
		_, err := m.Txn(testContext(t)).Then(c.ops...).Commit()
		_, otherErr := m.Txn(testContext(t)).Then(clientv3.OpGet(prefix)).Else(c.ops...).Commit()
		if c.refuse {
			refused(t, err, rpctypes.ErrDuplicateKey)
			refused(t, otherErr, rpctypes.ErrDuplicateKey)
		} else if err != nil || otherErr != nil {
			t.Errorf("%s: %v, %v", c.what, err, otherErr)
		}
	}
	resp := commit(t, m.Txn(testContext(t)).Then(put).Else(put))
	equal(t, "the two branches of a txn may put the same key", resp.Succeeded, true)
}

// 128 operations a level; a nested txn has what its parent leaves.
func txnLimits(t *testing.T, m *member, prefix string) {
	gets := func(count int) []clientv3.Op {
		ops := make([]clientv3.Op, count)
		for i := range ops {
			ops[i] = clientv3.OpGet(fmt.Sprint(prefix, i))
		}
		return ops
	}
	compares := make([]clientv3.Cmp, 129)
	for i := range compares {
		compares[i] = clientv3.Compare(clientv3.Version(fmt.Sprint(prefix, i)), "=", 0)
	}
	begin := func() clientv3.Txn { return m.Txn(testContext(t)) }
	for what, c := range map[string]struct {
		txn    clientv3.Txn
		refuse bool
	}{
		"128 each":            {begin().If(compares[:128]...).Then(gets(128)...).Else(gets(128)...), false},
		"129 compares":        {begin().If(compares...), true},
		"129 operations":      {begin().Then(gets(129)...), true},
		"129 in the other":    {begin().Then(gets(1)...).Else(gets(129)...), true},
		"127 in a nested txn": {begin().Then(clientv3.OpTxn(nil, gets(127), nil)), false},
		"128 in a nested txn": {begin().Then(clientv3.OpTxn(nil, gets(128), nil)), true},
	} {
		_, err := c.txn.Commit()
		if c.refuse {
			refused(t, err, rpctypes.ErrTooManyOps)
		} else if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// All events of a txn arrive together, in the order of its operations and, for a deleted range, of its keys.
func txnEventsInOneResponse(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"x1", "1")
	m.put(t, prefix+"x2", "1")
	w := m.watch(t, prefix, clientv3.WithPrefix())
	resp := commit(t, m.Txn(testContext(t)).Then(
		clientv3.OpPut(prefix+"c", "1"),
		clientv3.OpDelete(prefix+"x", clientv3.WithPrefix()),
		clientv3.OpPut(prefix+"a", "1"),
		clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(prefix+"b", "1")}, nil)))
	got := w.next(t)
	equal(t, "header", got.Header.Revision, resp.Header.Revision)
	equal(t, "events", shownEvents(got.Events, prefix, resp.Header.Revision), "PUT c@0 DELETE x1@0 DELETE x2@0 PUT a@0 PUT b@0")

	// And so from history, with another revision behind it.
	m.put(t, prefix+"d", "1")
	past := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(resp.Header.Revision))
	equal(t, "from history", shownEvents(past.events(t, 6), prefix, resp.Header.Revision),
		"PUT c@0 DELETE x1@0 DELETE x2@0 PUT a@0 PUT b@0 PUT d@1")
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
