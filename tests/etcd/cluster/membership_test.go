package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tenure.dev/tests/harness"
)

const (
	// unknownID is no member's.
	unknownID = 0x123456789

	unhealthy     = "etcdserver: unhealthy cluster"
	noLeader      = "etcdserver: no leader"
	notLeader     = "etcdserver: not leader"
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
		c := harness.StartCluster(t, kind, 3, nil, calm...)
		leaderAmong(t, c.Members)
		client := newClient(t, c.Endpoints("default")...)
		for i := range 20 {
			put(t, client, fmt.Sprint("key", i), "value")
		}
		inOrder(t, list(t, client))
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter")

		// What is added is there at once, without a name and client URLs before it starts.
		healthy(t, c.Members, c.Members[0])
		m := c.NewMember()
		added := add(t, client, m.PeerURL, client.MemberAddAsLearner)
		equal(t, "members in the answer", len(added.Members), 4)
		inOrder(t, added.Members)
		equal(t, "added", fmt.Sprintf("%q %q %q %v", added.Member.Name, added.Member.PeerURLs, added.Member.ClientURLs, added.Member.IsLearner),
			fmt.Sprintf("%q %q %q true", "", []string{m.PeerURL}, []string{}))
		notReady(t, without(c.Members, m), client, added.Member.ID)
		// A new member asks any of the others who they all are, which must have heard of it.
		for _, other := range without(c.Members, m) {
			of := newClient(t, other.Endpoint())
			await(t, other.Name+" to know of "+m.Name, func() bool {
				resp := answered(t, "member list of "+other.Name, func(ctx context.Context) (*clientv3.MemberListResponse, error) {
					return of.MemberList(ctx, clientv3.WithSerializable())
				})
				return slices.ContainsFunc(resp.Members, func(known *etcdserverpb.Member) bool { return known.ID == added.Member.ID })
			})
		}
		m.Join()
		asLearner(t, m)
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter, m4 learner")
		promote(t, client, added.Member.ID)
		refusedAtLast(t, "promotion of a voter", notLearner, func(ctx context.Context) error {
			_, err := client.MemberPromote(ctx, added.Member.ID)
			return err
		})
		equal(t, "members", shownMembers(t, c, client), "m1 voter, m2 voter, m3 voter, m4 voter")

		// A follower goes, then the leader: the others elect a new one. Meanwhile clients of a member that stays write.
		leader := leaderAmong(t, c.Members)
		written := writing(t, newClient(t, m.Endpoint()))
		remove(t, c, without(c.Members, leader, m)[0])
		leaderAmong(t, c.Members)
		remove(t, c, leader)
		leaderAmong(t, c.Members)
		equal(t, "members", len(list(t, newClient(t, c.Endpoints("default")...))), 2)
		acknowledged := written()

		// The member that came last is a whole one, also after a crash.
		last := newClient(t, m.Endpoint())
		equal(t, "keys", get(t, last, "key", clientv3.WithPrefix(), clientv3.WithCountOnly()).Count, 20)
		resp := get(t, last, "load", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if resp.Count < acknowledged || acknowledged == 0 {
			t.Errorf("%d writes were acknowledged, %d are there", acknowledged, resp.Count)
		}
		put(t, last, "by", "the last")
		m.Kill()
		m.Start()
		equal(t, "value", string(get(t, newClient(t, m.Endpoint()), "by").Kvs[0].Value), "the last")
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
func notReady(t *testing.T, voters []*harness.Member, client *clientv3.Client, id uint64) {
	t.Helper()
	refusedAtLast(t, "promotion of what never ran", notInSync, func(ctx context.Context) error {
		_, err := client.MemberPromote(ctx, id)
		return err
	})
	refusedAtLast(t, "second learner", tooMany, func(ctx context.Context) error {
		_, err := client.MemberAddAsLearner(ctx, []string{"http://127.0.0.1:1"})
		return err
	})
	refusedAtLast(t, "peer URL that is taken", urlTaken, func(ctx context.Context) error {
		_, err := client.MemberAdd(ctx, []string{voters[0].PeerURL})
		return err
	})
	refusedWhileLed(t, "leader to a learner", badTransferee, voters, func(ctx context.Context, leader *harness.Member) error {
		_, err := newClient(t, leader.Endpoint()).MoveLeader(ctx, id)
		return err
	})
}

// add makes a new member, or finds it made by a call of which nobody knew what came of it.
func add(t *testing.T, client *clientv3.Client, url string, call func(context.Context, []string) (*clientv3.MemberAddResponse, error)) *clientv3.MemberAddResponse {
	t.Helper()
	added, doubtful, err := settled(t, "the addition of "+url, func(ctx context.Context) (*clientv3.MemberAddResponse, error) {
		return call(ctx, []string{url})
	})
	if err != nil && doubtful {
		members := list(t, client)
		is := func(m *etcdserverpb.Member) bool { return slices.Contains(m.PeerURLs, url) }
		if i := slices.IndexFunc(members, is); i >= 0 {
			return &clientv3.MemberAddResponse{Member: members[i], Members: members}
		}
	}
	if err != nil {
		t.Fatalf("addition of %s: %v", url, err)
	}
	return added
}

// removed takes a member out and gives those that are left. It may have been taken out by a call of which nobody knew that.
func removed(t *testing.T, client *clientv3.Client, id uint64) []*etcdserverpb.Member {
	t.Helper()
	answer, doubtful, err := settled(t, fmt.Sprintf("the removal of %x", id), func(ctx context.Context) (*clientv3.MemberRemoveResponse, error) {
		return client.MemberRemove(ctx, id)
	})
	var left []*etcdserverpb.Member
	switch {
	case err == nil:
		left = answer.Members
	case doubtful && fmt.Sprint(err) == notFound:
		left = list(t, client)
	default:
		t.Fatalf("removal of %x: %v", id, err)
	}
	inOrder(t, left)
	if slices.ContainsFunc(left, func(m *etcdserverpb.Member) bool { return m.ID == id }) {
		t.Errorf("%x is among those that its removal leaves: %v", id, left)
	}
	return left
}

// promote makes a learner that runs a voter as soon as it is in sync.
func promote(t *testing.T, client *clientv3.Client, id uint64) {
	t.Helper()
	await(t, "the promotion of the learner", func() bool {
		promoted, doubtful, err := settled(t, "the promotion", func(ctx context.Context) (*clientv3.MemberPromoteResponse, error) {
			return client.MemberPromote(ctx, id)
		})
		switch {
		case err == nil:
			inOrder(t, promoted.Members)
			return true
		case doubtful && fmt.Sprint(err) == notLearner:
			return true
		}
		refused(t, "promotion", err, notInSync)
		return t.Failed()
	})
}

// asLearner checks what a learner answers.
func asLearner(t *testing.T, m *harness.Member) {
	t.Helper()
	client := newClient(t, m.Endpoint())
	status := answered(t, "the status of a learner", func(ctx context.Context) (*clientv3.StatusResponse, error) {
		return client.Status(ctx, m.Endpoint())
	})
	equal(t, "status is a learner's", status.IsLearner, true)
	for what, call := range map[string]func(ctx context.Context) error{
		"put":         func(ctx context.Context) error { _, err := client.Put(ctx, "learner", ""); return err },
		"get":         func(ctx context.Context) error { _, err := client.Get(ctx, "key0"); return err },
		"grant":       func(ctx context.Context) error { _, err := client.Grant(ctx, 60); return err },
		"member list": func(ctx context.Context) error { _, err := client.MemberList(ctx); return err },
		"compaction":  func(ctx context.Context) error { _, err := client.Compact(ctx, 2); return err },
		"transfer":    func(ctx context.Context) error { _, err := client.MoveLeader(ctx, 1); return err },
	} {
		refusedAtLast(t, what+" of a learner", "etcdserver: rpc not supported for learner", call)
	}
	get(t, client, "key0", clientv3.WithSerializable())
}

// remove takes a member out through the others, and sees it end by itself.
func remove(t *testing.T, c *harness.Cluster, m *harness.Member) {
	t.Helper()
	id := idOf(t, m)
	healthy(t, c.Members, c.Members[0])
	c.Forget(m)
	removed(t, newClient(t, c.Endpoints("default")...), id)
	m.AwaitEnd()
}

// Requests that are refused, and those that change one member.
func TestMembershipRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil, calm...)
		leader := leaderAmong(t, c.Members)
		followers := without(c.Members, leader)
		follower, third := followers[0], followers[1]
		client := newClient(t, leader.Endpoint())
		followerID, leaderID := idOf(t, follower), idOf(t, leader)

		for _, of := range []struct {
			what, want string
			call       func(ctx context.Context) error
		}{
			{"removal of an unknown one", notFound, func(ctx context.Context) error { _, err := client.MemberRemove(ctx, unknownID); return err }},
			{"update of an unknown one", notFound, func(ctx context.Context) error {
				_, err := client.MemberUpdate(ctx, unknownID, []string{"http://127.0.0.1:1"})
				return err
			}},
			{"promotion of an unknown one", notFound, func(ctx context.Context) error { _, err := client.MemberPromote(ctx, unknownID); return err }},
			{"promotion of a voter", notLearner, func(ctx context.Context) error {
				_, err := client.MemberPromote(ctx, followerID)
				if fmt.Sprint(err) == notInSync {
					// The first thing that either looks at, and a voter of a new cluster may be behind for a moment.
					return status.Error(codes.Unavailable, notInSync)
				}
				return err
			}},
		} {
			refusedAtLast(t, of.what, of.want, of.call)
		}
		healthy(t, c.Members, leader)
		wire := etcdserverpb.NewClusterClient(client.ActiveConnection())
		for _, urls := range [][]string{
			nil, {""}, {"nonsense"}, {"127.0.0.1:1"}, {"http://127.0.0.1"}, {"ftp://127.0.0.1:1"}, {"http://127.0.0.1:1/path"},
			{"http://127.0.0.1:1", "http://"},
		} {
			const want = "rpc error: code = InvalidArgument desc = etcdserver: given member URLs are invalid"
			refusedAtLast(t, fmt.Sprintf("peer URLs %q", urls), want, func(ctx context.Context) error {
				_, err := wire.MemberAdd(ctx, &etcdserverpb.MemberAddRequest{PeerURLs: urls})
				return err
			})
		}

		moved(t, c, client, follower)
		// Not before: etcd does what it refused when the follower starts, which then looks for the leader at this URL.
		refusedAtLast(t, "update to a peer URL that is taken", urlTaken, func(ctx context.Context) error {
			_, err := client.MemberUpdate(ctx, leaderID, []string{third.PeerURL})
			return err
		})
		tooFew(t, c, client, leader, follower, third)
	})
}

