package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/etcd/history"
)

// lease is one that is kept alive until the end, with a key.
type lease struct {
	id  clientv3.LeaseID
	key string
}

const (
	// keptTTL is longer than any time in which a client that asks all members gets no answer but for lack of a leader, on a
	// machine that halts for some seconds now and then.
	keptTTL = 15
	// forgottenTTL is the shortest that etcd grants.
	forgottenTTL = 2
	keptLeases   = 3
)

// startLeases keeps some leases alive, and forgets others.
func (l *load) startLeases() {
	for i := range keptLeases {
		lease := &lease{key: fmt.Sprintf("/registry/leases/%d", i)}
		lease.id = l.grant(keptTTL)
		l.through(i, lease.put(fmt.Sprintf("%s-lease-%d", l.tenant, i), lease.key))
		l.leases = append(l.leases, lease)
		l.watching.Go(func() { l.keep(lease) })
	}
	l.running.Go(l.forget)
}

// grant asks any member until one grants.
func (l *load) grant(ttl int64) clientv3.LeaseID {
	for i := 0; ; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), l.patience)
		call := l.Now()
		resp, err := l.perMember[i%len(l.perMember)].Grant(ctx, ttl)
		cancel()
		if err == nil {
			l.Promise(int64(resp.ID), history.Promise{Call: call, Return: l.Now(), TTL: time.Duration(resp.TTL) * time.Second})
			return resp.ID
		}
		if l.ctx.Err() != nil {
			return 0
		}
	}
}

// put is a write of keys with the lease.
func (lease *lease) put(value string, keys ...string) *history.Op {
	op := &history.Op{Client: "lessee", Kind: history.Write}
	for i, key := range keys {
		op.Changes = append(op.Changes, history.Change{Key: key, Value: fmt.Sprintf("%s-%d", value, i), Lease: int64(lease.id)})
	}
	return op
}

// keep renews a lease through one member after the other, so that it lives as long as some member can renew it.
func (l *load) keep(lease *lease) {
	for i := 0; ; i++ {
		select {
		case <-time.After(4 * pace):
		case <-l.watchers[0].ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		call := l.Now()
		resp, err := l.perMember[i%len(l.perMember)].KeepAliveOnce(ctx, lease.id)
		cancel()
		switch {
		case err == nil:
			l.Promise(int64(lease.id), history.Promise{Call: call, Return: l.Now(), TTL: time.Duration(resp.TTL) * time.Second})
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			if l.losesLeases {
				return
			}
			l.t.Errorf("lease %x of tenant %s, which was kept alive, is gone at %v", lease.id, l.tenant, l.Now())
			return
		}
	}
}

// forget puts keys with leases that nobody keeps: all keys of a lease go at one revision.
func (l *load) forget() {
	for i := 0; l.ctx.Err() == nil; i++ {
		lease := &lease{id: l.grant(forgottenTTL)}
		if lease.id == 0 {
			return
		}
		for j := range 2 {
			keys := []string{fmt.Sprintf("/registry/forgotten/%d/%d", i, j), fmt.Sprintf("%s9%d", pods, j)}
			l.through(i, lease.put(fmt.Sprintf("%s-forgotten-%d-%d", l.tenant, i, j), keys...))
		}
		if i%3 == 0 {
			l.revoke(lease, i)
		}
		select {
		case <-time.After(20 * pace):
		case <-l.ctx.Done():
		}
	}
}

func (l *load) revoke(lease *lease, member int) {
	ctx, cancel := context.WithTimeout(context.Background(), l.patience)
	defer cancel()
	l.Revoked(int64(lease.id))
	_, _ = l.perMember[member%len(l.perMember)].Revoke(ctx, lease.id)
}

// endLeases checks that what was kept alive lives. It is called before the watches end, with which the keeping ends.
func (l *load) endLeases() {
	for _, lease := range l.leases {
		if l.losesLeases {
			return
		}
		resp := answered(l.t, "time to live", func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
			return l.perMember[0].TimeToLive(ctx, lease.id, clientv3.WithAttachedKeys())
		})
		if resp.TTL <= 0 || len(resp.Keys) != 1 || string(resp.Keys[0]) != lease.key {
			l.t.Errorf("lease %x of tenant %s, which was kept alive: TTL %d, keys %q", lease.id, l.tenant, resp.TTL, resp.Keys)
		}
	}
}

// through makes a write by one member.
func (l *load) through(member int, op *history.Op) {
	client := l.perMember[member%len(l.perMember)]
	// What came of it is in the history.
	_ = l.record(op, func(ctx context.Context) (*etcdserverpb.ResponseHeader, error) { return l.send(ctx, client, op) })
}
