package client

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// One watch stream on each server, sent the same messages, among them those that the client never sends. After each
// message both must have sent the same.
func TestWatchStreamSame(t *testing.T) {
	p := newPair(t)
	p.same(t, &pb.PutRequest{Key: []byte("a"), Value: []byte("1")}) // 2
	p.same(t, &pb.PutRequest{Key: []byte("b"), Value: []byte("1")}) // 3
	p.same(t, &pb.DeleteRangeRequest{Key: []byte("a")})             // 4
	p.same(t, &pb.PutRequest{Key: []byte("a"), Value: []byte("2")}) // 5
	p.same(t, &pb.CompactionRequest{Revision: 3})
	streams := p.watchStreams(t)

	for _, create := range []*pb.WatchCreateRequest{
		{Key: []byte("a")},
		{Key: []byte("a"), WatchId: 7},
		{Key: []byte("a"), WatchId: -3},
		{Key: []byte("a"), RangeEnd: []byte("c"), PrevKv: true},
		{Key: []byte("a"), RangeEnd: []byte{0}},
		{RangeEnd: []byte{0}},
		// An empty key is the key of one zero byte.
		{},
		// In use, nothing in the range, before all time.
		{Key: []byte("b"), WatchId: 7},
		{Key: []byte("b"), RangeEnd: []byte("a")},
		{Key: []byte("b"), RangeEnd: []byte("b"), WatchId: 11},
		{Key: []byte("b"), StartRevision: -1},
		{Key: []byte("a"), Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}},
		{Key: []byte("a"), Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE, 9}},
		{Key: []byte("a"), StartRevision: 100},
	} {
		streams.send(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}})
		streams.same(t, 1)
	}
	for _, create := range []struct {
		request *pb.WatchCreateRequest
		answers int
	}{
		{&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("c"), StartRevision: 3, PrevKv: true, WatchId: 50}, 2},
		{&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("c"), StartRevision: 5, WatchId: 51}, 2},
		{&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("c"), StartRevision: 2, WatchId: 52}, 2},
		{&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("c"), StartRevision: 1, WatchId: 53}, 2},
	} {
		streams.send(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create.request}})
		streams.same(t, create.answers)
	}
	// What was ended by the compaction keeps its id until it is canceled.
	streams.send(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("a"), WatchId: 52}}})
	streams.same(t, 1)
	for _, id := range []int64{52, 53, 51, 7, 50, 0} {
		streams.cancel(t, id)
		streams.same(t, 1)
	}
	// Of no watch and of nothing at all: no answer, as the next one shows.
	streams.cancel(t, 4711)
	streams.cancel(t, 7)
	streams.send(t, &pb.WatchRequest{})
	// A freed id may be chosen again; the server itself goes on counting.
	for _, create := range []*pb.WatchCreateRequest{{Key: []byte("c"), WatchId: 7}, {Key: []byte("c")}} {
		streams.send(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}})
		streams.same(t, 1)
	}
	// Seen by two watches of c, those from a and from anything; then by all but those of other keys, of puts or of the future.
	p.same(t, &pb.PutRequest{Key: []byte("c"), Value: []byte("1")})
	streams.same(t, 4)
	p.same(t, &pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte{0}})
	streams.same(t, 7)
}

// watchStreams is a watch stream on each of a pair.
type watchStreams struct {
	etcd, tenured pb.Watch_WatchClient
}

func (p pair) watchStreams(t *testing.T) watchStreams {
	t.Helper()
	open := func(m *member) pb.Watch_WatchClient {
		stream, err := pb.NewWatchClient(m.ActiveConnection()).Watch(testContext(t))
		must(t, err)
		return stream
	}
	return watchStreams{etcd: open(p.etcd), tenured: open(p.tenured)}
}

func (s watchStreams) send(t *testing.T, request *pb.WatchRequest) {
	t.Helper()
	must(t, s.etcd.Send(request))
	must(t, s.tenured.Send(request))
}

func (s watchStreams) cancel(t *testing.T, id int64) {
	t.Helper()
	s.send(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

// same takes count responses of both, which must be equal in some order: between watches there is none.
func (s watchStreams) same(t *testing.T, count int) {
	t.Helper()
	want, got := receiveMany(t, s.etcd, count), receiveMany(t, s.tenured, count)
	for text := range want {
		if got[text] != want[text] {
			t.Errorf("etcd sent %d times:\n%s\ntenured sent:\n%s", want[text], text, fmt.Sprint(got))
		}
	}
}

func receiveMany(t *testing.T, stream pb.Watch_WatchClient, count int) map[string]int {
	t.Helper()
	texts := map[string]int{}
	for range count {
		resp := receiveRaw(t, stream)
		if header := resp.Header; header != nil {
			if header.ClusterId == 0 || header.MemberId == 0 || header.RaftTerm == 0 {
				t.Errorf("header lacks cluster, member or term: %v", header)
			}
			header.ClusterId, header.MemberId, header.RaftTerm = 0, 0, 0
		}
		texts[textOf(resp)]++
	}
	return texts
}

// The events of a history of random txns and lease revokes are the same, seen live and from the past.
func TestWatchEventsSame(t *testing.T) {
	p := newPair(t)
	watches := map[string][2]*watching{}
	add := func(name string, opts ...clientv3.OpOption) {
		opts = append(opts, clientv3.WithFromKey())
		watches[name] = [2]*watching{p.etcd.watch(t, "k", opts...), p.tenured.watch(t, "k", opts...)}
	}
	add("live", clientv3.WithPrevKV())
	add("deletes", clientv3.WithFilterPut())
	add("puts", clientv3.WithFilterDelete())
	for seed := range 300 {
		random := newRandom(uint64(5000 + seed))
		lease := 1 + random.Int64N(3)
		switch random.IntN(10) {
		case 0:
			p.same(t, &pb.LeaseGrantRequest{ID: lease, TTL: 6000})
		case 1:
			p.same(t, &pb.LeaseRevokeRequest{ID: lease})
		case 2, 3, 4:
			p.same(t, &pb.PutRequest{Key: randomKey(random), Value: []byte("l"), Lease: lease})
		default:
			p.same(t, randomTxn(random, 2))
		}
	}
	add("past", clientv3.WithRev(2), clientv3.WithPrevKV())
	p.same(t, &pb.HashKVRequest{})
	p.same(t, &pb.PutRequest{Key: []byte("last")})
	p.same(t, &pb.DeleteRangeRequest{Key: []byte("last")})
	for name, pair := range watches {
		want, got := pair[0].upTo(t, "last"), pair[1].upTo(t, "last")
		equal(t, name+", events", len(got), len(want))
		for i := range min(len(got), len(want)) {
			if !proto.Equal(got[i], want[i]) {
				t.Fatalf("%s, event %d\netcd:    %v\ntenured: %v", name, i, want[i], got[i])
			}
		}
	}
}