// moved gives a follower another address for its peers: all of them hear of it, and it works.
func moved(t *testing.T, c *harness.Cluster, client *clientv3.Client, follower *harness.Member) {
	t.Helper()
	id, url := idOf(t, follower), follower.AnotherPeerURL()
	for _, urls := range [][]string{{follower.PeerURL, url}, {url}} {
		updated := answered(t, fmt.Sprintf("the update to %q", urls), func(ctx context.Context) (*clientv3.MemberUpdateResponse, error) {
			return client.MemberUpdate(ctx, id, urls)
		})
		inOrder(t, updated.Members)
	}
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
	put(t, client, "while", "away")
	follower.Start()
	equal(t, "keys", len(get(t, newClient(t, follower.Endpoint()), "while").Kvs), 1)
}

// tooFew checks what strict reconfiguration refuses: what would leave fewer than a quorum of members that run.
func tooFew(t *testing.T, c *harness.Cluster, client *clientv3.Client, leader, follower, third *harness.Member) {
	t.Helper()
	adding := func(port int) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			_, err := client.MemberAdd(ctx, []string{fmt.Sprintf("http://127.0.0.1:%d", port)})
			return err
		}
	}
	followerID := idOf(t, follower)
	removing := func(ctx context.Context) error { _, err := client.MemberRemove(ctx, followerID); return err }
	thirdID := idOf(t, third)

	healthy(t, c.Members, leader)
	var unstarted []uint64
	for port := range 2 {
		unstarted = append(unstarted, add(t, client, fmt.Sprintf("http://127.0.0.1:%d", port+1), client.MemberAdd).Member.ID)
	}
	refusedAtLast(t, "a third that does not run", notEnough, adding(3))
	refusedAtLast(t, "removal of one of three that run", notEnough, removing)
	for _, id := range unstarted {
		removed(t, client, id)
	}

	// What is acknowledged counts from now on: of three members one may be lost.
	third.Kill()
	await(t, "the leader to miss a member", func() bool { return taken(client, leader.PeerURL) == unhealthy })
	refusedAtLast(t, "a new member while one is down", unhealthy, adding(1))
	refusedAtLast(t, "removal of one of two that are up", unhealthy, removing)
	// The one that is down may go.
	c.Forget(third)
	equal(t, "members", len(removed(t, client, thirdID)), 2)
	equal(t, "members", len(list(t, client)), 2)
}

