package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/harness"
)

const (
	// unknownID is no member's.
	unknownID = 0x123456789

	unhealthy     = "etcdserver: unhealthy cluster"
	notFound      = "etcdserver: member not found"
	urlTaken      = "etcdserver: Peer URLs already exists"
	notEnough     = "etcdserver: re-configuration failed due to not enough started members"
	notLearner    = "etcdserver: can only promote a learner member"
	notInSync     = "etcdserver: can only promote a learner member which is in sync with leader"
	tooMany       = "etcdserver: too many learner members in cluster"
	badTransferee = "etcdserver: bad leader transferee"
)

// A cluster grows from three to four by a learner, and then loses a follower and the leader.
func TestMembership(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil)
		leader := leaderAmong(t, c.Members)
		client := newClient(t, c.Endpoints("default")...)
		for i := range 20 {
			_, err := client.Put(testContext(t), fmt.Sprint("key", i), "value")
			must(t, err)
		}
		inOrder(t, list(t, client))
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter")

		// What is added is there at once, without a name and client URLs before it starts.
		m := c.NewMember()
		healthy(t, client, leader)
		added, err := client.MemberAddAsLearner(testContext(t), []string{m.PeerURL})
		must(t, err)
		equal(t, "members in the answer", len(added.Members), 4)
		inOrder(t, added.Members)
		equal(t, "added", fmt.Sprintf("%q %q %q %v", added.Member.Name, added.Member.PeerURLs, added.Member.ClientURLs, added.Member.IsLearner),
			fmt.Sprintf("%q %q %q true", "", []string{m.PeerURL}, []string{}))
		notReady(t, client, added.Member.ID, leader)
		// A new member asks any of the others who they all are, which must have heard of it.
		for _, other := range without(c.Members, m) {
			of := newClient(t, other.Endpoint())
			await(t, other.Name+" to know of "+m.Name, func() bool {
				resp, err := of.MemberList(testContext(t), clientv3.WithSerializable())
				must(t, err)
				return slices.ContainsFunc(resp.Members, func(known *etcdserverpb.Member) bool { return known.ID == added.Member.ID })
			})
		}
		m.Join()
		asLearner(t, m)
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter, m4 learner")
		promote(t, client, added.Member.ID)
		_, err = client.MemberPromote(testContext(t), added.Member.ID)
		refused(t, "promotion of a voter", err, notLearner)
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter, m4 voter")

		// A follower goes, then the leader: the others elect a new one. Meanwhile clients of a member that stays write.
		leader = leaderAmong(t, c.Members)
		written := writing(t, newClient(t, m.Endpoint()))
		remove(t, c, without(c.Members, leader, m)[0])
		leaderAmong(t, c.Members)
		remove(t, c, leader)
		leaderAmong(t, c.Members)
		equal(t, "members", len(list(t, newClient(t, c.Endpoints("default")...))), 2)
		acknowledged := written()

		// The member that came last is a whole one, also after a crash.
		last := newClient(t, m.Endpoint())
		resp, err := last.Get(testContext(t), "key", clientv3.WithPrefix(), clientv3.WithCountOnly())
		must(t, err)
		equal(t, "keys", resp.Count, 20)
		resp, err = last.Get(testContext(t), "load", clientv3.WithPrefix(), clientv3.WithCountOnly())
		must(t, err)
		if resp.Count < acknowledged || acknowledged == 0 {
			t.Errorf("%d writes were acknowledged, %d are there", acknowledged, resp.Count)
		}
		_, err = last.Put(testContext(t), "by", "the last")
		must(t, err)
		m.Kill()
		m.Start()
		read, err := newClient(t, m.Endpoint()).Get(testContext(t), "by")
		must(t, err)
		equal(t, "value", string(read.Kvs[0].Value), "the last")
	})
}

// writing puts new keys from several goroutines until the function that it gives is called, which says how many were
// acknowledged.
func writing(t *testing.T, client *clientv3.Client) func() int64 {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	var acknowledged atomic.Int64
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				// One that fails while the leader changes is no matter here.
				if _, err := client.Put(ctx, fmt.Sprintf("load/%d/%d", w, i), ""); err == nil {
					acknowledged.Add(1)
				}
			}
		})
	}
	return func() int64 {
		stop()
		all.Wait()
		return acknowledged.Load()
	}
}

// notReady checks what cannot be done with a learner that never ran, nor beside it.
func notReady(t *testing.T, client *clientv3.Client, id uint64, leader *harness.Member) {
	t.Helper()
	_, err := client.MemberPromote(testContext(t), id)
	refused(t, "promotion of what never ran", err, notInSync)
	_, err = client.MemberAddAsLearner(testContext(t), []string{"http://127.0.0.1:1"})
	refused(t, "second learner", err, tooMany)
	_, err = client.MemberAdd(testContext(t), []string{leader.PeerURL})
	refused(t, "peer URL that is taken", err, urlTaken)
	_, err = newClient(t, leader.Endpoint()).MoveLeader(testContext(t), id)
	refused(t, "leader to a learner", err, badTransferee)
}

