package harness

import (
	"errors"
	"net"
	"sync"
	"testing"
	"time"
)

// network stands between the members: each advertises an address of the network, which passes on to where the member
// listens. So a test can treat what goes from one member to another as it likes.
//
// Rules are for directions of bytes, not for who opened a connection: a member of etcd sends its messages over connections
// that the others opened to it.
type network struct {
	t testing.TB
	// processes is held while a member's process starts, so that no connection of a process is seen before its pid is known.
	processes sync.RWMutex

	mu      sync.Mutex
	members map[*Member]bool
	rules   map[direction]rule
	links   map[*link]bool
	// changed is closed, and made anew, when a rule changes.
	changed chan struct{}
	closed  bool
}

type direction struct{ from, to *Member }

// rule is how bytes of one direction fare; the zero rule passes them.
type rule struct {
	cut, hold bool
	delay     time.Duration
}

// link is one connection that passes through.
type link struct {
	dialer, member *Member
	// ends are the two connections it is made of.
	ends [2]net.Conn
	done chan struct{}
	once sync.Once
}

func newNetwork(t testing.TB) *network {
	n := &network{
		t:       t,
		members: map[*Member]bool{},
		rules:   map[direction]rule{},
		links:   map[*link]bool{},
		changed: make(chan struct{}),
	}
	t.Cleanup(n.close)
	return n
}

// front opens an address for a member and returns it.
func (n *network) front(m *Member) string {
	n.t.Helper()
	listener := listen(n.t)
	n.t.Cleanup(func() { _ = listener.Close() })
	n.mu.Lock()
	n.members[m] = true
	n.mu.Unlock()
	go func() {
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go n.open(conn.(*net.TCPConn), m)
			}
		}
	}()
	return listener.Addr().String()
}

// open links a connection to a member. One whose owner is not found is refused: its process is gone, or it is no member's.
func (n *network) open(conn *net.TCPConn, m *Member) {
	onward, err := net.Dial("tcp", m.listen)
	if err != nil {
		reset(conn)
		return
	}
	dialer := n.owner(conn)
	l := &link{dialer: dialer, member: m, ends: [2]net.Conn{conn, onward}, done: make(chan struct{})}
	n.mu.Lock()
	refused := dialer == nil || n.closed || n.rules[direction{dialer, m}].cut
	if !refused {
		n.links[l] = true
	}
	n.mu.Unlock()
	if refused {
		l.close(reset)
		return
	}
	go n.pump(l, direction{dialer, m}, conn, onward)
	n.pump(l, direction{m, dialer}, onward, conn)
	n.mu.Lock()
	delete(n.links, l)
	n.mu.Unlock()
}

// packet is what was read at once.
type packet struct {
	bytes []byte
	came  time.Time
}

// inFlight is how many packets a direction takes in before they are passed on; then the sender waits, as on a full window.
const inFlight = 256

// pump passes bytes on by the rule of their direction, until either end closes.
func (n *network) pump(l *link, d direction, from, to net.Conn) {
	// What was written last must still arrive, so this end is an orderly one.
	defer l.close(func(conn net.Conn) { _ = conn.Close() })
	packets := make(chan packet, inFlight)
	go func() {
		defer close(packets)
		buffer := make([]byte, 16<<10)
		for {
			size, err := from.Read(buffer)
			if size > 0 {
				select {
				case packets <- packet{append([]byte(nil), buffer[:size]...), time.Now()}:
				case <-l.done:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	for packet := range packets {
		if !n.admit(l, d, packet.came) {
			return
		}
		if _, err := to.Write(packet.bytes); err != nil {
			return
		}
	}
}

// admit waits until a packet of this age may go on; false when the link closed meanwhile.
func (n *network) admit(l *link, d direction, came time.Time) bool {
	for {
		n.mu.Lock()
		rule, changed := n.rules[d], n.changed
		n.mu.Unlock()
		var due <-chan time.Time
		if !rule.hold {
			left := rule.delay - time.Since(came)
			if left <= 0 {
				return true
			}
			due = time.After(left)
		}
		select {
		case <-due:
		case <-changed:
		case <-l.done:
			return false
		}
	}
}

func (n *network) set(from, to *Member, r rule) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rules[direction{from, to}] = r
	if r.cut {
		for l := range n.links {
			if (l.dialer == from && l.member == to) || (l.dialer == to && l.member == from) {
				l.close(reset)
			}
		}
	}
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *network) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.rules)
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *network) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for l := range n.links {
		l.close(reset)
	}
}

// close ends both connections of a link, the first time.
func (l *link) close(end func(net.Conn)) {
	l.once.Do(func() {
		close(l.done)
		for _, conn := range l.ends {
			end(conn)
		}
	})
}

// reset closes at once, so that no port is left waiting: members dial a dead one many times a second.
func reset(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.Close()
}