func TestMoveLeader(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil, calm...)
		for i := range 2 {
			refusedWhileLed(t, "asked of a follower", notLeader, c.Members, func(ctx context.Context, leader *harness.Member) error {
				to := without(c.Members, leader)[i]
				_, err := newClient(t, to.Endpoint()).MoveLeader(ctx, idOf(t, to))
				return err
			})
			refusedWhileLed(t, "to nobody", badTransferee, c.Members, func(ctx context.Context, leader *harness.Member) error {
				_, err := newClient(t, leader.Endpoint()).MoveLeader(ctx, unknownID)
				return err
			})
			refusedWhileLed(t, "to itself", "<nil>", c.Members, func(ctx context.Context, leader *harness.Member) error {
				_, err := newClient(t, leader.Endpoint()).MoveLeader(ctx, idOf(t, leader))
				return err
			})
			moveLeader(t, c, i)
		}
	})
}

// moveLeader makes the follower at this place the leader. The term is the next one; in a later one nobody knows who led in that.
func moveLeader(t *testing.T, c *harness.Cluster, follower int) {
	t.Helper()
	awaitNoError(t, "a leader that is moved", func() error {
		leader, term := leadership(t, c.Members)
		to := without(c.Members, leader)[follower]
		id := idOf(t, to)
		err := attempt(func(ctx context.Context) error {
			_, err := newClient(t, leader.Endpoint()).MoveLeader(ctx, id)
			return err
		})
		now, later := leadership(t, c.Members)
		if later > term+1 || mayPass(err) || (fmt.Sprint(err) == notLeader && later > term) {
			return fmt.Errorf("term %d came after %d, and %v", later, term, err)
		}
		must(t, err)
		if now != to || later == term {
			t.Errorf("leader is %s in term %d, want %s, before it was %s in term %d", now.Name, later, to.Name, leader.Name, term)
		}
		return nil
	})
}

