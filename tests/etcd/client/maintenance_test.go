package client

import (
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func TestCompact(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{{"logical", compactAt(false)}, {"physical", compactAt(true)}})
}

func compactAt(physical bool) func(*testing.T, *member, string) {
	return func(t *testing.T, m *member, prefix string) {
		old := m.put(t, prefix+"a", "1")
		m.put(t, prefix+"b", "1")
		m.delete(t, prefix+"b")
		at := m.put(t, prefix+"a", "2")
		now := m.put(t, prefix+"a", "3")
		opts := []clientv3.CompactOption{}
		if physical {
			opts = append(opts, clientv3.WithCompactPhysical())
		}
		_, err := m.Compact(testContext(t), at, opts...)
		must(t, err)
		_, err = m.Get(testContext(t), prefix+"a", clientv3.WithRev(old))
		refused(t, err, rpctypes.ErrCompacted)
		equal(t, "at", string(only(m.get(t, prefix+"a", clientv3.WithRev(at)).Kvs).Value), "2")
		equal(t, "deleted", m.get(t, prefix+"b", clientv3.WithRev(at)).Count, 0)
		equal(t, "now", string(only(m.get(t, prefix+"a").Kvs).Value), "3")
		_, err = m.Compact(testContext(t), at)
		refused(t, err, rpctypes.ErrCompacted)
		_, err = m.Compact(testContext(t), now+10)
		refused(t, err, rpctypes.ErrFutureRev)
		_, err = m.Txn(testContext(t)).Then(clientv3.OpGet(prefix+"a", clientv3.WithRev(old))).Commit()
		refused(t, err, rpctypes.ErrCompacted)
	}
}

func TestMaintenance(t *testing.T) {
	casesOnBoth(t, nil, []caseOn{
		{"status", maintenanceStatus},
		{"defragment", maintenanceDefragment},
		{"health", maintenanceHealth},
	})
}

func maintenanceStatus(t *testing.T, m *member, prefix string) {
	before, err := m.Status(testContext(t), m.server.Endpoint())
	must(t, err)
	m.put(t, prefix+"a", repeat(1<<20))
	// etcd counts what it has committed to its file, some time after the put.
	after, ctx := before, testContext(t)
	for after.DbSize < before.DbSize+1<<20-1<<16 {
		after, err = m.Status(ctx, m.server.Endpoint())
		must(t, err)
	}
	if after.DbSizeInUse > after.DbSize {
		t.Errorf("%d of %d bytes in use", after.DbSizeInUse, after.DbSize)
	}
	equal(t, "leader", after.Leader, after.Header.MemberId)
	equal(t, "learner", after.IsLearner, false)
	equal(t, "errors", len(after.Errors), 0)
	if after.RaftTerm == 0 || after.RaftIndex == 0 || after.RaftAppliedIndex > after.RaftIndex {
		t.Errorf("raft's numbers: %v", after)
	}
	equal(t, "minor version", strings.Join(strings.Split(after.Version, ".")[:2], "."), "3.7")
	alarms, err := m.AlarmList(testContext(t))
	must(t, err)
	equal(t, "alarms", len(alarms.Alarms), 0)
	members, err := m.MemberList(testContext(t))
	must(t, err)
	equal(t, "members", len(members.Members), 1)
	equal(t, "member", members.Members[0].ID, after.Header.MemberId)
	equal(t, "client urls", fmt.Sprint(members.Members[0].ClientURLs), fmt.Sprint([]string{m.server.Endpoint()}))
}

func maintenanceDefragment(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"a", "1")
	_, err := m.Defragment(testContext(t), m.server.Endpoint())
	must(t, err)
	equal(t, "value", string(only(m.get(t, prefix+"a").Kvs).Value), "1")
}

func maintenanceHealth(t *testing.T, m *member, _ string) {
	resp, err := healthpb.NewHealthClient(m.ActiveConnection()).Check(testContext(t), &healthpb.HealthCheckRequest{})
	must(t, err)
	equal(t, "status", resp.Status, healthpb.HealthCheckResponse_SERVING)
}

// The same history hashes alike: a tenant can be compared with the etcd it came from.
func TestHashOfHistory(t *testing.T) {
	p := newPair(t)
	for seed := range 300 {
		p.same(t, randomTxn(newRandom(uint64(1000+seed)), 1))
	}
	p.same(t, &pb.HashKVRequest{})
	last := p.etcd.revision(t)
	p.same(t, &pb.HashKVRequest{Revision: last / 2})
	p.same(t, &pb.CompactionRequest{Revision: last / 3, Physical: true})
	p.same(t, &pb.HashKVRequest{Revision: last / 2})
	p.same(t, &pb.HashKVRequest{Revision: last})
}

// A full store refuses what would grow it; reading, deleting and disarming go on. Which write fills it differs: Tenure counts
// exactly, etcd by pages and late.
func TestQuota(t *testing.T) {
	onBoth(t, []string{"--quota-backend-bytes=1000000"}, func(t *testing.T, m *member) {
		m.put(t, "small", "1")
		_, err := m.Put(testContext(t), "large", repeat(1_200_000))
		refused(t, err, rpctypes.ErrNoSpace)
		_, err = m.Put(testContext(t), "small", "2")
		refused(t, err, rpctypes.ErrNoSpace)
		_, err = m.Grant(testContext(t), 60)
		refused(t, err, rpctypes.ErrNoSpace)
		alarms, err := m.AlarmList(testContext(t))
		must(t, err)
		equal(t, "alarms", len(alarms.Alarms), 1)
		equal(t, "kind", alarms.Alarms[0].Alarm, pb.AlarmType_NOSPACE)
		equal(t, "reads", m.get(t, "small").Count, 1)
		m.delete(t, "small")
		_, err = m.AlarmDisarm(testContext(t), &clientv3.AlarmMember{})
		must(t, err)
		m.put(t, "small", "3")
	})
}
