package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestWatch(t *testing.T) {
	casesOnBoth(t, []string{"--watch-progress-notify-interval=200ms"}, []caseOn{
		{"live", watchLive},
		{"past", watchPast},
		{"future", watchFuture},
		{"filters", watchFilters},
		{"previous", watchPrevious},
		{"compacted", watchCompacted},
		{"periodic-progress", watchPeriodicProgress},
		{"requested-progress", watchRequestedProgress},
		{"many", watchMany},
		{"fragments", watchFragments},
		{"cancel", watchCancel},
		{"leader", watchWithLeader},
	})
}

// next is the following response of a watch that must not have ended.
func next(t *testing.T, watcher clientv3.WatchChan) clientv3.WatchResponse {
	t.Helper()
	select {
	case response, open := <-watcher:
		if !open {
			t.Fatal("the watch ended")
		}
		must(t, response.Err())
		return response
	case <-testContext(t).Done():
		t.Fatal("nothing came")
		return clientv3.WatchResponse{}
	}
}

// collect reads until n events have come.
func collect(t *testing.T, watcher clientv3.WatchChan, n int) []*clientv3.Event {
	t.Helper()
	var events []*clientv3.Event
	for len(events) < n {
		events = append(events, next(t, watcher).Events...)
	}
	equal(t, "events", len(events), n)
	return events
}

func texts(events []*clientv3.Event, prefix string) string {
	var texts []string
	for _, event := range events {
		text := event.Type.String() + " " + strings.TrimPrefix(string(event.Kv.Key), prefix)
		if len(event.Kv.Value) > 0 {
			text += "=" + string(event.Kv.Value)
		}
		if event.PrevKv != nil {
			text += " was " + string(event.PrevKv.Value)
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, ", ")
}

func watchLive(t *testing.T, m *member, prefix string) {
	watcher := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	created := next(t, watcher)
	equal(t, "created", created.Created, true)
	equal(t, "created at", created.Header.Revision, m.revision(t))
	m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	m.put(t, "beside", "1")
	m.put(t, prefix+"b", "3")
	events := collect(t, watcher, 4)
	equal(t, "events", texts(events, prefix), "PUT a=1, PUT a=2, DELETE a, PUT b=3")
	equal(t, "is create", events[0].IsCreate(), true)
	equal(t, "is modify", events[1].IsModify(), true)
	equal(t, "a delete's revision", events[2].Kv.ModRevision, created.Header.Revision+3)
}

func watchPast(t *testing.T, m *member, prefix string) {
	first := m.put(t, prefix+"a", "1")
	for i := 2; i <= 50; i++ {
		m.put(t, prefix+"a", fmt.Sprint(i))
	}
	watcher := m.Watch(testContext(t), prefix+"a", clientv3.WithRev(first+9))
	events := collect(t, watcher, 41)
	for i, event := range events {
		equal(t, "revision", event.Kv.ModRevision, first+9+int64(i))
		equal(t, "version", event.Kv.Version, int64(10+i))
	}
	m.put(t, prefix+"a", "live")
	equal(t, "then live", texts(collect(t, watcher, 1), prefix), "PUT a=live")
}

func watchFuture(t *testing.T, m *member, prefix string) {
	base := m.revision(t)
	watcher := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithRev(base+3))
	for i := 1; i <= 4; i++ {
		m.put(t, fmt.Sprint(prefix, i), "v")
	}
	equal(t, "events", texts(collect(t, watcher, 2), prefix), "PUT 3=v, PUT 4=v")
}

func watchFilters(t *testing.T, m *member, prefix string) {
	base := m.revision(t)
	puts := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithRev(base+1), clientv3.WithFilterDelete())
	deletes := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithRev(base+1), clientv3.WithFilterPut())
	m.put(t, prefix+"a", "1")
	m.delete(t, prefix+"a")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	equal(t, "puts", texts(collect(t, puts, 2), prefix), "PUT a=1, PUT a=2")
	equal(t, "deletes", texts(collect(t, deletes, 2), prefix), "DELETE a, DELETE a")
}

func watchPrevious(t *testing.T, m *member, prefix string) {
	base := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	m.delete(t, prefix+"a")
	m.put(t, prefix+"a", "3")
	const want = "PUT a=1, PUT a=2 was 1, DELETE a was 2, PUT a=3"
	replayed := m.Watch(testContext(t), prefix+"a", clientv3.WithRev(base), clientv3.WithPrevKV())
	equal(t, "replayed", texts(collect(t, replayed, 4), prefix), want)
	m.put(t, prefix+"a", "4")
	equal(t, "live", texts(collect(t, replayed, 1), prefix), "PUT a=4 was 3")
}

func watchCompacted(t *testing.T, m *member, prefix string) {
	old := m.put(t, prefix+"a", "1")
	m.put(t, prefix+"a", "2")
	compacted := m.put(t, prefix+"a", "3")
	_, err := m.Compact(testContext(t), compacted)
	must(t, err)
	response := <-m.Watch(testContext(t), prefix+"a", clientv3.WithRev(old))
	refused(t, response.Err(), rpctypes.ErrCompacted)
	equal(t, "compact revision", response.CompactRevision, compacted)
	equal(t, "canceled", response.Canceled, true)
	watcher := m.Watch(testContext(t), prefix+"a", clientv3.WithRev(compacted))
	equal(t, "from the compact revision on", texts(collect(t, watcher, 1), prefix), "PUT a=3")
}

