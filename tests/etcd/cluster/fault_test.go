package cluster

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/harness"
)

// fault is what happens to a cluster under load.
type fault struct {
	name    string
	members int
	flags   []string
	strike  func(f *faulty)
	// gentle says that clients that know all members must not notice.
	gentle bool
	// ofSystem says that the members' disks and clocks are what strikes, which a test has in hand for tenured only.
	ofSystem bool
	// etcdLosesLeases says that a real etcd lets leases end that are kept alive, so that only tenured is held to it.
	etcdLosesLeases bool
}

var faults = []fault{
	{name: "kill follower", members: 3, strike: killFollower},
	{name: "kill leader", members: 3, strike: killLeader},
	{name: "kill leaders in turn", members: 3, strike: killLeaders},
	{name: "kill two of five", members: 5, strike: killTwo},
	{name: "kill all", members: 3, strike: killAll},
	// A leader of etcd that was stopped may revoke, when it goes on, what others have renewed since.
	{name: "pause leader", members: 3, strike: pauseLeader, etcdLosesLeases: true},
	{name: "partition leader", members: 3, strike: partitionLeader},
	{name: "partition follower", members: 3, strike: partitionFollower},
	{name: "partition by loss", members: 5, strike: partitionByLoss},
	{name: "one way", members: 3, strike: oneWay},
	{name: "slow link", members: 3, strike: slowLink},
	{name: "catch up", members: 3, strike: catchUp},
	{name: "catch up by snapshot", members: 3, flags: smallSnapshots, strike: catchUpBySnapshot},
	{name: "rolling restart", members: 3, strike: rollingRestart, gentle: true},
	{name: "slow disk", members: 3, strike: slowDisk, ofSystem: true},
	{name: "clock jumps", members: 3, strike: clockJumps, ofSystem: true},
	{name: "full disk", members: 3, strike: fullDisk, ofSystem: true},
	{name: "pause leader of five", members: 5, strike: pauseLeader, etcdLosesLeases: true},
	{name: "rolling restart of five", members: 5, strike: rollingRestart, gentle: true},
	{name: "slow disk of five", members: 5, strike: slowDisk, ofSystem: true},
	{name: "clock jumps of five", members: 5, strike: clockJumps, ofSystem: true},
	{name: "full disk of five", members: 5, strike: fullDisk, ofSystem: true},
}

// smallSnapshots makes a member that missed some hundred writes need a snapshot.
var smallSnapshots = []string{"--snapshot-count", "50", "--snapshot-catchup-entries", "50"}

// faulty is a cluster under load while a fault strikes.
type faulty struct {
	*harness.Cluster
	t      *testing.T
	random *rand.Rand
	loads  []*load
}

func TestFault(t *testing.T) {
	rounds, seed := number(t, "TENURE_FAULT_ROUNDS", 1), uint64(number(t, "TENURE_FAULT_SEED", 1))
	for _, kind := range chosen(harness.Tenured) {
		for _, fault := range faults {
			if fault.ofSystem && kind != harness.Tenured {
				continue
			}
			for round := range rounds {
				t.Run(fmt.Sprintf("%s/%s/%d", kind, fault.name, seed+uint64(round)), func(t *testing.T) {
					t.Parallel()
					fault.run(t, kind, seed+uint64(round))
				})
			}
		}
	}
}

