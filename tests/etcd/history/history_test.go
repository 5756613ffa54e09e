package history

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// A long story of everything that is right.
func TestRight(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pods := &Watch{Name: "pods", Key: "/pods/", End: "/pods0"}
	s := newStory(everything("all"), everything("other"), pods)
	s.Promise(7, Promise{Call: 0, Return: 1, TTL: time.Millisecond})
	for i := range 3000 {
		key := fmt.Sprintf("/pods/%d", random.IntN(9))
		value := fmt.Sprint("v", i)
		switch random.IntN(9) {
		case 0, 1:
			s.put(key, value)
		case 2:
			s.delete(key)
		case 3:
			s.write(&Compare{key, s.keys[key].Mod}, Change{Key: key, Value: value}, Change{Key: "/other", Value: value + "'"})
		case 4:
			s.write(&Compare{key, 1}, Change{Key: key, Value: value})
		case 5:
			s.read("/pods/", "/pods0")
			s.read(key, "").Serializable = true
			old := s.read("/pods/", "/pods0")
			old.At = s.revision
		case 6:
			s.progress()
		case 7:
			s.write(nil, Change{Key: "/lease/a", Value: value + "a", Lease: 7}, Change{Key: "/lease/b", Value: value + "b", Lease: 7})
			s.expire("/lease/a", "/lease/b")
		case 8:
			limited := s.read("/pods/", "/pods0")
			if limited.Limit = 2; len(limited.KVs) > 2 {
				limited.KVs, limited.More = limited.KVs[:2], true
			}
		}
	}
	// The watch on pods has no use for empty responses.
	var steps []Step
	for _, step := range pods.Steps {
		var events []Event
		for _, e := range step.Events {
			if within(e.KV.Key, pods.Key, pods.End) {
				e.Prev = nil
				events = append(events, e)
			}
		}
		if step.Events = events; step.Kind != Response || events != nil {
			steps = append(steps, step)
		}
	}
	pods.Steps = steps
	s.end()
	right(t, s.History)
}

// What is unknown may have happened, or not; what was refused has not.
func TestUnknown(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1").Outcome = Unknown
	s.delete("a").Outcome = Unknown
	s.put("a", "2")
	s.Add(&Op{Kind: Write, Changes: []Change{{Key: "a", Value: "3"}}, Outcome: Unknown, Call: s.tick(), Return: s.tick()})
	s.Add(&Op{Kind: Write, Changes: []Change{{Key: "a", Value: "4"}}, Outcome: Failed, Call: s.tick(), Return: s.tick()})
	s.read("a", "")
	right(t, s.History)
	s.put("a", "5").Outcome = Failed
	wrong(t, s.History, "failed write applied", "a=5")
}

// Events, their order and their ends; a watch that starts again below what it had, and behind a compaction.
func TestResumed(t *testing.T) {
	s := newStory(everything("w"), everything("full"))
	for i := range 6 {
		s.put("a", fmt.Sprint(i))
	}
	w := s.Watches[0]
	again := []Step{{Kind: Started, Revision: 5}}
	again = append(again, w.Steps[4:]...)
	w.Steps = append(w.Steps[:5:5], again...)
	right(t, s.History)

	compact := s.op(&Op{Kind: Compact, At: 4})
	w.Steps = append([]Step{w.Steps[0], {Kind: Compacted, At: s.tick(), Revision: 4}, {Kind: Started, Revision: 4}}, w.Steps[3:]...)
	right(t, s.History)
	compact.At = 3
	wrong(t, s.History, "wrong compaction")
}

func TestStaleRead(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "old")
	early := s.read("a", "")
	s.put("a", "new")
	late := s.read("a", "")
	// All of the answer is old, revision and content.
	late.Revision, late.KVs = early.Revision, early.KVs
	late.Member = "m2"
	wrong(t, s.History, "stale read", "answered of 2", "a=new")
	late.Serializable = true
	right(t, s.History)
	late.Member = "m1"
	wrong(t, s.History, "went back")
	// The revision is new and the content old: not even a serializable read may do that.
	late.Revision = s.revision
	wrong(t, s.History, "stale read", "got  a=old", "want a=new", "after [")
	// Content that never was.
	late.KVs = []KV{{Key: "a", Value: "new", Create: 3, Mod: 3, Version: 1}}
	wrong(t, s.History, "wrong read")
}