// promote makes a learner that runs a voter as soon as it is in sync.
func promote(t *testing.T, client *clientv3.Client, id uint64) {
	t.Helper()
	await(t, "the promotion of the learner", func() bool {
		promoted, err := client.MemberPromote(testContext(t), id)
		if err == nil {
			inOrder(t, promoted.Members)
			return true
		}
		refused(t, "promotion", err, notInSync)
		return t.Failed()
	})
}

// asLearner checks what a learner answers.
func asLearner(t *testing.T, m *harness.Member) {
	t.Helper()
	client, ctx := newClient(t, m.Endpoint()), testContext(t)
	status, err := client.Status(ctx, m.Endpoint())
	must(t, err)
	equal(t, "status is a learner's", status.IsLearner, true)
	for what, call := range map[string]func() error{
		"put":         func() error { _, err := client.Put(ctx, "learner", ""); return err },
		"get":         func() error { _, err := client.Get(ctx, "key0"); return err },
		"grant":       func() error { _, err := client.Grant(ctx, 60); return err },
		"member list": func() error { _, err := client.MemberList(ctx); return err },
		"compaction":  func() error { _, err := client.Compact(ctx, 2); return err },
		"transfer":    func() error { _, err := client.MoveLeader(ctx, 1); return err },
	} {
		refused(t, what+" of a learner", call(), "etcdserver: rpc not supported for learner")
	}
	_, err = client.Get(ctx, "key0", clientv3.WithSerializable())
	must(t, err)
}

// remove takes a member out through the others, and sees it end by itself.
func remove(t *testing.T, c *harness.Cluster, m *harness.Member) {
	t.Helper()
	id := idOf(t, m)
	c.Forget(m)
	client := newClient(t, c.Endpoints("default")...)
	await(t, "a cluster that lets a member go", func() bool {
		removed, err := client.MemberRemove(testContext(t), id)
		if err != nil {
			refused(t, "removal", err, unhealthy)
			return t.Failed()
		}
		inOrder(t, removed.Members)
		if slices.ContainsFunc(removed.Members, func(other *etcdserverpb.Member) bool { return other.ID == id }) {
			t.Errorf("%s is in the answer to its removal", m.Name)
		}
		return true
	})
	if !t.Failed() {
		m.AwaitEnd()
	}
}

// Requests that are refused, and those that change one member.
func TestMembershipRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil)
		leader := leaderAmong(t, c.Members)
		follower := without(c.Members, leader)[0]
		client, ctx := newClient(t, leader.Endpoint()), testContext(t)
		followerID := idOf(t, follower)

		_, err := client.MemberRemove(ctx, unknownID)
		refused(t, "removal of an unknown one", err, notFound)
		_, err = client.MemberUpdate(ctx, unknownID, []string{"http://127.0.0.1:1"})
		refused(t, "update of an unknown one", err, notFound)
		_, err = client.MemberPromote(ctx, unknownID)
		refused(t, "promotion of an unknown one", err, notFound)
		_, err = client.MemberPromote(ctx, followerID)
		refused(t, "promotion of a voter", err, notLearner)
		_, err = client.MemberUpdate(ctx, idOf(t, leader), []string{follower.PeerURL})
		refused(t, "update to a peer URL that is taken", err, urlTaken)
		healthy(t, client, follower)
		wire := etcdserverpb.NewClusterClient(client.ActiveConnection())
		for _, urls := range [][]string{
			nil, {""}, {"nonsense"}, {"127.0.0.1:1"}, {"http://127.0.0.1"}, {"ftp://127.0.0.1:1"}, {"http://127.0.0.1:1/path"},
			{"http://127.0.0.1:1", "http://"},
		} {
			_, err = wire.MemberAdd(ctx, &etcdserverpb.MemberAddRequest{PeerURLs: urls})
			refused(t, fmt.Sprintf("peer URLs %q", urls), err, "rpc error: code = InvalidArgument desc = etcdserver: given member URLs are invalid")
		}

		moved(t, c, client, follower)
		tooFew(t, c, client, leader, follower)
	})
}

// moved gives a follower another address for its peers: all of them hear of it, and it works.
func moved(t *testing.T, c *harness.Cluster, client *clientv3.Client, follower *harness.Member) {
	t.Helper()
	ctx, id, url := testContext(t), idOf(t, follower), follower.AnotherPeerURL()
	updated, err := client.MemberUpdate(ctx, id, []string{follower.PeerURL, url})
	must(t, err)
	inOrder(t, updated.Members)
	_, err = client.MemberUpdate(ctx, id, []string{url})
	must(t, err)
	for _, m := range c.Members {
		of := newClient(t, m.Endpoint())
		await(t, "the new peer URL on "+m.Name, func() bool {
			for _, member := range list(t, of) {
				if member.ID == id {
					return fmt.Sprint(member.PeerURLs) == fmt.Sprint([]string{url})
				}
			}
			return false
		})
	}
	follower.Kill()
	_, err = client.Put(ctx, "while", "away")
	must(t, err)
	follower.Start()
	read, err := newClient(t, follower.Endpoint()).Get(ctx, "while")
	must(t, err)
	equal(t, "keys", len(read.Kvs), 1)
}

