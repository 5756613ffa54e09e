package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"tenure.dev/tests/harness"
)

// What one of three members answers while the others are gone, be it the one that led them or not, and that all goes on
// when they come back.
func TestQuorumLost(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		for _, led := range []bool{true, false} {
			t.Run(fmt.Sprintf("led=%v", led), func(t *testing.T) {
				t.Parallel()
				quorumLost(t, kind, led)
			})
		}
	})
}

func quorumLost(t *testing.T, kind harness.Kind, led bool) {
	c := harness.StartCluster(t, kind, 3, nil)
	left := leaderAmong(t, c.Members)
	if !led {
		left = without(c.Members, left)[0]
	}
	client := newClient(t, left.Endpoint())
	first := put(t, client, "key", "value").Header.Revision
	grant := answered(t, "grant", func(ctx context.Context) (*clientv3.LeaseGrantResponse, error) { return client.Grant(ctx, 600) })

	watching, cancel := context.WithCancel(context.Background())
	defer cancel()
	open := watchFrom(t, watching, client, first)
	leading := watchFrom(t, clientv3.WithRequireLeader(watching), client, first)

	kept := keptAlive(t, clientv3.WithRequireLeader(testContext(t)), left, grant.ID)

	others := without(c.Members, left)
	id := idOf(t, left)
	for _, m := range others {
		m.Kill()
	}
	// While it still knows of a leader, be it itself: the write is on its way and gets nowhere.
	underway := make(chan error, 1)
	go func() {
		_, err := etcdserverpb.NewKVClient(wireTo(t, left)).Put(testContext(t), &etcdserverpb.PutRequest{Key: []byte("underway")})
		underway <- err
	}()
	await(t, "the last member to know that it has no leader", func() bool {
		status, err := statusOf(t, left)
		return err == nil && status.Leader == 0
	})
	equal(t, "error of a write that was on its way", fmt.Sprint(<-underway), "rpc error: code = Unavailable desc = etcdserver: request timed out")
	leaderless(t, left, id, grant.ID)
	// A client's own get repeats itself until its context ends.
	brief, cancelBrief := context.WithTimeout(context.Background(), time.Second)
	defer cancelBrief()
	if _, err := client.Get(brief, "key"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get of a client: %v", err)
	}
	ended := <-leading
	equal(t, "error of the watch that requires a leader", fmt.Sprint(ended.Err()), noLeader)
	if resp, more := <-leading; more {
		t.Errorf("the watch goes on after its end: %v", resp)
	}
	_, err := kept.Recv()
	equal(t, "error of the stream of keep alives that requires a leader", fmt.Sprint(err), "rpc error: code = Unavailable desc = "+noLeader)
	again := <-client.Watch(clientv3.WithRequireLeader(watching), "key")
	equal(t, "error of a new watch that requires a leader", fmt.Sprint(again.Err()), noLeader)
	select {
	case resp := <-open:
		t.Errorf("the watch that requires no leader: %v", resp)
	default:
	}

	for _, m := range others {
		m.Launch()
	}
	for _, m := range others {
		m.AwaitReady()
	}
	leaderAmong(t, c.Members)
	put(t, newClient(t, others[0].Endpoint()), "key", "after")
	goesOn(t, open)
	after := etcdserverpb.NewLeaseClient(wireTo(t, left))
	answered(t, "keep alive", func(ctx context.Context) (struct{}, error) { return struct{}{}, keepAlive(ctx, after, grant.ID) })
}

// keptAlive opens a stream of keep alives that has brought an answer.
func keptAlive(t *testing.T, ctx context.Context, m *harness.Member, lease clientv3.LeaseID) etcdserverpb.Lease_LeaseKeepAliveClient {
	t.Helper()
	leases := etcdserverpb.NewLeaseClient(wireTo(t, m))
	var stream etcdserverpb.Lease_LeaseKeepAliveClient
	awaitNoError(t, "a stream of keep alives with its first answer", func() (err error) {
		if stream, err = leases.LeaseKeepAlive(ctx); err != nil {
			return err
		}
		_ = stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(lease)})
		_, err = stream.Recv()
		return err
	})
	return stream
}

