package history

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"
)

// past is what the tenant went through, put together from all that was seen of it.
type past struct {
	*report
	revisions map[int64]*revision
	// ordered are the revisions in their order.
	ordered []*revision
	// keys holds the versions of each key in the order of revisions.
	keys map[string][]version
	// names are the keys in order.
	names []string
	// compactions are those asked for, in the order of their calls.
	compactions []*Op
	// places are the revisions that operations made.
	places map[*Op]*revision
	// last is the highest revision that anybody saw.
	last int64
}

// revision is one write.
type revision struct {
	number int64
	events map[string]*event
	// seen is the earliest sign that the revision exists, or a later one.
	seen sign
	// views are what watches brought of it, in one response each.
	views []*view
	// write is the operation that made it, nil when that is a lease's end.
	write *Op
	// acknowledged is the operation that was told this revision.
	acknowledged *Op
	// watched says that a watch brought it; lost that it was reported because none did.
	watched, lost bool
}

// view is which keys one response of a watch had.
type view struct {
	watch  *Watch
	member string
	keys   map[string]bool
}

// event is a change as it is now known. derived says that no watch brought it: what it is follows from the acknowledgement.
type event struct {
	Event
	derived bool
	// from is where it is known from.
	from string
}

// version is a key from a revision on.
type version struct {
	mod  int64
	live bool
	kv   KV
}

// sign is something that shows that a revision has been reached.
type sign struct {
	at       time.Duration
	revision int64
	what     func() string
}

func (h *History) past(r *report) *past {
	p := &past{report: r, revisions: map[int64]*revision{}, keys: map[string][]version{}}
	for _, w := range h.Watches {
		for _, step := range whole(w.Steps) {
			p.last = max(p.last, step.headerRevision())
			for _, e := range step.Events {
				p.brought(w, step, e)
			}
		}
	}
	for _, op := range h.Ops {
		if op.Kind == Compact && op.Outcome != Failed {
			p.compactions = append(p.compactions, op)
		}
		if op.Outcome != OK {
			continue
		}
		p.last = max(p.last, op.Revision)
		if op.Kind == Write && op.Succeeded {
			p.acknowledge(op)
		}
	}
	sort.Slice(p.compactions, func(i, j int) bool { return p.compactions[i].Call < p.compactions[j].Call })
	for _, number := range slices.Sorted(maps.Keys(p.revisions)) {
		p.ordered = append(p.ordered, p.revisions[number])
	}
	return p
}

// headerRevision is a revision that the step shows to be reached.
func (s Step) headerRevision() int64 {
	if s.Kind == Response || s.Kind == Progress {
		return s.Revision
	}
	return 0
}

func (p *past) at(number int64) *revision {
	r := p.revisions[number]
	if r == nil {
		r = &revision{number: number, events: map[string]*event{}}
		p.revisions[number] = r
	}
	return r
}

// brought adds an event of a watch.
func (p *past) brought(w *Watch, step Step, e Event) {
	r := p.at(e.KV.Mod)
	r.watched = true
	from := fmt.Sprintf("watch %s at %s", w.Name, step.Member)
	if last := len(r.views) - 1; last >= 0 && r.views[last].watch == w {
		r.views[last].keys[e.KV.Key] = true
	} else {
		r.views = append(r.views, &view{w, step.Member, map[string]bool{e.KV.Key: true}})
	}
	known := r.events[e.KV.Key]
	if known == nil {
		r.events[e.KV.Key] = &event{Event: Event{Delete: e.Delete, KV: e.KV}, from: from}
		return
	}
	if known.Delete != e.Delete || (!e.Delete && known.KV != e.KV) {
		p.add("members differ", "revision %d is %v for %s, %v for %s", e.KV.Mod, known.Event, known.from, e, from)
	}
}

// acknowledge adds the write that was told its revision, as far as no watch brought it. What a delete deleted is not
// known before the keys are: see replay.
func (p *past) acknowledge(op *Op) {
	if len(op.Changes) == 0 || (onlyDeletes(op) && op.Deleted == 0) {
		return
	}
	r := p.at(op.Revision)
	if other := r.acknowledged; other != nil {
		p.add("lost write", "both were told the same revision:\n  %v\n  %v", other, op)
		return
	}
	r.acknowledged = op
}

func onlyDeletes(op *Op) bool {
	return !slices.ContainsFunc(op.Changes, func(c Change) bool { return !c.Delete })
}

