package client

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/leasing"
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
	session := newSession(t, m, concurrency.WithTTL(5))
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
	watcher := namespace.NewWatcher(m.Watcher, prefix).Watch(testContext(t), "", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	next(t, watcher)
	_, err := kv.Put(testContext(t), "a", "1")
	must(t, err)
	equal(t, "event", texts(collect(t, watcher, 1), ""), "PUT a=1")
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
