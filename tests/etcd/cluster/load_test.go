package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"tenure.dev/tests/etcd/history"
	"tenure.dev/tests/harness"
)

const (
	// pace is how long a client rests between its operations: the load is not to measure anything.
	pace = 50 * time.Millisecond
	// patience is for clients that a fault may leave without an answer.
	patience = 2 * time.Second
	pods     = "/registry/pods/"
	podsEnd  = "/registry/pods0"
	podCount = 30
	registry = "/registry/"
	theEnd   = "/registry0"
)

// load is what the clients of one tenant do and see.
type load struct {
	*history.History
	t       testing.TB
	cluster *harness.Cluster
	tenant  string
	// perMember are clients of one member each; shared ones know all members.
	perMember []*clientv3.Client
	// members are names by member id.
	members map[uint64]*harness.Member
	options

	ctx      context.Context
	stop     context.CancelFunc
	running  sync.WaitGroup
	watchers []*watcher
	watching sync.WaitGroup
	leases   []*lease
	// done counts the writes that were acknowledged.
	done atomic.Int64
	// compacted is the revision of the last compaction that was acknowledged.
	compacted atomic.Int64
	// failures are errors of the clients that know all members.
	mu       sync.Mutex
	failures []string
}

// options of a load.
type options struct {
	// pinned says that each member has a client that knows no other.
	pinned bool
	// patience is how long a client waits for an answer before it goes on without.
	patience time.Duration
	// losesLeases says that leases may end that are kept alive.
	losesLeases bool
	// dial are options of all clients' connections.
	dial []grpc.DialOption
}

