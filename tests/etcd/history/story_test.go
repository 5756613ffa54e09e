package history

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// story makes a right history, one operation after the other, each of which takes from one millisecond to the next. Every
// watch gets every event as soon as it is there.
type story struct {
	*History
	now      time.Duration
	revision int64
	keys     map[string]KV
	// before are the keys as each revision left them.
	before map[int64]map[string]KV
}

func newStory(watches ...*Watch) *story {
	s := &story{History: New(), revision: 1, keys: map[string]KV{}, before: map[int64]map[string]KV{}}
	for _, w := range watches {
		w.Steps = append(w.Steps, Step{Kind: Started, Revision: 2})
		s.Watch(w)
	}
	return s
}

func everything(name string) *Watch {
	return &Watch{Name: name, Key: "\x00", End: "\x00", PrevKV: true}
}

func (s *story) tick() time.Duration {
	s.now += time.Millisecond
	return s.now
}

func (s *story) op(op *Op) *Op {
	op.Client, op.Member = "c", "m1"
	op.Call, op.Return, op.Revision = s.tick(), s.tick(), s.revision
	s.Add(op)
	return op
}

// write applies changes as etcd would.
func (s *story) write(compare *Compare, changes ...Change) *Op {
	op := &Op{Kind: Write, Compare: compare, Changes: changes}
	if compare != nil && s.keys[compare.Key].Mod != compare.Mod {
		op.KVs = s.list(compare.Key, "")
		return s.op(op)
	}
	op.Succeeded = true
	s.snapshot()
	var events []Event
	for _, c := range changes {
		if old, live := s.keys[c.Key]; !c.Delete || live {
			events = append(events, s.change(c, old, live))
		}
		if c.Delete && events != nil {
			op.Deleted++
		}
	}
	if events != nil {
		s.revision++
	}
	s.op(op)
	s.send(events)
	return op
}

func (s *story) snapshot() {
	s.before[s.revision] = map[string]KV{}
	for key, kv := range s.keys {
		s.before[s.revision][key] = kv
	}
}

func (s *story) change(c Change, old KV, live bool) Event {
	e := Event{Delete: c.Delete, KV: KV{Key: c.Key, Mod: s.revision + 1}}
	if live {
		e.Prev = &old
	}
	if c.Delete {
		delete(s.keys, c.Key)
		return e
	}
	e.KV = written(c, old, live, s.revision+1)
	s.keys[c.Key] = e.KV
	return e
}

func (s *story) send(events []Event) {
	if events == nil {
		return
	}
	for _, w := range s.Watches {
		w.Steps = append(w.Steps, Step{Kind: Response, At: s.now, Revision: s.revision, Member: "m1", Events: slices.Clone(events)})
	}
}

func (s *story) put(key, value string) *Op { return s.write(nil, Change{Key: key, Value: value}) }

func (s *story) delete(key string) *Op { return s.write(nil, Change{Key: key, Delete: true}) }

func (s *story) list(from, end string) []KV {
	var kvs []KV
	for key, kv := range s.keys {
		if within(key, from, end) {
			kvs = append(kvs, kv)
		}
	}
	slices.SortFunc(kvs, func(a, b KV) int { return strings.Compare(a.Key, b.Key) })
	return kvs
}

func (s *story) read(from, end string) *Op {
	kvs := s.list(from, end)
	return s.op(&Op{Kind: Read, Key: from, End: end, KVs: kvs, Count: int64(len(kvs))})
}

// expire is the end of a lease: its keys are deleted at one revision by nobody.
func (s *story) expire(keys ...string) {
	s.snapshot()
	var events []Event
	for _, key := range keys {
		events = append(events, s.change(Change{Key: key, Delete: true}, s.keys[key], true))
	}
	s.revision++
	s.tick()
	s.send(events)
}

func (s *story) progress() {
	s.tick()
	for _, w := range s.Watches {
		w.Steps = append(w.Steps, Step{Kind: Progress, At: s.now, Revision: s.revision, Member: "m1"})
	}
}

func (s *story) end() {
	s.tick()
	for _, w := range s.Watches {
		w.Steps = append(w.Steps, Step{Kind: Ended, At: s.now, Revision: s.revision, Member: "m1"})
	}
}

// response is the step of a watch that brought a revision.
func response(w *Watch, revision int64) *Step {
	for i, step := range w.Steps {
		if len(step.Events) > 0 && step.Events[0].KV.Mod == revision {
			return &w.Steps[i]
		}
	}
	panic("no such revision")
}

func (w *Watch) drop(step *Step) {
	w.Steps = slices.DeleteFunc(w.Steps, func(s Step) bool { return s.At == step.At && s.Kind == step.Kind })
}

// right checks that nothing is found.
func right(t *testing.T, h *History) {
	t.Helper()
	for _, v := range h.Check() {
		t.Errorf("%v", v)
	}
}

// wrong checks that all that is found has this name, and shows these words.
func wrong(t *testing.T, h *History, name string, words ...string) {
	t.Helper()
	found := h.Check()
	if len(found) == 0 {
		t.Fatalf("%s: not found", name)
	}
	for _, v := range found {
		if v.Name != name {
			t.Errorf("looked for %s, found %v", name, v)
		}
	}
	for _, word := range words {
		if !strings.Contains(found[0].Text, word) {
			t.Errorf("%v\n  does not say %q", found[0], word)
		}
	}
}

// firstIs checks only what is found first: some wrongs have others as their consequence.
func firstIs(t *testing.T, h *History, name string) {
	t.Helper()
	if found := h.Check(); len(found) == 0 || found[0].Name != name {
		t.Errorf("looked for %s, found %v", name, found)
	}
}
