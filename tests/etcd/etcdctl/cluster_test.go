package etcdctl

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"tenure.dev/tests/harness"
)

// clusterSteps are commands about a cluster of three members, m1 the leader. In them $ID1 is the id of m1, $CLIENT1 and $PEER1 are
// its addresses, and so on; m4 does not run before the step that starts it, $PEER5 is nobody's.
var clusterSteps = slices.Concat(
	inShownFormats("member list", "member list --consistency=s", "endpoint status", "endpoint status --cluster",
		"endpoint health", "endpoint health --cluster", "endpoint hashkv", "endpoint hashkv --cluster"),
	fruit,
	inShownFormats("endpoint status --cluster", "endpoint hashkv --cluster", "endpoint hashkv --cluster --rev=5"),
	commands(
		"move-leader",
		"move-leader nonsense",
		"move-leader 123",
		"move-leader $ID2 --endpoints=$CLIENT2",
		"move-leader $ID2",
		"endpoint status --cluster",
		"move-leader $ID1",
		"endpoint status",

		"member add",
		"member add m4",
		"member add m4 --peer-urls=nonsense",
		"member add m4 --peer-urls=$PEER1",
		"member add m4 --peer-urls=$PEER4 --learner",
		"member add m5 --peer-urls=$PEER5 --learner",
	),
	inShownFormats("member list"),
	commands(
		"member promote",
		"member promote nonsense",
		"member promote 123",
		"member promote $ID1",
		"member promote $ID4",
		"move-leader $ID4",
		"member update $ID4",
		"member update nonsense --peer-urls=$PEER5",
		"member update 123 --peer-urls=$PEER5",
		"member update $ID4 --peer-urls=$PEER1",
		"member update $ID4 --peer-urls=$PEER5",
		"member list",
		"member update $ID4 --peer-urls=$PEER4 -w json",
		"member remove",
		"member remove nonsense",
		"member remove 123",
		"member remove $ID4",
		"member list -w table",
		"member add m4 --peer-urls=$PEER4 --learner -w json",
	),
	[]step{{args: startFourth}},
	inShownFormats("member list", "endpoint status --cluster", "endpoint health --cluster"),
	commands(
		"get apple --endpoints=$CLIENT4",
		"get apple --endpoints=$CLIENT4 --consistency=s",
		"put apple --endpoints=$CLIENT4 blue",
		"member promote $ID4",
		"member promote $ID4",
		"member list",
		"endpoint hashkv --cluster",
		"put by 'the fourth' --endpoints=$CLIENT4",
		// Asked to remove itself, etcd may stop before it answers.
		"member remove $ID3 --endpoints=$CLIENT1 -w json",
		"member list -w table",
	),
)

// startFourth is the step that starts m4.
const startFourth = "(start m4)"

// calm lets a member be silent for some seconds before another one is elected, as those of a busy machine are.
var calm = []string{"--heartbeat-interval=500", "--election-timeout=5000"}

// inShownFormats runs each command in the formats that list members below each other.
func inShownFormats(lines ...string) []step {
	var steps []step
	for _, line := range lines {
		steps = append(steps, commands(line, line+" -w table", line+" -w json")...)
	}
	return steps
}

// The same commands about a cluster of etcd and one of tenured.
func TestCluster(t *testing.T) {
	t.Parallel()
	sessions := []*clusterSession{{kind: harness.Etcd}, {kind: harness.Tenured}}
	if os.Getenv("TENURE_CLUSTER") == string(harness.Etcd) {
		// Two of etcd: what is not masked and differs is the suite's fault.
		sessions[1].kind = harness.Etcd
	}
	for again := sessions; len(again) > 0; {
		var all sync.WaitGroup
		for _, s := range again {
			s.start(t)
			all.Go(s.play)
		}
		all.Wait()
		again = slices.DeleteFunc(slices.Clone(sessions), func(s *clusterSession) bool { return s.disturbed == "" })
		for _, s := range again {
			if s.tries == mostTries {
				t.Fatalf("%s was disturbed %d times: %s", s.kind, s.tries, s.disturbed)
			}
			t.Logf("%s was disturbed: %s", s.kind, s.disturbed)
		}
	}
	for i, step := range clusterSteps {
		for _, s := range sessions {
			if i < len(s.failures) && s.failures[i] != nil {
				t.Errorf("$ %s\n  on %s: %v", step, s.kind, s.failures[i])
			}
		}
		if diff := difference(sessions[0].answers[i], sessions[1].answers[i]); diff != "" {
			t.Errorf("$ %s\n  (-%s +%s)\n%s", step, sessions[0].kind, sessions[1].kind, diff)
		}
	}
}

// mostTries is how often a session begins anew: what disturbs each of so many is no accident.
const mostTries = 4

