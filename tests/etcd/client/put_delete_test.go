package client

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestPut(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"versions", putVersions},
		{"previous", putPrevious},
		{"lease", putLease},
		{"ignore", putIgnore},
		{"bytes", putAnyBytes},
		{"size", putSize},
		{"errors", putErrors},
	})
}

// A put counts the version up, a delete ends it; the same value again is a change too.
func putVersions(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	base := m.put(t, key, "1")
	state := func() string { return shown(only(m.get(t, key).Kvs), base) }
	equal(t, "created", state(), key+"=1 create+0 mod+0 version 1 lease 0")
	equal(t, "revision", m.put(t, key, "1"), base+1)
	equal(t, "same value", state(), key+"=1 create+0 mod+1 version 2 lease 0")
	equal(t, "revision of a delete", m.delete(t, key), base+2)
	equal(t, "deleted", state(), "none")
	m.put(t, key, "")
	equal(t, "created again", state(), key+"= create+3 mod+3 version 1 lease 0")
}

func putPrevious(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	resp, err := m.Put(testContext(t), key, "1", clientv3.WithPrevKV())
	must(t, err)
	base := resp.Header.Revision
	fullHeader(t, resp.Header, base)
	equal(t, "before the first put", shown(resp.PrevKv, base), "none")
	resp, err = m.Put(testContext(t), key, "2", clientv3.WithPrevKV())
	must(t, err)
	equal(t, "previous", shown(resp.PrevKv, base), key+"=1 create+0 mod+0 version 1 lease 0")
	resp, err = m.Put(testContext(t), key, "3")
	must(t, err)
	equal(t, "not asked for", shown(resp.PrevKv, base), "none")
}

// A put without a lease takes the key's lease away.
func putLease(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	one, two := m.grant(t, 600), m.grant(t, 600)
	leaseOf := func() clientv3.LeaseID { return clientv3.LeaseID(only(m.get(t, key).Kvs).Lease) }
	m.put(t, key, "1", clientv3.WithLease(one))
	equal(t, "lease", leaseOf(), one)
	m.put(t, key, "1", clientv3.WithLease(two))
	equal(t, "another lease", leaseOf(), two)
	equal(t, "keys of the first", len(m.leaseKeys(t, one)), 0)
	m.put(t, key, "1")
	equal(t, "no lease", leaseOf(), clientv3.NoLease)
	equal(t, "keys of the second", len(m.leaseKeys(t, two)), 0)
}

func putIgnore(t *testing.T, m *member, prefix string) {
	key := prefix + "a"
	lease := m.grant(t, 600)
	base := m.put(t, key, "1")
	state := func() string {
		kv := only(m.get(t, key).Kvs)
		equal(t, "lease", kv.Lease == int64(lease), kv.Lease != 0)
		kv.Lease = 0
		return shown(kv, base)
	}
	m.put(t, key, "", clientv3.WithIgnoreValue(), clientv3.WithLease(lease))
	equal(t, "value kept", state(), key+"=1 create+0 mod+1 version 2 lease 0")
	m.put(t, key, "2", clientv3.WithIgnoreLease())
	equal(t, "lease kept", len(m.leaseKeys(t, lease)), 1)
	equal(t, "value", state(), key+"=2 create+0 mod+2 version 3 lease 0")
	m.put(t, key, "", clientv3.WithIgnoreLease(), clientv3.WithIgnoreValue())
	equal(t, "both kept", len(m.leaseKeys(t, lease)), 1)
	equal(t, "value", state(), key+"=2 create+0 mod+3 version 4 lease 0")

	_, err := m.Put(testContext(t), prefix+"missing", "", clientv3.WithIgnoreValue())
	refused(t, err, rpctypes.ErrKeyNotFound)
	_, err = m.Put(testContext(t), prefix+"missing", "1", clientv3.WithIgnoreLease())
	refused(t, err, rpctypes.ErrKeyNotFound)
	_, err = m.Put(testContext(t), key, "1", clientv3.WithIgnoreValue())
	refused(t, err, rpctypes.ErrValueProvided)
	_, err = m.Put(testContext(t), key, "1", clientv3.WithIgnoreLease(), clientv3.WithLease(lease))
	refused(t, err, rpctypes.ErrLeaseProvided)
	equal(t, "nothing changed by errors", m.revision(t), base+3)
}

