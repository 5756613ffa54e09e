package harness

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// testsRun is set in the environment of the process that runs the tests.
const testsRun = "TENURE_TESTS_RUN"

// Main runs the tests of a package in a process of their own, and says again at the end what failed: of a long output often no
// more than the end is kept, and the servers' lines come behind the test's.
func Main(m *testing.M) {
	if os.Getenv(testsRun) != "" {
		os.Exit(m.Run())
	}
	// The tests' process ends with this thread.
	runtime.LockOSThread()
	output, input, err := os.Pipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	tests := exec.Command(os.Args[0], os.Args[1:]...)
	tests.Env = append(os.Environ(), testsRun+"=1")
	tests.Stdin, tests.Stdout, tests.Stderr = os.Stdin, input, input
	tests.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := tests.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	_ = input.Close()
	r := &report{said: map[string][]string{}}
	for lines := bufio.NewReader(output); ; {
		line, err := lines.ReadString('\n')
		_, _ = io.WriteString(os.Stdout, line)
		r.read(strings.TrimRight(line, "\n"))
		if err != nil {
			break
		}
	}
	err = tests.Wait()
	if err == nil {
		os.Exit(0)
	}
	r.write(os.Stdout)
	code := 2
	if ended := (*exec.ExitError)(nil); errors.As(err, &ended) && ended.ExitCode() > 0 {
		code = ended.ExitCode()
	}
	os.Exit(code)
}

// report takes from the output of tests what those said that failed.
type report struct {
	// test is the one that says what comes next.
	test   string
	failed []string
	said   map[string][]string
	// panicked is how a panic begins.
	panicked []string
	// left is how many further lines belong to what was said last, if they are indented by more than indent.
	left, indent int
}

const (
	// reportLines of one message, reportMessages of one test, and reportBytes of one line are said again.
	reportLines    = 16
	reportMessages = 12
	reportBytes    = 400
	panicLines     = 15
)

var (
	testNamed  = regexp.MustCompile(`^=== (?:RUN|PAUSE|CONT|NAME) +(\S*)`)
	testEnded  = regexp.MustCompile(`^ *--- (FAIL|PASS|SKIP): (\S+) \(`)
	testSaid   = regexp.MustCompile(`^( +)\w+_test\.go:\d+: `)
	beginPanic = regexp.MustCompile(`^(panic|fatal error): `)
)

func (r *report) read(line string) {
	said := testSaid.FindStringSubmatch(line)
	indented := len(line) - len(strings.TrimLeft(line, " "))
	switch named, ended := testNamed.FindStringSubmatch(line), testEnded.FindStringSubmatch(line); {
	case r.panicked != nil:
		if len(r.panicked) < panicLines {
			r.panicked = append(r.panicked, line)
		}
	case beginPanic.MatchString(line):
		r.panicked = []string{line}
	case named != nil:
		r.test, r.left = named[1], 0
	case ended != nil:
		r.test, r.left = ended[2], 0
		if ended[1] == "FAIL" {
			r.failed = append(r.failed, r.test)
		}
	case said != nil:
		r.indent, r.left = len(said[1]), reportLines-1
		r.say("    " + line[r.indent:])
	case r.left > 0 && indented > r.indent:
		r.left--
		r.say("    " + line[r.indent:])
	default:
		r.left = 0
	}
}

func (r *report) say(line string) {
	r.said[r.test] = append(r.said[r.test], cut(line, reportBytes))
}

func (r *report) write(to io.Writer) {
	fmt.Fprintln(to, "\nWhat failed:")
	// Those inside others first: it is they that say why.
	slices.SortStableFunc(r.failed, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	for _, test := range slices.Compact(r.failed) {
		lines := r.said[test]
		fmt.Fprintln(to, test)
		if more := len(lines) - reportMessages*reportLines; more > 0 {
			lines = append(lines[:reportMessages*reportLines:reportMessages*reportLines], fmt.Sprintf("    … and %d lines more", more))
		}
		for _, line := range lines {
			fmt.Fprintln(to, line)
		}
	}
	for _, line := range r.panicked {
		fmt.Fprintln(to, line)
	}
}
