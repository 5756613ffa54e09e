package client

import (
	"math/rand/v2"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestGet(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"fresh", getFromFreshStore},
		{"ranges", getRanges},
		{"limit", getLimit},
		{"sorts", getSorts},
		{"revisions", getRevisions},
		{"filters", getFilters},
		{"only", getKeysOrCountOnly},
		{"errors", getErrors},
	})
}

// A store that was never written is at revision 1.
func getFromFreshStore(t *testing.T, m *member, prefix string) {
	resp := m.get(t, prefix, clientv3.WithPrefix())
	fullHeader(t, resp.Header, 1)
	equal(t, "count", resp.Count, 0)
	equal(t, "first write", m.put(t, prefix+"a", "1"), 2)
}

func getRanges(t *testing.T, m *member, prefix string) {
	for _, key := range []string{"a", "b", "b\x00", "ba", "c", "\xff", "\xff\xff"} {
		m.put(t, prefix+key, "v")
	}
	end := clientv3.GetPrefixRangeEnd(prefix)
	for _, c := range []struct {
		what, key string
		opts      []clientv3.OpOption
		want      string
	}{
		{"one key", prefix + "b", nil, "b"},
		{"a missing key", prefix + "bb", nil, ""},
		{"a prefix", prefix + "b", []clientv3.OpOption{clientv3.WithPrefix()}, "b b\x00 ba"},
		{"a prefix that ends in 0xff", prefix + "\xff", []clientv3.OpOption{clientv3.WithPrefix()}, "\xff \xff\xff"},
		{"half open", prefix + "a", []clientv3.OpOption{clientv3.WithRange(prefix + "b\x00")}, "a b"},
		{"to the end of the prefix", prefix + "ba", []clientv3.OpOption{clientv3.WithRange(end)}, "ba c \xff \xff\xff"},
		{"nothing between", prefix + "b", []clientv3.OpOption{clientv3.WithRange(prefix + "b")}, ""},
		{"reversed", prefix + "c", []clientv3.OpOption{clientv3.WithRange(prefix + "a")}, ""},
		{"serializable", prefix + "a", []clientv3.OpOption{clientv3.WithSerializable()}, "a"},
	} {
		resp := m.get(t, c.key, c.opts...)
		equal(t, c.what, keys(resp.Kvs, prefix), c.want)
		equal(t, c.what+", count", resp.Count, int64(len(resp.Kvs)))
		equal(t, c.what+", more", resp.More, false)
	}

	all := m.get(t, "\x00", clientv3.WithFromKey())
	equal(t, "everything by from-key, by prefix of nothing", keys(m.get(t, "", clientv3.WithPrefix()).Kvs, ""), keys(all.Kvs, ""))
	from := keys(m.get(t, prefix+"c", clientv3.WithFromKey()).Kvs, "")
	if !strings.HasSuffix(keys(all.Kvs, ""), from) || !strings.HasPrefix(from, prefix+"c "+prefix+"\xff") {
		t.Errorf("from key c: %q", from)
	}
}

func getLimit(t *testing.T, m *member, prefix string) {
	for _, key := range []string{"a", "b", "c"} {
		m.put(t, prefix+key, "v")
	}
	for _, c := range []struct {
		limit int64
		want  string
		more  bool
	}{{0, "a b c", false}, {-1, "a b c", false}, {1, "a", true}, {2, "a b", true}, {3, "a b c", false}, {4, "a b c", false}} {
		resp := m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithLimit(c.limit))
		equal(t, "keys", keys(resp.Kvs, prefix), c.want)
		equal(t, "more", resp.More, c.more)
		equal(t, "count is of the whole range", resp.Count, 3)
	}
}