// watchFrom opens a watch that has brought the value of a revision. While there is no leader, one that requires one ends.
func watchFrom(t *testing.T, ctx context.Context, client *clientv3.Client, revision int64) clientv3.WatchChan {
	t.Helper()
	var watch clientv3.WatchChan
	awaitNoError(t, "a watch with its first event", func() error {
		watch = client.Watch(ctx, "key", clientv3.WithRev(revision))
		resp := <-watch
		if mayPass(resp.Err()) {
			return resp.Err()
		}
		if must(t, resp.Err()); len(resp.Events) == 0 {
			return fmt.Errorf("no event: %v", resp)
		}
		equal(t, "event of a watch", string(resp.Events[0].Kv.Value), "value")
		return nil
	})
	return watch
}

// goesOn checks that a watch brings what is written last. What was asked for meanwhile may have been done before: that
// nobody answered for it is no refusal.
func goesOn(t *testing.T, open clientv3.WatchChan) {
	t.Helper()
	deadline := time.After(hang)
	for {
		select {
		case resp := <-open:
			if len(resp.Events) == 0 {
				t.Errorf("the watch that requires no leader ended: %v", resp)
				return
			}
			if string(resp.Events[len(resp.Events)-1].Kv.Value) == "after" {
				return
			}
		case <-deadline:
			t.Error("the watch that requires no leader brings nothing")
			return
		}
	}
}

// ofDeadline is the error of a call whose client set a deadline, whichever side noticed first that it is over: only the
// words differ.
func ofDeadline(err error) error {
	if status.Code(err) == codes.DeadlineExceeded {
		return status.Error(codes.DeadlineExceeded, "context deadline exceeded")
	}
	return err
}

// wireTo is a connection to a member without what etcd's client does on its own.
func wireTo(t *testing.T, m *harness.Member) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(strings.TrimPrefix(m.Endpoint(), "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// keepAlive asks once for a lease to live on, on a stream of its own. The lease must be there if there is an answer.
func keepAlive(ctx context.Context, leases etcdserverpb.LeaseClient, lease clientv3.LeaseID) error {
	stream, err := leases.LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	defer stream.CloseSend()
	// Why a stream ended is what its reader is told.
	_ = stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(lease)})
	resp, err := stream.Recv()
	if err == nil && resp.TTL == 0 {
		return errors.New("there is no such lease")
	}
	return err
}