func putAnyBytes(t *testing.T, m *member, prefix string) {
	long := prefix + repeat(100_000)
	for _, key := range []string{"\x00", "\x00\x00", "\xff\xff\xff", prefix + "a\x00b", prefix + "é", long} {
		m.put(t, key, key)
		equal(t, "value", string(only(m.get(t, key).Kvs).Value), key)
		resp, err := m.Delete(testContext(t), key)
		must(t, err)
		equal(t, "deleted", resp.Deleted, 1)
	}
}

// The largest put is 1.5 MiB as etcd's log encodes it, with a header of some bytes more or less.
func putSize(t *testing.T, m *member, prefix string) {
	const largest, header = 1_572_864, 64
	key := prefix + "a"
	fits := largest - header - len(key)
	m.put(t, key, repeat(fits))
	equal(t, "length", len(only(m.get(t, key).Kvs).Value), fits)
	_, err := m.Put(testContext(t), key, repeat(fits+header))
	refused(t, err, rpctypes.ErrRequestTooLarge)
	_, err = m.Txn(testContext(t)).Then(clientv3.OpPut(key, repeat(fits+header))).Commit()
	refused(t, err, rpctypes.ErrRequestTooLarge)
	m.delete(t, key)
}

func putErrors(t *testing.T, m *member, prefix string) {
	revision := m.revision(t)
	_, err := m.Put(testContext(t), "", "1")
	refused(t, err, rpctypes.ErrEmptyKey)
	_, err = m.Put(testContext(t), prefix+"a", "1", clientv3.WithLease(12345))
	refused(t, err, rpctypes.ErrLeaseNotFound)
	_, err = m.Put(testContext(t), prefix+"a", "1", clientv3.WithLease(-1))
	refused(t, err, rpctypes.ErrLeaseNotFound)
	_, err = m.Delete(testContext(t), "")
	refused(t, err, rpctypes.ErrEmptyKey)
	equal(t, "revision", m.revision(t), revision)
	equal(t, "not written", m.get(t, prefix+"a").Count, 0)
}

func TestDelete(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"ranges", deleteRanges},
		{"previous", deletePrevious},
		{"nothing", deleteNothing},
		{"lease", deleteDetaches},
	})
}

func deleteRanges(t *testing.T, m *member, prefix string) {
	for _, c := range []struct {
		what, key string
		opts      []clientv3.OpOption
		left      string
	}{
		{"one", "b", nil, "a ba c"},
		{"prefix", "b", []clientv3.OpOption{clientv3.WithPrefix()}, "a c"},
		{"half open", "a", []clientv3.OpOption{clientv3.WithRange(prefix + "ba")}, "ba c"},
		{"reversed", "c", []clientv3.OpOption{clientv3.WithRange(prefix + "a")}, "a b ba c"},
		{"from key", "b", []clientv3.OpOption{clientv3.WithFromKey()}, "a"},
	} {
		for _, key := range []string{"a", "b", "ba", "c"} {
			m.put(t, prefix+key, "1")
		}
		before := m.revision(t)
		resp, err := m.Delete(testContext(t), prefix+c.key, c.opts...)
		must(t, err)
		left := m.get(t, prefix, clientv3.WithPrefix())
		equal(t, c.what+" left", keys(left.Kvs, prefix), c.left)
		equal(t, c.what+" deleted", resp.Deleted, 4-left.Count)
		// However many keys, one revision.
		fullHeader(t, resp.Header, before+min(resp.Deleted, 1))
	}
}

func deletePrevious(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"b", "2")
	m.put(t, prefix+"b", "3")
	resp, err := m.Delete(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithPrevKV())
	must(t, err)
	equal(t, "deleted", resp.Deleted, 2)
	equal(t, "keys", keys(resp.PrevKvs, prefix), "a b")
	equal(t, "previous", shown(resp.PrevKvs[1], base), prefix+"b=3 create+1 mod+2 version 2 lease 0")
}

// What deletes nothing makes no revision.
func deleteNothing(t *testing.T, m *member, prefix string) {
	revision := m.revision(t)
	resp, err := m.Delete(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithPrevKV())
	must(t, err)
	equal(t, "deleted", resp.Deleted, 0)
	equal(t, "previous", len(resp.PrevKvs), 0)
	fullHeader(t, resp.Header, revision)
}

