package client

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestLease(t *testing.T) {
	concurrentCasesOnBoth(t, nil, []caseOn{
		{"grant", leaseGrant},
		{"revoke", leaseRevoke},
		{"expire", leaseExpires},
		{"keep-alive", leaseKeptAlive},
		{"keep-alive-once", leaseKeepAliveOnce},
		{"keep-alive-stream", leaseKeepAliveStream},
		{"keep-alive-unknown", leaseKeepAliveUnknown},
		{"reattach", leaseReattach},
	})
}

func leaseGrant(t *testing.T, m *member, _ string) {
	granted, err := m.Grant(testContext(t), 600)
	must(t, err)
	equal(t, "ttl", granted.TTL, 600)
	if granted.ID == 0 {
		t.Error("no id")
	}
	ttl, err := m.TimeToLive(testContext(t), granted.ID)
	must(t, err)
	equal(t, "granted", ttl.GrantedTTL, 600)
	if ttl.TTL < 540 || ttl.TTL > 600 {
		t.Errorf("%d s remain", ttl.TTL)
	}
	leases, err := m.Leases(testContext(t))
	must(t, err)
	found := false
	for _, lease := range leases.Leases {
		found = found || lease.ID == granted.ID
	}
	equal(t, "listed", found, true)
	_, err = m.Grant(testContext(t), 9_000_000_001)
	refused(t, err, rpctypes.ErrLeaseTTLTooLarge)
	unknown, err := m.TimeToLive(testContext(t), 4711)
	must(t, err)
	equal(t, "ttl of no lease", unknown.TTL, -1)
}

func leaseRevoke(t *testing.T, m *member, prefix string) {
	lease := m.grant(t, 600)
	for i := range 10 {
		m.put(t, fmt.Sprint(prefix, i), "v", clientv3.WithLease(lease))
	}
	w := m.watch(t, prefix, clientv3.WithPrefix())
	_, err := m.Revoke(testContext(t), lease)
	must(t, err)
	events := w.next(t).Events
	equal(t, "all keys go at once", len(events), 10)
	for _, event := range events {
		equal(t, "kind", event.Type, clientv3.EventTypeDelete)
		equal(t, "revision", event.Kv.ModRevision, events[0].Kv.ModRevision)
	}
	equal(t, "keys left", m.get(t, prefix, clientv3.WithPrefix()).Count, 0)
	_, err = m.Revoke(testContext(t), lease)
	refused(t, err, rpctypes.ErrLeaseNotFound)
	_, err = m.Put(testContext(t), prefix+"x", "v", clientv3.WithLease(lease))
	refused(t, err, rpctypes.ErrLeaseNotFound)
}

func leaseExpires(t *testing.T, m *member, prefix string) {
	w := m.watch(t, prefix, clientv3.WithPrefix())
	const seconds = 5
	before := time.Now()
	lease := m.grant(t, seconds)
	m.put(t, prefix+"a", "1", clientv3.WithLease(lease))
	events := w.events(t, 2)
	// Late is allowed, early is not.
	if lived := time.Since(before); lived < seconds*time.Second {
		t.Errorf("a lease of %d s ended after %v", seconds, lived)
	}
	equal(t, "event", string(events[0].Kv.Value), "1")
	equal(t, "event", events[1].Type, clientv3.EventTypeDelete)
	ttl, err := m.TimeToLive(testContext(t), lease)
	must(t, err)
	equal(t, "ttl", ttl.TTL, -1)
}

// Kept alive for longer than it was granted for.
func leaseKeptAlive(t *testing.T, m *member, prefix string) {
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	const seconds = 9
	lease := m.grant(t, seconds)
	m.put(t, prefix+"a", "1", clientv3.WithLease(lease))
	beats, err := m.KeepAlive(ctx, lease)
	must(t, err)
	for range 5 {
		beat, open := <-beats
		if !open {
			t.Fatal("keep-alives ended")
		}
		equal(t, "ttl", beat.TTL, seconds)
	}
	equal(t, "key", m.get(t, prefix+"a").Count, 1)
	_, err = m.Revoke(testContext(t), lease)
	must(t, err)
	for range beats { //nolint:revive // ends when the server says that the lease is gone
	}
}