// leaderless checks the answers, all asked for at the same time: most take as long as the member waits for a leader.
//
// They are asked for without etcd's client, which hides what the member says: it repeats what is unavailable, and also a
// write that the member gave up by its own deadline. Of such a write the member must know that it is not applied.
func leaderless(t *testing.T, m *harness.Member, id uint64, lease clientv3.LeaseID) {
	t.Helper()
	conn := wireTo(t, m)
	kv, cluster, leases := etcdserverpb.NewKVClient(conn), etcdserverpb.NewClusterClient(conn), etcdserverpb.NewLeaseClient(conn)
	maintenance := etcdserverpb.NewMaintenanceClient(conn)
	ctx := testContext(t)
	leading := clientv3.WithRequireLeader(ctx)
	brief, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	const (
		timedOut  = "rpc error: code = Unavailable desc = etcdserver: request timed out"
		noLeader  = "rpc error: code = Unavailable desc = " + noLeader
		noQuorum  = "rpc error: code = Unavailable desc = " + unhealthy
		notLeader = "rpc error: code = FailedPrecondition desc = " + notLeader
		deadline  = "rpc error: code = DeadlineExceeded desc = context deadline exceeded"
		answered  = "<nil>"
	)
	key := []byte("key")
	calls := []struct {
		what, want string
		call       func() error
	}{
		{"get", timedOut, func() error { _, err := kv.Range(ctx, &etcdserverpb.RangeRequest{Key: key}); return err }},
		{"brief get", deadline, func() error {
			_, err := kv.Range(brief, &etcdserverpb.RangeRequest{Key: key})
			return ofDeadline(err)
		}},
		{"get that requires a leader", noLeader, func() error { _, err := kv.Range(leading, &etcdserverpb.RangeRequest{Key: key}); return err }},
		{"serializable get", answered, func() error {
			resp, err := kv.Range(ctx, &etcdserverpb.RangeRequest{Key: key, Serializable: true})
			if err == nil {
				equal(t, "value", string(resp.Kvs[0].Value), "value")
			}
			return err
		}},
		{"put", deadline, func() error {
			_, err := kv.Put(ctx, &etcdserverpb.PutRequest{Key: key, Value: []byte("maybe")})
			return err
		}},
		{"brief put", deadline, func() error {
			_, err := kv.Put(brief, &etcdserverpb.PutRequest{Key: key, Value: []byte("maybe")})
			return ofDeadline(err)
		}},
		{"txn", deadline, func() error {
			put := &etcdserverpb.RequestOp{Request: &etcdserverpb.RequestOp_RequestPut{RequestPut: &etcdserverpb.PutRequest{Key: key}}}
			_, err := kv.Txn(ctx, &etcdserverpb.TxnRequest{Success: []*etcdserverpb.RequestOp{put}})
			return err
		}},
		{"compaction", deadline, func() error { _, err := kv.Compact(ctx, &etcdserverpb.CompactionRequest{Revision: 1}); return err }},
		{"grant", deadline, func() error { _, err := leases.LeaseGrant(ctx, &etcdserverpb.LeaseGrantRequest{TTL: 60}); return err }},
		{"time to live", noLeader, func() error {
			_, err := leases.LeaseTimeToLive(ctx, &etcdserverpb.LeaseTimeToLiveRequest{ID: int64(lease)})
			return err
		}},
		{"keep alive", noLeader, func() error { return keepAlive(ctx, leases, lease) }},
		{"keep alive that requires a leader", noLeader, func() error { return keepAlive(leading, leases, lease) }},
		{"member add", noQuorum, func() error {
			_, err := cluster.MemberAdd(ctx, &etcdserverpb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
			return err
		}},
		{"member remove", noQuorum, func() error {
			_, err := cluster.MemberRemove(ctx, &etcdserverpb.MemberRemoveRequest{ID: id})
			return err
		}},
		{"member promote", noLeader, func() error {
			_, err := cluster.MemberPromote(ctx, &etcdserverpb.MemberPromoteRequest{ID: id})
			return err
		}},
		// What changes no quorum needs one all the same, and is not given up before its client gives up.
		{"brief member update", deadline, func() error {
			_, err := cluster.MemberUpdate(brief, &etcdserverpb.MemberUpdateRequest{ID: id, PeerURLs: []string{m.PeerURL}})
			return ofDeadline(err)
		}},
		{"member list", timedOut, func() error {
			_, err := cluster.MemberList(ctx, &etcdserverpb.MemberListRequest{Linearizable: true})
			return err
		}},
		{"member list, not linearizable", answered, func() error { _, err := cluster.MemberList(ctx, &etcdserverpb.MemberListRequest{}); return err }},
		{"move leader", notLeader, func() error {
			_, err := maintenance.MoveLeader(ctx, &etcdserverpb.MoveLeaderRequest{TargetID: id})
			return err
		}},
		{"hash", answered, func() error { _, err := maintenance.HashKV(ctx, &etcdserverpb.HashKVRequest{}); return err }},
	}
	var all sync.WaitGroup
	for _, call := range calls {
		all.Go(func() {
			began := time.Now()
			err := call.call()
			refused(t, fmt.Sprintf("%s, answered after %v", call.what, time.Since(began)), err, call.want)
		})
	}
	all.Go(func() {
		status, err := maintenance.Status(ctx, &etcdserverpb.StatusRequest{})
		if err != nil || status.Leader != 0 || fmt.Sprint(status.Errors) != fmt.Sprint([]string{rpctypes.ErrNoLeader.Error()}) {
			t.Errorf("status: leader %x, errors %q, error %v", status.GetLeader(), status.GetErrors(), err)
		}
	})
	all.Wait()
}