// startLoad begins with clients that know all members, and those of options. Watches are of both kinds always.
func startLoad(t testing.TB, c *harness.Cluster, tenant string, seed uint64, options options) *load {
	t.Helper()
	l := &load{
		History:   history.New(),
		t:         t,
		cluster:   c,
		tenant:    tenant,
		perMember: each(t, c, tenant, options.dial...),
		members:   map[uint64]*harness.Member{},
		options:   options,
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	t.Cleanup(l.stop)
	for i, client := range l.perMember {
		status := answered(t, "status", func(ctx context.Context) (*clientv3.StatusResponse, error) {
			return client.Status(ctx, client.Endpoints()[0])
		})
		l.members[status.Header.MemberId] = c.Members[i]
	}
	l.startWatchers()
	l.startLeases()
	const workers = 5
	shared := workers
	if options.pinned {
		shared = 2
	}
	for i := range shared {
		l.startWorker(fmt.Sprintf("shared%d", i), dialled(t, c.Endpoints(tenant), options.dial...), seed, true)
	}
	if options.pinned {
		for i, client := range l.perMember {
			l.startWorker("only-"+c.Members[i].Name, client, seed, false)
		}
	}
	l.running.Go(l.compact)
	return l
}

// worker is one client: it knows of each key what it saw last, as a kube-apiserver's cache does.
type worker struct {
	*load
	name   string
	client *clientv3.Client
	random *rand.Rand
	known  map[string]int64
	puts   int
	// strict records every error as a failure.
	strict bool
}

func (l *load) startWorker(name string, client *clientv3.Client, seed uint64, strict bool) {
	var stream uint64
	for _, r := range l.tenant + name {
		stream = stream*31 + uint64(r)
	}
	w := &worker{load: l, name: name, client: client, known: map[string]int64{}, strict: strict}
	w.random = rand.New(rand.NewPCG(seed, stream))
	l.running.Go(func() {
		for l.ctx.Err() == nil {
			w.step()
			select {
			case <-time.After(pace/2 + time.Duration(w.random.Int64N(int64(pace)))):
			case <-l.ctx.Done():
			}
		}
	})
}

// finish ends the clients; the watches and leases go on.
func (l *load) finish() {
	l.stop()
	l.running.Wait()
}

func (w *worker) value() string {
	w.puts++
	return fmt.Sprintf("%s-%s-%d", w.tenant, w.name, w.puts)
}

// step is one operation.
func (w *worker) step() {
	key := fmt.Sprintf("%s%02d", pods, w.random.IntN(podCount))
	known := &history.Compare{Key: key, Mod: w.known[key]}
	switch n := w.random.IntN(100); {
	case n < 35:
		w.write(known, history.Change{Key: key, Value: w.value()})
	case n < 43:
		w.write(known, history.Change{Key: key, Delete: true})
	case n < 48:
		w.write(nil, history.Change{Key: key, Value: w.value()})
	case n < 51:
		w.write(nil, history.Change{Key: key, Delete: true})
	case n < 56:
		event := fmt.Sprintf("/registry/events/%d", w.random.IntN(podCount))
		w.write(known, history.Change{Key: key, Value: w.value()}, history.Change{Key: event, Value: w.value()})
	case n < 66:
		w.read(history.Op{Key: key})
	case n < 76:
		w.read(history.Op{Key: key, Serializable: true})
	case n < 84:
		w.read(history.Op{Key: pods, End: podsEnd})
	case n < 91:
		w.read(history.Op{Key: pods, End: podsEnd, Serializable: true})
	case n < 94:
		w.read(history.Op{Key: registry, End: theEnd, CountOnly: true})
	case n < 97:
		w.read(history.Op{Key: pods, End: podsEnd, Limit: 7})
	default:
		// What a list goes on at, page after page.
		w.read(history.Op{Key: pods, End: podsEnd, At: w.known[key]})
	}
}

func (w *worker) write(compare *history.Compare, changes ...history.Change) {
	op := &history.Op{Client: w.name, Kind: history.Write, Compare: compare, Changes: changes}
	w.record(op, func(ctx context.Context) (*etcdserverpb.ResponseHeader, error) { return w.send(ctx, w.client, op) })
	w.learn(op)
}

// send makes a plain put or delete of a write without a condition and of one change, else a txn.
func (l *load) send(ctx context.Context, client *clientv3.Client, op *history.Op) (*etcdserverpb.ResponseHeader, error) {
	var changes []clientv3.Op
	for _, c := range op.Changes {
		if c.Delete {
			changes = append(changes, clientv3.OpDelete(c.Key))
		} else {
			changes = append(changes, clientv3.OpPut(c.Key, c.Value, clientv3.WithLease(clientv3.LeaseID(c.Lease))))
		}
	}
	if op.Compare == nil && len(changes) == 1 {
		resp, err := client.Do(ctx, changes[0])
		if err != nil {
			return nil, err
		}
		op.Succeeded = true
		if deleted := resp.Del(); deleted != nil {
			op.Deleted = deleted.Deleted
			return deleted.Header, nil
		}
		return resp.Put().Header, nil
	}
	txn := client.Txn(ctx)
	if op.Compare != nil {
		txn = txn.If(clientv3.Compare(clientv3.ModRevision(op.Compare.Key), "=", op.Compare.Mod))
	}
	txn = txn.Then(changes...)
	if op.Compare != nil {
		txn = txn.Else(clientv3.OpGet(op.Compare.Key))
	}
	resp, err := txn.Commit()
	if err != nil {
		return nil, err
	}
	op.Succeeded = resp.Succeeded
	for _, r := range resp.Responses {
		op.Deleted += r.GetResponseDeleteRange().GetDeleted()
		op.KVs = append(op.KVs, kvs(r.GetResponseRange().GetKvs())...)
	}
	return resp.Header, nil
}

func (w *worker) read(op history.Op) {
	op.Client, op.Kind = w.name, history.Read
	var opts []clientv3.OpOption
	if op.End != "" {
		opts = append(opts, clientv3.WithRange(op.End))
	}
	if op.Serializable {
		opts = append(opts, clientv3.WithSerializable())
	}
	if op.CountOnly {
		opts = append(opts, clientv3.WithCountOnly())
	}
	opts = append(opts, clientv3.WithLimit(op.Limit), clientv3.WithRev(op.At))
	w.record(&op, func(ctx context.Context) (*etcdserverpb.ResponseHeader, error) {
		resp, err := w.client.Get(ctx, op.Key, opts...)
		if err != nil {
			return nil, err
		}
		op.KVs, op.Count, op.More = kvs(resp.Kvs), resp.Count, resp.More
		return resp.Header, nil
	})
	w.learn(&op)
}

// learn keeps what an answer says of keys.
func (w *worker) learn(op *history.Op) {
	if op.Outcome != history.OK || op.At != 0 {
		return
	}
	if op.Kind == history.Write && op.Succeeded {
		for _, c := range op.Changes {
			w.known[c.Key] = op.Revision
			if c.Delete {
				w.known[c.Key] = 0
			}
		}
	} else if op.End == "" && len(op.KVs) == 0 && op.Compare != nil {
		w.known[op.Compare.Key] = 0
	}
	for _, kv := range op.KVs {
		w.known[kv.Key] = kv.Mod
	}
}

// record makes a call and adds it to the history.
func (w *worker) record(op *history.Op, call func(context.Context) (*etcdserverpb.ResponseHeader, error)) {
	err := w.load.record(op, call)
	if err != nil && w.strict && !errors.Is(err, rpctypes.ErrCompacted) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.failures = append(w.failures, op.String())
	}
}