func deleteDetaches(t *testing.T, m *member, prefix string) {
	lease := m.grant(t, 600)
	m.put(t, prefix+"a", "1", clientv3.WithLease(lease))
	m.delete(t, prefix+"a")
	equal(t, "keys of the lease", len(m.leaseKeys(t, lease)), 0)
	m.put(t, prefix+"a", "2")
	_, err := m.Revoke(testContext(t), lease)
	must(t, err)
	equal(t, "a key created again has no lease", m.get(t, prefix+"a").Count, 1)
}

// Codes and texts of what is refused, and what is checked first when several things are wrong.
func TestRefusalsSame(t *testing.T) {
	p := newPair(t)
	p.same(t, &pb.PutRequest{Key: []byte("k"), Value: []byte("1")})
	p.same(t, &pb.PutRequest{Key: []byte("k"), Value: []byte("2")})
	p.same(t, &pb.PutRequest{Key: []byte("k"), Value: []byte("3")})
	p.same(t, &pb.CompactionRequest{Revision: 3})
	large := []byte(repeat(1 << 21))
	for _, request := range []*pb.PutRequest{
		{},
		{Value: []byte("1"), IgnoreValue: true},
		{Key: []byte("k"), Value: []byte("1"), IgnoreValue: true, IgnoreLease: true, Lease: 1},
		{Key: []byte("k"), IgnoreLease: true, Lease: 1},
		{Key: []byte("missing"), IgnoreValue: true, Lease: 1},
		{Key: []byte("missing"), IgnoreValue: true},
		{Key: []byte("missing"), IgnoreLease: true},
		{Key: []byte("k"), Lease: 1},
		{Key: []byte("k"), Lease: -1},
		{Value: large[:1_700_000]},
		{Key: []byte("k"), Value: large[:1_700_000], Lease: 1},
		{Key: []byte("k"), Value: large[:1_700_000], IgnoreValue: true},
		// Above what the transport takes; its text names the sizes.
		{Key: []byte("k"), Value: large},
	} {
		p.same(t, request)
		p.same(t, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: request}}}})
		p.same(t, &pb.TxnRequest{Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: request}}}})
	}
	for _, request := range []*pb.RangeRequest{
		{}, {SortOrder: 9}, {Key: []byte("k"), SortOrder: 9, Revision: 99}, {Key: []byte("k"), SortTarget: 5, Revision: 1},
		{Key: []byte("k"), Revision: 2}, {Key: []byte("k"), Revision: 3}, {Key: []byte("k"), Revision: 5},
		{Key: []byte("k"), RangeEnd: []byte("a"), Revision: 2}, {Key: []byte("k"), RangeEnd: []byte("a"), Revision: 5},
		{Key: []byte("k"), Revision: -7},
	} {
		p.same(t, request)
		p.same(t, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: request}}}})
	}
	p.same(t, &pb.DeleteRangeRequest{})
	p.same(t, &pb.DeleteRangeRequest{RangeEnd: []byte{0}})
	for _, revision := range []int64{-1, 0, 2, 3, 5} {
		p.same(t, &pb.CompactionRequest{Revision: revision})
		p.same(t, &pb.CompactionRequest{Revision: revision, Physical: true})
	}
	p.same(t, &pb.LeaseGrantRequest{ID: 5, TTL: 600})
	p.same(t, &pb.LeaseGrantRequest{ID: 5, TTL: 600})
	p.same(t, &pb.LeaseGrantRequest{ID: -5, TTL: 600})
	p.same(t, &pb.LeaseGrantRequest{ID: 6, TTL: 9_000_000_001})
	p.same(t, &pb.LeaseGrantRequest{ID: 5, TTL: 9_000_000_001})
	p.same(t, &pb.LeaseGrantRequest{ID: 7, TTL: 9_000_000_000})
	p.same(t, &pb.LeaseGrantRequest{ID: 8, TTL: 0})
	p.same(t, &pb.LeaseGrantRequest{ID: 9, TTL: -1})
	p.same(t, &pb.LeaseRevokeRequest{ID: 10})
	p.same(t, &pb.LeaseRevokeRequest{})
	// Of the compact revision itself etcd remembers the hash before the compaction.
	for _, revision := range []int64{-1, 0, 1, 2, 4, 5} {
		p.same(t, &pb.HashKVRequest{Revision: revision})
	}
}
