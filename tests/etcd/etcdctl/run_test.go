// Package etcdctl runs the real etcdctl against tenured and, beside it, a real etcd: the same commands in the same order. Exit
// code, standard output and standard error must be the same, line by line, revisions included.
//
// Masked is only what two right servers must answer differently: see masks. What Tenure does differently on purpose
// (docs/compatibility.md) or does not have yet (README.md) is left out, with a comment where it would have been.
package etcdctl

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"tenure.dev/tests/harness"
)

// hang bounds a command or a condition that should long be over; it judges nothing.
const hang = time.Minute

// scenario is a story on two fresh servers.
type scenario struct {
	name string
	// flags of both servers.
	flags []string
	// masks beyond those of every scenario.
	masks []mask
	steps []step
}

// step is one etcdctl command.
type step struct {
	// args as one would type them in a shell, with single quotes only. $LEASE1 is the id of the scenario's first lease, and so on.
	args  string
	stdin string
	// talk makes this a command that does not end by itself: it is ended after the last turn.
	talk []turn
	// proto is the message that standard output holds, for -w protobuf.
	proto proto.Message
}

// turn is what happens while a command runs.
type turn struct {
	// say is a line for its standard input. A command that is spoken to is ended by the end of its input, others by SIGINT.
	say string
	// run is an etcdctl command that runs beside it, and must succeed.
	run string
	// watchers is how many watchers the server must have before it goes on.
	watchers int
	// lines is how many more lines it must have printed before it goes on.
	lines int
}

func TestEtcdctl(t *testing.T) {
	for _, s := range slices.Concat(
		readScenarios, writeScenarios, txnScenarios, watchScenarios, leaseScenarios, maintenanceScenarios, recipeScenarios,
	) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			s.compare(t)
		})
	}
}

func (s scenario) compare(t *testing.T) {
	program := harness.Tool(t, "etcdctl")
	etcd := &session{scenario: s, program: program, endpoint: harness.StartEtcd(t, s.flags...).Endpoint()}
	tenured := &session{scenario: s, program: program, endpoint: harness.StartTenured(t, nil, s.flags...).Endpoint()}
	var both sync.WaitGroup
	both.Go(etcd.play)
	both.Go(tenured.play)
	both.Wait()
	for i, step := range s.steps {
		if diff := difference(etcd.answers[i], tenured.answers[i]); diff != "" {
			t.Errorf("$ etcdctl %s   (-etcd +tenured)\n%s", step.args, diff)
		}
	}
}

// session plays a scenario on one server.
type session struct {
	scenario scenario
	program  string
	endpoint string
	// leases are the ids granted so far, in hexadecimal.
	leases []string
	// answers of the steps so far, masked.
	answers []string
}

func (s *session) play() {
	for _, step := range s.scenario.steps {
		s.answers = append(s.answers, s.masked(s.run(step)))
	}
}

// run returns exit code, standard output and standard error as one text.
func (s *session) run(step step) string {
	if step.talk != nil {
		return s.converse(step)
	}
	cmd := s.etcdctl(step.args)
	cmd.Stdin = strings.NewReader(step.stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return err.Error()
	}
	watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	_ = cmd.Wait()
	if strings.HasPrefix(step.args, "lease grant") {
		s.learnLease(stdout.String())
	}
	if step.proto != nil {
		return answer(cmd, decoded(stdout.Bytes(), step.proto), stderr.String())
	}
	return answer(cmd, stdout.String(), stderr.String())
}

// converse runs a command that does not end by itself.
func (s *session) converse(step step) string {
	if err := s.awaitWatchers(0); err != nil {
		return err.Error()
	}
	cmd := s.etcdctl(step.args)
	var stdout, stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err.Error()
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return err.Error()
	}
	if err := cmd.Start(); err != nil {
		return err.Error()
	}
	watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	lines := bufio.NewReader(output)
	spoken := false
	for _, turn := range step.talk {
		spoken = spoken || turn.say != ""
		if err := s.take(turn, stdin, lines, &stdout); err != nil {
			fmt.Fprintf(&stdout, "at %+v: %v\n", turn, err)
			_ = cmd.Process.Kill()
			break
		}
	}
	if spoken {
		_ = stdin.Close()
	} else {
		_ = cmd.Process.Signal(os.Interrupt)
	}
	_, _ = io.Copy(&stdout, lines)
	_ = cmd.Wait()
	return answer(cmd, stdout.String(), stderr.String())
}

func (s *session) take(turn turn, stdin io.Writer, lines *bufio.Reader, stdout *bytes.Buffer) error {
	if turn.say != "" {
		if _, err := io.WriteString(stdin, turn.say+"\n"); err != nil {
			return err
		}
	}
	if turn.run != "" {
		if output, err := s.etcdctl(turn.run).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, output)
		}
	}
	if turn.watchers > 0 {
		if err := s.awaitWatchers(turn.watchers); err != nil {
			return err
		}
	}
	for range turn.lines {
		line, err := lines.ReadString('\n')
		stdout.WriteString(line)
		if err != nil {
			return err
		}
	}
	return nil
}

// awaitWatchers waits until the server has exactly so many watchers, which only its metrics tell from outside.
func (s *session) awaitWatchers(want int) error {
	gauge := fmt.Sprintf("\netcd_debugging_mvcc_watcher_total %d\n", want)
	for deadline := time.Now().Add(hang); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		response, err := http.Get(s.endpoint + "/metrics")
		if err != nil {
			return err
		}
		metrics, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if err != nil {
			return err
		}
		if bytes.Contains(metrics, []byte(gauge)) {
			return nil
		}
	}
	return errors.New("the server does not have so many watchers")
}

func (s *session) etcdctl(args string) *exec.Cmd {
	for i, lease := range s.leases {
		args = strings.ReplaceAll(args, fmt.Sprintf("$LEASE%d", i+1), lease)
	}
	cmd := exec.Command(s.program, words(args)...)
	// Nothing of the caller's environment: an ETCDCTL_ variable in it would change what is tested.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "ETCDCTL_ENDPOINTS=" + s.endpoint}
	return cmd
}

func answer(cmd *exec.Cmd, stdout, stderr string) string {
	text := fmt.Sprintf("%s\n%s", cmd.ProcessState, stdout)
	if stderr != "" {
		text += "\nstandard error:\n" + stderr
	}
	return text
}

// decoded is a readable form of a message, with everything that this etcdctl does not know of.
func decoded(message []byte, as proto.Message) string {
	as = as.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(message, as); err != nil {
		return fmt.Sprintf("%v: %q", err, message)
	}
	text := prototext.MarshalOptions{Multiline: true, EmitUnknown: true}.Format(as)
	// The package varies its spaces from build to build, so that nobody relies on them.
	return regexp.MustCompile(` +`).ReplaceAllString(text, " ")
}

// words splits at spaces, except inside single quotes.
func words(text string) []string {
	var words []string
	var word strings.Builder
	inWord, quoted := false, false
	for _, r := range text + " " {
		switch {
		case r == '\'':
			inWord, quoted = true, !quoted
		case r == ' ' && !quoted:
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	return words
}