func (l *load) record(op *history.Op, call func(context.Context) (*etcdserverpb.ResponseHeader, error)) error {
	runs := map[uint64]int64{}
	for id, m := range l.members {
		runs[id] = m.Run()
	}
	// Not the load's own context: its end is no reason to know less of what was asked.
	ctx, cancel := context.WithTimeout(context.Background(), l.patience)
	defer cancel()
	op.Call = l.Now()
	header, err := call(ctx)
	op.Return = l.Now()
	switch {
	case err == nil:
		op.Revision = header.Revision
		// What a member shows must only get newer while it is one process.
		if m := l.members[header.MemberId]; m == nil {
			l.t.Errorf("answered by member %x, which nobody knows: %v", header.MemberId, op)
		} else if run := m.Run(); run == runs[header.MemberId] {
			op.Member = fmt.Sprintf("%s#%d", m.Name, run)
		}
		if op.Kind == history.Write {
			l.done.Add(1)
		}
	case refusal(err):
		op.Outcome, op.Error = history.Failed, err.Error()
	default:
		op.Outcome, op.Error = history.Unknown, err.Error()
	}
	l.Add(op)
	return err
}

// refusal says whether an error means that nothing was or will be applied. Only a few say so.
func refusal(err error) bool {
	for _, known := range []error{
		rpctypes.ErrCompacted, rpctypes.ErrFutureRev, rpctypes.ErrLeaseNotFound, rpctypes.ErrTooManyRequests, rpctypes.ErrNoSpace,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	return false
}

func kvs(from []*mvccpb.KeyValue) []history.KV {
	var kvs []history.KV
	for _, kv := range from {
		kvs = append(kvs, *keyValue(kv))
	}
	return kvs
}

func keyValue(kv *mvccpb.KeyValue) *history.KV {
	return &history.KV{
		Key: string(kv.Key), Value: string(kv.Value),
		Create: kv.CreateRevision, Mod: kv.ModRevision, Version: kv.Version, Lease: kv.Lease,
	}
}

// compact forgets, now and then, most of what every watch of all keys has brought.
func (l *load) compact() {
	const kept = 30
	for l.ctx.Err() == nil {
		select {
		case <-time.After(pace):
		case <-l.ctx.Done():
			return
		}
		brought := l.broughtByAll() - kept
		if brought < l.compacted.Load()+2*kept {
			continue
		}
		op := &history.Op{Client: "compactor", Kind: history.Compact, At: brought}
		err := l.record(op, func(ctx context.Context) (*etcdserverpb.ResponseHeader, error) {
			resp, err := l.perMember[brought%int64(len(l.perMember))].Compact(ctx, brought)
			if err != nil {
				return nil, err
			}
			return resp.Header, nil
		})
		if err == nil {
			l.compacted.Store(brought)
		}
	}
}
