package client

import (
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
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
	equal(t, "name", members.Members[0].Name, "default")
	equal(t, "a list of members has no revision", members.Header.Revision, 0)
	equal(t, "client urls", fmt.Sprint(members.Members[0].ClientURLs), fmt.Sprint([]string{m.server.Endpoint()}))
}

func maintenanceDefragment(t *testing.T, m *member, prefix string) {
	m.put(t, prefix+"a", "1")
	_, err := m.Defragment(testContext(t), m.server.Endpoint())
	must(t, err)
	equal(t, "value", string(only(m.get(t, prefix+"a").Kvs).Value), "1")
	// The only call of all whose answer has no header.
	resp, err := pb.NewMaintenanceClient(m.ActiveConnection()).Defragment(testContext(t), &pb.DefragmentRequest{})
	must(t, err)
	equal(t, "header", resp.Header == nil, true)
}

func maintenanceHealth(t *testing.T, m *member, _ string) {
	resp, err := healthpb.NewHealthClient(m.ActiveConnection()).Check(testContext(t), &healthpb.HealthCheckRequest{})
	must(t, err)
	equal(t, "status", resp.Status, healthpb.HealthCheckResponse_SERVING)
	_, err = healthpb.NewHealthClient(m.ActiveConnection()).Check(testContext(t), &healthpb.HealthCheckRequest{Service: "etcdserverpb.KV"})
	equal(t, "code", status.Code(err), codes.NotFound)
	equal(t, "text", status.Convert(err).Message(), "unknown service")
}

