package cluster

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"tenure.dev/tests/harness"
)

// families are the metrics of replication, as etcd shows them: their kinds, the names of their labels, and for histograms the
// bounds of their buckets. Alerts and dashboards ask for them by these.
var families = []struct {
	name, kind, labels string
	// least is the lowest bound; each of the others is twice the one before.
	least  float64
	bounds int
	// rare says that etcd shows the family once such a thing has happened, and that it does not happen here.
	rare bool
}{
	{name: "etcd_server_has_leader", kind: "gauge"},
	{name: "etcd_server_is_leader", kind: "gauge"},
	{name: "etcd_server_is_learner", kind: "gauge"},
	{name: "etcd_server_id", kind: "gauge", labels: "server_id"},
	{name: "etcd_server_version", kind: "gauge", labels: "server_version"},
	{name: "etcd_cluster_version", kind: "gauge", labels: "cluster_version"},
	{name: "etcd_server_leader_changes_seen_total", kind: "counter"},
	{name: "etcd_server_proposals_committed_total", kind: "gauge"},
	{name: "etcd_server_proposals_applied_total", kind: "gauge"},
	{name: "etcd_server_proposals_pending", kind: "gauge"},
	{name: "etcd_server_proposals_failed_total", kind: "counter"},
	{name: "etcd_server_heartbeat_send_failures_total", kind: "counter"},
	{name: "etcd_server_slow_apply_total", kind: "counter"},
	{name: "etcd_server_slow_read_indexes_total", kind: "counter"},
	{name: "etcd_server_read_indexes_failed_total", kind: "counter"},
	{name: "etcd_server_learner_promote_successes", kind: "counter"},
	{name: "etcd_server_learner_promote_failures", kind: "counter", labels: "Reason"},
	{name: "etcd_server_snapshot_apply_in_progress_total", kind: "gauge"},
	{name: "etcd_disk_wal_fsync_duration_seconds", kind: "histogram", least: 0.001, bounds: 14},
	{name: "etcd_disk_wal_write_duration_seconds", kind: "histogram", least: 0.001, bounds: 14},
	{name: "etcd_disk_wal_write_bytes_total", kind: "gauge"},
	{name: "etcd_disk_backend_commit_duration_seconds", kind: "histogram", least: 0.001, bounds: 14},
	{name: "etcd_network_known_peers", kind: "gauge", labels: "Local Remote"},
	{name: "etcd_network_active_peers", kind: "gauge", labels: "Local Remote"},
	{name: "etcd_network_disconnected_peers_total", kind: "counter", labels: "Local Remote"},
	{name: "etcd_network_peer_round_trip_time_seconds", kind: "histogram", labels: "To", least: 0.0001, bounds: 16},
	{name: "etcd_network_peer_sent_bytes_total", kind: "counter", labels: "To"},
	{name: "etcd_network_peer_received_bytes_total", kind: "counter", labels: "From"},
	{name: "etcd_network_peer_sent_failures_total", kind: "counter", labels: "To"},
	{name: "etcd_network_peer_received_failures_total", kind: "counter", labels: "From", rare: true},
	{name: "etcd_network_snapshot_send_success", kind: "counter", labels: "To"},
	{name: "etcd_network_snapshot_send_failures", kind: "counter", labels: "To", rare: true},
	{name: "etcd_network_snapshot_send_inflights_total", kind: "gauge", labels: "To"},
	{name: "etcd_network_snapshot_send_total_duration_seconds", kind: "histogram", labels: "To", least: 0.1, bounds: 10},
	{name: "etcd_network_snapshot_receive_success", kind: "counter", labels: "From"},
	{name: "etcd_network_snapshot_receive_failures", kind: "counter", labels: "From", rare: true},
	{name: "etcd_network_snapshot_receive_inflights_total", kind: "gauge", labels: "From"},
	{name: "etcd_network_snapshot_receive_total_duration_seconds", kind: "histogram", labels: "From", least: 0.1, bounds: 10},
}

