package harness

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Kind is which program the members of a cluster run.
type Kind string

const (
	Etcd    Kind = "etcd"
	Tenured Kind = "tenured"
)

// Cluster is several members of one cluster. What one member sends to another goes through the network, which a test can
// cut, hold up or slow down.
type Cluster struct {
	// Members that belong to the cluster, in the order they came.
	Members []*Member

	t       testing.TB
	kind    Kind
	tenants []string
	flags   []string
	named   int
	network *network
	// onFaults gives every member Faults.
	onFaults bool
}

// Member is one member: a Server with a name and an address for its peers.
type Member struct {
	*Server
	Name string
	// PeerURL is what the member advertises to the others: an address of the network, not of the member.
	PeerURL string
	// Faults of its system; nil if the cluster was started without.
	Faults *Faults

	cluster *Cluster
	listen  string
	pid     atomic.Int64
	run     atomic.Int64
}

// StartCluster starts a new cluster of n members and returns when all are ready. Every member of a tenured has a listener
// for the tenant default and for each of tenants; etcd has the one that is called default here. The members are killed at
// the end of the test.
func StartCluster(t testing.TB, kind Kind, n int, tenants []string, flags ...string) *Cluster {
	t.Helper()
	return newCluster(t, kind, tenants, flags).start(n)
}

// StartOnFaults is StartCluster of tenureds whose disks and clocks do as the test says.
func StartOnFaults(t testing.TB, n int, tenants []string, flags ...string) *Cluster {
	t.Helper()
	c := newCluster(t, Tenured, tenants, flags)
	c.onFaults = true
	return c.start(n)
}

func newCluster(t testing.TB, kind Kind, tenants, flags []string) *Cluster {
	c := &Cluster{t: t, kind: kind, flags: flags, network: newNetwork(t)}
	if kind == Tenured {
		c.tenants = tenants
	}
	return c
}

func (c *Cluster) start(n int) *Cluster {
	c.t.Helper()
	for range n {
		c.NewMember()
	}
	for _, m := range c.Members {
		m.found("new")
		m.Launch()
	}
	for _, m := range c.Members {
		m.AwaitReady()
	}
	return c
}

// NewMember makes a member that has addresses but does not run yet: see Join.
func (c *Cluster) NewMember() *Member {
	c.t.Helper()
	var path string
	if c.kind == Etcd {
		path = Tool(c.t, "etcd")
	} else {
		path = tenuredPath(c.t)
	}
	c.named++
	m := &Member{cluster: c, Name: fmt.Sprintf("m%d", c.named), listen: FreeAddress(c.t)}
	m.Server = newServer(c.t, m.Name, path)
	m.relaunch = m.Launch
	if slices.Contains(c.flags, "--auto-tls") {
		m.scheme = "https"
	}
	if c.onFaults {
		m.Faults = newFaults(c.t, filepath.Dir(m.DataDir))
		m.env = m.Faults.env()
	}
	m.PeerURL = m.AnotherPeerURL()
	for _, tenant := range c.Tenants() {
		m.endpoint(tenant)
	}
	c.Members = append(c.Members, m)
	return m
}

// Tenants are the names that Endpoints understands.
func (c *Cluster) Tenants() []string { return append([]string{"default"}, c.tenants...) }

// Endpoints are the client URLs of all members for one tenant.
func (c *Cluster) Endpoints(tenant string) []string {
	var urls []string
	for _, m := range c.Members {
		urls = append(urls, m.Endpoints[tenant])
	}
	return urls
}

// Forget takes a member out of Members, after it was removed from the cluster. It may still run.
func (c *Cluster) Forget(m *Member) {
	c.Members = slices.DeleteFunc(c.Members, func(other *Member) bool { return other == m })
}

// AnotherPeerURL is one more address at which the others reach the member.
func (m *Member) AnotherPeerURL() string {
	m.t.Helper()
	return m.peerScheme() + "://" + m.cluster.network.front(m)
}

func (m *Member) peerScheme() string {
	if slices.Contains(m.cluster.flags, "--peer-auto-tls") {
		return "https"
	}
	return "http"
}

