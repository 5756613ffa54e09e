// Package harness starts real server processes for the Go tests: tenured and, beside it, etcd.
//
// The binaries are built by the Makefile, which names them in the environment: TENURED is the server under test,
// TENURE_TOOLS the directory that holds etcd, etcdctl and kube-apiserver. Run the tests through make.
//
// A process keeps its ports and its data directory over Kill and Start, so that clients see what they would see of a
// member that crashes and comes back.
package harness

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// readyLine is printed by both servers once they answer.
const readyLine = "ready to serve client requests"

// startTimeout bounds a start that hangs; it judges nothing.
const startTimeout = 3 * time.Minute

// Server is one server process and what is needed to start it again.
type Server struct {
	// Endpoints are the client URLs by tenant; a real etcd has the one named "default".
	Endpoints map[string]string
	// DataDir holds the server's state; it is removed after the test.
	DataDir string

	t      testing.TB
	name   string
	path   string
	scheme string
	args   []string
	// env is the process's environment; nil for the test's own.
	env []string
	log *tailWriter
	cmd *exec.Cmd
	// ready is closed at the ready line of the running process, or at its end.
	ready chan struct{}
	// relaunch is Launch, or what a member has instead.
	relaunch func()
}

// Tool returns the path of a binary that the Makefile built, by its file name.
func Tool(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("TENURE_TOOLS")
	if dir == "" {
		t.Fatal("TENURE_TOOLS is not set: run the Go tests through make")
	}
	return existing(t, filepath.Join(dir, name))
}

func tenuredPath(t testing.TB) string {
	t.Helper()
	path := os.Getenv("TENURED")
	if path == "" {
		t.Fatal("TENURED is not set: run the Go tests through make")
	}
	return existing(t, path)
}

func existing(t testing.TB, path string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run the Go tests through make, which builds it", err)
	}
	return path
}

// StartTenured starts tenured with a listener for the tenant default and one for each of tenants, and returns when it
// is ready. It is killed at the end of the test.
func StartTenured(t testing.TB, tenants []string, flags ...string) *Server {
	t.Helper()
	s := newServer(t, "tenured", tenuredPath(t))
	s.args = append(s.args, "--data-dir", s.DataDir)
	s.args = append(s.args, "--listen-client-urls", s.endpoint("default"), "--advertise-client-urls", s.Endpoints["default"])
	for _, tenant := range tenants {
		s.args = append(s.args, "--tenant-listen", tenant+"="+s.endpoint(tenant))
	}
	s.args = append(s.args, flags...)
	s.Start()
	return s
}

// StartEtcd starts a real etcd of one member and returns when it is ready. It is killed at the end of the test.
func StartEtcd(t testing.TB, flags ...string) *Server {
	t.Helper()
	s := newServer(t, "etcd", Tool(t, "etcd"))
	peer := freeURL(t)
	s.args = append(s.args, "--data-dir", s.DataDir, "--name", "default",
		"--listen-client-urls", s.endpoint("default"), "--advertise-client-urls", s.Endpoints["default"],
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	s.args = append(s.args, flags...)
	s.Start()
	return s
}

func newServer(t testing.TB, name, path string) *Server {
	s := &Server{
		Endpoints: map[string]string{},
		DataDir:   filepath.Join(t.TempDir(), name),
		t:         t,
		name:      name,
		path:      path,
		scheme:    "http",
		log:       &tailWriter{},
	}
	s.relaunch = s.Launch
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() {
			t.Logf("last lines of %s:\n%s", name, s.log.tail())
		}
	})
	return s
}

// endpoint gives a tenant a free address of its own.
func (s *Server) endpoint(tenant string) string {
	s.Endpoints[tenant] = s.scheme + "://" + FreeAddress(s.t)
	return s.Endpoints[tenant]
}

// Endpoint is the client URL of the tenant default.
func (s *Server) Endpoint() string { return s.Endpoints["default"] }

// Start runs the process and waits for its ready line. The process must not be running.
func (s *Server) Start() {
	s.t.Helper()
	s.Launch()
	s.AwaitReady()
}

// Launch runs the process and returns at once: a member of a cluster is not ready before most of the others run too.
func (s *Server) Launch() {
	s.t.Helper()
	output, input, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd = exec.Command(s.path, s.args...)
	s.cmd.Stdout, s.cmd.Stderr = input, input
	s.cmd.Env = s.env
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = s.cmd.Start()
	_ = input.Close()
	if err != nil {
		s.t.Fatal(err)
	}
	s.ready = make(chan struct{})
	go s.log.copy(output, s.ready)
}

// addressTaken is what a process says that ends because somebody has its address.
const addressTaken = "address already in use"

