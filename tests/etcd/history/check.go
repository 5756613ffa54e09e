package history

import (
	"fmt"
	"sort"
	"time"
)

// mostViolations is how many are reported: one wrong has many consequences.
const mostViolations = 20

// report collects violations.
type report struct {
	found []Violation
	// more is how many came after mostViolations.
	more int
}

func (r *report) add(name, format string, args ...any) {
	if len(r.found) == mostViolations {
		r.more++
		return
	}
	r.found = append(r.found, Violation{name, fmt.Sprintf(format, args...)})
}

// Check judges a history that has ended; the first violation is the one to look at. Nothing means that etcd could have shown
// all of it.
func (h *History) Check() []Violation {
	r := &report{}
	p := h.past(r)
	p.replay()
	p.observe(h)
	p.lost(h)
	p.attribute(h)
	p.order(h)
	p.answers(h)
	for _, w := range h.Watches {
		p.watch(w)
	}
	if r.more > 0 {
		r.found = append(r.found, Violation{"more", fmt.Sprintf("%d further violations", r.more)})
	}
	return r.found
}

// signs are all signs of revisions in the order of their times. A sign is when its client had it.
func (h *History) signs() []sign {
	var signs []sign
	for _, op := range h.Ops {
		if op.Outcome == OK {
			signs = append(signs, sign{op.Return, op.Revision, op.String})
		}
	}
	for _, w := range h.Watches {
		for _, step := range w.Steps {
			if revision := step.headerRevision(); revision > 0 {
				what := func() string {
					return fmt.Sprintf("[%v] watch %s at %s → revision %d", step.At.Round(time.Microsecond), w.Name, step.Member, revision)
				}
				signs = append(signs, sign{step.At, revision, what})
			}
		}
	}
	sort.SliceStable(signs, func(i, j int) bool { return signs[i].at < signs[j].at })
	return signs
}

// observe finds when each revision was first known to exist.
func (p *past) observe(h *History) {
	signs := h.signs()
	highest := int64(0)
	next := 0
	for _, s := range signs {
		for s.revision > highest && next < len(p.ordered) && p.ordered[next].number <= s.revision {
			p.ordered[next].seen = s
			next++
		}
		highest = max(highest, s.revision)
	}
}

// order checks real time: who begins after something was known sees at least that. A write is then later than it.
func (p *past) order(h *History) {
	signs := h.signs()
	calls := byCall(h.Ops)
	var highest sign
	byMember := map[string]*Op{}
	// Answers in the order of their returns, for what each member has shown itself.
	returns := byReturn(h.Ops)
	next, returned := 0, 0
	for _, op := range calls {
		for ; next < len(signs) && signs[next].at < op.Call; next++ {
			if signs[next].revision > highest.revision {
				highest = signs[next]
			}
		}
		for ; returned < len(returns) && returns[returned].Return < op.Call; returned++ {
			earlier := returns[returned]
			if best := byMember[earlier.Member]; earlier.Outcome == OK && (best == nil || best.Revision < earlier.Revision) {
				byMember[earlier.Member] = earlier
			}
		}
		p.inOrder(op, highest, byMember[op.Member])
	}
}

func (p *past) inOrder(op *Op, highest sign, ofMember *Op) {
	placed := p.placed(op)
	switch {
	case op.Kind == Compact:
		return
	case placed != nil:
		if placed.number <= highest.revision {
			p.add("out of order", "revision %d was made by a write that began only when revision %d was known:\n  %v\n  %s",
				placed.number, highest.revision, op, highest.what())
		}
		return
	case op.Outcome != OK:
		return
	case !op.Serializable && op.Revision < highest.revision:
		p.add("stale read", "it began when revision %d was known, and answered of %d:\n  %v\n  %s",
			highest.revision, op.Revision, op, highest.what())
	}
	if op.Member != "" && ofMember != nil && op.Revision < ofMember.Revision {
		p.add("went back", "a member showed an older revision than before:\n  %v\n  %v", ofMember, op)
	}
}

func byCall(ops []*Op) []*Op {
	ops = append([]*Op(nil), ops...)
	sort.SliceStable(ops, func(i, j int) bool { return ops[i].Call < ops[j].Call })
	return ops
}

func byReturn(ops []*Op) []*Op {
	ops = append([]*Op(nil), ops...)
	sort.SliceStable(ops, func(i, j int) bool { return ops[i].Return < ops[j].Return })
	return ops
}
