package cluster

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"tenure.dev/tests/etcd/history"
	"tenure.dev/tests/harness"
)

// plant is a wrong that a server could do. It is done to what clients receive of a right one, so that nothing else is wrong.
type plant struct {
	name string
	// found are the names of violations of which the checks must report one; none if there is nothing to be found.
	found []string
	dial  func(p *planted) grpc.DialOption
}

// planted is a plant at work.
type planted struct {
	// armed says that it may begin, struck that it has been done.
	armed, struck atomic.Bool
}

var plants = []plant{
	{name: "nothing", dial: func(p *planted) grpc.DialOption {
		p.struck.Store(true)
		return grpc.EmptyDialOption{}
	}},
	{name: "stale read", found: []string{"stale read"}, dial: staleRead},
	// Progress may be told before the next event comes, which is then the lie.
	{name: "dropped event", found: []string{"dropped event", "dishonest progress"}, dial: droppedEvent},
	{name: "applied out of order", found: []string{"members differ"}, dial: appliedOutOfOrder},
}

// What the checks of TestFault say is worth as much as they find: each wrong is done to clients of a real cluster, under the same load.
func TestPlanted(t *testing.T) {
	for _, plant := range plants {
		t.Run(plant.name, func(t *testing.T) {
			t.Parallel()
			plant.run(t)
		})
	}
}

func (plant plant) run(t *testing.T) {
	c := harness.StartCluster(t, harness.Tenured, 3, tenants, "--watch-progress-notify-interval", "1s")
	leaderAmong(t, c.Members)
	p := &planted{}
	l := startLoad(t, c, tenants[0], 1, options{pinned: true, patience: hang, dial: []grpc.DialOption{plant.dial(p)}})
	writes := func(n int64) {
		until := l.done.Load() + n
		await(t, "more writes", func() bool { return l.done.Load() >= until })
	}
	writes(50)
	p.armed.Store(true)
	await(t, "the wrong to be done", p.struck.Load)
	writes(50)
	l.finish()
	last := l.lastWrite()
	l.endLeases()
	l.endWatches(last)
	violations := l.Check()
	isFound := func(v history.Violation) bool { return slices.Contains(plant.found, v.Name) }
	if len(plant.found) > 0 && !slices.ContainsFunc(violations, isFound) {
		t.Errorf("want one of %q, got %v", plant.found, violations)
	}
	if len(plant.found) == 0 && len(violations) > 0 {
		t.Errorf("nothing was wrong, got %v", violations)
	}
}

// staleFor is how many revisions an answer is too old for that is given once more. Clients of the load, which see one revision after the
// other, knew of later ones when they asked.
const staleFor = 10

// staleRead answers linearizable reads as they were answered once before.
func staleRead(p *planted) grpc.DialOption {
	var mu sync.Mutex
	once := map[string]*etcdserverpb.RangeResponse{}
	return grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := next(ctx, method, req, reply, cc, opts...)
		asked, isRange := req.(*etcdserverpb.RangeRequest)
		if err != nil || !isRange || asked.Serializable || asked.Revision != 0 || !p.armed.Load() {
			return err
		}
		answer := reply.(*etcdserverpb.RangeResponse)
		key := asked.String()
		mu.Lock()
		defer mu.Unlock()
		before, known := once[key]
		if !known {
			once[key] = proto.CloneOf(answer)
		} else if before.Header.Revision+staleFor <= answer.Header.Revision {
			proto.Reset(answer)
			proto.Merge(answer, before)
			p.struck.Store(true)
		}
		return nil
	})
}

// droppedEvent withholds one response of one watch.
func droppedEvent(p *planted) grpc.DialOption {
	return alterWatches(func() alteration {
		return func(resp *etcdserverpb.WatchResponse) []*etcdserverpb.WatchResponse {
			if len(resp.Events) > 0 && p.armed.Load() && p.struck.CompareAndSwap(false, true) {
				return nil
			}
			return []*etcdserverpb.WatchResponse{resp}
		}
	})
}

// appliedOutOfOrder exchanges what two revisions that follow each other brought one watch.
func appliedOutOfOrder(p *planted) grpc.DialOption {
	return alterWatches(func() alteration {
		var held *etcdserverpb.WatchResponse
		return func(resp *etcdserverpb.WatchResponse) []*etcdserverpb.WatchResponse {
			switch {
			case held == nil && isOfOneRevision(resp) && p.armed.Load() && p.struck.CompareAndSwap(false, true):
				held = resp
				return nil
			case held == nil || held.WatchId != resp.WatchId:
				return []*etcdserverpb.WatchResponse{resp}
			}
			both := []*etcdserverpb.WatchResponse{held, resp}
			held = nil
			if isOfOneRevision(resp) {
				exchange(both[0], both[1])
			} else {
				// Another time.
				p.struck.Store(false)
			}
			return both
		}
	})
}

func isOfOneRevision(resp *etcdserverpb.WatchResponse) bool {
	other := func(e *mvccpb.Event) bool { return e.Kv.ModRevision != resp.Events[0].Kv.ModRevision }
	return len(resp.Events) > 0 && !resp.Fragment && !slices.ContainsFunc(resp.Events, other)
}

// exchange gives each of two revisions the other's events.
func exchange(a, b *etcdserverpb.WatchResponse) {
	ofA, ofB := a.Events[0].Kv.ModRevision, b.Events[0].Kv.ModRevision
	a.Events, b.Events = b.Events, a.Events
	for resp, revision := range map[*etcdserverpb.WatchResponse]int64{a: ofA, b: ofB} {
		for _, e := range resp.Events {
			if e.Kv.CreateRevision == e.Kv.ModRevision {
				e.Kv.CreateRevision = revision
			}
			e.Kv.ModRevision = revision
		}
	}
}

// alteration says what a client receives instead of a response: nothing, or one or more.
type alteration func(resp *etcdserverpb.WatchResponse) []*etcdserverpb.WatchResponse

// alterWatches makes an alteration for each stream of watches.
func alterWatches(make func() alteration) grpc.DialOption {
	return grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		stream, err := open(ctx, desc, cc, method, opts...)
		if err != nil || method != etcdserverpb.Watch_Watch_FullMethodName {
			return stream, err
		}
		return &alteredStream{ClientStream: stream, alter: make()}, nil
	})
}

type alteredStream struct {
	grpc.ClientStream
	alter alteration
	// next are received before the stream is asked again.
	next []*etcdserverpb.WatchResponse
}

func (s *alteredStream) RecvMsg(m any) error {
	for len(s.next) == 0 {
		resp := &etcdserverpb.WatchResponse{}
		if err := s.ClientStream.RecvMsg(resp); err != nil {
			return err
		}
		s.next = s.alter(resp)
	}
	into := m.(*etcdserverpb.WatchResponse)
	proto.Reset(into)
	proto.Merge(into, s.next[0])
	s.next = s.next[1:]
	return nil
}