// clusterSession plays the steps on one cluster.
type clusterSession struct {
	kind     harness.Kind
	t        *testing.T
	program  string
	cluster  *harness.Cluster
	fourth   *harness.Member
	client   *clientv3.Client
	peers    []string
	clients  []string
	ids      [4]uint64
	answers  []string
	failures []error
	// term in which the cluster has its leader.
	term uint64
	// disturbed says why nothing can be said of the answers: the cluster had an election that no step asked for, in which commands
	// get other answers, or nobody knows what came of a command. The session is then played on a new cluster.
	disturbed string
	tries     int
}

// start makes m1 the leader of a new cluster.
func (s *clusterSession) start(t *testing.T) {
	t.Helper()
	if s.cluster != nil {
		for _, m := range s.cluster.Members {
			m.Kill()
		}
	}
	*s = clusterSession{kind: s.kind, tries: s.tries + 1, t: t, program: harness.Tool(t, "etcdctl")}
	s.cluster = harness.StartCluster(t, s.kind, 3, nil, calm...)
	s.clients = s.cluster.Endpoints("default")
	var err error
	s.client, err = clientv3.New(clientv3.Config{Endpoints: s.clients, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.client.Close() })
	if err := await(s.firstLeads); err != nil {
		t.Fatalf("m1 of %s as the leader: %v", s.kind, err)
	}
	for _, m := range s.cluster.Members {
		s.peers = append(s.peers, m.PeerURL)
	}
	s.fourth = s.cluster.NewMember()
	s.clients = append(s.clients, s.fourth.Endpoint())
	s.peers = append(s.peers, s.fourth.PeerURL, "http://"+harness.FreeAddress(t))
}

// firstLeads says whether all members know m1 as their leader, and are of the version that they have in the end. If another
// leads, it is asked to let m1.
func (s *clusterSession) firstLeads() (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	lead, ready := "", true
	var first, leader uint64
	for i, m := range s.cluster.Members {
		status, err := s.client.Status(ctx, m.Endpoint())
		if err != nil {
			return false, nil
		}
		if i == 0 {
			first, leader, s.term = status.Header.MemberId, status.Leader, status.RaftTerm
		}
		if status.Leader == status.Header.MemberId {
			lead = m.Endpoint()
		}
		ready = ready && status.Leader == leader && status.RaftTerm == s.term && status.StorageVersion == "3.7.0"
	}
	if lead == "" || leader == first {
		return ready && leader == first, nil
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{lead}, Logger: zap.NewNop()})
	if err != nil {
		return false, err
	}
	// It may lead no more; the next look tells.
	_, _ = client.MoveLeader(ctx, first)
	return false, client.Close()
}

func (s *clusterSession) play() {
	for _, step := range clusterSteps {
		answer, err := s.answer(step)
		if s.disturbed != "" {
			s.disturbed = fmt.Sprintf("$ %s: %s", step, s.disturbed)
			return
		}
		s.answers = append(s.answers, s.comparable(answer))
		s.failures = append(s.failures, err)
	}
}

// answer runs a step on members that are all as far as the others, and waits until they are so again.
func (s *clusterSession) answer(step step) (string, error) {
	if err := s.level(); err != nil {
		return "", err
	}
	if step.args == startFourth {
		// A new member asks any of the others who they all are, which must have heard of it.
		if err := await(s.knownToAll); err != nil {
			return "", err
		}
		s.fourth.LaunchJoining()
		return "", await(s.fourthAnswers)
	}
	answer, err := s.settled(step.args)
	if strings.Contains(answer, "Leadership transferred") {
		s.term++
	}
	if err == nil {
		err = s.level()
	}
	return answer, err
}

// level waits until all members that run have applied the same, and learns who the members are. It notes elections that nobody
// asked for.
func (s *clusterSession) level() error {
	return await(func() (bool, error) {
		ctx, cancel := context.WithTimeout(context.Background(), hang)
		defer cancel()
		members, err := s.client.MemberList(ctx)
		if err != nil {
			return false, nil
		}
		s.learnIDs(members.Members)
		var index uint64
		var applied []uint64
		for _, m := range s.cluster.Members {
			is := func(member *etcdserverpb.Member) bool { return slices.Contains(member.PeerURLs, m.PeerURL) }
			if !m.Running() || !slices.ContainsFunc(members.Members, is) {
				continue
			}
			status, err := s.client.Status(ctx, m.Endpoint())
			if err != nil || status.Leader == 0 || status.RaftTerm < s.term {
				return false, nil
			}
			if status.RaftTerm > s.term {
				s.disturbed = fmt.Sprintf("term %d came after %d", status.RaftTerm, s.term)
				return true, nil
			}
			index, applied = max(index, status.RaftIndex), append(applied, status.RaftAppliedIndex)
		}
		return !slices.ContainsFunc(applied, func(of uint64) bool { return of != index }), nil
	})
}

