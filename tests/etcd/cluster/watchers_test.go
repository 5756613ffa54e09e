package cluster

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/etcd/history"
)

// watcher records one watch, which its client resumes by itself.
type watcher struct {
	*history.Watch
	load   *load
	client *clientv3.Client
	opts   []clientv3.OpOption
	// asks makes it ask for progress now and then.
	asks bool
	// all says that it watches all keys.
	all bool
	// done is the highest revision it brought, or was promised.
	done   atomic.Int64
	ctx    context.Context
	cancel context.CancelFunc
}

// startWatchers gives every member three watches, and one to a client that knows all members.
func (l *load) startWatchers() {
	for i, client := range l.perMember {
		name := l.cluster.Members[i].Name
		l.startWatcher(&watcher{client: client, all: true, Watch: &history.Watch{
			Name: name + "/all", Key: registry, End: theEnd, PrevKV: true,
		}})
		l.startWatcher(&watcher{client: client, asks: true, opts: []clientv3.OpOption{clientv3.WithProgressNotify()}, Watch: &history.Watch{
			Name: name + "/pods", Key: pods, End: podsEnd,
		}})
		l.startWatcher(&watcher{client: client, opts: []clientv3.OpOption{clientv3.WithFragment()}, Watch: &history.Watch{
			Name: name + "/one", Key: pods + "00",
		}})
	}
	l.startWatcher(&watcher{client: dialled(l.t, l.cluster.Endpoints(l.tenant), l.dial...), all: true, asks: true, Watch: &history.Watch{
		Name: "shared/all", Key: registry, End: theEnd, PrevKV: true,
	}})
}

func (l *load) startWatcher(w *watcher) {
	w.load = l
	if w.End != "" {
		w.opts = append(w.opts, clientv3.WithRange(w.End))
	}
	if w.PrevKV {
		w.opts = append(w.opts, clientv3.WithPrevKV())
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	l.t.Cleanup(w.cancel)
	l.Watch(w.Watch)
	l.watchers = append(l.watchers, w)
	l.watching.Go(w.run)
	if w.asks {
		l.watching.Go(w.ask)
	}
}

// ask asks for progress on the watch's stream.
func (w *watcher) ask() {
	for {
		select {
		case <-time.After(10 * pace):
			// That it fails while the stream is down is no matter.
			_ = w.client.RequestProgress(w.ctx)
		case <-w.ctx.Done():
			return
		}
	}
}

func (w *watcher) run() {
	next := int64(2)
	for w.ctx.Err() == nil {
		w.step(history.Step{Kind: history.Started, Revision: next})
		for resp := range w.client.Watch(w.ctx, w.Key, append(w.opts, clientv3.WithRev(next))...) {
			switch {
			case resp.CompactRevision != 0:
				w.step(history.Step{Kind: history.Compacted, Revision: resp.CompactRevision})
				next = resp.CompactRevision
			case resp.Canceled:
				next = w.done.Load() + 1
			case resp.IsProgressNotify():
				w.step(history.Step{Kind: history.Progress, Revision: resp.Header.Revision, Member: w.member(resp)})
				w.reach(resp.Header.Revision)
			case len(resp.Events) > 0:
				w.response(resp)
			}
		}
	}
}

func (w *watcher) response(resp clientv3.WatchResponse) {
	step := history.Step{Kind: history.Response, Revision: resp.Header.Revision, Member: w.member(resp)}
	for _, e := range resp.Events {
		event := history.Event{Delete: e.Type == clientv3.EventTypeDelete, KV: *keyValue(e.Kv)}
		if e.PrevKv != nil {
			event.Prev = keyValue(e.PrevKv)
		}
		step.Events = append(step.Events, event)
	}
	w.step(step)
	w.reach(resp.Events[len(resp.Events)-1].Kv.ModRevision)
}

func (w *watcher) member(resp clientv3.WatchResponse) string {
	if m := w.load.members[resp.Header.MemberId]; m != nil {
		return m.Name
	}
	return fmt.Sprintf("%x", resp.Header.MemberId)
}

func (w *watcher) step(s history.Step) {
	s.At = w.load.Now()
	w.Steps = append(w.Steps, s)
}

func (w *watcher) reach(revision int64) {
	w.done.Store(max(w.done.Load(), revision))
}

// broughtByAll is the revision up to which some watch of all keys brought everything.
func (l *load) broughtByAll() int64 {
	var most int64
	for _, w := range l.watchers {
		if w.all {
			most = max(most, w.done.Load())
		}
	}
	return most
}

// endWatches waits until every watch has brought the last revision, and ends them all.
func (l *load) endWatches(last int64) {
	for _, w := range l.watchers {
		await(l.t, fmt.Sprintf("watch %s of tenant %s to reach revision %d", w.Name, l.tenant, last), func() bool { return w.done.Load() >= last })
	}
	for _, w := range l.watchers {
		w.cancel()
	}
	l.watching.Wait()
	for _, w := range l.watchers {
		w.step(history.Step{Kind: history.Ended, Revision: last})
	}
}
