package client

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// watching is a watch that the server has confirmed: whatever is written from then on is seen by it.
type watching struct {
	responses clientv3.WatchChan
	// created is the store's revision when the watch was made.
	created int64
	cancel  context.CancelFunc
}

func (m *member) watch(t *testing.T, key string, opts ...clientv3.OpOption) *watching {
	t.Helper()
	return watchWith(t, testContext(t), m.Client, key, opts...)
}

// watchWith takes any watcher; watches share a stream of their client unless their contexts differ in metadata.
func watchWith(t *testing.T, ctx context.Context, watcher clientv3.Watcher, key string, opts ...clientv3.OpOption) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	t.Cleanup(cancel)
	w := &watching{responses: watcher.Watch(ctx, key, append(opts, clientv3.WithCreatedNotify())...), cancel: cancel}
	resp := w.next(t)
	if !resp.Created {
		t.Fatalf("the first response is not that of the creation: %+v", resp)
	}
	w.created = resp.Header.Revision
	return w
}

// next is the next response; the watch must not have ended.
func (w *watching) next(t *testing.T) clientv3.WatchResponse {
	t.Helper()
	resp, open := w.receive(t)
	if !open {
		t.Fatal("the watch has ended")
	}
	return resp
}

func (w *watching) receive(t *testing.T) (clientv3.WatchResponse, bool) {
	t.Helper()
	select {
	case resp, open := <-w.responses:
		return resp, open
	case <-time.After(hang):
		t.Fatal("no watch response")
		return clientv3.WatchResponse{}, false
	}
}

// events takes responses until there are count events, which must then be exactly so many.
func (w *watching) events(t *testing.T, count int) []*clientv3.Event {
	t.Helper()
	var events []*clientv3.Event
	for len(events) < count {
		resp := w.next(t)
		must(t, resp.Err())
		events = append(events, resp.Events...)
	}
	equal(t, "events", len(events), count)
	return events
}

// upTo are the events up to the first one of a key, that one included.
func (w *watching) upTo(t *testing.T, key string) []*clientv3.Event {
	t.Helper()
	var events []*clientv3.Event
	for {
		resp := w.next(t)
		must(t, resp.Err())
		for _, event := range resp.Events {
			events = append(events, event)
			if string(event.Kv.Key) == key {
				return events
			}
		}
	}
}

// ended demands that the watch sends nothing more but its end.
func (w *watching) ended(t *testing.T) {
	t.Helper()
	if resp, open := w.receive(t); open {
		t.Errorf("got %+v where the watch should have ended", resp)
	}
}

// shownEvents is one line: "PUT key@revision", with revisions counted from base.
func shownEvents(events []*clientv3.Event, prefix string, base int64) string {
	lines := make([]string, 0, len(events))
	for _, event := range events {
		key := strings.TrimPrefix(string(event.Kv.Key), prefix)
		lines = append(lines, fmt.Sprintf("%s %s@%d", event.Type, key, event.Kv.ModRevision-base))
	}
	return strings.Join(lines, " ")
}