// knownToAll says whether each of the first three itself has m4 among its members.
func (s *clusterSession) knownToAll() (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	for _, endpoint := range s.clients[:3] {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
		if err != nil {
			return false, err
		}
		resp, err := client.MemberList(ctx, clientv3.WithSerializable())
		_ = client.Close()
		if err != nil || !slices.ContainsFunc(resp.Members, func(m *etcdserverpb.Member) bool { return m.ID == s.ids[3] }) {
			return false, nil
		}
	}
	return true, nil
}

// fourthAnswers says whether m4 answers, and its name is known.
func (s *clusterSession) fourthAnswers() (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := s.client.Status(ctx, s.fourth.Endpoint()); err != nil {
		return false, nil
	}
	resp, err := s.client.MemberList(ctx)
	return err == nil && !slices.ContainsFunc(resp.Members, func(m *etcdserverpb.Member) bool { return m.Name == "" }), nil
}

// learnIDs finds the ids by the peer URLs.
func (s *clusterSession) learnIDs(members []*etcdserverpb.Member) {
	for _, m := range members {
		for i, url := range s.peers[:len(s.ids)] {
			if slices.Contains(m.PeerURLs, url) {
				s.ids[i] = m.ID
			}
		}
	}
}

// unsettled is what a cluster says as long as its members are not connected for a while.
const unsettled = "etcdserver: unhealthy cluster"

var (
	// unanswered is what etcdctl says when no leader answered, or when it is not known what came of a command.
	unanswered = regexp.MustCompile(`etcdserver: (leader changed|request timed out|no leader)|transport: |connection error|context deadline exceeded`)
	// changing are commands that may not be repeated then.
	changing = regexp.MustCompile(`^(member (add|remove|update|promote)|move-leader|put)\b`)
)

// settled runs a command until the cluster is settled enough for it.
func (s *clusterSession) settled(args string) (string, error) {
	var answer string
	err := await(func() (bool, error) {
		cmd := s.etcdctl(args)
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			return false, err
		}
		watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		if !watchdog.Stop() {
			return false, fmt.Errorf("it did not end: %s", stderr.String())
		}
		answer = fmt.Sprintf("%s\n%s", cmd.ProcessState, stdout.String())
		if stderr.Len() > 0 {
			answer += "\nstandard error:\n" + stderr.String()
		}
		if unanswered.MatchString(answer) && changing.MatchString(args) {
			s.disturbed = answer
			return true, nil
		}
		// Not in sync is right for a learner that does not run.
		waits := strings.Contains(answer, unsettled) || unanswered.MatchString(answer) ||
			// An id comes from the URLs and the second: for etcd, one that is added and removed and added in the same second was removed.
			(strings.HasPrefix(args, "member add") && strings.Contains(answer, "member not found")) ||
			(args == "member promote $ID4" && s.fourth.Running() && strings.Contains(answer, "in sync with leader"))
		return !waits, nil
	})
	return answer, err
}

func (s *clusterSession) etcdctl(args string) *exec.Cmd {
	for i, id := range s.ids {
		args = strings.ReplaceAll(args, fmt.Sprintf("$ID%d", i+1), fmt.Sprintf("%x", id))
	}
	for i, url := range s.clients {
		args = strings.ReplaceAll(args, fmt.Sprintf("$CLIENT%d", i+1), url)
	}
	for i, url := range s.peers {
		args = strings.ReplaceAll(args, fmt.Sprintf("$PEER%d", i+1), url)
	}
	cmd := endsWithTheTests(exec.Command(s.program, words(args)...))
	cmd.Env = environment()
	// It refuses to be told twice.
	if !strings.Contains(args, "--endpoints") {
		cmd.Env = append(cmd.Env, endpoints(s.clients[:3]...))
	}
	return cmd
}

