package client

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
)

// What programs build on etcd with its own recipes.
func TestRecipes(t *testing.T) {
	concurrentCasesOnBoth(t, nil, []caseOn{
		{"mutex", recipeMutex},
		{"try-lock", recipeTryLock},
		{"election", recipeElection},
		{"stm", recipeSTM},
		{"session", recipeSession},
		{"namespace", recipeNamespace},
		{"ordering", recipeOrdering},
		{"leasing", recipeLeasing},
		{"mirror", recipeMirror},
		{"kubernetes", recipeKubernetes},
	})
}

func newSession(t *testing.T, m *member, opts ...concurrency.SessionOption) *concurrency.Session {
	t.Helper()
	session, err := concurrency.NewSession(m.Client, opts...)
	must(t, err)
	return session
}

// Several holders add one to a number, reading and writing it apart; only a lock keeps every one.
func recipeMutex(t *testing.T, m *member, prefix string) {
	const holders, rounds = 8, 5
	m.put(t, prefix+"n", "0")
	var group sync.WaitGroup
	for range holders {
		session := newSession(t, m)
		group.Go(func() {
			mutex := concurrency.NewMutex(session, prefix+"lock")
			for range rounds {
				if err := mutex.Lock(testContext(t)); err != nil {
					t.Error(err)
					return
				}
				resp, err := m.Get(testContext(t), prefix+"n")
				if err == nil {
					n, _ := strconv.Atoi(string(resp.Kvs[0].Value))
					_, err = m.Put(testContext(t), prefix+"n", strconv.Itoa(n+1))
				}
				if err := errors.Join(err, mutex.Unlock(testContext(t))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	equal(t, "n", string(only(m.get(t, prefix+"n").Kvs).Value), strconv.Itoa(holders*rounds))
}

func recipeTryLock(t *testing.T, m *member, prefix string) {
	first := concurrency.NewMutex(newSession(t, m), prefix)
	second := concurrency.NewMutex(newSession(t, m), prefix)
	must(t, first.TryLock(testContext(t)))
	refused(t, second.TryLock(testContext(t)), concurrency.ErrLocked)
	must(t, first.Unlock(testContext(t)))
	must(t, second.TryLock(testContext(t)))
}

func recipeElection(t *testing.T, m *member, prefix string) {
	firstSession := newSession(t, m)
	first := concurrency.NewElection(firstSession, prefix)
	second := concurrency.NewElection(newSession(t, m), prefix)
	must(t, first.Campaign(testContext(t), "first"))
	observed := second.Observe(testContext(t))
	equal(t, "observed", string((<-observed).Kvs[0].Value), "first")
	elected := make(chan error, 1)
	go func() { elected <- second.Campaign(testContext(t), "second") }()
	must(t, first.Proclaim(testContext(t), "still first"))
	leader, err := second.Leader(testContext(t))
	must(t, err)
	equal(t, "leader", string(leader.Kvs[0].Value), "still first")
	// A leader whose session ends makes way.
	must(t, firstSession.Close())
	must(t, <-elected)
	for response := range observed {
		if string(response.Kvs[0].Value) == "second" {
			break
		}
	}
	must(t, second.Resign(testContext(t)))
	_, err = second.Leader(testContext(t))
	refused(t, err, concurrency.ErrElectionNoLeader)
}

// Transfers between accounts at once; no amount is lost or made.
func recipeSTM(t *testing.T, m *member, prefix string) {
	const accounts, workers, transfers = 5, 6, 20
	account := func(i int) string { return prefix + strconv.Itoa(i) }
	for i := range accounts {
		m.put(t, account(i), "100")
	}
	var group sync.WaitGroup
	for worker := range workers {
		group.Go(func() {
			random := newRandom(uint64(worker))
			for range transfers {
				from, to := account(random.IntN(accounts)), account(random.IntN(accounts))
				_, err := concurrency.NewSTM(m.Client, func(stm concurrency.STM) error {
					if from == to {
						return nil
					}
					a, _ := strconv.Atoi(stm.Get(from))
					b, _ := strconv.Atoi(stm.Get(to))
					stm.Put(from, strconv.Itoa(a-1))
					stm.Put(to, strconv.Itoa(b+1))
					return nil
				}, concurrency.WithIsolation(concurrency.Serializable))
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	sum := 0
	for _, kv := range m.get(t, prefix, clientv3.WithPrefix()).Kvs {
		n, err := strconv.Atoi(string(kv.Value))
		must(t, err)
		sum += n
	}
	equal(t, "sum", sum, accounts*100)
}

func recipeSession(t *testing.T, m *member, prefix string) {
	session := newSession(t, m, concurrency.WithTTL(15))
	m.put(t, prefix+"a", "1", clientv3.WithLease(session.Lease()))
	_, err := m.Revoke(testContext(t), session.Lease())
	must(t, err)
	select {
	case <-session.Done():
	case <-testContext(t).Done():
		t.Error("the session outlives its lease")
	}
	equal(t, "key", m.get(t, prefix+"a").Count, 0)
}

func recipeNamespace(t *testing.T, m *member, prefix string) {
	kv := namespace.NewKV(m.KV, prefix)
	w := watchWith(t, testContext(t), namespace.NewWatcher(m.Watcher, prefix), "", clientv3.WithPrefix())
	put, err := kv.Put(testContext(t), "a", "1")
	must(t, err)
	equal(t, "event", shownEvents(w.events(t, 1), "", put.Header.Revision), "PUT a@0")
	resp, err := kv.Get(testContext(t), "\x00", clientv3.WithFromKey())
	must(t, err)
	equal(t, "keys", keys(resp.Kvs, ""), "a")
	equal(t, "outside", keys(m.get(t, prefix, clientv3.WithPrefix()).Kvs, prefix), "a")
}

func recipeOrdering(t *testing.T, m *member, prefix string) {
	violated := errors.New("read from the past")
	kv := ordering.NewKV(m.KV, func(clientv3.Op, clientv3.OpResponse, int64) error { return violated })
	m.put(t, prefix+"a", "1")
	for range 10 {
		_, err := kv.Get(testContext(t), prefix+"a", clientv3.WithSerializable())
		must(t, err)
		m.put(t, prefix+"a", "2")
		_, err = kv.Get(testContext(t), prefix+"a")
		must(t, err)
	}
}

// A key cached by one owner is written by another, who must be obeyed.
func recipeLeasing(t *testing.T, m *member, prefix string) {
	first, closeFirst, err := leasing.NewKV(m.Client, prefix+"lease/")
	must(t, err)
	defer closeFirst()
	second, closeSecond, err := leasing.NewKV(m.Client, prefix+"lease/")
	must(t, err)
	defer closeSecond()
	key := prefix + "a"
	for i := range 5 {
		value := strconv.Itoa(i)
		_, err := second.Put(context.Background(), key, value)
		must(t, err)
		resp, err := first.Get(context.Background(), key)
		must(t, err)
		equal(t, "value", string(only(resp.Kvs).Value), value)
	}
}

// A copy is what is there at one revision and then every event behind it.
func recipeMirror(t *testing.T, m *member, prefix string) {
	const keysAtStart = 1200 // more than one page of the mirror
	for i := range keysAtStart {
		m.put(t, prefix+strconv.Itoa(i), "v")
	}
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	syncer := mirror.NewSyncer(m.Client, prefix, 0)
	pages, errs := syncer.SyncBase(ctx)
	copied := map[string]string{}
	for page := range pages {
		for _, kv := range page.Kvs {
			copied[string(kv.Key)] = string(kv.Value)
		}
	}
	must(t, <-errs)
	equal(t, "keys at the start", len(copied), keysAtStart)
	m.delete(t, prefix+"1")
	m.put(t, prefix+"2", "new")
	last := m.put(t, prefix+"last", "v")
	updates := &watching{responses: syncer.SyncUpdates(ctx)}
	for done := false; !done; {
		for _, event := range updates.next(t).Events {
			if event.Type == clientv3.EventTypeDelete {
				delete(copied, string(event.Kv.Key))
			} else {
				copied[string(event.Kv.Key)] = string(event.Kv.Value)
			}
			done = event.Kv.ModRevision == last
		}
	}
	original := m.get(t, prefix, clientv3.WithPrefix())
	equal(t, "keys at the end", int64(len(copied)), original.Count)
	for _, kv := range original.Kvs {
		equal(t, string(kv.Key), copied[string(kv.Key)], string(kv.Value))
	}
}

// The client that kube-apiserver uses: writes that hold only if nothing was written in between, and pages at one revision.
func recipeKubernetes(t *testing.T, m *member, prefix string) {
	client := kubernetes.Client{Client: m.Client}
	ctx, key := testContext(t), prefix+"a"
	created, err := client.OptimisticPut(ctx, key, []byte("1"), 0, kubernetes.PutOptions{})
	must(t, err)
	equal(t, "created", created.Succeeded, true)
	again, err := client.OptimisticPut(ctx, key, []byte("2"), 0, kubernetes.PutOptions{GetOnFailure: true})
	must(t, err)
	equal(t, "created again", again.Succeeded, false)
	equal(t, "what is there", again.KV.ModRevision, created.Revision)
	lease := m.grant(t, 600)
	updated, err := client.OptimisticPut(ctx, key, []byte("2"), created.Revision, kubernetes.PutOptions{LeaseID: lease})
	must(t, err)
	equal(t, "updated", updated.Succeeded, true)
	got, err := client.Get(ctx, key, kubernetes.GetOptions{Revision: created.Revision})
	must(t, err)
	equal(t, "past", string(got.KV.Value), "1")
	for _, name := range []string{"b", "c"} {
		_, err := client.OptimisticPut(ctx, prefix+name, []byte("1"), 0, kubernetes.PutOptions{})
		must(t, err)
	}
	count, err := client.Count(ctx, prefix, kubernetes.CountOptions{})
	must(t, err)
	equal(t, "count", count, 3)
	page, err := client.List(ctx, prefix, kubernetes.ListOptions{Limit: 2})
	must(t, err)
	equal(t, "first page", keys(page.Kvs, prefix), "a b")
	equal(t, "count with a limit", page.Count, 3)
	m.delete(t, prefix+"c")
	rest, err := client.List(ctx, prefix, kubernetes.ListOptions{Continue: prefix + "b\x00", Revision: page.Revision})
	must(t, err)
	equal(t, "second page", keys(rest.Kvs, prefix), "c")
	stale, err := client.OptimisticDelete(ctx, key, created.Revision, kubernetes.DeleteOptions{GetOnFailure: true})
	must(t, err)
	equal(t, "stale delete", stale.Succeeded, false)
	equal(t, "what is there", stale.KV.Lease, int64(lease))
	deleted, err := client.OptimisticDelete(ctx, key, updated.Revision, kubernetes.DeleteOptions{})
	must(t, err)
	equal(t, "delete", deleted.Succeeded, true)
	equal(t, "left", m.get(t, key).Count, 0)
}
