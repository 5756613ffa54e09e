// Package etcdctl runs the real etcdctl against two tenants of a tenured and, beside it, a real etcd: the same commands in the same
// order. Exit code, standard output and standard error must be the same, line by line, revisions included.
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
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"tenure.dev/tests/harness"
)

// hang bounds a command or a condition that should long be over; it judges nothing. It is longer than commandTimeout.
const hang = 3 * time.Minute

// commandTimeout is how long etcdctl waits for an answer: 5 s, its own, is little for a busy machine.
const commandTimeout = "60s"

func TestMain(m *testing.M) { harness.Main(m) }

// environment of etcdctl: nothing of the caller's, as an ETCDCTL_ variable in it would change what is tested.
func environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"),
		"ETCDCTL_COMMAND_TIMEOUT=" + commandTimeout, "ETCDCTL_DIAL_TIMEOUT=" + commandTimeout,
	}
}

func endpoints(urls ...string) string { return "ETCDCTL_ENDPOINTS=" + strings.Join(urls, ",") }

// endsWithTheTests makes a command not outlive them.
func endsWithTheTests(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// scenario is a story on fresh servers.
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
	// args as one would type them in a shell, with single quotes only. $LEASE1 is the id of the scenario's first lease, and so on;
	// $ENDPOINT is the server's address.
	args  string
	stdin string
	// until is what the command must print before it counts; it is run again until it does.
	until string
	// talk makes this a command that does not end by itself: it is ended after the last turn.
	talk []turn
	// proto is the message that standard output holds, for -w protobuf.
	proto proto.Message
}

// String shows a command as one would type it; a long input is cut.
func (s step) String() string {
	text := "etcdctl " + s.args
	if s.stdin != "" {
		text += fmt.Sprintf(" <<< %.200q", s.stdin)
	}
	return text
}

// turn is what happens while a command runs.
type turn struct {
	// say is a line for its standard input. A command that is spoken to is ended by the end of its input, others by SIGTERM.
	say string
	// run is an etcdctl command that runs beside it, and must succeed.
	run string
	// watchers is how many watchers the server must have before it goes on.
	watchers int
	// ask is an etcdctl command that must print told before it goes on.
	ask, told string
	// lines is how many more lines it must have printed before it goes on.
	lines int
}

// untilItEnds as the lines of a last turn is for a command that then ends by itself.
const untilItEnds = -1

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

// compare plays the scenario on etcd and on two tenants of one tenured at the same time: each must answer as etcd does.
func (s scenario) compare(t *testing.T) {
	program := harness.Tool(t, "etcdctl")
	etcd := harness.StartEtcd(t, s.flags...)
	tenured := harness.StartTenured(t, []string{"acme"}, s.flags...)
	sessions := []*session{
		{name: "etcd", endpoint: etcd.Endpoint()},
		{name: "tenured", endpoint: tenured.Endpoint()},
		{name: "tenured, tenant acme", endpoint: tenured.Endpoints["acme"]},
	}
	var all sync.WaitGroup
	for _, session := range sessions {
		session.scenario, session.program = s, program
		all.Go(session.play)
	}
	all.Wait()
	for i, step := range s.steps {
		for _, session := range sessions {
			if err := session.failures[i]; err != nil {
				t.Errorf("$ %s\n  on %s: %v", step, session.name, err)
			}
			if diff := difference(sessions[0].answers[i], session.answers[i]); diff != "" {
				t.Errorf("$ %s\n  (-etcd +%s)\n%s", step, session.name, diff)
			}
		}
	}
}

// session plays a scenario on one etcd, be it a tenant.
type session struct {
	name     string
	scenario scenario
	program  string
	endpoint string
	// leases are the ids granted so far, in hexadecimal.
	leases []string
	// answers of the steps so far, masked; failures are of steps that could not be played to the end, nil otherwise.
	answers  []string
	failures []error
}

func (s *session) play() {
	for _, step := range s.scenario.steps {
		answer, err := s.run(step)
		s.answers = append(s.answers, s.masked(answer))
		s.failures = append(s.failures, err)
	}
}

// run returns exit code, standard output and standard error as one text.
func (s *session) run(step step) (string, error) {
	if step.until != "" {
		if err := s.awaitOutput(step.args, step.until); err != nil {
			return "", err
		}
	}
	cmd := s.etcdctl(step.args)
	var stdout, stderr bytes.Buffer
	cmd.Stderr = &stderr
	// It gets a pipe even if nothing is said to it: its input must not end before it does.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if step.talk != nil {
		if err := s.awaitWatchers(0); err != nil {
			return "", err
		}
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	watchdog := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
	lines := bufio.NewReader(output)
	if step.talk == nil {
		// What a command does not read is no failure.
		go func() { _, _ = io.WriteString(stdin, step.stdin); _ = stdin.Close() }()
	} else {
		err = s.converse(step.talk, cmd.Process, stdin, lines, &stdout)
	}
	_, _ = io.Copy(&stdout, lines)
	_ = cmd.Wait()
	if !watchdog.Stop() && err == nil {
		err = errors.New("it did not end")
	}
	if strings.HasPrefix(step.args, "lease grant") {
		s.learnLease(stdout.String())
	}
	text := stdout.String()
	if step.proto != nil {
		text = decoded(stdout.Bytes(), step.proto)
	}
	text = fmt.Sprintf("%s\n%s", cmd.ProcessState, text)
	if stderr.Len() > 0 {
		text += "\nstandard error:\n" + stderr.String()
	}
	return text, err
}

// converse takes the turns of a command that runs on, and ends it.
func (s *session) converse(talk []turn, process *os.Process, stdin io.WriteCloser, lines *bufio.Reader, stdout *bytes.Buffer) error {
	spoken := false
	for _, turn := range talk {
		spoken = spoken || turn.say != ""
		if err := s.take(turn, stdin, lines, stdout); err != nil {
			_ = process.Kill()
			return fmt.Errorf("%+v: %w", turn, err)
		}
	}
	if spoken {
		return stdin.Close()
	}
	if err := process.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
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
	if turn.ask != "" {
		if err := s.awaitOutput(turn.ask, turn.told); err != nil {
			return err
		}
	}
	if turn.lines == untilItEnds {
		_, err := io.Copy(stdout, lines)
		return err
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
	return await(func() (bool, error) {
		response, err := http.Get(s.endpoint + "/metrics")
		if err != nil {
			return false, err
		}
		defer response.Body.Close()
		metrics, err := io.ReadAll(response.Body)
		return bytes.Contains(metrics, []byte(gauge)), err
	})
}

// awaitOutput runs a command until it prints this.
func (s *session) awaitOutput(args, want string) error {
	return await(func() (bool, error) {
		output, err := s.etcdctl(args).Output()
		return bytes.Contains(output, []byte(want)), err
	})
}

// await asks until it is so.
func await(is func() (bool, error)) error {
	for deadline := time.Now().Add(hang); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if so, err := is(); so || err != nil {
			return err
		}
	}
	return errors.New("waited in vain")
}

func (s *session) etcdctl(args string) *exec.Cmd {
	for i, lease := range s.leases {
		args = strings.ReplaceAll(args, fmt.Sprintf("$LEASE%d", i+1), lease)
	}
	args = strings.ReplaceAll(args, "$ENDPOINT", s.endpoint)
	cmd := endsWithTheTests(exec.Command(s.program, words(args)...))
	cmd.Env = append(environment(), endpoints(s.endpoint))
	return cmd
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
