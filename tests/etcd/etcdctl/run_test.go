// Package etcdctl runs the real etcdctl against tenured and, beside it, a real etcd: the same commands in the same order, and
// everything etcdctl prints must be the same, line by line, revisions included.
//
// Masked is only what two right servers must answer differently, see masks. What Tenure does differently on purpose
// (docs/compatibility.md) or does not have yet (README.md) is left out, with a comment where it would have been.
package etcdctl

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tenure.dev/tests/harness"
)

// hang bounds a command that should long be over; it judges nothing.
const hang = time.Minute

// step is one command of a scenario.
type step struct {
	// args of etcdctl, split at spaces except inside single quotes. $LEASE is the id that the scenario's last grant got.
	args  string
	stdin string
	// For commands that do not end by themselves: what to run beside it, and the lines it must print until it is ended.
	beside []string
	lines  int
}

// scenario is a story on two fresh servers.
type scenario struct {
	name  string
	flags []string
	// masks beyond those of every scenario.
	masks []mask
	steps []step
}

// mask replaces what differs between two right servers.
type mask struct {
	pattern *regexp.Regexp
	with    string
}

func hide(pattern, with string) mask { return mask{regexp.MustCompile(pattern), with} }

// masks of every scenario: addresses, ids, terms, and the client's own timings and pointers.
var masks = []mask{
	hide(`(http://)?127\.0\.0\.1:\d+`, "ENDPOINT"),
	hide(`"(cluster_id|member_id|raft_term)":\d+`, `"$1":ID`),
	hide(`"(ClusterID|MemberID|RaftTerm)" : \d+`, `"$1" : ID`),
	hide(`took (= )?[\d.]+[µm]?s`, "took TIME"),
	hide(`"took":"[\d.]+[µm]?s"`, `"took":"TIME"`),
	hide(`"ts":"[^"]+"`, `"ts":"TIME"`),
	hide(`etcd-endpoints://0x[0-9a-f]+`, "etcd-endpoints://POINTER"),
}

func (s scenario) run(t *testing.T) {
	var etcd, tenured *transcript
	var both sync.WaitGroup
	both.Go(func() { etcd = s.on(t, harness.StartEtcd(t, s.flags...)) })
	both.Go(func() { tenured = s.on(t, harness.StartTenured(t, nil, s.flags...)) })
	both.Wait()
	if t.Failed() {
		return
	}
	for i, step := range s.steps {
		if etcd.answers[i] != tenured.answers[i] {
			t.Errorf("etcdctl %s\n%s", step.args, difference(etcd.answers[i], tenured.answers[i]))
		}
	}
}

// transcript is what one server made etcdctl print, one answer for each step.
type transcript struct{ answers []string }

func (s scenario) on(t *testing.T, server *harness.Server) *transcript {
	result := &transcript{}
	lease := ""
	for _, step := range s.steps {
		raw, err := step.run(t, server, lease)
		if err != nil {
			t.Errorf("etcdctl %s: %v", step.args, err)
			return result
		}
		if granted := regexp.MustCompile(`lease ([0-9a-f]{16}) granted`).FindStringSubmatch(raw); granted != nil {
			lease = granted[1]
		}
		result.answers = append(result.answers, s.masked(raw, lease))
	}
	return result
}

func (s scenario) masked(text, lease string) string {
	if lease != "" {
		number, err := strconv.ParseInt(lease, 16, 64)
		if err == nil {
			text = strings.ReplaceAll(text, strconv.FormatInt(number, 10), "LEASE")
		}
		text = strings.ReplaceAll(text, lease, "LEASE")
	}
	for _, masks := range [][]mask{masks, s.masks} {
		for _, mask := range masks {
			text = mask.pattern.ReplaceAllString(text, mask.with)
		}
	}
	return text
}

// run returns the exit code, standard output and standard error as one text.
func (s step) run(t *testing.T, server *harness.Server, lease string) (string, error) {
	if s.lines > 0 {
		return s.runUntilLines(t, server, lease)
	}
	cmd := etcdctl(t, server, s.args, lease)
	cmd.Stdin = strings.NewReader(s.stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return "", err
	}
	watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	_ = cmd.Wait()
	return fmt.Sprintf("exit %d\n%s\nstderr:\n%s", cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()), nil
}

// runUntilLines runs the commands beside it, and ends the command when it has printed as many lines as expected.
func (s step) runUntilLines(t *testing.T, server *harness.Server, lease string) (string, error) {
	cmd := etcdctl(t, server, s.args, lease)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	if _, err := stdin.Write([]byte(s.stdin)); err != nil {
		return "", err
	}
	for _, args := range s.beside {
		if out, err := etcdctl(t, server, args, lease).CombinedOutput(); err != nil {
			return "", fmt.Errorf("etcdctl %s: %w: %s", args, err, out)
		}
	}
	var lines []string
	reader := bufio.NewReader(output)
	for len(lines) < s.lines {
		line, err := reader.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("ended after %q: %w", lines, err)
		}
		lines = append(lines, line)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return strings.Join(lines, ""), nil
}

func etcdctl(t *testing.T, server *harness.Server, args, lease string) *exec.Cmd {
	cmd := exec.Command(harness.Tool(t, "etcdctl"), words(strings.ReplaceAll(args, "$LEASE", lease))...)
	cmd.Env = append(os.Environ(), "ETCDCTL_ENDPOINTS="+server.Endpoint())
	return cmd
}

// words splits at spaces, except inside single quotes.
func words(text string) []string {
	var words []string
	for i, part := range strings.Split(text, "'") {
		if i%2 == 1 {
			words = append(words, part)
		} else {
			words = append(words, strings.Fields(part)...)
		}
	}
	return words
}

// difference shows both answers where they differ first, with a few lines around.
func difference(etcd, tenured string) string {
	a, b := strings.Split(etcd, "\n"), strings.Split(tenured, "\n")
	at := 0
	for at < len(a) && at < len(b) && a[at] == b[at] {
		at++
	}
	around := func(lines []string) string {
		return strings.Join(lines[max(0, min(at-2, len(lines))):min(len(lines), at+6)], "\n    ")
	}
	return fmt.Sprintf("line %d differs\n  etcd:\n    %s\n  tenured:\n    %s", at+1, around(a), around(b))
}