func TestLostWrite(t *testing.T) {
	// The store forgets an acknowledged write, and gives its revision away again.
	s := newStory(everything("w"))
	s.put("a", "1")
	lost := s.put("b", "2")
	s.Watches[0].drop(response(s.Watches[0], lost.Revision))
	delete(s.keys, "b")
	s.revision--
	s.put("c", "3")
	firstIs(t, s.History, "lost write")

	// Nobody else gets the revision, and all watches go past it.
	s = newStory(everything("w"), everything("x"))
	lost = s.put("a", "1")
	s.put("b", "2")
	for _, w := range s.Watches {
		w.drop(response(w, lost.Revision))
	}
	s.end()
	wrong(t, s.History, "lost write", "a=1", "all others went past revision 2")
}

func TestAppliedTwice(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1")
	twice := s.put("a", "2")
	s.put("a", "3")
	s.put("a", "2")
	s.Ops = s.Ops[:3]
	wrong(t, s.History, "write applied twice", "revision 3 and as revision 5")
	twice.Outcome = Unknown
	wrong(t, s.History, "write applied twice", "revision 3 and as revision 5")
}

func TestDroppedEvent(t *testing.T) {
	s := newStory(everything("w"), everything("x"))
	s.put("a", "1")
	dropped := s.put("a", "2")
	s.put("a", "3")
	w := s.Watches[0]
	w.drop(response(w, dropped.Revision))
	wrong(t, s.History, "dropped event", "watch w", "a=2")
	// By all of them, and its client was told nothing.
	x := s.Watches[1]
	x.drop(response(x, dropped.Revision))
	dropped.Outcome = Unknown
	firstIs(t, s.History, "dropped event")

	// The last one, which nothing follows.
	s = newStory(everything("w"), everything("x"))
	s.put("a", "1")
	last := s.put("a", "2")
	s.end()
	w = s.Watches[0]
	w.drop(response(w, last.Revision))
	wrong(t, s.History, "dropped event", "watch w", "the end", "a=2")
}

func TestDuplicatedEvent(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1")
	s.put("a", "2")
	w := s.Watches[0]
	w.Steps = append(w.Steps, *response(w, 2))
	wrong(t, s.History, "duplicated event", "a=1")
}

func TestSplitRevision(t *testing.T) {
	s := newStory(everything("w"), everything("x"))
	s.put("a", "0")
	s.write(nil, Change{Key: "a", Value: "1"}, Change{Key: "b", Value: "2"})
	s.put("c", "3")
	right(t, s.History)
	w := s.Watches[0]
	step := response(w, 3)
	rest := *step
	rest.Events = step.Events[1:]
	step.Events = step.Events[:1]
	w.Steps = append(w.Steps[:3:3], append([]Step{rest}, w.Steps[3:]...)...)
	wrong(t, s.History, "split revision", "watch w", "a=1", "b=2")
	// In fragments that is right.
	w.Steps[2].Fragment = true
	right(t, s.History)
	// Half of it never comes.
	w.Steps = append(w.Steps[:3:3], w.Steps[4:]...)
	w.Steps[2].Fragment = false
	wrong(t, s.History, "dropped event", "watch w", "b=2")

	// The store itself makes two revisions of one write.
	s = newStory(everything("w"))
	s.write(nil, Change{Key: "a", Value: "1"}, Change{Key: "b", Value: "2"})
	whole := s.Ops[0]
	w = s.Watches[0]
	second := w.Steps[1]
	second.Events = []Event{second.Events[1]}
	second.Events[0].KV.Mod, second.Events[0].KV.Create, second.Revision = 3, 3, 3
	w.Steps[1].Events = w.Steps[1].Events[:1]
	w.Steps = append(w.Steps, second)
	whole.Outcome = Unknown
	firstIs(t, s.History, "split revision")
}