// AwaitReady waits for the ready line of a process that was launched. If somebody has its address for a moment, it is launched
// again: clients know it by this address.
func (s *Server) AwaitReady() {
	s.t.Helper()
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(100 * time.Millisecond) {
		select {
		case <-s.ready:
		case <-time.After(time.Until(deadline)):
			s.t.Fatalf("%s did not become ready", s.name)
		}
		if s.log.sawReady() {
			return
		}
		_ = s.cmd.Wait()
		if !s.log.says(addressTaken) || time.Now().After(deadline) {
			s.t.Fatalf("%s ended at start: %v", s.name, s.cmd.ProcessState)
		}
		s.relaunch()
	}
}

// Kill ends the process with SIGKILL and waits until it is gone; a second call does nothing.
func (s *Server) Kill() {
	if s.cmd == nil || s.cmd.ProcessState != nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Restart is kill -9 and a start on the same ports and data.
func (s *Server) Restart() {
	s.t.Helper()
	s.Kill()
	s.Start()
}

// Terminate sends SIGTERM and returns how the process ended.
func (s *Server) Terminate() *os.ProcessState {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	_ = s.cmd.Wait()
	return s.cmd.ProcessState
}

// Pid of the running process.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// nextPort counts the ports that were looked at; none is looked at twice before all were.
var nextPort atomic.Uint32

func freeURL(t testing.TB) string {
	t.Helper()
	return "http://" + FreeAddress(t)
}

// FreeAddress finds a loopback address, host and port, that nothing listens on, and keeps it for the test until its end.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener := listen(t)
	defer listener.Close()
	return listener.Addr().String()
}

// listen takes a port of those below what the system gives to outgoing connections, which could take one while nobody listens.
// Until the test's end the same port of another address of this machine is held: for as long, other tests find it taken, those
// in Rust (tests/src/cluster.rs) too. Test programs that run side by side begin at different places.
func listen(t testing.TB) net.Listener {
	t.Helper()
	const lowest, ports = 10_000, 20_000
	for range ports {
		port := lowest + (uint32(os.Getpid())*1499+nextPort.Add(1))%ports
		claim, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", port))
		if err != nil {
			continue
		}
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			_ = claim.Close()
			continue
		}
		t.Cleanup(func() { _ = claim.Close() })
		return listener
	}
	t.Fatal("no free port")
	return nil
}

// tailWriter keeps the last lines of a process's output for the report of a failure. Lines of raft are kept apart, so that
// a member without a leader, which says much, hides nothing else.
type tailWriter struct {
	mu    sync.Mutex
	count int
	other []numbered
	raft  []numbered
	ready bool
}

type numbered struct {
	number int
	text   string
}

// How many lines a failed test shows of each kind, and how much of a line.
const (
	tailLines     = 40
	raftTailLines = 20
	tailLineBytes = 500
)

// ofRaft is in the lines in which raft tells what it does, of tenured and of etcd.
var ofRaft = []string{`"caller":"raft:`, `"logger":"raft"`}

// copy reads lines until the process closes its output; ready is closed at the ready line or at the end.
func (w *tailWriter) copy(output io.ReadCloser, ready chan<- struct{}) {
	defer output.Close()
	w.mu.Lock()
	w.ready = false
	w.mu.Unlock()
	var once sync.Once
	lines := bufio.NewReader(output)
	for {
		line, err := lines.ReadString('\n')
		w.mu.Lock()
		if line != "" {
			w.keep(strings.TrimRight(line, "\n"))
		}
		if strings.Contains(line, readyLine) {
			w.ready = true
			once.Do(func() { close(ready) })
		}
		w.mu.Unlock()
		if err != nil {
			once.Do(func() { close(ready) })
			return
		}
	}
}

func (w *tailWriter) sawReady() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ready
}

// keep adds a line. Its caller holds the lock.
func (w *tailWriter) keep(line string) {
	w.count++
	lines, most := &w.other, tailLines
	if slices.ContainsFunc(ofRaft, func(mark string) bool { return strings.Contains(line, mark) }) {
		lines, most = &w.raft, raftTailLines
	}
	*lines = append(*lines, numbered{w.count, cut(line, tailLineBytes)})
	*lines = (*lines)[max(0, len(*lines)-most):]
}

// cut takes the end of a line that is too long.
func cut(line string, bytes int) string {
	if len(line) <= bytes {
		return line
	}
	return fmt.Sprintf("%s… (%d bytes)", strings.ToValidUTF8(line[:bytes], ""), len(line))
}

// lines in their order.
func (w *tailWriter) lines() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := slices.Concat(w.other, w.raft)
	slices.SortFunc(all, func(a, b numbered) int { return a.number - b.number })
	var texts []string
	for _, line := range all {
		texts = append(texts, line.text)
	}
	return texts
}

func (w *tailWriter) tail() string { return strings.Join(w.lines(), "\n") }

// says tells whether one of the last lines contains a text.
func (w *tailWriter) says(text string) bool { return strings.Contains(w.tail(), text) }
