package client

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestWatch(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"events", watchEvents},
		{"ranges", watchRanges},
		{"past", watchPast},
		{"long-past", watchLongPast},
		{"future", watchFuture},
		{"previous", watchPrevious},
		{"filters", watchFilters},
		{"cancel", watchCancel},
		{"close", watchClose},
		{"many", watchMany},
		{"require-leader", watchRequireLeader},
		{"empty-range", watchEmptyRange},
		{"compacted", watchCompacted},
		{"compacted-behind", watchOutlivesCompaction},
	})
}

// A put brings the whole key, a delete the key and its revision, nothing else.
func watchEvents(t *testing.T, m *member, prefix string) {
	lease := m.grant(t, 600)
	w := m.watch(t, prefix, clientv3.WithPrefix())
	base := m.put(t, prefix+"a", "1", clientv3.WithLease(lease))
	equal(t, "revision of the creation", w.created, base-1)
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	m.put(t, prefix+"a", "3")
	for i, want := range []string{
		fmt.Sprintf("%sa=1 create+0 mod+0 version 1 lease %x", prefix, int64(lease)),
		prefix + "a=2 create+0 mod+1 version 2 lease 0",
		fmt.Sprintf("%sa= create+%d mod+2 version 0 lease 0", prefix, -base),
		prefix + "a=3 create+3 mod+3 version 1 lease 0",
	} {
		resp := w.next(t)
		fullHeader(t, resp.Header, base+int64(i))
		equal(t, "events", len(resp.Events), 1)
		event := resp.Events[0]
		equal(t, "event", shown(event.Kv, base), want)
		equal(t, "create", event.IsCreate(), i == 0 || i == 3)
		equal(t, "modify", event.IsModify(), i == 1)
		equal(t, "type", event.Type == clientv3.EventTypeDelete, i == 2)
		equal(t, "previous, not asked for", shown(event.PrevKv, base), "none")
	}
}

func watchRanges(t *testing.T, m *member, prefix string) {
	ranges := map[string]struct {
		w    *watching
		want string
	}{
		"one key":   {m.watch(t, prefix+"b"), "PUT b@1"},
		"prefix":    {m.watch(t, prefix+"b", clientv3.WithPrefix()), "PUT b@1 PUT ba@2"},
		"half open": {m.watch(t, prefix+"a", clientv3.WithRange(prefix+"ba")), "PUT a@0 PUT b@1"},
		"from key":  {m.watch(t, prefix+"ba", clientv3.WithFromKey()), "PUT ba@2 PUT c@3"},
		"all":       {m.watch(t, "", clientv3.WithPrefix()), "PUT a@0 PUT b@1 PUT ba@2 PUT c@3"},
	}
	base := m.put(t, prefix+"a", "1")
	for _, key := range []string{"b", "ba", "c"} {
		m.put(t, prefix+key, "1")
	}
	// In the order of the events nothing of a watch may be left before what all of them see.
	last := commit(t, m.Txn(testContext(t)).Then(clientv3.OpPut(prefix+"b", "2"), clientv3.OpPut(prefix+"ba", "2"))).Header.Revision
	for what, r := range ranges {
		var events []*clientv3.Event
		for {
			resp := r.w.next(t)
			if resp.Events[0].Kv.ModRevision == last {
				break
			}
			events = append(events, resp.Events...)
		}
		equal(t, what, shownEvents(events, prefix, base), r.want)
	}
}

// From a past revision, that one included, and on into the present.
func watchPast(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"b", "1")
	m.delete(t, prefix+"a")
	w := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base+1))
	current := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base+2))
	m.put(t, prefix+"c", "1")
	equal(t, "from the second", shownEvents(w.events(t, 3), prefix, base), "PUT b@1 DELETE a@2 PUT c@3")
	equal(t, "from the current", shownEvents(current.events(t, 2), prefix, base), "DELETE a@2 PUT c@3")
}

// History longer than what one response holds, with writes going on.
func watchLongPast(t *testing.T, m *member, prefix string) {
	const before, after = 2500, 200
	var base int64
	for i := range before {
		revision := m.put(t, prefix+fmt.Sprint(i%7), fmt.Sprint(i))
		if i == 0 {
			base = revision
		}
	}
	w := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base))
	for i := range after {
		m.put(t, prefix+fmt.Sprint(i%7), fmt.Sprint(before+i))
	}
	for i, event := range w.events(t, before+after) {
		if got, want := event.Kv.ModRevision, base+int64(i); got != want || string(event.Kv.Value) != fmt.Sprint(i) {
			t.Fatalf("event %d: revision %d, value %s, want revision %d", i, got, event.Kv.Value, want)
		}
	}
}