// Each target orders the keys in its own way.
func getSorts(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"a", "2")
	m.put(t, prefix+"b", "3")
	m.put(t, prefix+"c", "1")
	m.put(t, prefix+"c", "1")
	m.put(t, prefix+"a", "2")
	m.put(t, prefix+"a", "2")
	for _, c := range []struct {
		target          clientv3.SortTarget
		ascend, descend string
	}{
		{clientv3.SortByKey, "a b c", "c b a"},
		{clientv3.SortByVersion, "b c a", "a c b"},
		{clientv3.SortByCreateRevision, "a b c", "c b a"},
		{clientv3.SortByModRevision, "b c a", "a c b"},
		{clientv3.SortByValue, "c a b", "b a c"},
	} {
		sort := func(order clientv3.SortOrder, opts ...clientv3.OpOption) string {
			opts = append(opts, clientv3.WithPrefix(), clientv3.WithSort(c.target, order))
			return keys(m.get(t, prefix, opts...).Kvs, prefix)
		}
		equal(t, "ascending", sort(clientv3.SortAscend), c.ascend)
		equal(t, "descending", sort(clientv3.SortDescend), c.descend)
		equal(t, "no order is ascending", sort(clientv3.SortNone), c.ascend)
		equal(t, "first", sort(clientv3.SortAscend, clientv3.WithLimit(1)), c.ascend[:1])
		equal(t, "last two", sort(clientv3.SortDescend, clientv3.WithLimit(2)), c.descend[:3])
		equal(t, "sorted by a value that is not sent", sort(clientv3.SortAscend, clientv3.WithKeysOnly()), c.ascend)
	}
	for _, c := range []struct {
		want string
		opts []clientv3.OpOption
	}{
		{"a", clientv3.WithFirstKey()}, {"c", clientv3.WithLastKey()},
		{"a", clientv3.WithFirstCreate()}, {"c", clientv3.WithLastCreate()},
		{"b", clientv3.WithFirstRev()}, {"a", clientv3.WithLastRev()},
	} {
		equal(t, "first or last", keys(m.get(t, prefix, c.opts...).Kvs, prefix), c.want)
	}
}

// A read in the past sees the past, and its header says what is now.
func getRevisions(t *testing.T, m *member, prefix string) {
	created := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	last := m.put(t, prefix+"a", "3")
	for i, want := range []string{
		"none",
		prefix + "a=1 create+0 mod+0 version 1 lease 0",
		prefix + "a=2 create+0 mod+1 version 2 lease 0",
		"none",
		prefix + "a=3 create+3 mod+3 version 1 lease 0",
	} {
		resp := m.get(t, prefix+"a", clientv3.WithRev(created-1+int64(i)))
		equal(t, "at a revision", shown(only(resp.Kvs), created), want)
		fullHeader(t, resp.Header, last)
	}
	equal(t, "a negative revision is now", string(only(m.get(t, prefix+"a", clientv3.WithRev(-1)).Kvs).Value), "3")
}

func getFilters(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "") // create+0 mod+4
	m.put(t, prefix+"b", "")         // create+1 mod+1
	m.put(t, prefix+"c", "")         // create+2 mod+3
	m.put(t, prefix+"c", "")
	m.put(t, prefix+"a", "")
	for _, c := range []struct {
		what string
		opts []clientv3.OpOption
		want string
	}{
		{"min mod", []clientv3.OpOption{clientv3.WithMinModRev(base + 3)}, "a c"},
		{"max mod", []clientv3.OpOption{clientv3.WithMaxModRev(base + 3)}, "b c"},
		{"min create", []clientv3.OpOption{clientv3.WithMinCreateRev(base + 1)}, "b c"},
		{"max create", []clientv3.OpOption{clientv3.WithMaxCreateRev(base + 1)}, "a b"},
		{"both", []clientv3.OpOption{clientv3.WithMinModRev(base + 3), clientv3.WithMaxCreateRev(base + 1)}, "a"},
		{"none left", []clientv3.OpOption{clientv3.WithMinModRev(base + 5)}, ""},
	} {
		resp := m.get(t, prefix, append(c.opts, clientv3.WithPrefix())...)
		equal(t, c.what, keys(resp.Kvs, prefix), c.want)
		equal(t, c.what+": filters do not change the count", resp.Count, 3)
	}
	cut := m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithMinModRev(base+3), clientv3.WithLimit(1))
	equal(t, "filtered, then cut", keys(cut.Kvs, prefix), "a")
	equal(t, "more", cut.More, true)
}