func (fault fault) run(t *testing.T, kind harness.Kind, seed uint64) {
	patience := patience
	if fault.gentle {
		patience = hang
	}
	flags := slices.Concat(fault.flags, []string{"--watch-progress-notify-interval", "1s"})
	var c *harness.Cluster
	if fault.ofSystem {
		c = harness.StartOnFaults(t, fault.members, tenants, flags...)
	} else {
		c = harness.StartCluster(t, kind, fault.members, tenants, flags...)
	}
	leaderAmong(t, c.Members)
	f := &faulty{Cluster: c, t: t, random: rand.New(rand.NewPCG(seed, 0))}
	for _, tenant := range c.Tenants() {
		f.loads = append(f.loads, startLoad(t, c, tenant, seed, options{
			pinned:      !fault.gentle,
			patience:    patience,
			losesLeases: fault.etcdLosesLeases && kind == harness.Etcd,
		}))
	}
	f.writes(50)
	fault.strike(f)
	f.Heal()
	f.writes(50)
	for _, l := range f.loads {
		l.verify()
		if fault.gentle {
			for _, failure := range l.failures {
				report := t.Errorf
				if kind == harness.Etcd {
					// It loses proposals that are on the way to a leader that goes.
					report = t.Logf
				}
				report("tenant %s: a client that knows all members got an error: %s", l.tenant, failure)
			}
		}
	}
}

// writes waits until so many more writes of every tenant were acknowledged.
func (f *faulty) writes(n int64) {
	f.t.Helper()
	for _, l := range f.loads {
		until := l.done.Load() + n
		await(f.t, fmt.Sprintf("%d more writes of tenant %s", n, l.tenant), func() bool { return l.done.Load() >= until })
	}
}

// some is a number of writes after which the next thing happens.
func (f *faulty) some() { f.writes(20 + f.random.Int64N(60)) }

// leader is the one that all know, and the others.
func (f *faulty) leader() (*harness.Member, []*harness.Member) {
	f.t.Helper()
	leader := leaderAmong(f.t, f.Members)
	return leader, without(f.Members, leader)
}

// follower is any.
func (f *faulty) follower() *harness.Member {
	f.t.Helper()
	_, followers := f.leader()
	return followers[f.random.IntN(len(followers))]
}

func killFollower(f *faulty) {
	for range 2 {
		m := f.follower()
		m.Kill()
		f.some()
		m.Start()
		f.some()
	}
}

func killLeader(f *faulty) {
	for range 2 {
		m, others := f.leader()
		m.Kill()
		leaderAmong(f.t, others)
		f.some()
		m.Start()
		f.some()
	}
}

// killLeaders makes members dial dead ones, whose connections break anywhere, many times; each way must be found again.
func killLeaders(f *faulty) {
	for range 10 {
		leader, _ := f.leader()
		leader.Kill()
		f.some()
		leader.Start()
	}
}

func killTwo(f *faulty) {
	leader, others := f.leader()
	second := others[f.random.IntN(len(others))]
	leader.Kill()
	second.Kill()
	leaderAmong(f.t, without(f.Members, leader, second))
	f.some()
	leader.Start()
	f.some()
	second.Start()
}

func killAll(f *faulty) {
	for range 2 {
		for _, i := range f.random.Perm(len(f.Members)) {
			f.Members[i].Kill()
		}
		for _, i := range f.random.Perm(len(f.Members)) {
			f.Members[i].Launch()
		}
		for _, m := range f.Members {
			m.AwaitReady()
		}
		f.some()
	}
}

// pauseLeader stops it for longer than leases live: when it goes on, it must not take them for expired.
func pauseLeader(f *faulty) {
	const pause = (keptTTL + 2) * time.Second
	leader, others := f.leader()
	leader.Pause()
	time.Sleep(pause)
	leaderAmong(f.t, others)
	f.some()
	leader.Resume()
	f.some()
}

func partitionLeader(f *faulty) {
	for range 2 {
		leader, others := f.leader()
		f.Isolate(leader)
		leaderAmong(f.t, others)
		f.some()
		f.Heal()
		leaderAmong(f.t, f.Members)
		f.some()
	}
}

func partitionFollower(f *faulty) {
	for range 2 {
		m := f.follower()
		f.Isolate(m)
		f.awaitNoLeader(m)
		f.some()
		f.Heal()
		leaderAmong(f.t, f.Members)
		f.some()
	}
}