var clusterMasks = slices.Concat(tablePadding, []mask{
	hide(`(cluster_id"?:"?)[0-9a-f]+`, "${1}ID"),
	hide(` (in|to|from) cluster\s+[0-9a-f]+`, " $1 cluster ID"),
	// Which member is asked first is the client's choice.
	hide(`"peer":"Peer\{[^}]*\}"`, `"peer":"PEER"`),
	hide(`raft_term"?:\d+`, "raft_term:TERM"),
	hide(`"?(dbSize|dbSizeInUse|raftIndex|raftAppliedIndex|raftTerm|hash|dbSizeQuota)"?:[1-9]\d*`, `"$1":N`),
	// Of m4 it is etcd's older one for a while.
	hide(`"?storageVersion"?:"3\.\d\.0"`, `"storageVersion":"VERSION"`),
	hide(`(CLIENT4, ID4, 3\.7\.\d+, )3\.\d\.0`, "${1}3.7.0"),
	hide(`(│ CLIENT4 │ ID4 │ 3\.7\.\d+ │ )3\.\d\.0`, "${1}3.7.0"),
	hide(`"?version"?:"3\.7\.\d+"`, `"version":"VERSION"`),
	hide(`(CLIENT\d), (ID\d), 3\.7\.\d+, (3\.7\.0), [\d.]+ [kM]?B, [\d.]+ [kM]?B, \d+%, (.*, (?:true|false), (?:true|false)), \d+, \d+, \d+, `,
		"$1, $2, VERSION, $3, SIZE, SIZE, SHARE, $4, TERM, INDEX, INDEX, "),
	hide(`│ 3\.7\.\d+ │ (3\.7\.0) │ [\d.]+ [kM]?B │ [\d.]+ [kM]?B │ \d+% │ (.* │ (?:true|false) │ (?:true|false)) │ \d+ │ \d+ │ \d+ │`,
		"│ VERSION │ $1 │ SIZE │ SIZE │ SHARE │ $2 │ TERM │ INDEX │ INDEX │"),
	// All members hold the same; what that hash is follows from the ids of nobody, but from how each server keeps its history.
	hide(`(CLIENT\d), \d+, (\d+)`, "$1, HASH, $2"),
	hide(`│ (CLIENT\d) │ \d+ │ (\d+) │`, "│ $1 │ HASH │ $2 │"),
	logTime, clientPointer,
}, tookMasks)

// comparable hides ids, addresses and the order of ids.
func (s *clusterSession) comparable(answer string) string {
	lines := strings.Split(answer, "\n")
	for i, line := range lines {
		lines[i] = s.sortedJSON(line)
	}
	for i := 0; i < len(lines); i++ {
		first := i
		for i < len(lines) && ofMember.MatchString(lines[i]) {
			i++
		}
		slices.Sort(lines[first:i])
	}
	return strings.Join(lines, "\n")
}

// ofMember is a line of a list of members.
var ofMember = regexp.MustCompile(`^(│ )?(ID|CLIENT)\d`)

func (s *clusterSession) masked(text string) string {
	for i, id := range s.ids {
		if id != 0 {
			for _, form := range []string{strconv.FormatUint(id, 10), fmt.Sprintf("%016x", id), fmt.Sprintf("%x", id)} {
				text = strings.ReplaceAll(text, form, fmt.Sprintf("ID%d", i+1))
			}
		}
	}
	for i, url := range s.clients {
		text = strings.ReplaceAll(text, strings.TrimPrefix(url, "http://"), fmt.Sprintf("CLIENT%d", i+1))
	}
	for i, url := range s.peers {
		text = strings.ReplaceAll(text, strings.TrimPrefix(url, "http://"), fmt.Sprintf("PEER%d", i+1))
	}
	text = strings.ReplaceAll(text, "http://", "")
	text = initialCluster.ReplaceAllStringFunc(text, func(list string) string {
		members := strings.Split(list, ",")
		slices.Sort(members)
		return strings.Join(members, ",")
	})
	for _, mask := range clusterMasks {
		text = mask.pattern.ReplaceAllString(text, mask.with)
	}
	return text
}

// initialCluster is the members as a flag takes them, in the order of their ids.
var initialCluster = regexp.MustCompile(`m\d=PEER\d(,m\d=PEER\d)+`)

// sortedJSON is a line with the lists of objects in it in an order that does not depend on ids, if it is JSON, and masked.
func (s *clusterSession) sortedJSON(line string) string {
	decoder := json.NewDecoder(strings.NewReader(line))
	decoder.UseNumber()
	var value any
	if !strings.HasPrefix(line, "{") && !strings.HasPrefix(line, "[") || decoder.Decode(&value) != nil {
		return s.masked(line)
	}
	return s.text(value)
}

func (s *clusterSession) text(value any) string {
	var parts []string
	switch value := value.(type) {
	case map[string]any:
		for name, inner := range value {
			// The member that answers is any of them.
			if name != "member_id" {
				parts = append(parts, s.masked(fmt.Sprintf("%q:%s", name, s.text(inner))))
			}
		}
		slices.Sort(parts)
		return "{" + strings.Join(parts, ",") + "}"
	case []any:
		for _, inner := range value {
			parts = append(parts, s.text(inner))
		}
		slices.Sort(parts)
		return "[" + strings.Join(parts, ",") + "]"
	default:
		text, err := json.Marshal(value)
		if err != nil {
			return err.Error()
		}
		return s.masked(string(text))
	}
}