func getKeysOrCountOnly(t *testing.T, m *member, prefix string) {
	lease := m.grant(t, 600)
	base := m.put(t, prefix+"a", "1", clientv3.WithLease(lease))
	m.put(t, prefix+"b", "2")
	resp := m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	equal(t, "keys only", keys(resp.Kvs, prefix), "a b")
	// Of a key alone not even the lease is told.
	equal(t, "a key without its value", shown(resp.Kvs[0], base), prefix+"a= create+0 mod+0 version 1 lease 0")

	resp = m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithLimit(1))
	equal(t, "keys with a count", len(resp.Kvs), 0)
	equal(t, "count", resp.Count, 2)
	equal(t, "more", resp.More, false)
	resp = m.get(t, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithRev(base))
	equal(t, "count in the past", resp.Count, 1)
}

func getErrors(t *testing.T, m *member, prefix string) {
	revision := m.put(t, prefix+"a", "1")
	_, err := m.Get(testContext(t), "")
	refused(t, err, rpctypes.ErrEmptyKey)
	for _, opts := range [][]clientv3.OpOption{nil, {clientv3.WithPrefix()}, {clientv3.WithCountOnly()}, {clientv3.WithSerializable()}} {
		_, err = m.Get(testContext(t), prefix+"a", append(opts, clientv3.WithRev(revision+1))...)
		refused(t, err, rpctypes.ErrFutureRev)
	}
	_, err = m.Get(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortTarget(9), clientv3.SortAscend))
	refused(t, err, rpctypes.ErrInvalidSortOption)
}

// Thousands of range requests with every mixture of fields, also invalid ones, are answered as etcd does.
//
// The keys are twelve, because etcd's order among equal sort keys is arbitrary above that.
func TestGetSame(t *testing.T) {
	p := newPair(t)
	random := rand.New(rand.NewPCG(1, 1))
	p.same(t, &pb.LeaseGrantRequest{ID: 77, TTL: 6000})
	revision := int64(1)
	for range 60 {
		key := []byte{'a' + byte(random.IntN(12))}
		if random.IntN(4) == 0 {
			if p.same(t, &pb.DeleteRangeRequest{Key: key}).(*pb.DeleteRangeResponse).Deleted == 0 {
				continue
			}
		} else {
			p.same(t, &pb.PutRequest{Key: key, Value: []byte{'0' + byte(random.IntN(4))}, Lease: pick[int64](random, 0, 77)})
		}
		revision++
	}
	p.same(t, &pb.CompactionRequest{Revision: revision / 3})
	for range 4000 {
		p.same(t, randomRange(random, revision))
	}
}

// randomRange is a range request on the one-letter keys a to l of a store at revision.
func randomRange(random *rand.Rand, revision int64) *pb.RangeRequest {
	someRevision := func() int64 {
		return pick(random, 0, 0, 0, 0, revision, 1+random.Int64N(revision+1))
	}
	request := &pb.RangeRequest{
		Key:               []byte{'a' + byte(random.IntN(12))},
		Limit:             pick[int64](random, 0, 0, 1, 2, 5, 12, 100, -1),
		Revision:          pick(random, someRevision(), someRevision(), -1),
		SortOrder:         pb.RangeRequest_SortOrder(random.IntN(3)),
		SortTarget:        pb.RangeRequest_SortTarget(random.IntN(5)),
		Serializable:      random.IntN(2) == 0,
		KeysOnly:          random.IntN(3) == 0,
		CountOnly:         random.IntN(6) == 0,
		MinModRevision:    someRevision(),
		MaxModRevision:    someRevision(),
		MinCreateRevision: someRevision(),
		MaxCreateRevision: someRevision(),
	}
	switch random.IntN(100) {
	case 0:
		request.SortOrder = 3
	case 1:
		request.SortTarget = -1
	case 2:
		request.Key = nil
	}
	switch random.IntN(4) {
	case 0:
		request.RangeEnd = []byte{'a' + byte(random.IntN(12))}
	case 1:
		request.RangeEnd = []byte{0}
	case 2:
		request.Key, request.RangeEnd = []byte("a"), []byte("z")
	}
	return request
}

func pick[T any](random *rand.Rand, values ...T) T { return values[random.IntN(len(values))] }