// apart finds revisions that are one thing for one watch and another for another, each lacking what the other has. What only
// one of them lacks it was not sent, which is found with the watch.
func (p *past) apart() {
	for _, r := range p.ordered {
		for _, a := range r.views {
			for key := range r.events {
				if a.keys[key] || !within(key, a.watch.Key, a.watch.End) {
					continue
				}
				if b := r.without(a.keys, key); b != nil {
					p.add("members differ", "revision %d is %v for watch %s at %s, %v for watch %s at %s", r.number,
						slices.Sorted(maps.Keys(a.keys)), a.watch.Name, a.member, slices.Sorted(maps.Keys(b.keys)), b.watch.Name, b.member)
					return
				}
			}
		}
	}
}

// without is a view that has key and lacks one of keys.
func (r *revision) without(keys map[string]bool, key string) *view {
	for _, b := range r.views {
		for other := range keys {
			if b.keys[key] && !b.keys[other] && within(other, b.watch.Key, b.watch.End) {
				return b
			}
		}
	}
	return nil
}

// replay walks through the revisions in order, gives each key its versions, and checks what watches brought against what
// a write at this place must be.
func (p *past) replay() {
	p.apart()
	p.holes()
	for _, r := range p.ordered {
		if r.acknowledged != nil && !r.watched {
			p.derive(r)
		}
		for _, key := range slices.Sorted(maps.Keys(r.events)) {
			p.apply(r, r.events[key])
		}
	}
	p.names = slices.Sorted(maps.Keys(p.keys))
}

// holes reports revisions that nobody saw: an event that every watch missed.
func (p *past) holes() {
	next := int64(2)
	for _, r := range p.ordered {
		if r.number > next {
			p.add("dropped event", "revisions %d to %d were brought by no watch and told to no client", next, r.number-1)
		}
		next = r.number + 1
	}
	if next <= p.last {
		p.add("dropped event", "revisions %d to %d were brought by no watch and told to no client", next, p.last)
	}
}

// derive makes the events of a write that is known only from its answer.
func (p *past) derive(r *revision) {
	for _, change := range r.acknowledged.Changes {
		before, live := p.state(change.Key, r.number-1)
		switch {
		case !change.Delete:
			r.events[change.Key] = &event{Event: Event{KV: written(change, before, live, r.number)}, derived: true}
		case live:
			r.events[change.Key] = &event{Event: Event{Delete: true, KV: KV{Key: change.Key, Mod: r.number}}, derived: true}
		}
	}
}

// written is a key after a put.
func written(c Change, before KV, live bool, number int64) KV {
	kv := KV{Key: c.Key, Value: c.Value, Lease: c.Lease, Create: number, Mod: number, Version: 1}
	if live {
		kv.Create, kv.Version = before.Create, before.Version+1
	}
	return kv
}

// apply adds an event to its key's versions.
func (p *past) apply(r *revision, e *event) {
	key := e.KV.Key
	before, live := p.state(key, r.number-1)
	if e.Delete {
		if !live {
			p.add("wrong event", "%v deletes what is not there (%s)", e.Event, e.origin())
		}
		p.keys[key] = append(p.keys[key], version{mod: r.number})
		return
	}
	want := written(Change{Key: key, Value: e.KV.Value, Lease: e.KV.Lease}, before, live, r.number)
	if e.KV != want {
		p.add("wrong event", "%v (%s) after %s must be %v", e.Event, e.from, shown(before, live), want)
	}
	p.keys[key] = append(p.keys[key], version{mod: r.number, live: true, kv: want})
}

// state is a key at a revision, and whether it is there.
func (p *past) state(key string, number int64) (KV, bool) {
	versions := p.keys[key]
	after := sort.Search(len(versions), func(i int) bool { return versions[i].mod > number })
	if after == 0 {
		return KV{}, false
	}
	return versions[after-1].kv, versions[after-1].live
}

// list is all keys of a range at a revision, in order.
func (p *past) list(from, end string, number int64) []KV {
	var kvs []KV
	for i := sort.SearchStrings(p.names, from); i < len(p.names) && within(p.names[i], from, end); i++ {
		if kv, live := p.state(p.names[i], number); live {
			kvs = append(kvs, kv)
		}
	}
	return kvs
}

// compactedTo is the highest revision that a compaction asked for before this time.
func (p *past) compactedTo(at time.Duration) int64 {
	var highest int64
	for _, op := range p.compactions {
		if op.Call > at {
			break
		}
		highest = max(highest, op.At)
	}
	return highest
}

func shown(kv KV, live bool) string {
	if !live {
		return "nothing"
	}
	return kv.String()
}