// What operators watch of the members must be there under etcd's names, and must move when the thing happens that it is for.
func TestMemberMetrics(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		// Every apply is a slow one, and some hundred writes that a member misses need a snapshot.
		flags := slices.Concat(smallSnapshots, []string{"--warning-apply-duration=1ns"})
		w := &watched{Cluster: harness.StartCluster(t, kind, 3, nil, flags...), shown: noneShown(), ids: map[*harness.Member]string{}}
		leaderAmong(t, w.Members)
		for _, m := range w.Members {
			w.ids[m] = fmt.Sprintf("%x", idOf(t, m))
		}
		// One after the other.
		for _, of := range []struct {
			name string
			test func(w *watched)
		}{
			{"in peace", (*watched).inPeace},
			{"without one", (*watched).withoutOne},
			{"without quorum", (*watched).withoutQuorum},
			{"with a learner", (*watched).withLearner},
			{"families", (*watched).checkFamilies},
		} {
			t.Run(of.name, func(t *testing.T) {
				w.t = t
				of.test(w)
			})
		}
	})
}

// watched is a cluster with what its metrics showed.
type watched struct {
	*harness.Cluster
	// t of what runs now.
	t     *testing.T
	shown map[string]*shownFamily
	// ids of the members, as metrics have them.
	ids map[*harness.Member]string
}

// inPeace checks what a cluster shows in which nothing happens but writes.
func (w *watched) inPeace() {
	w.t.Helper()
	leader := leaderAmong(w.t, w.Members)
	before := map[*harness.Member]exposition{}
	for _, m := range w.Members {
		before[m] = w.scrape(m)
	}
	const writes = 20
	client := newClient(w.t, leader.Endpoint())
	for i := range writes {
		put(w.t, client, fmt.Sprint("key", i), "value")
	}
	var claims []claim
	for _, m := range w.Members {
		grows := func(by float64, name string, labels ...string) {
			claims = append(claims, above(m, before[m].sum(name, labels...)+by, name, labels...))
		}
		status := answered(w.t, "the status of "+m.Name, func(ctx context.Context) (*clientv3.StatusResponse, error) {
			return newClient(w.t, m.Endpoint()).Status(ctx, m.Endpoint())
		})
		claims = append(claims,
			exactly(m, 1, "etcd_server_has_leader"),
			exactly(m, 0, "etcd_server_is_learner"),
			exactly(m, 1, "etcd_server_id"),
			exactly(m, 1, "etcd_server_id", "server_id", w.ids[m]),
			exactly(m, 1, "etcd_server_version"),
			exactly(m, 1, "etcd_server_version", "server_version", status.Version),
			above(m, 0, "etcd_server_leader_changes_seen_total"),
			exactly(m, 0, "etcd_server_proposals_pending"),
		)
		grows(writes-1, "etcd_server_proposals_committed_total")
		grows(writes-1, "etcd_server_proposals_applied_total")
		grows(0, "etcd_server_slow_apply_total")
		grows(0, "etcd_disk_wal_fsync_duration_seconds_count")
		grows(0, "etcd_disk_wal_fsync_duration_seconds_sum")
		grows(0, "etcd_disk_wal_write_bytes_total")
		grows(0, "etcd_disk_backend_commit_duration_seconds_count")
		for _, other := range without(w.Members, m) {
			id := w.ids[other]
			claims = append(claims,
				exactly(m, 1, "etcd_network_known_peers", "Local", w.ids[m], "Remote", id),
				exactly(m, 1, "etcd_network_active_peers", "Local", w.ids[m], "Remote", id),
				above(m, 0, "etcd_network_peer_round_trip_time_seconds_count", "To", id),
				above(m, 0, "etcd_network_peer_round_trip_time_seconds_sum", "To", id),
			)
			if m == leader || other == leader {
				grows(0, "etcd_network_peer_sent_bytes_total", "To", id)
				grows(0, "etcd_network_peer_received_bytes_total", "From", id)
			}
		}
	}
	w.await(claims)
	await(w.t, "one member to be leader, the one that all know", func() bool {
		leader := leaderAmong(w.t, w.Members)
		return !slices.ContainsFunc(w.Members, func(m *harness.Member) bool {
			return (w.scrape(m).sum("etcd_server_is_leader") == 1) != (m == leader)
		})
	})
}