// Two members apply the same writes in different orders.
func TestMembersDiffer(t *testing.T) {
	s := newStory(everything("w"), everything("x"))
	s.put("a", "1")
	s.put("b", "2")
	w := s.Watches[0]
	first, second := response(w, 2), response(w, 3)
	first.Events, second.Events = second.Events, first.Events
	for i, step := range []*Step{first, second} {
		kv := &step.Events[0].KV
		kv.Create, kv.Mod = int64(i+2), int64(i+2)
	}
	firstIs(t, s.History, "members differ")

	// The same key, with another value.
	s = newStory(everything("w"), everything("x"))
	s.put("a", "1")
	response(s.Watches[0], 2).Events[0].KV.Value = "2"
	firstIs(t, s.History, "members differ")

	// A read of a member that holds something else at a revision than the others.
	s = newStory(everything("w"))
	s.put("a", "1")
	s.put("a", "2")
	s.put("b", "3")
	read := s.read("", "\x00")
	read.Serializable = true
	right(t, s.History)
	read.KVs[0].Version = 1
	wrong(t, s.History, "wrong read", "got  a=2", "version 1", "version 2")
}

func TestDishonestProgress(t *testing.T) {
	s := newStory(everything("w"), everything("x"))
	s.put("a", "1")
	s.put("a", "2")
	w := s.Watches[0]
	w.Steps = append(w.Steps[:2:2], Step{Kind: Progress, At: s.now, Revision: 3, Member: "m1"}, w.Steps[2])
	wrong(t, s.History, "dishonest progress", "a=2")
	// It never comes.
	w.Steps = w.Steps[:3]
	wrong(t, s.History, "dishonest progress", "a=2")
}

func TestOutOfOrder(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1")
	late := s.put("a", "2")
	right(t, s.History)
	// It begins only when somebody has read what it wrote.
	s.read("a", "")
	late.Call = s.tick()
	late.Return = s.tick()
	wrong(t, s.History, "out of order", "revision 3", "a=2")

	s = newStory(everything("w"), everything("x"))
	s.put("a", "1")
	s.put("b", "2")
	w := s.Watches[0]
	w.Steps[1], w.Steps[2] = w.Steps[2], w.Steps[1]
	wrong(t, s.History, "dropped event", "watch w")
}

func TestCompare(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1")
	update := s.write(&Compare{"a", 2}, Change{Key: "a", Value: "2"})
	failed := s.write(&Compare{"a", 2}, Change{Key: "a", Value: "3"})
	right(t, s.History)
	update.Compare.Mod = 1
	wrong(t, s.History, "wrong compare", "a had mod 2")
	update.Compare.Mod = 2
	failed.Compare.Mod = 3
	wrong(t, s.History, "wrong compare", "the condition held")
}

func TestPrevious(t *testing.T) {
	s := newStory(everything("w"))
	s.put("a", "1")
	s.put("a", "2")
	w := s.Watches[0]
	first := *response(w, 3).Events[0].Prev
	response(w, 3).Events[0].Prev = nil
	wrong(t, s.History, "wrong previous", "there was a=1")
	// It may be gone when it was compacted.
	s.op(&Op{Kind: Compact, At: 3})
	w.Steps[2].At = s.tick()
	right(t, s.History)
	first.Value = "other"
	response(w, 3).Events[0].Prev = &first
	wrong(t, s.History, "wrong previous", "a=other")
}

func TestLostLease(t *testing.T) {
	s := newStory(everything("w"))
	s.Promise(7, Promise{Call: s.tick(), Return: s.tick(), TTL: time.Second})
	s.write(nil, Change{Key: "a", Value: "1", Lease: 7})
	s.expire("a")
	wrong(t, s.History, "lost lease", "lease 7")
	s.Leases[7].Promises[0].TTL = time.Millisecond
	right(t, s.History)
	s.Promise(7, Promise{Call: s.tick(), Return: s.tick(), TTL: time.Second})
	wrong(t, s.History, "lost lease", "was renewed")

	// A key without a lease does not go by itself.
	s = newStory(everything("w"))
	s.put("a", "1")
	s.expire("a")
	wrong(t, s.History, "unexplained write", "DELETE a")
}