// A watch from the future is silent until then.
func watchFuture(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "0")
	w := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base+3))
	for i := range 5 {
		m.put(t, prefix+"a", fmt.Sprint(i+1))
	}
	equal(t, "events", shownEvents(w.events(t, 3), prefix, base), "PUT a@3 PUT a@4 PUT a@5")
}

// With prev_kv an event holds what was there before it; live and from history.
func watchPrevious(t *testing.T, m *member, prefix string) {
	live := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV())
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	m.put(t, prefix+"a", "3")
	past := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(base))
	for what, w := range map[string]*watching{"live": live, "from history": past} {
		events := w.events(t, 4)
		for i, want := range []string{
			"none",
			prefix + "a=1 create+0 mod+0 version 1 lease 0",
			prefix + "a=2 create+0 mod+1 version 2 lease 0",
			"none",
		} {
			equal(t, what, shown(events[i].PrevKv, base), want)
		}
	}
}

func watchFilters(t *testing.T, m *member, prefix string) {
	puts := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithFilterDelete())
	deletes := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithFilterPut())
	base := m.put(t, prefix+"a", "1")
	m.delete(t, prefix+"a")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	pastPuts := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithFilterDelete(), clientv3.WithRev(base))
	pastDeletes := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithRev(base))
	commit(t, m.Txn(testContext(t)).Then(clientv3.OpPut(prefix+"b", "1"), clientv3.OpDelete(prefix+"missing")))
	m.delete(t, prefix+"b")
	for _, w := range []*watching{puts, pastPuts} {
		equal(t, "puts", shownEvents(w.events(t, 3), prefix, base), "PUT a@0 PUT a@2 PUT b@4")
	}
	for _, w := range []*watching{deletes, pastDeletes} {
		equal(t, "deletes", shownEvents(w.events(t, 3), prefix, base), "DELETE a@1 DELETE a@3 DELETE b@5")
	}
}

// A canceled watch ends and leaves the others of its stream alone.
func watchCancel(t *testing.T, m *member, prefix string) {
	gone := m.watch(t, prefix, clientv3.WithPrefix())
	stays := m.watch(t, prefix, clientv3.WithPrefix())
	gone.cancel()
	gone.ended(t)
	base := m.put(t, prefix+"a", "1")
	equal(t, "the other", shownEvents(stays.events(t, 1), prefix, base), "PUT a@0")
	again := m.watch(t, prefix, clientv3.WithPrefix())
	m.put(t, prefix+"a", "2")
	equal(t, "a new one", shownEvents(again.events(t, 1), prefix, base), "PUT a@1")
}

func watchClose(t *testing.T, m *member, prefix string) {
	watcher := clientv3.NewWatcher(m.Client)
	one := watchWith(t, testContext(t), watcher, prefix+"a")
	two := watchWith(t, testContext(t), watcher, prefix+"b")
	base := m.put(t, prefix+"a", "1")
	equal(t, "before", shownEvents(one.events(t, 1), prefix, base), "PUT a@0")
	must(t, watcher.Close())
	for _, w := range []*watching{one, two} {
		for {
			resp, open := w.receive(t)
			if !open {
				break
			}
			equal(t, "events behind the close", len(resp.Events), 0)
		}
	}
	m.put(t, prefix+"a", "2")
}

// Many watches of the same keys, on several streams, see the same.
func watchMany(t *testing.T, m *member, prefix string) {
	const streams, each, writes = 4, 100, 30
	var all []*watching
	for range streams {
		watcher := clientv3.NewWatcher(m.Client)
		t.Cleanup(func() { _ = watcher.Close() })
		for range each {
			all = append(all, watchWith(t, testContext(t), watcher, prefix, clientv3.WithPrefix()))
		}
	}
	var base int64
	for i := range writes {
		revision := m.put(t, prefix+fmt.Sprint(i), "v")
		if i == 0 {
			base = revision
		}
	}
	for _, w := range all {
		for i, event := range w.events(t, writes) {
			equal(t, "revision", event.Kv.ModRevision, base+int64(i))
		}
	}
}