// withoutOne checks what the others show of a leader that is gone, and what is shown of the snapshot that it needs later.
func (w *watched) withoutOne() {
	w.t.Helper()
	gone := leaderAmong(w.t, w.Members)
	others := without(w.Members, gone)
	before := map[*harness.Member]exposition{}
	for _, m := range others {
		before[m] = w.scrape(m)
	}
	gone.Kill()
	leader := leaderAmong(w.t, others)
	id := w.ids[gone]
	var claims []claim
	for _, m := range others {
		const disconnected = "etcd_network_disconnected_peers_total"
		claims = append(claims,
			above(m, before[m].sum("etcd_server_leader_changes_seen_total"), "etcd_server_leader_changes_seen_total"),
			exactly(m, 1, "etcd_network_known_peers", "Local", w.ids[m], "Remote", id),
			exactly(m, 0, "etcd_network_active_peers", "Local", w.ids[m], "Remote", id),
			above(m, before[m].sum(disconnected, "Local", w.ids[m], "Remote", id), disconnected, "Local", w.ids[m], "Remote", id),
		)
	}
	// It has something to say to the one that is gone.
	failures := before[leader].sum("etcd_network_peer_sent_failures_total", "To", id)
	claims = append(claims, above(leader, failures, "etcd_network_peer_sent_failures_total", "To", id))
	w.await(claims)

	client := newClient(w.t, others[0].Endpoint(), others[1].Endpoint())
	for i := range 300 {
		put(w.t, client, fmt.Sprint("missed", i), "value")
	}
	gone.Start()
	leader = leaderAmong(w.t, w.Members)
	w.await([]claim{
		above(gone, 0, "etcd_network_snapshot_receive_success"),
		above(gone, 0, "etcd_network_snapshot_receive_total_duration_seconds_count"),
		exactly(gone, 0, "etcd_network_snapshot_receive_inflights_total"),
		exactly(gone, 0, "etcd_server_snapshot_apply_in_progress_total"),
		above(leader, 0, "etcd_network_snapshot_send_success", "To", id),
		above(leader, 0, "etcd_network_snapshot_send_total_duration_seconds_count", "To", id),
		exactly(leader, 0, "etcd_network_snapshot_send_inflights_total", "To", id),
		exactly(leader, 1, "etcd_network_active_peers", "Local", w.ids[leader], "Remote", id),
	})
}

// withoutQuorum checks what a leader shows that loses the others under load, and that all is well when they are back.
func (w *watched) withoutQuorum() {
	w.t.Helper()
	left := leaderAmong(w.t, w.Members)
	others := without(w.Members, left)
	before := w.scrape(left)
	stopWriting := writing(w.t, newClient(w.t, left.Endpoint()))
	for _, m := range others {
		m.Kill()
	}
	// Some were under way when the second one went. Nobody knows what comes of them until the member gives them up.
	w.await([]claim{above(left, 0, "etcd_server_proposals_pending")})
	w.await([]claim{
		exactly(left, 0, "etcd_server_has_leader"),
		exactly(left, 0, "etcd_server_is_leader"),
		above(left, before.sum("etcd_server_proposals_failed_total"), "etcd_server_proposals_failed_total"),
	})
	stopWriting()

	stopReading := w.reading(left)
	w.await([]claim{
		exactly(left, 0, "etcd_server_proposals_pending"),
		above(left, before.sum("etcd_server_slow_read_indexes_total"), "etcd_server_slow_read_indexes_total"),
	})
	for _, m := range others {
		m.Launch()
	}
	for _, m := range others {
		m.AwaitReady()
	}
	leaderAmong(w.t, w.Members)
	// Reads under way see the leader change.
	claims := []claim{above(left, before.sum("etcd_server_read_indexes_failed_total"), "etcd_server_read_indexes_failed_total")}
	for _, m := range w.Members {
		claims = append(claims, exactly(m, 1, "etcd_server_has_leader"))
	}
	w.await(claims)
	stopReading()
}

// reading keeps a linearizable read under way until the function that it gives is called.
func (w *watched) reading(m *harness.Member) func() {
	w.t.Helper()
	kv := etcdserverpb.NewKVClient(wireTo(w.t, m))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			// Errors are what this is for.
			_, _ = kv.Range(ctx, &etcdserverpb.RangeRequest{Key: []byte("key")})
		}
	}()
	stop := func() {
		cancel()
		<-ended
	}
	w.t.Cleanup(stop)
	return stop
}

