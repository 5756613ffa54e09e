package cluster

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"tenure.dev/tests/harness"
)

// answer is the code and the body of an answer of HTTP.
type answer struct {
	code int
	body string
}

const (
	isHealthy = `{"health":"true","reason":""}`
	isOK      = "ok\n"
)

// ofLive is the same in all states: a member that reads what it has is alive.
var ofLive = map[string]answer{
	"/health?serializable=true": {200, isHealthy},
	"/livez":                    {200, isOK},
	"/livez?verbose":            {200, "[+]serializable_read ok\n" + isOK},
	"/livez/serializable_read":  {200, isOK},
	"/readyz/data_corruption":   {200, isOK},
	"/readyz/serializable_read": {200, isOK},
	"/readyz?exclude=non_learner&exclude=linearizable_read": {200, isOK},
	"/livez/linearizable_read":                              {404, "404 page not found\n"},
}

// Supervisors of etcd ask these to know whether a member is to be restarted, or left alone until it is ready.
func TestReadyz(t *testing.T) {
	onBoth(t, func(t *testing.T, kind harness.Kind) {
		c := harness.StartCluster(t, kind, 3, nil, calm...)
		leader := leaderAmong(t, c.Members)
		const allOK = "[+]data_corruption ok\n[+]linearizable_read ok\n[+]non_learner ok\n[+]serializable_read ok\n" + isOK
		ready := map[string]answer{
			"/health":                                {200, isHealthy},
			"/readyz":                                {200, isOK},
			"/readyz?verbose":                        {200, allOK},
			"/readyz?verbose&exclude=non_learner":    {200, strings.Replace(allOK, "[+]non_learner ok\n", "", 1)},
			"/readyz/linearizable_read":              {200, isOK},
			"/readyz/linearizable_read?verbose=true": {200, "[+]linearizable_read ok\n" + isOK},
			"/readyz/non_learner":                    {200, isOK},
		}
		for _, m := range c.Members {
			awaitAnswers(t, m, ofLive)
			awaitAnswers(t, m, ready)
		}

		healthy(t, c.Members, c.Members[0])
		client := newClient(t, leader.Endpoint())
		m := c.NewMember()
		id := add(t, client, m.PeerURL, client.MemberAddAsLearner).Member.ID
		m.Join()
		const ofLearner = "[+]data_corruption ok\n[+]linearizable_read ok\n[+]serializable_read ok\n[-]non_learner failed: not supported for learner\n\n"
		awaitAnswers(t, m, ofLive)
		awaitAnswers(t, m, map[string]answer{
			"/health":                     {200, isHealthy},
			"/readyz":                     {503, ofLearner},
			"/readyz?verbose":             {503, ofLearner},
			"/readyz?exclude=non_learner": {200, isOK},
			"/readyz/linearizable_read":   {200, isOK},
			"/readyz/non_learner":         {503, "[-]non_learner failed: not supported for learner\n\n"},
		})
		c.Forget(m)
		removed(t, client, id)
		m.Kill()

		left := leaderAmong(t, c.Members)
		for _, other := range without(c.Members, left) {
			other.Kill()
		}
		await(t, "the last member to know that it has no leader", func() bool {
			status, err := statusOf(t, left)
			return err == nil && status.Leader == 0
		})
		const noRead = "[-]linearizable_read failed: etcdserver: request timed out\n"
		const leaderless = "[+]data_corruption ok\n[+]non_learner ok\n[+]serializable_read ok\n" + noRead + "\n"
		checkAnswers(t, left, ofLive)
		checkAnswers(t, left, map[string]answer{
			"/health":                           {503, `{"health":"false","reason":"RAFT NO LEADER"}` + "\n"},
			"/readyz":                           {503, leaderless},
			"/readyz?verbose":                   {503, leaderless},
			"/readyz?exclude=linearizable_read": {200, isOK},
			"/readyz/linearizable_read":         {503, noRead + "\n"},
			"/readyz/non_learner":               {200, isOK},
		})
	})
}

// awaitAnswers waits until a member answers so: one that just started may need a moment.
func awaitAnswers(t *testing.T, m *harness.Member, want map[string]answer) {
	t.Helper()
	for path, want := range want {
		awaitNoError(t, fmt.Sprintf("the answer of %s to %s", m.Name, path), func() error {
			if got := ask(t, m, path); got != want {
				return fmt.Errorf("got %d %q, want %d %q", got.code, got.body, want.code, want.body)
			}
			return nil
		})
	}
}

// checkAnswers asks for all at once: some take as long as the member waits for a leader.
func checkAnswers(t *testing.T, m *harness.Member, want map[string]answer) {
	t.Helper()
	var all sync.WaitGroup
	for path, want := range want {
		all.Go(func() {
			if got := ask(t, m, path); got != want {
				t.Errorf("%s of %s: got %d %q, want %d %q", path, m.Name, got.code, got.body, want.code, want.body)
			}
		})
	}
	all.Wait()
}

// ask gives the answer to a path. The lines of checks, which come in no order, are sorted.
func ask(t *testing.T, m *harness.Member, path string) answer {
	t.Helper()
	request, err := http.NewRequestWithContext(testContext(t), http.MethodGet, m.Endpoint()+path, nil)
	if err != nil {
		return answer{body: err.Error()}
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{body: err.Error()}
	}
	lines := strings.SplitAfter(string(body), "\n")
	checks := 0
	for checks < len(lines) && strings.HasPrefix(lines[checks], "[") {
		checks++
	}
	slices.Sort(lines[:checks])
	return answer{response.StatusCode, strings.Join(lines, "")}
}
