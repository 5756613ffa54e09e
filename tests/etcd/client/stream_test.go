package client

import (
	"fmt"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestGetStream(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"same-as-get", streamSameAsGet},
		{"pieces", streamPieces},
		{"large", streamLarge},
		{"refused", streamRefused},
		{"compacted", streamCompacted},
	})
}

// stream collects what one call sends.
func (m *member) stream(t *testing.T, key string, opts ...clientv3.OpOption) []*pb.RangeResponse {
	t.Helper()
	responses, err := m.GetStream(testContext(t), key, opts...)
	must(t, err)
	var pieces []*pb.RangeResponse
	for response := range responses {
		must(t, response.Err())
		pieces = append(pieces, response.RangeResponse)
	}
	return pieces
}

// The pieces together are what Get answers.
func streamSameAsGet(t *testing.T, m *member, prefix string) {
	random := rand.New(rand.NewPCG(3, 3))
	var revisions []int64
	for range 100 {
		key := fmt.Sprint(prefix, random.IntN(40))
		if random.IntN(5) == 0 {
			revisions = append(revisions, m.delete(t, key))
		} else {
			revisions = append(revisions, m.put(t, key, repeat(random.IntN(200))))
		}
	}
	for range 200 {
		var opts []clientv3.OpOption
		key := prefix
		switch random.IntN(4) {
		case 0:
			key = fmt.Sprint(prefix, random.IntN(45))
		case 1:
			opts = append(opts, clientv3.WithRange(fmt.Sprint(prefix, random.IntN(45))))
		default:
			opts = append(opts, clientv3.WithPrefix())
		}
		for _, option := range []clientv3.OpOption{
			clientv3.WithLimit(int64(random.IntN(45) - 1)),
			clientv3.WithRev(revisions[random.IntN(len(revisions))]),
			clientv3.WithKeysOnly(),
			clientv3.WithCountOnly(),
			clientv3.WithSerializable(),
			clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend),
		} {
			if random.IntN(4) == 0 {
				opts = append(opts, option)
			}
		}
		together := &pb.RangeResponse{}
		for _, piece := range m.stream(t, key, opts...) {
			proto.Merge(together, piece)
		}
		if get := (*pb.RangeResponse)(m.get(t, key, opts...)); !proto.Equal(together, get) {
			t.Errorf("%s\nget:    %s\nstream: %s", key, textOf(get), textOf(together))
		}
	}
}

// Many keys come in several pieces, and only the last says how many there are.
func streamPieces(t *testing.T, m *member, prefix string) {
	const count = 100
	for i := range count {
		m.put(t, fmt.Sprintf("%s%03d", prefix, i), "v")
	}
	revision := m.put(t, "beside", "v")
	pieces := m.stream(t, prefix, clientv3.WithPrefix(), clientv3.WithLimit(count-1))
	if len(pieces) < 2 {
		t.Errorf("%d pieces", len(pieces))
	}
	if first := len(pieces[0].Kvs); first > 10 {
		t.Errorf("%d keys at once to start with", first)
	}
	for _, piece := range pieces[:len(pieces)-1] {
		equal(t, "header before the end", piece.Header == nil, true)
		equal(t, "count before the end", piece.Count, 0)
		equal(t, "more before the end", piece.More, false)
	}
	last := pieces[len(pieces)-1]
	fullHeader(t, last.Header, revision)
	equal(t, "count", last.Count, count)
	equal(t, "more", last.More, true)
	equal(t, "pieces of no key", len(m.stream(t, prefix+"none")), 1)
	equal(t, "pieces of a count", len(m.stream(t, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())), 1)
}

// A value that is larger than a piece should be goes out alone.
func streamLarge(t *testing.T, m *member, prefix string) {
	for i := range 6 {
		m.put(t, fmt.Sprint(prefix, i), repeat(1_500_000))
	}
	count := 0
	pieces := m.stream(t, prefix, clientv3.WithPrefix())
	for _, piece := range pieces {
		for _, kv := range piece.Kvs {
			equal(t, "size", len(kv.Value), 1_500_000)
			count++
		}
	}
	equal(t, "keys", count, 6)
	for i := range 6 {
		m.delete(t, fmt.Sprint(prefix, i))
	}
}

// What a stream cannot do is refused before anything is sent.
func streamRefused(t *testing.T, m *member, prefix string) {
	revision := m.put(t, prefix+"a", "1")
	failure := func(key string, opts ...clientv3.OpOption) error {
		responses, err := m.GetStream(testContext(t), key, opts...)
		if err != nil {
			return err
		}
		response := <-responses
		return response.Err()
	}
	refused(t, failure(""), rpctypes.ErrEmptyKey)
	refused(t, failure(prefix, clientv3.WithRev(revision+1)), rpctypes.ErrFutureRev)
	for what, opt := range map[string]clientv3.OpOption{
		"descending": clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend),
		"by value":   clientv3.WithSort(clientv3.SortByValue, clientv3.SortAscend),
		"min mod":    clientv3.WithMinModRev(1),
		"max create": clientv3.WithMaxCreateRev(1),
	} {
		equal(t, what, status.Code(failure(prefix, clientv3.WithPrefix(), opt)), codes.Unimplemented)
	}
}

// A compaction that passes the stream's revision ends it with an error, behind what was already sent: the server neither
// holds the whole answer nor sends a part as if it were all.
func streamCompacted(t *testing.T, m *member, prefix string) {
	const count = 3000
	for i := range count {
		m.put(t, fmt.Sprintf("%s%04d", prefix, i), repeat(10<<10))
	}
	responses, err := m.GetStream(testContext(t), prefix, clientv3.WithPrefix())
	must(t, err)
	first := <-responses
	must(t, first.Err())
	equal(t, "first key", string(first.Kvs[0].Key), prefix+"0000")
	revision := m.put(t, "beside", "1")
	_, err = m.Compact(testContext(t), revision)
	must(t, err)
	got := len(first.Kvs)
	var end error
	for response := range responses {
		if end = response.Err(); end == nil {
			got += len(response.Kvs)
		}
	}
	refused(t, end, rpctypes.ErrCompacted)
	if got == count {
		t.Error("all keys came, and then an error")
	}
}
