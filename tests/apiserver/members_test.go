package apiserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tenure.dev/tests/harness"
)

// Two kube-apiservers share a tenant, as those of a highly available control plane do, and know all members of the cell.
// Under load every member is killed once, a leader among them. What one apiserver acknowledges, the other must show: each
// has its own watch cache, and only tenured tells it what the other wrote.
func TestThreeMembers(t *testing.T) {
	cell := harness.StartCluster(t, harness.Tenured, 3, []string{"acme", "idle"})
	idle := etcdClient(t, cell.Endpoints("idle")...)
	idleBefore := revision(t, idle)
	both := []*controlPlane{
		startControlPlane(t, "acme-1", "acme", cell.Endpoints("acme")...),
		startControlPlane(t, "acme-2", "acme", cell.Endpoints("acme")...),
	}
	started := []float64{startTime(t, both[0]), startTime(t, both[1])}

	l := startLoad(t, both, []kind{configMaps, leases})
	l.waitForMore(t, 20)
	survivors := slices.Clone(cell.Members)
	for len(survivors) > 0 {
		// The leader, until it is one that was killed before.
		m, leads := survivors[0], "a follower"
		if leader := leader(t, cell, both[0].etcd); slices.Contains(survivors, leader) {
			m, leads = leader, "the leader"
		}
		survivors = slices.DeleteFunc(survivors, func(other *harness.Member) bool { return other == m })
		l.slowest()
		m.Kill()
		l.waitForMore(t, 20)
		waitHealthy(t, both)
		l.check(t)
		t.Logf("%s, %s, was killed; until both showed it the slowest change took %v", m.Name, leads, l.slowest())
		m.Start()
		l.waitForMore(t, 20)
		waitHealthy(t, both)
	}
	l.check(t)
	for i, cp := range both {
		if now := startTime(t, cp); now != started[i] {
			t.Errorf("%s was started at %v, then at %v", cp.name, started[i], now)
		}
	}
	if now := revision(t, idle); now != idleBefore {
		t.Errorf("the idle tenant went from revision %d to %d", idleBefore, now)
	}
	l.report(t)
}

// leader waits until a running member says that it leads.
func leader(t *testing.T, cell *harness.Cluster, etcd *clientv3.Client) *harness.Member {
	t.Helper()
	var leader *harness.Member
	eventually(t, "a leader", func(ctx context.Context) error {
		for _, m := range cell.Members {
			status, err := etcd.Status(ctx, m.Endpoints["acme"])
			if err != nil {
				return err
			}
			if status.Leader == status.Header.MemberId {
				leader = m
				return nil
			}
		}
		return errors.New("no member leads")
	})
	return leader
}

func waitHealthy(t *testing.T, both []*controlPlane) {
	t.Helper()
	for _, cp := range both {
		cp.waitHealthy(t, "/readyz/etcd")
		cp.waitReady(t)
	}
}

// check stops the load for a moment. Then what is acknowledged, what tenured stores, and what each apiserver lists are the
// same, and both apiservers' watches have shown how it came to be.
func (l *load) check(t *testing.T) {
	t.Helper()
	l.calm.Lock()
	defer l.calm.Unlock()
	for _, k := range l.kinds {
		story := l.story(t, k)
		acknowledged := story.living()
		same(t, "tenured stores "+k.Resource, acknowledged.revisions(), stored(t, l.both[0].etcd, k))
		for _, cp := range l.both {
			var latest states
			eventually(t, cp.name+" lists", func(ctx context.Context) (err error) {
				latest, err = l.list(ctx, cp, k, metav1.ListOptions{})
				return err
			})
			same(t, cp.name+" lists the latest "+k.Resource, acknowledged, latest)
			eventually(t, cp.name+" lists its cache", func(ctx context.Context) error {
				cached, err := l.list(ctx, cp, k, metav1.ListOptions{ResourceVersion: "0"})
				if err != nil {
					return err
				}
				return difference(acknowledged, cached)
			})
			waitForCache(t, cp, k)
		}
		for _, f := range l.followers {
			if f.kind == k {
				eventually(t, f.cp.name+"'s watch of "+k.Resource, func(context.Context) error { return f.hasSeen(t, story) })
			}
		}
	}
}

// list has the load's objects of one kind as an apiserver lists them.
func (l *load) list(ctx context.Context, cp *controlPlane, k kind, options metav1.ListOptions) (states, error) {
	options.LabelSelector = batchKey + "=" + loadBatch
	listed, err := k.of(cp).List(ctx, options)
	if err != nil {
		return nil, err
	}
	found := states{}
	for i := range listed.Items {
		found[listed.Items[i].GetName()] = stateOf(&listed.Items[i])
	}
	return found, nil
}

// stored has the revisions of the load's objects of one kind, read past any apiserver.
func stored(t *testing.T, etcd *clientv3.Client, k kind) map[string]int64 {
	t.Helper()
	prefix := fmt.Sprintf("/registry/%s/%s/", k.Resource, k.namespace)
	found := map[string]int64{}
	eventually(t, "a read of "+prefix, func(ctx context.Context) error {
		answer, err := etcd.Get(ctx, prefix+loadBatch, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			return err
		}
		for _, kv := range answer.Kvs {
			found[string(kv.Key[len(prefix):])] = kv.ModRevision
		}
		return nil
	})
	return found
}

func same[V comparable](t *testing.T, what string, wanted, got map[string]V) {
	t.Helper()
	if err := difference(wanted, got); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// difference names the first object that differs.
func difference[V comparable](wanted, got map[string]V) error {
	names := maps.Clone(wanted)
	maps.Copy(names, got)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		w, wants := wanted[name]
		g, has := got[name]
		if w != g || wants != has {
			return fmt.Errorf("%s is %v (there: %v), acknowledged is %v (there: %v)", name, g, has, w, wants)
		}
	}
	return nil
}