// partitionByLoss parts the leader and one more from the others without closing a connection.
func partitionByLoss(f *faulty) {
	leader, others := f.leader()
	i := f.random.IntN(len(others))
	few, many := []*harness.Member{leader, others[i]}, without(others, others[i])
	for _, a := range few {
		for _, b := range many {
			f.Hold(a, b)
			f.Hold(b, a)
		}
	}
	leaderAmong(f.t, many)
	f.some()
	f.Heal()
	leaderAmong(f.t, f.Members)
}

// oneWay lets the leader hear the others, and not the others the leader; and then a follower.
func oneWay(f *faulty) {
	leader, others := f.leader()
	for _, m := range others {
		f.Hold(leader, m)
	}
	leaderAmong(f.t, others)
	f.some()
	f.Heal()
	m := f.follower()
	for _, other := range without(f.Members, m) {
		f.Hold(m, other)
	}
	f.some()
	f.Heal()
	leaderAmong(f.t, f.Members)
	f.some()
}

func slowLink(f *faulty) {
	leader, others := f.leader()
	m := others[f.random.IntN(len(others))]
	for _, delay := range []time.Duration{20 * time.Millisecond, 200 * time.Millisecond} {
		f.Delay(leader, m, delay)
		f.Delay(m, leader, delay)
		f.some()
	}
	// All links of the leader, by less than an election.
	for _, m := range others {
		f.Delay(leader, m, 50*time.Millisecond)
	}
	f.some()
}

func catchUp(f *faulty) {
	m := f.follower()
	m.Kill()
	f.writes(400)
	m.Start()
}

// catchUpBySnapshot keeps a member away until the others have no log for it, and what it had is compacted.
func catchUpBySnapshot(f *faulty) {
	m := f.follower()
	m.Kill()
	var before []int64
	for _, l := range f.loads {
		before = append(before, l.broughtByAll())
	}
	f.writes(100)
	for i, l := range f.loads {
		await(f.t, "a compaction of what the member had", func() bool { return l.compacted.Load() > before[i] })
	}
	f.writes(150)
	m.Start()
	f.some()
	f.gotSnapshot(m)
	// And once more, the other way round: the member that got the snapshot is one of those that give it.
	leader, _ := f.leader()
	f.Isolate(leader)
	f.writes(200)
	f.Heal()
	leaderAmong(f.t, f.Members)
}

func rollingRestart(f *faulty) {
	for _, m := range f.Members {
		m.Stop()
		f.some()
		m.Start()
		leaderAmong(f.t, f.Members)
		f.some()
	}
}

// slowDisk makes the disks of members slow, one by one: by what a bad disk takes, and by more than an election does, which
// must not cost a leader its office, since others have what it has not.
func slowDisk(f *faulty) {
	for _, delay := range []time.Duration{100 * time.Millisecond, 3 * time.Second} {
		leader, others := f.leader()
		for _, m := range []*harness.Member{leader, others[f.random.IntN(len(others))]} {
			m.Faults.SlowSync(delay)
			f.some()
			m.Faults.Clear()
		}
	}
	for _, m := range f.Members {
		m.Faults.SlowSync(50 * time.Millisecond)
	}
	f.some()
	for _, m := range f.Members {
		m.Faults.Clear()
	}
}

// clockJumps moves the wall clocks of members, apart from each other, by more than leases live, and restarts members on the
// wrong time.
func clockJumps(f *faulty) {
	const hours = time.Hour
	for _, offsets := range [][]time.Duration{{10 * hours, 0, 0}, {-10 * hours, hours, -hours}, {0, -2 * hours, 5 * hours}} {
		for i, m := range f.Members {
			m.Faults.ShiftClock(offsets[i%len(offsets)])
		}
		f.some()
		leader, _ := f.leader()
		leader.Kill()
		f.some()
		leader.Start()
	}
	for _, m := range f.Members {
		m.Faults.Clear()
	}
	f.some()
}