func leaseKeepAliveOnce(t *testing.T, m *member, _ string) {
	lease := m.grant(t, 600)
	beat, err := m.KeepAliveOnce(testContext(t), lease)
	must(t, err)
	equal(t, "ttl", beat.TTL, 600)
	_, err = m.KeepAliveOnce(testContext(t), 4712)
	refused(t, err, rpctypes.ErrLeaseNotFound)
}

// Renewals of one stream are answered in their order; one of no lease is answered too, with 0, and ends nothing.
func leaseKeepAliveStream(t *testing.T, m *member, _ string) {
	long, short := m.grant(t, 600), m.grant(t, 300)
	stream, err := pb.NewLeaseClient(m.ActiveConnection()).LeaseKeepAlive(testContext(t))
	must(t, err)
	asked := []struct{ id, ttl int64 }{{int64(long), 600}, {4713, 0}, {int64(short), 300}, {0, 0}, {int64(long), 600}}
	for _, ask := range asked {
		must(t, stream.Send(&pb.LeaseKeepAliveRequest{ID: ask.id}))
	}
	must(t, stream.CloseSend())
	for _, ask := range asked {
		resp, err := stream.Recv()
		must(t, err)
		equal(t, "id", resp.ID, ask.id)
		equal(t, "ttl", resp.TTL, ask.ttl)
	}
	_, err = stream.Recv()
	equal(t, "end", err, io.EOF)
}

func leaseKeepAliveUnknown(t *testing.T, m *member, _ string) {
	beats, err := m.KeepAlive(testContext(t), 4714)
	must(t, err)
	select {
	case beat, open := <-beats:
		if open {
			t.Errorf("a lease that does not exist was kept alive: %+v", beat)
		}
	case <-time.After(hang):
		t.Error("the keep-alive of no lease goes on")
	}
}

func leaseReattach(t *testing.T, m *member, prefix string) {
	first, second := m.grant(t, 600), m.grant(t, 600)
	m.put(t, prefix+"a", "1", clientv3.WithLease(first))
	m.put(t, prefix+"a", "2", clientv3.WithLease(second))
	m.put(t, prefix+"b", "1", clientv3.WithLease(first))
	m.put(t, prefix+"b", "2", clientv3.WithIgnoreLease())
	m.put(t, prefix+"c", "1", clientv3.WithLease(first))
	m.put(t, prefix+"c", "2")
	equal(t, "first", fmt.Sprint(m.leaseKeys(t, first)), fmt.Sprint([]string{prefix + "b"}))
	equal(t, "second", fmt.Sprint(m.leaseKeys(t, second)), fmt.Sprint([]string{prefix + "a"}))
	_, err := m.Revoke(testContext(t), first)
	must(t, err)
	equal(t, "left", keys(m.get(t, prefix, clientv3.WithPrefix()).Kvs, prefix), "a c")
}

// Leases, their keys and a time to live that is at least what was left survive kill -9.
func TestLeaseSurvivesRestart(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		long, short, revoked := m.grant(t, 600), m.grant(t, 10), m.grant(t, 600)
		m.put(t, "long", "1", clientv3.WithLease(long))
		m.put(t, "revoked", "1", clientv3.WithLease(revoked))
		_, err := m.Revoke(testContext(t), revoked)
		must(t, err)
		m.put(t, "short", "1", clientv3.WithLease(short))
		m.restart(t)
		equal(t, "keys", fmt.Sprint(m.leaseKeys(t, long)), "[long]")
		leases, err := m.Leases(testContext(t))
		must(t, err)
		equal(t, "the one that ends first is listed first", fmt.Sprint(leases.Leases), fmt.Sprint([]clientv3.LeaseStatus{{ID: short}, {ID: long}}))
		again, err := m.TimeToLive(testContext(t), long)
		must(t, err)
		equal(t, "granted", again.GrantedTTL, 600)
		_, err = m.KeepAliveOnce(testContext(t), long)
		must(t, err)
		_, err = m.KeepAliveOnce(testContext(t), revoked)
		refused(t, err, rpctypes.ErrLeaseNotFound)
		equal(t, "revoked key", m.get(t, "revoked").Count, 0)
		events := m.watch(t, "short", clientv3.WithRev(only(m.get(t, "long").Kvs).ModRevision)).events(t, 2)
		equal(t, "the short one expires", events[1].Type, clientv3.EventTypeDelete)
		equal(t, "long outlives short", m.get(t, "long").Count, 1)
	})
}
