package history

import (
	"maps"
	"slices"
	"strings"
)

// lost finds acknowledged writes whose revision holds something else, or that no watch brought though watches went past.
func (p *past) lost(h *History) {
	for _, r := range p.ordered {
		op := r.acknowledged
		if op == nil {
			continue
		}
		if r.watched {
			if other := p.otherThan(r, op); other != "" {
				p.add("lost write", "revision %d is something else: %s\n  %v", r.number, other, op)
			}
			continue
		}
		if w := p.missed(h, r); w != nil {
			r.lost = true
			p.add("lost write", "watch %s and all others went past revision %d without it:\n  %v", w.Name, r.number, op)
		}
	}
}

// otherThan says what is at the revision when it is nothing of this write's.
func (p *past) otherThan(r *revision, op *Op) string {
	var events []string
	for _, key := range slices.Sorted(maps.Keys(r.events)) {
		e := r.events[key]
		for _, change := range op.Changes {
			if change.Key == key && change.Delete == e.Delete && (change.Delete || change.Value == e.KV.Value) {
				return ""
			}
		}
		events = append(events, e.String())
	}
	return strings.Join(events, ", ")
}

// missed is a watch that should have brought the revision and showed a later one.
func (p *past) missed(h *History, r *revision) *Watch {
	for _, w := range h.Watches {
		covered, past := false, false
		for key := range r.events {
			covered = covered || within(key, w.Key, w.End)
		}
		began := int64(0)
		for _, step := range w.Steps {
			switch step.Kind {
			case Started:
				began = step.Revision
			case Response:
				for _, e := range step.Events {
					past = past || (e.KV.Mod > r.number && began <= r.number)
				}
			case Progress, Ended:
				past = past || (step.Revision >= r.number && began <= r.number)
			}
		}
		if covered && past {
			return w
		}
	}
	return nil
}

// attribute finds for each revision the operation that made it: by value for puts, by acknowledgement, key and condition
// for deletes; what is left is the end of a lease.
func (p *past) attribute(h *History) {
	byValue := map[string]*Op{}
	deletes := map[string][]*Op{}
	for _, op := range byCall(h.Ops) {
		for _, change := range op.Changes {
			if !change.Delete {
				byValue[change.Value] = op
			} else if op.Outcome == Unknown && onlyDeletes(op) {
				deletes[change.Key] = append(deletes[change.Key], op)
			}
		}
	}
	places := map[*Op]*revision{}
	for _, r := range p.ordered {
		op := p.maker(r, byValue, deletes, places)
		if op == nil {
			p.ended(h, r)
			continue
		}
		if first := places[op]; first != nil {
			p.add("write applied twice", "as revision %d and as revision %d:\n  %v", first.number, r.number, op)
			continue
		}
		places[op] = r
		r.write = op
		p.place(op, r)
	}
	p.places = places
}

// maker is the operation that made a revision, if one did.
func (p *past) maker(r *revision, byValue map[string]*Op, deletes map[string][]*Op, places map[*Op]*revision) *Op {
	for _, key := range slices.Sorted(maps.Keys(r.events)) {
		e := r.events[key]
		if e.Delete {
			continue
		}
		op := byValue[e.KV.Value]
		if op == nil {
			p.add("unexplained write", "nobody asked for %v (%s)", e.Event, e.from)
		}
		return op
	}
	if r.acknowledged != nil {
		return r.acknowledged
	}
	for key := range r.events {
		before, _ := p.state(key, r.number-1)
		for _, op := range deletes[key] {
			conditional := op.Compare != nil
			if places[op] == nil && op.Call < r.seen.at && (!conditional || op.Compare.Mod == before.Mod) {
				return op
			}
		}
	}
	return nil
}

// place checks that an operation may be where it is, whole.
func (p *past) place(op *Op, r *revision) {
	switch {
	case op.Outcome == Failed:
		p.add("failed write applied", "revision %d is of a write that was refused:\n  %v", r.number, op)
	case op.Outcome == OK && !op.Succeeded:
		p.add("failed write applied", "revision %d is of a write whose condition failed:\n  %v", r.number, op)
	case op.Outcome == OK && op.Revision != r.number:
		p.add("lost write", "it was told revision %d and is revision %d:\n  %v", op.Revision, r.number, op)
	}
	if op.Compare != nil {
		if before, _ := p.state(op.Compare.Key, r.number-1); before.Mod != op.Compare.Mod {
			p.add("wrong compare", "revision %d was made while %s had mod %d:\n  %v", r.number, op.Compare.Key, before.Mod, op)
		}
	}
	p.whole(op, r)
}

// whole checks that the revision is all of the write and nothing else.
func (p *past) whole(op *Op, r *revision) {
	wanted, deleted := map[string]bool{}, int64(0)
	for _, change := range op.Changes {
		_, live := p.state(change.Key, r.number-1)
		if change.Delete && !live {
			continue
		}
		wanted[change.Key] = true
		e := r.events[change.Key]
		switch {
		case e == nil:
			p.add("split revision", "revision %d lacks %q of its write:\n  %v", r.number, change, op)
		case e.Delete != change.Delete || (!change.Delete && (e.KV.Value != change.Value || e.KV.Lease != change.Lease)):
			p.add("wrong event", "%v (%s) is not what the write asked for:\n  %v", e.Event, e.from, op)
		}
		if change.Delete {
			deleted++
		}
	}
	for key, e := range r.events {
		if !wanted[key] {
			p.add("split revision", "revision %d holds %v, which is not of its write:\n  %v", r.number, e.Event, op)
		}
	}
	if op.Outcome == OK && op.Deleted != deleted {
		p.add("wrong answer", "it deleted %d keys and says %d:\n  %v", deleted, op.Deleted, op)
	}
}

// ended checks a revision that no operation made: all its events are deletes of keys of one lease, whose time was over.
func (p *past) ended(h *History, r *revision) {
	var id int64
	for _, key := range slices.Sorted(maps.Keys(r.events)) {
		e := r.events[key]
		if !e.Delete {
			return // reported as unexplained
		}
		before, _ := p.state(key, r.number-1)
		lease := h.Leases[before.Lease]
		if lease == nil || (id != 0 && before.Lease != id) {
			p.add("unexplained write", "nobody asked for %v (%s), which had lease %x", e.Event, e.from, before.Lease)
			return
		}
		id = before.Lease
	}
	p.over(h.Leases[id], r)
}

// over checks that a lease could be gone when its keys were.
func (p *past) over(l *Lease, r *revision) {
	if l == nil || (l.Revoked != 0 && l.Revoked < r.seen.at) {
		return
	}
	for _, promise := range l.Promises {
		if r.seen.at < promise.Return {
			// It may have been answered before the end, or wrongly after it: only a call after the end tells.
			if promise.Call > r.seen.at {
				p.add("lost lease", "lease %x was renewed at %v, and its keys were gone at revision %d: %s",
					l.ID, promise.Call, r.number, r.seen.what())
			}
			continue
		}
		if r.seen.at < promise.Call+promise.TTL {
			p.add("lost lease", "lease %x was promised at %v to live for %v, and its keys were gone at revision %d: %s",
				l.ID, promise.Call, promise.TTL, r.number, r.seen.what())
			return
		}
	}
}

// placed is the revision that an operation made.
func (p *past) placed(op *Op) *revision { return p.places[op] }