func watchRequireLeader(t *testing.T, m *member, prefix string) {
	w := watchWith(t, clientv3.WithRequireLeader(testContext(t)), m.Client, prefix, clientv3.WithPrefix())
	base := m.put(t, prefix+"a", "1")
	equal(t, "events", shownEvents(w.events(t, 1), prefix, base), "PUT a@0")
}

// A range without any key in it is refused.
func watchEmptyRange(t *testing.T, m *member, prefix string) {
	w := &watching{responses: m.Watch(testContext(t), prefix+"b", clientv3.WithRange(prefix+"a"))}
	resp := w.next(t)
	equal(t, "canceled", resp.Canceled, true)
	// The reason that the server gives is in the raw messages, the client drops it.
	if resp.Err() == nil {
		t.Error("a canceled watch has an error")
	}
	w.ended(t)
}

// A watch from what is compacted ends with the compaction's revision; from that revision on it works.
func watchCompacted(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	m.put(t, prefix+"a", "3")
	_, err := m.Compact(testContext(t), base+1)
	must(t, err)

	w := &watching{responses: m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithRev(base))}
	resp := w.next(t)
	equal(t, "canceled", resp.Canceled, true)
	equal(t, "compact revision", resp.CompactRevision, base+1)
	refused(t, resp.Err(), rpctypes.ErrCompacted)
	w.ended(t)

	w = m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base+1), clientv3.WithPrevKV())
	events := w.events(t, 2)
	equal(t, "from the compaction on", shownEvents(events, prefix, base), "PUT a@1 PUT a@2")
	equal(t, "previous that is compacted", shown(events[0].PrevKv, base), "none")
	equal(t, "previous", shown(events[1].PrevKv, base), prefix+"a=2 create+0 mod+1 version 2 lease 0")
}

// A watch that is up to date, or waits for the future, does not mind a compaction.
func watchOutlivesCompaction(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "0")
	live := m.watch(t, prefix, clientv3.WithPrefix())
	future := m.watch(t, prefix, clientv3.WithPrefix(), clientv3.WithRev(base+2))
	var last int64
	for i := range 4 {
		last = m.put(t, prefix+"a", fmt.Sprint(i+1))
	}
	equal(t, "before", len(live.events(t, 4)), 4)
	_, err := m.Compact(testContext(t), last, clientv3.WithCompactPhysical())
	must(t, err)
	m.put(t, prefix+"a", "5")
	equal(t, "live", shownEvents(live.events(t, 1), prefix, base), "PUT a@5")
	equal(t, "future", shownEvents(future.events(t, 4), prefix, base), "PUT a@2 PUT a@3 PUT a@4 PUT a@5")
}

// Progress is told at the interval of this flag.
var progressFlags = []string{"--watch-progress-notify-interval=200ms"}

func TestWatchProgress(t *testing.T) {
	onBoth(t, progressFlags, func(t *testing.T, m *member) {
		// One after the other: each expects what the store's revision is.
		t.Run("periodic", func(t *testing.T) { progressPeriodic(t, m, "periodic/") })
		t.Run("not asked for", func(t *testing.T) { progressNotAskedFor(t, m, "not/") })
		t.Run("on request", func(t *testing.T) { progressOnRequest(t, m, "request/") })
		t.Run("future", func(t *testing.T) { progressOfFuture(t, m, "future/") })
	})
}

// A watch without events learns that other keys' revisions have passed.
func progressPeriodic(t *testing.T, m *member, prefix string) {
	w := m.watch(t, prefix+"in/", clientv3.WithPrefix(), clientv3.WithProgressNotify())
	m.put(t, prefix+"out", "1")
	revision := m.put(t, prefix+"out", "2")
	progressTo(t, w, revision)

	// Events come before the progress that covers them.
	inside := m.put(t, prefix+"in/a", "1")
	equal(t, "event", shownEvents(eventsSkippingProgress(t, w, inside), prefix, inside), "PUT in/a@0")
	progressTo(t, w, inside)
}