// found writes the flags of a member that does not run yet: of a new cluster, or of an existing one.
func (m *Member) found(state string) {
	var initial []string
	for _, other := range m.cluster.Members {
		initial = append(initial, other.Name+"="+other.PeerURL)
	}
	m.args = []string{
		"--name", m.Name, "--data-dir", m.DataDir,
		"--listen-client-urls", m.Endpoint(), "--advertise-client-urls", m.Endpoint(),
		"--listen-peer-urls", m.peerScheme() + "://" + m.listen, "--initial-advertise-peer-urls", m.PeerURL,
		"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", "harness", "--initial-cluster-state", state,
	}
	for _, tenant := range m.cluster.tenants {
		m.args = append(m.args, "--tenant-listen", tenant+"="+m.Endpoints[tenant])
	}
	m.args = append(m.args, m.cluster.flags...)
}

// Join starts a member of NewMember, which must have been added to the cluster, and returns when it is ready.
func (m *Member) Join() {
	m.t.Helper()
	m.LaunchJoining()
	m.AwaitReady()
}

// LaunchJoining is Join that returns at once.
func (m *Member) LaunchJoining() {
	m.t.Helper()
	m.found("existing")
	m.Launch()
}

// Start runs the member and waits until it is ready.
func (m *Member) Start() {
	m.t.Helper()
	m.Launch()
	m.AwaitReady()
}

// Launch runs the member and returns at once.
func (m *Member) Launch() {
	m.t.Helper()
	// The network must know the process before it looks for whose connection it got.
	m.cluster.network.processes.Lock()
	defer m.cluster.network.processes.Unlock()
	m.Server.Launch()
	m.run.Add(1)
	m.pid.Store(int64(m.Pid()))
}

// Running says whether the member's process was started and not ended since.
func (m *Member) Running() bool { return m.pid.Load() != 0 }

// Run counts the starts of the member. What it promises of its own reads ends with its process.
func (m *Member) Run() int64 { return m.run.Load() }

// Kill ends the member with SIGKILL and waits until it is gone.
func (m *Member) Kill() {
	m.pid.Store(0)
	m.Server.Kill()
}

// Stop sends SIGTERM and waits until the member is gone.
func (m *Member) Stop() {
	m.t.Helper()
	m.Terminate()
	m.pid.Store(0)
}

// AwaitEnd waits until the member ends by itself.
func (m *Member) AwaitEnd() {
	m.t.Helper()
	ended := make(chan struct{})
	go func() {
		_ = m.cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(startTimeout):
		// The test's end kills it, for which nobody else may wait.
		_ = m.cmd.Process.Kill()
		<-ended
		m.t.Errorf("%s did not end by itself", m.Name)
	}
	m.pid.Store(0)
}

// Pause stops the member with SIGSTOP: its connections stay open and nobody answers.
func (m *Member) Pause() { m.signal(syscall.SIGSTOP) }

// Resume lets a paused member go on.
func (m *Member) Resume() { m.signal(syscall.SIGCONT) }

func (m *Member) signal(signal syscall.Signal) {
	m.t.Helper()
	if err := m.cmd.Process.Signal(signal); err != nil {
		m.t.Fatal(err)
	}
}

// Cut closes the connections between two members and lets them open no others.
func (c *Cluster) Cut(a, b *Member) {
	c.network.set(a, b, rule{cut: true})
	c.network.set(b, a, rule{cut: true})
}

// Hold lets nothing through from one member to another, while connections stay open and can be opened: what a network
// does that loses packets. The other direction is as it was.
func (c *Cluster) Hold(from, to *Member) { c.network.set(from, to, rule{hold: true}) }

// Delay brings what one member sends to another so much later.
func (c *Cluster) Delay(from, to *Member, delay time.Duration) {
	c.network.set(from, to, rule{delay: delay})
}

// Isolate cuts a member from all others.
func (c *Cluster) Isolate(m *Member) {
	for _, other := range c.Members {
		if other != m {
			c.Cut(m, other)
		}
	}
}

// Heal makes the network whole again.
func (c *Cluster) Heal() { c.network.heal() }
