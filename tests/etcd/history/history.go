// Package history holds what clients of one tenant saw, and judges whether a right etcd could have shown it to them.
//
// The checks use that every write of a tenant has a revision of its own: from what was acknowledged and what watches brought,
// the tenant's whole past is known, revision by revision. Every answer is then compared with that past at the revision
// the answer claims, and the claimed revisions with the real time of the calls. So no search is needed, as it is for
// registers without revisions. It asks of the load that
//
//   - the tenant was empty, and nobody else writes to it,
//   - every value put is put once,
//   - nothing is compacted that no watch has brought yet: else a revision may be known to nobody, which is reported.
package history

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// Outcome of an operation as its client knows it.
type Outcome int

const (
	// OK was answered.
	OK Outcome = iota
	// Failed was refused in a way that says that it was not applied and never will be.
	Failed
	// Unknown may have been applied, or may be later: a timeout, a broken connection.
	Unknown
)

// Kind of an operation.
type Kind int

const (
	// Write is a put, a delete or a txn of both, perhaps under a condition.
	Write Kind = iota
	// Read is a range.
	Read
	// Compact forgets what is older than Op.At.
	Compact
)

// KV is a key as it was written at the revision Mod.
type KV struct {
	Key, Value                  string
	Create, Mod, Version, Lease int64
}

// Change is one put or delete of a write.
type Change struct {
	Key, Value string
	Lease      int64
	Delete     bool
}

// Compare is the condition of a write: the key's mod_revision, 0 for a key that is not there.
type Compare struct {
	Key string
	Mod int64
}

// Op is one call of one client.
type Op struct {
	Client string
	// Member is who answered, and which of its runs; empty when that is not known.
	Member       string
	Call, Return time.Duration
	Kind         Kind
	Outcome      Outcome
	// Error is what the client got, for the report.
	Error string

	// Of a write. When Compare fails, Key is read instead, which is then Compare's.
	Compare *Compare
	Changes []Change
	// Succeeded says of an answered write that Compare held, or that there was none.
	Succeeded bool
	// Deleted is how many keys the answer says were deleted.
	Deleted int64

	// Of a read: the range from Key to End as etcd has it, at the revision At unless it is 0.
	Key, End     string
	At           int64
	Limit        int64
	CountOnly    bool
	Serializable bool

	// The answer.
	Revision int64
	KVs      []KV
	Count    int64
	More     bool
}

// Event is one change that a watch brought.
type Event struct {
	Delete bool
	// KV holds only Key and Mod for a delete.
	KV   KV
	Prev *KV
}

// StepKind is what happened on a watch.
type StepKind int

const (
	// Started asks for events from Revision on.
	Started StepKind = iota
	// Response brought Events; Revision is its header's.
	Response
	// Progress says that everything up to Revision was sent.
	Progress
	// Compacted ended the watch, because what it asks for was compacted up to Revision.
	Compacted
	// Ended is the end of the test, when everything up to Revision must have come.
	Ended
)

// Step is one thing that happened on a watch.
type Step struct {
	Kind     StepKind
	At       time.Duration
	Revision int64
	Member   string
	Events   []Event
	// Fragment says that the rest of the response is in the next step.
	Fragment bool
}

// Watch is one watch as its consumer saw it; what its client did to keep it alive does not show.
type Watch struct {
	Name     string
	Key, End string
	PrevKV   bool
	Steps    []Step
}

// Lease is one that the load granted.
type Lease struct {
	ID int64
	// Promises are the answers to its grant and its renewals, by which it lives for TTL after the call.
	Promises []Promise
	// Revoked is the call that revoked it, 0 if none did.
	Revoked time.Duration
}

// Promise of a lease's life.
type Promise struct {
	Call, Return, TTL time.Duration
}

// History of one tenant. Its methods may be used by many goroutines; its fields when these have ended.
type History struct {
	Ops     []*Op
	Watches []*Watch
	Leases  map[int64]*Lease

	start time.Time
	mu    sync.Mutex
}

// New starts the clock of a history.
func New() *History {
	return &History{start: time.Now(), Leases: map[int64]*Lease{}}
}

// Now is the history's clock, which never jumps.
func (h *History) Now() time.Duration { return time.Since(h.start) }

// Add records an operation that has ended.
func (h *History) Add(op *Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.Ops = append(h.Ops, op)
}

// Watch records a watch; its steps are the caller's to add.
func (h *History) Watch(w *Watch) *Watch {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.Watches = append(h.Watches, w)
	return w
}

// Promise records that a lease was granted or renewed.
func (h *History) Promise(id int64, p Promise) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.Leases[id]
	if l == nil {
		l = &Lease{ID: id}
		h.Leases[id] = l
	}
	l.Promises = append(l.Promises, p)
}

// Revoked records that a lease is about to be revoked.
func (h *History) Revoked(id int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.Leases[id].Revoked = time.Since(h.start)
}

// Violation is something that no right etcd shows.
type Violation struct {
	// Name is one of a few: what kind of wrong it is.
	Name string
	// Text shows the operations that contradict each other.
	Text string
}

func (v Violation) String() string { return v.Name + ": " + v.Text }

// within says whether a key is in a range as etcd has it.
func within(key, from, end string) bool {
	switch end {
	case "":
		return key == from
	case "\x00":
		return key >= from
	default:
		return key >= from && key < end
	}
}

func (c Change) String() string {
	if c.Delete {
		return "delete " + c.Key
	}
	return fmt.Sprintf("put %s=%s", c.Key, c.Value)
}

func (kv KV) String() string {
	text := fmt.Sprintf("%s=%s create %d mod %d version %d", kv.Key, kv.Value, kv.Create, kv.Mod, kv.Version)
	if kv.Lease != 0 {
		text += fmt.Sprintf(" lease %x", kv.Lease)
	}
	return text
}

func (e Event) String() string {
	if e.Delete {
		return fmt.Sprintf("DELETE %s mod %d", e.KV.Key, e.KV.Mod)
	}
	return "PUT " + e.KV.String()
}

func (op *Op) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "[%v–%v %s", op.Call.Round(time.Microsecond), op.Return.Round(time.Microsecond), op.Client)
	if op.Member != "" {
		fmt.Fprintf(&text, " at %s", op.Member)
	}
	text.WriteString("] ")
	switch op.Kind {
	case Write:
		if op.Compare != nil {
			fmt.Fprintf(&text, "if mod(%s)=%d ", op.Compare.Key, op.Compare.Mod)
		}
		for i, change := range op.Changes {
			if i > 0 {
				text.WriteString(", ")
			}
			text.WriteString(change.String())
		}
	case Read:
		if op.Serializable {
			text.WriteString("serializable ")
		}
		fmt.Fprintf(&text, "range %q %q", op.Key, op.End)
		if op.At != 0 {
			fmt.Fprintf(&text, " at revision %d", op.At)
		}
	case Compact:
		fmt.Fprintf(&text, "compact %d", op.At)
	}
	switch op.Outcome {
	case OK:
		fmt.Fprintf(&text, " → revision %d", op.Revision)
		if op.Kind == Write && !op.Succeeded {
			text.WriteString(", condition failed")
		}
	case Failed:
		fmt.Fprintf(&text, " → refused: %s", op.Error)
	case Unknown:
		fmt.Fprintf(&text, " → unknown: %s", op.Error)
	}
	return text.String()
}