// progressTo waits for a progress notification of revision; none may go back or beyond.
func progressTo(t *testing.T, w *watching, revision int64) {
	t.Helper()
	last := int64(0)
	for {
		resp := w.next(t)
		if !resp.IsProgressNotify() {
			t.Fatalf("got %+v, want progress", resp)
		}
		if resp.Header.Revision < last || resp.Header.Revision > revision {
			t.Fatalf("progress %d behind %d, the store is at %d", resp.Header.Revision, last, revision)
		}
		last = resp.Header.Revision
		if last == revision {
			return
		}
	}
}

// eventsSkippingProgress are the events of the next response with any; progress before it may not cover them.
func eventsSkippingProgress(t *testing.T, w *watching, revision int64) []*clientv3.Event {
	t.Helper()
	for {
		resp := w.next(t)
		if !resp.IsProgressNotify() {
			return resp.Events
		}
		if resp.Header.Revision >= revision {
			t.Fatalf("progress %d before the event of it", resp.Header.Revision)
		}
	}
}

// Only a watch that asked is told, on the same stream too.
func progressNotAskedFor(t *testing.T, m *member, prefix string) {
	silent := m.watch(t, prefix, clientv3.WithPrefix())
	told := m.watch(t, prefix+"none", clientv3.WithProgressNotify())
	for range 3 {
		resp := told.next(t)
		equal(t, "progress", resp.IsProgressNotify(), true)
	}
	base := m.put(t, prefix+"a", "1")
	equal(t, "first response", shownEvents(silent.next(t).Events, prefix, base), "PUT a@0")
}

// A request is answered on every watch of the stream, once all are up to date.
func progressOnRequest(t *testing.T, m *member, prefix string) {
	ctx := testContext(t)
	one := watchWith(t, ctx, m.Client, prefix+"one")
	two := watchWith(t, ctx, m.Client, prefix+"two")
	revision := m.put(t, prefix+"else", "1")
	for _, w := range []*watching{one, two} {
		requestProgressUntilAnswered(t, m, w, revision)
	}
	event := m.put(t, prefix+"one", "1")
	equal(t, "event", shownEvents(eventsSkippingProgress(t, one, event), prefix, event), "PUT one@0")
	requestProgressUntilAnswered(t, m, two, event)
}

// requestProgressUntilAnswered repeats the request, as its users do: the server may drop one.
func requestProgressUntilAnswered(t *testing.T, m *member, w *watching, revision int64) {
	t.Helper()
	for deadline := time.Now().Add(hang); time.Now().Before(deadline); {
		must(t, m.RequestProgress(testContext(t)))
		select {
		case resp := <-w.responses:
			if !resp.IsProgressNotify() || resp.Header.Revision > revision {
				t.Fatalf("got %+v, want progress up to %d", resp, revision)
			}
			if resp.Header.Revision == revision {
				return
			}
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatal("no progress")
}

// A watch that waits for the future is not told of progress before it.
func progressOfFuture(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	ctx := testContext(t)
	watcher := clientv3.NewWatcher(m.Client)
	t.Cleanup(func() { _ = watcher.Close() })
	future := watchWith(t, ctx, watcher, prefix+"b", clientv3.WithRev(base+2), clientv3.WithProgressNotify())
	present := watchWith(t, ctx, watcher, prefix+"b", clientv3.WithProgressNotify())
	for range 3 {
		equal(t, "progress of the other", present.next(t).Header.Revision, base)
	}
	m.put(t, prefix+"a", "2")
	m.put(t, prefix+"a", "3")
	resp := future.next(t)
	equal(t, "progress", resp.IsProgressNotify(), true)
	equal(t, "revision", resp.Header.Revision, base+2)
}

// A revision of 3 MiB of events, to one watch that takes it in pieces and to one that does not: the client puts the pieces
// together, on the wire each stays below 2 MiB. What does not ask for pieces gets one message, however large.
func TestWatchFragments(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		const keys = 3
		first := m.revision(t) + 1
		for i := range keys {
			m.put(t, fmt.Sprint("large/", i), repeat(1<<20))
		}
		opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithFilterPut()}
		watches := map[string]*watching{
			"whole":     m.watch(t, "large/", opts...),
			"in pieces": m.watch(t, "large/", append(opts, clientv3.WithFragment())...),
		}
		wholeMessages, pieces := m.rawWatch(t, "large/", false), m.rawWatch(t, "large/", true)
		deleted := m.delete(t, "large/", clientv3.WithPrefix())

		watches["whole, from history"] = m.watch(t, "large/", append(opts, clientv3.WithRev(first))...)
		watches["in pieces, from history"] = m.watch(t, "large/", append(opts, clientv3.WithRev(first), clientv3.WithFragment())...)
		for what, w := range watches {
			resp := w.next(t)
			equal(t, what+", events of one response", shownEvents(resp.Events, "large/", deleted), "DELETE 0@0 DELETE 1@0 DELETE 2@0")
			for _, event := range resp.Events {
				equal(t, what+", size of what was there", len(event.PrevKv.GetValue()), 1<<20)
			}
		}

		whole := receiveRaw(t, wholeMessages)
		equal(t, "whole is one message", whole.Fragment, false)
		equal(t, "with all events", len(whole.Events), keys)
		for got := 0; got < keys; {
			piece := receiveRaw(t, pieces)
			got += len(piece.Events)
			equal(t, "piece's revision", piece.Header.Revision, deleted)
			equal(t, "marked as unfinished", piece.Fragment, got < keys)
			if size := proto.Size(piece); size >= 2<<20 {
				t.Errorf("a piece of %d bytes", size)
			}
		}
	})
}