// fullDisk takes the room of one follower, of the leader, of all, and then, without a warning, of one while it writes.
func fullDisk(f *faulty) {
	// Below the reserve, and below the quarter of it under which a member takes nothing from the leader either.
	const little, next = 200 << 20, 1 << 20
	m := f.follower()
	m.Faults.FreeBytes(little)
	f.awaitHealth(m, "DISK FULL")
	f.refuses(m)
	f.some()
	m.Faults.FreeBytes(next)
	f.writes(100)
	m.Faults.AllBytes()
	f.awaitHealth(m, "")
	f.some()

	leader, others := f.leader()
	leader.Faults.FreeBytes(little)
	await(f.t, "another leader", func() bool {
		status, err := statusOf(f.t, others[0])
		return err == nil && status.Leader != 0 && status.Leader != idOf(f.t, leader)
	})
	f.some()

	for _, m := range f.Members {
		m.Faults.FreeBytes(little)
	}
	for _, m := range f.Members {
		f.awaitHealth(m, "DISK FULL")
	}
	for _, m := range f.Members {
		f.refuses(m)
	}
	// Deletes still go, and take nothing from what is there.
	f.writes(10)
	for _, m := range f.Members {
		m.Faults.AllBytes()
	}
	for _, m := range f.Members {
		f.awaitHealth(m, "")
	}
	f.some()

	leader, _ = f.leader()
	leader.Faults.NoRoom(true)
	leader.AwaitEnd()
	f.some()
	leader.Faults.NoRoom(false)
	leader.Start()
	f.some()
}

// awaitHealth waits until a member says this of its health, or, if it is empty, that all is well.
func (f *faulty) awaitHealth(m *harness.Member, reason string) {
	f.t.Helper()
	await(f.t, fmt.Sprintf("%s to say %q", m.Name, reason), func() bool {
		response, err := http.Get(m.Endpoint() + "/health")
		if err != nil {
			return false
		}
		defer response.Body.Close()
		health, err := io.ReadAll(response.Body)
		if reason == "" {
			return err == nil && response.StatusCode == http.StatusOK
		}
		return err == nil && response.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(health), reason)
	})
}

// refuses checks that a member that is full takes no put, says why, and answers reads and takes deletes all the same.
func (f *faulty) refuses(m *harness.Member) {
	f.t.Helper()
	client := newClient(f.t, m.Endpoint())
	defer client.Close()
	ctx := testContext(f.t)
	refusedAtLast(f.t, m.Name+" is full and is asked for a put", rpctypes.ErrNoSpace.Error(), func(ctx context.Context) error {
		_, err := client.Put(ctx, "/elsewhere", "value")
		return err
	})
	get(f.t, client, "/elsewhere")
	answered(f.t, m.Name+" is full and is asked for a delete", func(ctx context.Context) (*clientv3.DeleteResponse, error) {
		return client.Delete(ctx, "/elsewhere")
	})
	alarms, err := client.AlarmList(ctx)
	if err != nil || len(alarms.Alarms) != 0 {
		f.t.Errorf("a full disk is no alarm of a tenant: %v, %v", alarms, err)
	}
}

// awaitNoLeader waits until a member knows that it has no leader.
func (f *faulty) awaitNoLeader(m *harness.Member) {
	f.t.Helper()
	await(f.t, m.Name+" to have no leader", func() bool {
		status, err := statusOf(f.t, m)
		return err == nil && status.Leader == 0
	})
}

// gotSnapshot checks that a fault did what it is for.
func (f *faulty) gotSnapshot(m *harness.Member) {
	f.t.Helper()
	response, err := http.Get(m.Endpoint() + "/metrics")
	must(f.t, err)
	defer response.Body.Close()
	metrics, err := io.ReadAll(response.Body)
	must(f.t, err)
	if !snapshotReceived.Match(metrics) {
		f.t.Errorf("%s caught up without a snapshot, or does not count it in its metrics", m.Name)
	}
}

var snapshotReceived = regexp.MustCompile(`(?m)^etcd_network_snapshot_receive_success\{.*\} [1-9]`)
