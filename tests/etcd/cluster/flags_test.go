package cluster

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/harness"
)

// A cluster takes as many learners as the flag says, by default one, and has a place again when one of them is promoted.
func TestMaxLearners(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		for _, limit := range []struct {
			learners int
			flags    []string
		}{
			{1, nil},
			{2, []string{"--max-learners=2"}},
		} {
			t.Run(fmt.Sprint(limit.flags), func(t *testing.T) {
				t.Parallel()
				maxLearners(t, kind, limit.learners, limit.flags)
			})
		}
	})
}

func maxLearners(t *testing.T, kind harness.Kind, learners int, flags []string) {
	c := harness.StartCluster(t, kind, 1, nil, slices.Concat(flags, calm)...)
	client := newClient(t, c.Members[0].Endpoint())
	put(t, client, "key", "value")
	var ids []uint64
	for range learners {
		m := c.NewMember()
		ids = append(ids, add(t, client, m.PeerURL, client.MemberAddAsLearner).Member.ID)
		m.Join()
	}
	oneMore := func(ctx context.Context) error {
		_, err := client.MemberAddAsLearner(ctx, []string{"http://127.0.0.1:1"})
		return err
	}
	refusedAtLast(t, "one learner more", tooMany, oneMore)
	equal(t, "members", len(list(t, client)), 1+learners)
	for _, m := range c.Members[1:] {
		awaitNoError(t, "the key on "+m.Name, func() error {
			if keys := len(get(t, newClient(t, m.Endpoint()), "key", clientv3.WithSerializable()).Kvs); keys != 1 {
				return fmt.Errorf("it has %d", keys)
			}
			return nil
		})
	}

	promote(t, client, ids[0])
	add(t, client, "http://127.0.0.1:1", client.MemberAddAsLearner)
	refusedAtLast(t, "one learner more, after a promotion", tooMany, func(ctx context.Context) error {
		_, err := client.MemberAddAsLearner(ctx, []string{"http://127.0.0.1:2"})
		return err
	})
	equal(t, "members", len(list(t, client)), 2+learners)
}

// Without the strict check a cluster does what it is told, even what leaves it without a quorum: TestMembershipRefused has the
// same requests refused. Such a quorum is back with the member that was down.
func TestNoStrictReconfigCheck(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		for _, of := range []struct {
			name string
			test func(t *testing.T, c *harness.Cluster)
		}{
			{"add while one is down", addWhileDown},
			{"remove while one is down", removeWhileDown},
			{"add beside others that never ran", addBesideOthers},
		} {
			t.Run(of.name, func(t *testing.T) {
				t.Parallel()
				of.test(t, harness.StartCluster(t, kind, 3, nil, append([]string{"--strict-reconfig-check=false"}, calm...)...))
			})
		}
	})
}

// addWhileDown makes a cluster of four of which two run, and takes the fourth out again.
func addWhileDown(t *testing.T, c *harness.Cluster) {
	t.Helper()
	leader := leaderAmong(t, c.Members)
	third := without(c.Members, leader)[1]
	third.Kill()
	client := newClient(t, leader.Endpoint())
	added := add(t, client, "http://127.0.0.1:1", client.MemberAdd)
	equal(t, "members in the answer", len(added.Members), 4)
	third.Start()
	leaderAmong(t, c.Members)
	equal(t, "members", len(removed(t, client, added.Member.ID)), 3)
	put(t, client, "key", "value")
}

// removeWhileDown makes a cluster of two of which one runs.
func removeWhileDown(t *testing.T, c *harness.Cluster) {
	t.Helper()
	leader := leaderAmong(t, c.Members)
	follower, third := without(c.Members, leader)[0], without(c.Members, leader)[1]
	id := idOf(t, follower)
	cluster := etcdserverpb.NewClusterClient(wireTo(t, leader))
	third.Kill()
	// Two of three run, who are enough to decide it.
	var answer *etcdserverpb.MemberRemoveResponse
	err := attempt(func(ctx context.Context) (err error) {
		answer, err = cluster.MemberRemove(ctx, &etcdserverpb.MemberRemoveRequest{ID: id})
		return err
	})
	refused(t, "removal of one of two that run", err, "<nil>")
	equal(t, "members in the answer", len(answer.GetMembers()), 2)
	c.Forget(follower)
	follower.Kill()
	third.Start()
	leaderAmong(t, c.Members)
	client := newClient(t, c.Endpoints("default")...)
	equal(t, "members", len(list(t, client)), 2)
	put(t, client, "key", "value")
}

// addBesideOthers makes a cluster of six of which three have never run.
func addBesideOthers(t *testing.T, c *harness.Cluster) {
	t.Helper()
	client := newClient(t, leaderAmong(t, c.Members).Endpoint())
	for never := range 3 {
		added := add(t, client, fmt.Sprintf("http://127.0.0.1:%d", never+1), client.MemberAdd)
		equal(t, "members in the answer", len(added.Members), 4+never)
	}
}

// A member that is cut off and asks nobody before it stands for election goes to term after term, and brings the last one with
// it when it is back; one that asks first disturbs nobody.
func TestPreVoteOff(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		for _, asks := range []bool{false, true} {
			t.Run(fmt.Sprintf("pre-vote=%v", asks), func(t *testing.T) {
				t.Parallel()
				cutOff(t, kind, asks)
			})
		}
	})
}

func cutOff(t *testing.T, kind harness.Kind, asks bool) {
	flags := calm
	if !asks {
		// The other is the default.
		flags = append([]string{"--pre-vote=false"}, calm...)
	}
	c := harness.StartCluster(t, kind, 3, nil, flags...)
	leader, term := leadership(t, c.Members)
	others := without(c.Members, leader)
	follower := others[0]
	c.Isolate(follower)
	await(t, follower.Name+" to have no leader", func() bool {
		status, err := statusOf(t, follower)
		return err == nil && status.Leader == 0
	})
	if !asks {
		standsAgain(t, kind, follower)
	}
	_, during := leadership(t, without(c.Members, follower))
	equal(t, "term of the others meanwhile", during, term)
	c.Heal()
	_, after := leadership(t, c.Members)
	switch {
	case asks:
		equal(t, "term after one came back that asks", after, term)
	case after < term+2:
		t.Errorf("the term is %d after one came back that stood for election twice, before it was %d", after, term)
	}
}

// standsAgain waits until a member that is cut off stands for election once more than when it gave up its leader.
func standsAgain(t *testing.T, kind harness.Kind, m *harness.Member) {
	t.Helper()
	if kind == harness.Tenured {
		status, err := statusOf(t, m)
		must(t, err)
		first := status.RaftTerm
		await(t, m.Name+" to stand for election again", func() bool {
			status, err := statusOf(t, m)
			return err == nil && status.RaftTerm > first
		})
		return
	}
	// The status of etcd has the term of what was applied last. But there is nothing to send other than the two requests for
	// votes; those of the first time may not have been counted yet.
	failures := func() float64 { return scrape(t, m).sum("etcd_network_peer_sent_failures_total") }
	first := failures()
	await(t, m.Name+" to stand for election again", func() bool { return failures() > first+2 })
}