// tooFew checks what strict reconfiguration refuses: what would leave fewer than a quorum of members that run.
func tooFew(t *testing.T, c *harness.Cluster, client *clientv3.Client, leader, follower *harness.Member) {
	t.Helper()
	ctx := testContext(t)
	healthy(t, client, leader)
	followerID := idOf(t, follower)
	var unstarted []uint64
	for port := range 2 {
		added, err := client.MemberAdd(ctx, []string{fmt.Sprintf("http://127.0.0.1:%d", port+1)})
		must(t, err)
		unstarted = append(unstarted, added.Member.ID)
	}
	_, err := client.MemberAdd(ctx, []string{"http://127.0.0.1:3"})
	refused(t, "a third that does not run", err, notEnough)
	_, err = client.MemberRemove(ctx, followerID)
	refused(t, "removal of one of three that run", err, notEnough)
	for _, id := range unstarted {
		_, err := client.MemberRemove(ctx, id)
		must(t, err)
	}

	healthy(t, client, leader)
	third := without(c.Members, leader, follower)[0]
	thirdID := idOf(t, third)
	third.Kill()
	await(t, "the leader to miss a member", func() bool { return taken(t, client, leader) == unhealthy })
	_, err = client.MemberAdd(ctx, []string{"http://127.0.0.1:1"})
	refused(t, "a new member while one is down", err, unhealthy)
	_, err = client.MemberRemove(ctx, followerID)
	refused(t, "removal of one of two that are up", err, unhealthy)
	// The one that is down may go.
	c.Forget(third)
	_, err = client.MemberRemove(ctx, thirdID)
	must(t, err)
	equal(t, "members", len(list(t, client)), 2)
}

func TestMoveLeader(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil)
		leader := leaderAmong(t, c.Members)
		for _, to := range without(c.Members, leader) {
			_, err := newClient(t, to.Endpoint()).MoveLeader(testContext(t), idOf(t, to))
			refused(t, "asked of a follower", err, "etcdserver: not leader")
			client := newClient(t, leader.Endpoint())
			_, err = client.MoveLeader(testContext(t), unknownID)
			refused(t, "to nobody", err, badTransferee)
			_, err = client.MoveLeader(testContext(t), idOf(t, leader))
			must(t, err)
			_, err = client.MoveLeader(testContext(t), idOf(t, to))
			must(t, err)
			if now := leaderAmong(t, c.Members); now != to {
				t.Errorf("leader is %s, want %s", now.Name, to.Name)
			}
			leader = to
		}
	})
}

// healthy waits until a member would be taken in, for which the others must have been connected for a while.
func healthy(t *testing.T, client *clientv3.Client, m *harness.Member) {
	t.Helper()
	await(t, "a cluster that takes members in", func() bool { return taken(t, client, m) == urlTaken })
}

// taken is the answer to an addition of what is there already, which changes nothing.
func taken(t *testing.T, client *clientv3.Client, m *harness.Member) string {
	t.Helper()
	_, err := client.MemberAdd(testContext(t), []string{m.PeerURL})
	return fmt.Sprint(err)
}

func list(t testing.TB, client *clientv3.Client) []*etcdserverpb.Member {
	t.Helper()
	resp, err := client.MemberList(testContext(t))
	must(t, err)
	return resp.Members
}

// inOrder checks that members come by their ids.
func inOrder(t testing.TB, members []*etcdserverpb.Member) {
	t.Helper()
	if !slices.IsSortedFunc(members, func(a, b *etcdserverpb.Member) int { return cmp.Compare(a.ID, b.ID) }) {
		t.Errorf("members are not in the order of ids: %v", members)
	}
}

func idOf(t testing.TB, m *harness.Member) uint64 {
	t.Helper()
	var id uint64
	await(t, "the status of "+m.Name, func() bool {
		status, err := statusOf(t, m)
		if err == nil {
			id = status.Header.MemberId
		}
		return err == nil
	})
	return id
}

// shownMembers are the cluster's in the order of their names, after a look at their addresses.
func shownMembers(t testing.TB, c *harness.Cluster, client *clientv3.Client) string {
	t.Helper()
	var members []string
	for _, m := range list(t, client) {
		role := "voter"
		if m.IsLearner {
			role = "learner"
		}
		members = append(members, m.Name+" "+role)
		for _, member := range c.Members {
			if member.Name == m.Name {
				equal(t, "peer URLs of "+m.Name, fmt.Sprint(m.PeerURLs), fmt.Sprint([]string{member.PeerURL}))
				equal(t, "client URLs of "+m.Name, fmt.Sprint(m.ClientURLs), fmt.Sprint([]string{member.Endpoint()}))
			}
		}
	}
	slices.Sort(members)
	return strings.Join(members, ", ")
}