// withLearner checks what a learner shows of itself, and the leader of promotions.
func (w *watched) withLearner() {
	w.t.Helper()
	healthy(w.t, w.Members, w.Members[0])
	client := newClient(w.t, w.Endpoints("default")...)
	successes := w.sumOfAll("etcd_server_learner_promote_successes")
	refusedWhileLed(w.t, "promotion of a voter", notLearner, w.Members, func(ctx context.Context, leader *harness.Member) error {
		_, err := newClient(w.t, leader.Endpoint()).MemberPromote(ctx, idOf(w.t, leader))
		return err
	})
	m := w.NewMember()
	id := add(w.t, client, m.PeerURL, client.MemberAddAsLearner).Member.ID
	m.Join()
	w.ids[m] = fmt.Sprintf("%x", id)
	claims := []claim{
		exactly(m, 1, "etcd_server_is_learner"),
		exactly(m, 1, "etcd_server_has_leader"),
		exactly(m, 1, "etcd_server_id", "server_id", w.ids[m]),
	}
	for _, other := range without(w.Members, m) {
		claims = append(claims,
			exactly(m, 1, "etcd_network_known_peers", "Local", w.ids[m], "Remote", w.ids[other]),
			exactly(other, 1, "etcd_network_known_peers", "Local", w.ids[other], "Remote", w.ids[m]),
		)
	}
	w.await(claims)
	promote(w.t, client, id)
	w.await([]claim{exactly(m, 0, "etcd_server_is_learner")})
	// The leader of that moment counts.
	awaitNoError(w.t, "a promotion that is counted", func() error {
		now, failures := w.sumOfAll("etcd_server_learner_promote_successes"), w.sumOfAll("etcd_server_learner_promote_failures")
		if now != successes+1 || failures == 0 {
			return fmt.Errorf("promotions: %v, before %v; refused: %v", now, successes, failures)
		}
		return nil
	})
}

// sumOfAll is a metric's sum over all members.
func (w *watched) sumOfAll(name string) float64 {
	w.t.Helper()
	var sum float64
	for _, m := range w.Members {
		sum += w.scrape(m).sum(name)
	}
	return sum
}

// checkFamilies compares what was shown with what should be.
func (w *watched) checkFamilies() {
	w.t.Helper()
	for _, want := range families {
		got := w.shown[want.name]
		if got.kind == "" {
			if !want.rare {
				w.t.Errorf("%s: no member shows it", want.name)
			}
			continue
		}
		equal(w.t, "kind of "+want.name, got.kind, want.kind)
		if !got.sampled {
			if !want.rare {
				w.t.Errorf("%s: no member shows a value", want.name)
			}
			continue
		}
		equal(w.t, "labels of "+want.name, got.labels, want.labels)
		var bounds []string
		for i := range want.bounds {
			bounds = append(bounds, fmt.Sprintf("%.9g", want.least*math.Pow(2, float64(i))))
		}
		if want.bounds > 0 {
			bounds = append(bounds, "+Inf")
		}
		equal(w.t, "buckets of "+want.name, strings.Join(got.bounds, " "), strings.Join(bounds, " "))
	}
}

// claim is what a metric of a member is to come to.
type claim struct {
	m      *harness.Member
	name   string
	labels []string
	want   string
	is     func(value float64) bool
}

// above claims that a metric, summed over all but the labels that are given by name and value, gets above a value.
func above(m *harness.Member, value float64, name string, labels ...string) claim {
	return claim{m, name, labels, fmt.Sprintf("more than %v", value), func(now float64) bool { return now > value }}
}

func exactly(m *harness.Member, value float64, name string, labels ...string) claim {
	return claim{m, name, labels, fmt.Sprint(value), func(now float64) bool { return now == value }}
}

// moves bounds what a metric takes to move. The longest are that of etcd's round trips and of requests without quorum, which take
// some seconds; a metric that does not move is reported, and the test goes on to the next.
const moves = time.Minute

