package cluster

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/etcd/history"
)

// verify ends the load, all members being up again, and judges: what the clients saw, that all leases live that were kept
// alive, and that all members hold the same.
func (l *load) verify() {
	l.t.Helper()
	l.finish()
	last := l.lastWrite()
	l.endLeases()
	l.endWatches(last)
	l.judge()
	l.equalMembers(last)
}

// lastWrite is one that every watch gets.
func (l *load) lastWrite() int64 {
	l.t.Helper()
	op := &history.Op{}
	for i := 0; ; i++ {
		op = &history.Op{Client: "last", Kind: history.Write, Changes: []history.Change{{Key: pods + "00", Value: fmt.Sprintf("%s-last-%d", l.tenant, i)}}}
		l.through(i, op)
		if op.Outcome == history.OK {
			return op.Revision
		}
		if op.Return > op.Call+hang || i > 100 {
			l.t.Fatalf("no member takes a write any more: %v", op)
		}
	}
}

func (l *load) judge() {
	l.t.Helper()
	unknown, events, progress := 0, 0, 0
	for _, op := range l.Ops {
		if op.Outcome == history.Unknown {
			unknown++
		}
	}
	for _, w := range l.Watches {
		for _, step := range w.Steps {
			events += len(step.Events)
			if step.Kind == history.Progress {
				progress++
			}
		}
	}
	l.t.Logf("tenant %s: %d operations, of %d the outcome is unknown, %d leases; %d watches brought %d events and %d times progress",
		l.tenant, len(l.Ops), unknown, len(l.Leases), len(l.Watches), events, progress)
	for _, violation := range l.Check() {
		if l.losesLeases && violation.Name == "lost lease" {
			continue
		}
		l.t.Errorf("tenant %s: %v", l.tenant, violation)
	}
}

// equalMembers compares the hashes of all members at the same revision, before and after a compaction.
func (l *load) equalMembers(last int64) {
	l.t.Helper()
	l.equalHashes(last)
	// Not to the last itself: at a revision to which it compacts, etcd answers now with the hash from before and now from after.
	for _, compacted := range []int64{last - 50, last - 1} {
		// What was compacted before, or is not there yet, is no matter here.
		_, _ = l.perMember[0].Compact(testContext(l.t), compacted)
		l.equalHashes(last)
	}
}

func (l *load) equalHashes(revision int64) {
	l.t.Helper()
	var first *clientv3.HashKVResponse
	for i, client := range l.perMember {
		m := l.cluster.Members[i]
		var resp *clientv3.HashKVResponse
		// A member may have to catch up with the revision, and with the last compaction.
		await(l.t, fmt.Sprintf("the hash of %s at revision %d of tenant %s", m.Name, revision, l.tenant), func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			got, err := client.HashKV(ctx, client.Endpoints()[0], revision)
			resp = got
			return err == nil && (first == nil || got.CompactRevision >= first.CompactRevision)
		})
		if first == nil {
			first = resp
		}
		if resp.Hash != first.Hash || resp.CompactRevision != first.CompactRevision {
			l.t.Errorf("tenant %s, revision %d: %s has hash %d compacted to %d, %s has hash %d compacted to %d", l.tenant, revision,
				l.cluster.Members[0].Name, first.Hash, first.CompactRevision, m.Name, resp.Hash, resp.CompactRevision)
		}
	}
}