func watchPeriodicProgress(t *testing.T, m *member, prefix string) {
	watcher := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithProgressNotify())
	m.put(t, "elsewhere", "1")
	revision := m.revision(t)
	for {
		response := next(t, watcher)
		equal(t, "no events", len(response.Events), 0)
		equal(t, "is progress", response.IsProgressNotify(), true)
		// The first may have been sent before the put.
		if response.Header.Revision >= revision {
			return
		}
	}
}

func watchRequestedProgress(t *testing.T, m *member, prefix string) {
	ctx := clientv3.WithRequireLeader(testContext(t))
	watcher := m.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	next(t, watcher)
	m.put(t, prefix+"a", "1")
	equal(t, "event", texts(collect(t, watcher, 1), prefix), "PUT a=1")
	revision := m.put(t, "elsewhere", "2")
	for {
		must(t, m.RequestProgress(ctx))
		response := next(t, watcher)
		equal(t, "is progress", response.IsProgressNotify(), true)
		if response.Header.Revision >= revision {
			return
		}
	}
}

func watchMany(t *testing.T, m *member, prefix string) {
	const watchers = 500
	ctx := testContext(t)
	channels := make([]clientv3.WatchChan, watchers)
	for i := range channels {
		channels[i] = m.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		next(t, channels[i])
	}
	for i := range 20 {
		m.put(t, prefix+"a", fmt.Sprint(i))
	}
	for _, channel := range channels {
		for i, event := range collect(t, channel, 20) {
			equal(t, "value", string(event.Kv.Value), fmt.Sprint(i))
		}
	}
}

// 3 MiB of events in one revision, through a client that takes 2 MiB at once.
func watchFragments(t *testing.T, m *member, prefix string) {
	const keys, size = 30, 100 << 10
	small, err := clientv3.New(clientv3.Config{
		Endpoints: []string{m.server.Endpoint()}, MaxCallSendMsgSize: 64 << 20, MaxCallRecvMsgSize: 64 << 20,
	})
	must(t, err)
	defer small.Close()
	first := m.revision(t) + 1
	for i := range keys {
		m.put(t, fmt.Sprintf("%s%02d", prefix, i), repeat(size))
	}
	for _, fragment := range []bool{true, false} {
		opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithRev(first)}
		if fragment {
			opts = append(opts, clientv3.WithFragment())
		}
		watcher := small.Watch(testContext(t), prefix, opts...)
		for i, event := range collect(t, watcher, keys) {
			equal(t, "key", string(event.Kv.Key), fmt.Sprintf("%s%02d", prefix, i))
			equal(t, "size", len(event.Kv.Value), size)
		}
	}
}

func watchCancel(t *testing.T, m *member, prefix string) {
	ctx, cancel := context.WithCancel(testContext(t))
	watcher := m.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	next(t, watcher)
	cancel()
	for range watcher { //nolint:revive // until it is closed
	}
	other := m.Watch(testContext(t), prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	next(t, other)
	m.put(t, prefix+"a", "1")
	equal(t, "the next watch on the stream", texts(collect(t, other, 1), prefix), "PUT a=1")
	empty := <-m.Watch(testContext(t), prefix+"b", clientv3.WithRange(prefix+"a"))
	if empty.Err() == nil {
		t.Error("a watch of an empty range was not refused")
	}
}

func watchWithLeader(t *testing.T, m *member, prefix string) {
	watcher := m.Watch(clientv3.WithRequireLeader(testContext(t)), prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	next(t, watcher)
	m.put(t, prefix+"a", "1")
	equal(t, "events", texts(collect(t, watcher, 1), prefix), "PUT a=1")
}

// A watch goes on over kill -9 and a restart on the same address, without a gap and without an event twice.
func TestWatchResumes(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		const key, rounds, puts = "resumed", 3, 40
		ctx := testContext(t)
		watcher := m.Watch(ctx, key, clientv3.WithCreatedNotify())
		next(t, watcher)
		acknowledged := map[string]int64{}
		for round := range rounds {
			for i := range puts {
				value := fmt.Sprintf("%d-%d", round, i)
				acknowledged[value] = m.put(t, key, value)
			}
			m.server.Restart()
		}
		last := m.put(t, key, "last")
		seen := map[string]int64{}
		for revision := int64(0); revision < last; {
			for _, event := range next(t, watcher).Events {
				if event.Kv.ModRevision <= revision {
					t.Fatalf("revision %d after %d", event.Kv.ModRevision, revision)
				}
				revision = event.Kv.ModRevision
				seen[string(event.Kv.Value)] = revision
			}
		}
		for value, revision := range acknowledged {
			equal(t, value, seen[value], revision)
		}
		for value, revision := range acknowledged {
			at := m.get(t, key, clientv3.WithRev(revision))
			equal(t, "read back", string(only(at.Kvs).Value), value)
		}
	})
}

// Closing a client ends its watches, without an error of its own.
func TestWatchEndsWithItsClient(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		client := newClient(t, m.server)
		watcher := client.Watch(testContext(t), "k", clientv3.WithCreatedNotify())
		next(t, watcher)
		must(t, client.Close())
		for response := range watcher {
			if err := response.Err(); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
		}
	})
}