// await waits until all claims hold at once, and reports those that do not.
func (w *watched) await(claims []claim) {
	w.t.Helper()
	var unmet []string
	holds := func() bool {
		unmet = nil
		now := map[*harness.Member]exposition{}
		for _, claim := range claims {
			if _, scraped := now[claim.m]; !scraped {
				now[claim.m] = w.scrape(claim.m)
			}
			if value := now[claim.m].sum(claim.name, claim.labels...); !claim.is(value) {
				unmet = append(unmet, fmt.Sprintf("%s%q of %s: got %v, want %s", claim.name, claim.labels, claim.m.Name, value, claim.want))
			}
		}
		return len(unmet) == 0
	}
	for deadline := time.Now().Add(moves); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, text := range unmet {
				w.t.Error(text)
			}
			return
		}
	}
}

// exposition is one answer of /metrics.
type exposition struct {
	// kinds by family.
	kinds   map[string]string
	samples []sample
}

type sample struct {
	name, family string
	labels       map[string]string
	value        float64
}

// sum of the samples of a name that have these labels, given by name and value.
func (e exposition) sum(name string, labels ...string) float64 {
	var sum float64
next:
	for _, sample := range e.samples {
		if sample.name != name {
			continue
		}
		for pair := range slices.Chunk(labels, 2) {
			if sample.labels[pair[0]] != pair[1] {
				continue next
			}
		}
		sum += sample.value
	}
	return sum
}

var (
	kindLine   = regexp.MustCompile(`^# TYPE (\S+) (counter|gauge|histogram|summary|untyped)$`)
	sampleLine = regexp.MustCompile(`^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$`)
	oneLabel   = regexp.MustCompile(`(\w+)="((?:[^"\\]|\\.)*)"(?:,|$)`)
)

// scrape asks a member for its metrics.
func scrape(t testing.TB, m *harness.Member) exposition {
	t.Helper()
	response, err := http.Get(m.Endpoint() + "/metrics")
	must(t, err)
	defer response.Body.Close()
	equal(t, "code of /metrics", response.StatusCode, http.StatusOK)
	all := exposition{kinds: map[string]string{}}
	family := ""
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		line := lines.Text()
		if kind := kindLine.FindStringSubmatch(line); kind != nil {
			family = kind[1]
			all.kinds[family] = kind[2]
			continue
		}
		if line == "" || strings.HasPrefix(line, "# HELP ") {
			continue
		}
		parts := sampleLine.FindStringSubmatch(line)
		if parts == nil || !strings.HasPrefix(parts[1], family) {
			t.Fatalf("%s has a line in its metrics that is none of %s: %q", m.Name, family, line)
		}
		value, err := strconv.ParseFloat(parts[3], 64)
		must(t, err)
		labels := map[string]string{}
		for _, label := range oneLabel.FindAllStringSubmatch(parts[2], -1) {
			labels[label[1]] = label[2]
		}
		all.samples = append(all.samples, sample{parts[1], family, labels, value})
	}
	must(t, lines.Err())
	return all
}

// shownFamily is what was seen of a family.
type shownFamily struct {
	// kind is empty if it was not seen.
	kind string
	// labels are the names of all samples', in order.
	labels  string
	sampled bool
	// bounds of the buckets, in the order in which they came first.
	bounds []string
}

func noneShown() map[string]*shownFamily {
	shown := map[string]*shownFamily{}
	for _, family := range families {
		shown[family.name] = &shownFamily{}
	}
	return shown
}

// scrape asks a member for its metrics, and notes how families look.
func (w *watched) scrape(m *harness.Member) exposition {
	w.t.Helper()
	now := scrape(w.t, m)
	for name, shown := range w.shown {
		if kind, is := now.kinds[name]; is {
			shown.kind = kind
		}
	}
	for _, sample := range now.samples {
		shown := w.shown[sample.family]
		if shown == nil {
			continue
		}
		bound, isBucket := sample.labels["le"]
		names := slices.Sorted(maps.Keys(sample.labels))
		labels := strings.Join(slices.DeleteFunc(names, func(name string) bool { return name == "le" }), " ")
		if shown.sampled && labels != shown.labels {
			w.t.Fatalf("%s has labels %q and labels %q", sample.family, shown.labels, labels)
		}
		shown.sampled, shown.labels = true, labels
		if isBucket && !slices.Contains(shown.bounds, bound) {
			shown.bounds = append(shown.bounds, bound)
		}
	}
	return now
}