// refusedWhileLed is refusedAtLast for a call that depends on who leads: another leader meanwhile makes it be asked again.
func refusedWhileLed(t *testing.T, what, want string, members []*harness.Member, call func(context.Context, *harness.Member) error) {
	t.Helper()
	var err error
	awaitNoError(t, what, func() error {
		leader, term := leadership(t, members)
		err = attempt(func(ctx context.Context) error { return call(ctx, leader) })
		if _, now := leadership(t, members); now != term {
			return fmt.Errorf("term %d came after %d, in which the answer was %v", now, term, err)
		}
		if fmt.Sprint(err) == want || !mayPass(err) {
			return nil
		}
		return err
	})
	refused(t, what, err, want)
}

// healthy waits until every member lets members come and go, for which each must have been connected with the others for a
// while, as it sees it itself.
func healthy(t *testing.T, members []*harness.Member, unmoved *harness.Member) {
	t.Helper()
	for _, m := range members {
		client := newClient(t, m.Endpoint())
		awaitNoError(t, "a cluster that takes members in at "+m.Name, func() error {
			if said := taken(client, unmoved.PeerURL); said != urlTaken {
				return errors.New(said)
			}
			return nil
		})
	}
}

// taken is the answer to an addition of what is there already, which changes nothing.
func taken(client *clientv3.Client, url string) string {
	return fmt.Sprint(attempt(func(ctx context.Context) error {
		_, err := client.MemberAdd(ctx, []string{url})
		return err
	}))
}

func list(t testing.TB, client *clientv3.Client) []*etcdserverpb.Member {
	t.Helper()
	return answered(t, "member list", func(ctx context.Context) (*clientv3.MemberListResponse, error) { return client.MemberList(ctx) }).Members
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