// rawWatch is a watch of a prefix with prev_kv, created, on a stream of its own: the client's own watches hide the pieces.
func (m *member) rawWatch(t *testing.T, prefix string, fragment bool) pb.Watch_WatchClient {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	t.Cleanup(cancel)
	stream, err := pb.NewWatchClient(m.ActiveConnection()).Watch(ctx)
	must(t, err)
	must(t, stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(prefix)), PrevKv: true, Fragment: fragment,
	}}}))
	equal(t, "created", receiveRaw(t, stream).Created, true)
	return stream
}

func receiveRaw(t *testing.T, stream pb.Watch_WatchClient) *pb.WatchResponse {
	t.Helper()
	resp, err := stream.Recv()
	must(t, err)
	return resp
}

// A watch lives through kill -9 and restarts on the same address: every revision comes once and in order, also those
// whose writer never got an answer.
func TestWatchResumes(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		const prefix, restarts, perRound = "resumed/", 3, 40
		w := m.watch(t, prefix, clientv3.WithPrefix())
		acknowledged := map[int64]string{}
		written := make(chan struct{}, 1)
		stop := make(chan struct{})
		writer := make(chan error, 1)
		go func() { writer <- writeUntil(stop, newClient(t, m.server), prefix, acknowledged, written) }()
		for range restarts {
			for range perRound {
				<-written
			}
			// In the middle of a write, most likely.
			m.restart(t)
		}
		for range perRound {
			<-written
		}
		close(stop)
		must(t, <-writer)

		last := m.put(t, prefix+"last", "last")
		for revision := w.created + 1; revision <= last; {
			for _, event := range w.next(t).Events {
				if event.Kv.ModRevision != revision {
					t.Fatalf("revision %d where %d is next", event.Kv.ModRevision, revision)
				}
				if value, ok := acknowledged[revision]; ok {
					equal(t, "value", string(event.Kv.Value), value)
				}
				revision++
			}
		}
		for revision, value := range acknowledged {
			if revision > last {
				t.Errorf("%s was acknowledged at %d, the store is at %d", value, revision, last)
			}
		}
	})
}

// writeUntil puts values one after the other and notes the revision of each that is acknowledged. Every written value puts
// a token into written, or finds that there is one.
func writeUntil(stop <-chan struct{}, client *clientv3.Client, prefix string, acknowledged map[int64]string, written chan<- struct{}) error {
	for i := 0; ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), hang)
		value := fmt.Sprint(i)
		resp, err := client.Put(ctx, prefix+fmt.Sprint(i%5), value)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if err != nil {
			continue // The server is down; whether it took this write, only the watch knows.
		}
		acknowledged[resp.Header.Revision] = value
		select {
		case written <- struct{}{}:
		default:
		}
	}
}

// Closing a client ends its watches, without an error of the server's. What the client says of it depends on which of
// its threads hears first: that its context is over, or that the stream of that context is.
func TestWatchEndsWithItsClient(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		client := newClient(t, m.server)
		w := watchWith(t, testContext(t), client, "k")
		must(t, client.Close())
		for response := range w.responses {
			err := response.Err()
			if err != nil && !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
				t.Errorf("ended with %v", err)
			}
		}
	})
}