// The same history hashes alike: a tenant can be compared with the etcd it came from. Also after a restart.
func TestHashOfHistory(t *testing.T) {
	p := newPair(t)
	p.same(t, &pb.HashKVRequest{})
	p.same(t, &pb.LeaseGrantRequest{ID: 1, TTL: 6000})
	for seed := range 300 {
		p.same(t, randomTxn(newRandom(uint64(1000+seed)), 1))
	}
	last := p.etcd.revision(t)
	compacted := last / 3
	// Not the compaction's own revision: see TestRefusalsSame.
	revisions := []int64{0, compacted - 1, compacted + 1, last / 2, last, last + 1}
	hashAll := func() {
		t.Helper()
		for _, revision := range revisions {
			p.same(t, &pb.HashKVRequest{Revision: revision})
		}
	}
	hashAll()
	p.same(t, &pb.CompactionRequest{Revision: compacted, Physical: true})
	hashAll()
	p.etcd.restart(t)
	p.tenured.restart(t)
	hashAll()
	p.same(t, &pb.CompactionRequest{Revision: last, Physical: true})
	p.same(t, &pb.PutRequest{Key: []byte("k"), Value: []byte("behind everything")})
	p.same(t, &pb.HashKVRequest{})
	p.same(t, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
}

// A store that was never compacted says -1, and its revision 0 can be compacted, once.
func TestCompactNothingSame(t *testing.T) {
	p := newPair(t)
	for range 2 {
		p.same(t, &pb.CompactionRequest{})
		p.same(t, &pb.RangeRequest{Key: []byte("k"), Revision: 1})
		p.same(t, &pb.HashKVRequest{Revision: 1})
	}
	p.same(t, &pb.CompactionRequest{Revision: 1})
	p.same(t, &pb.CompactionRequest{Revision: 1})
	p.same(t, &pb.PutRequest{Key: []byte("k")})
	// Not 0 for the current one: there etcd finds what it hashed before it compacted revision 0.
	p.same(t, &pb.HashKVRequest{Revision: 2})
}

// What was compacted stays so over kill -9, and so does what was not.
func TestCompactSurvivesRestart(t *testing.T) {
	onBoth(t, nil, func(t *testing.T, m *member) {
		first := m.put(t, "a", "1")
		for i := range 20 {
			m.put(t, "a", fmt.Sprint(i+2))
		}
		_, err := m.Compact(testContext(t), first+10)
		must(t, err)
		m.restart(t)
		_, err = m.Get(testContext(t), "a", clientv3.WithRev(first+9))
		refused(t, err, rpctypes.ErrCompacted)
		equal(t, "at", string(only(m.get(t, "a", clientv3.WithRev(first+10)).Kvs).Value), "11")
		_, err = m.Compact(testContext(t), first+10)
		refused(t, err, rpctypes.ErrCompacted)
		equal(t, "now", shown(only(m.get(t, "a").Kvs), first), "a=21 create+0 mod+20 version 21 lease 0")
		equal(t, "next", m.put(t, "a", "next"), first+21)
	})
}

// A full store refuses what would grow it; reading, deleting and disarming go on, also after a restart. Which write fills it
// differs: Tenure counts exactly, etcd by pages and late.
func TestQuota(t *testing.T) {
	onBoth(t, []string{"--quota-backend-bytes=1000000"}, func(t *testing.T, m *member) {
		lease := m.grant(t, 600)
		m.put(t, "small", "1", clientv3.WithLease(lease))
		_, err := m.Put(testContext(t), "large", repeat(1_200_000))
		refused(t, err, rpctypes.ErrNoSpace)
		for range 2 {
			_, err = m.Put(testContext(t), "small", "2")
			refused(t, err, rpctypes.ErrNoSpace)
			_, err = m.Txn(testContext(t)).Then(clientv3.OpGet("small"), clientv3.OpPut("small", "2")).Commit()
			refused(t, err, rpctypes.ErrNoSpace)
			// What a txn might write counts, whichever branch it takes.
			_, err = m.Txn(testContext(t)).Else(clientv3.OpPut("small", "2")).Commit()
			refused(t, err, rpctypes.ErrNoSpace)
			_, err = m.Grant(testContext(t), 60)
			refused(t, err, rpctypes.ErrNoSpace)
			equal(t, "reads", m.get(t, "small").Count, 1)
			commit(t, m.Txn(testContext(t)).Then(clientv3.OpGet("small"), clientv3.OpDelete("missing")))
			_, err = m.KeepAliveOnce(testContext(t), lease)
			must(t, err)

			alarms, err := m.AlarmList(testContext(t))
			must(t, err)
			equal(t, "alarms", len(alarms.Alarms), 1)
			equal(t, "kind", alarms.Alarms[0].Alarm, pb.AlarmType_NOSPACE)
			equal(t, "member", alarms.Alarms[0].MemberID, alarms.Header.MemberId)
			state, err := m.Status(testContext(t), m.server.Endpoint())
			must(t, err)
			equal(t, "quota", state.DbSizeQuota, 1_000_000)
			if errors := fmt.Sprint(state.Errors); len(state.Errors) != 1 || !strings.Contains(errors, "NOSPACE") {
				t.Errorf("status tells errors %s", errors)
			}
			m.restart(t)
		}
		_, err = m.Compact(testContext(t), m.revision(t))
		must(t, err)
		m.delete(t, "small")
		_, err = m.Revoke(testContext(t), lease)
		must(t, err)
		disarmed, err := m.AlarmDisarm(testContext(t), &clientv3.AlarmMember{})
		must(t, err)
		equal(t, "disarmed", len(disarmed.Alarms), 1)
		m.put(t, "small", "3")
	})
}

// The way out of a full store: delete, compact, defragment, disarm.
func TestQuotaRecovery(t *testing.T) {
	onBoth(t, []string{"--quota-backend-bytes=4000000"}, func(t *testing.T, m *member) {
		var err error
		for i := 0; err == nil; i++ {
			_, err = m.Put(testContext(t), fmt.Sprint("fill/", i), repeat(50_000))
		}
		refused(t, err, rpctypes.ErrNoSpace)
		m.delete(t, "fill/", clientv3.WithPrefix())
		_, err = m.Compact(testContext(t), m.revision(t), clientv3.WithCompactPhysical())
		must(t, err)
		_, err = m.Defragment(testContext(t), m.server.Endpoint())
		must(t, err)
		state, err := m.Status(testContext(t), m.server.Endpoint())
		must(t, err)
		if state.DbSize > 1_000_000 {
			t.Errorf("%d bytes are held by an empty store", state.DbSize)
		}
		_, err = m.Put(testContext(t), "a", "1")
		refused(t, err, rpctypes.ErrNoSpace)
		_, err = m.AlarmDisarm(testContext(t), &clientv3.AlarmMember{})
		must(t, err)
		m.put(t, "a", repeat(50_000))
	})
}
