package history

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"time"
)

// cursor walks through one watch.
type cursor struct {
	*past
	w *Watch
	// done is the revision up to which everything has come; promised is the last progress.
	done, promised int64
	// delivered is true for events that have come, false for those that were reported because they had not.
	delivered map[revisionKey]bool
}

type revisionKey struct {
	number int64
	key    string
}

// watch checks one watch: events ordered, each once, none missing, a revision in one response, progress honest.
func (p *past) watch(w *Watch) {
	c := &cursor{past: p, w: w, delivered: map[revisionKey]bool{}}
	steps := whole(w.Steps)
	for i, step := range steps {
		switch step.Kind {
		case Started:
			c.done, c.promised = step.Revision-1, 0
			clear(c.delivered)
		case Response:
			c.response(step, steps[i+1:])
		case Progress:
			c.nothingMissing("dishonest progress", step.Revision+1, fmt.Sprintf("the progress to %d", step.Revision), step)
			c.done = max(c.done, step.Revision)
			c.promised = max(c.promised, step.Revision)
		case Compacted:
			if asked := p.compactedTo(step.At); step.Revision > asked || step.Revision == 0 {
				c.add("wrong compaction", "%s was ended by a compaction of %d, asked for was %d", c.at(step), step.Revision, asked)
			}
		case Ended:
			c.nothingMissing("dropped event", step.Revision+1, "the end", step)
		}
	}
}

// whole puts responses together that were sent in fragments.
func whole(steps []Step) []Step {
	var joined []Step
	open := false
	for _, step := range steps {
		if open && step.Kind == Response {
			last := &joined[len(joined)-1]
			last.Events = append(slices.Clone(last.Events), step.Events...)
		} else {
			joined = append(joined, step)
		}
		open = step.Kind == Response && step.Fragment
	}
	return joined
}

func (c *cursor) at(step Step) string {
	return fmt.Sprintf("[%v] watch %s at %s", step.At.Round(time.Microsecond), c.w.Name, step.Member)
}

func (c *cursor) response(step Step, following []Step) {
	for rest := step.Events; len(rest) > 0; {
		number := rest[0].KV.Mod
		size := 1
		for size < len(rest) && rest[size].KV.Mod == number {
			size++
		}
		c.group(step, number, rest[:size], following)
		rest = rest[size:]
	}
	if last := len(step.Events) - 1; last >= 0 && step.Revision < step.Events[last].KV.Mod {
		c.add("wrong answer", "%s has revision %d in its header and an event of %d", c.at(step), step.Revision, step.Events[last].KV.Mod)
	}
}

// group is the events of one revision in one response.
func (c *cursor) group(step Step, number int64, events []Event, following []Step) {
	for _, e := range events {
		c.previous(step, e)
		if !within(e.KV.Key, c.w.Key, c.w.End) {
			c.add("wrong event", "%s brought %v, which is not in its range", c.at(step), e)
		}
	}
	if number <= c.done {
		c.late(step, events)
		return
	}
	c.nothingMissing("dropped event", number, events[0].String(), step)
	c.done = number
	came := map[string]bool{}
	for _, e := range events {
		if came[e.KV.Key] {
			c.add("duplicated event", "%s brought %v twice at once", c.at(step), e)
		}
		came[e.KV.Key] = true
		c.delivered[revisionKey{number, e.KV.Key}] = true
	}
	r := c.revisions[number]
	for _, key := range slices.Sorted(maps.Keys(r.events)) {
		if came[key] || !within(key, c.w.Key, c.w.End) {
			continue
		}
		if later := brings(following, number, key); later != nil {
			c.add("split revision", "%s brought %v of revision %d, and %s the rest: %v%s",
				c.at(step), events[0], number, c.at(*later), r.events[key].Event, r.by())
		} else {
			c.add("dropped event", "%s brought revision %d without %v (%s)%s", c.at(step), number, r.events[key].Event, r.events[key].from, r.by())
		}
		// Reported here: not once more when the rest comes.
		c.delivered[revisionKey{number, key}] = false
	}
}

// late names what is wrong with events of a revision that was done with.
func (c *cursor) late(step Step, events []Event) {
	for _, e := range events {
		delivered, reported := c.delivered[revisionKey{e.KV.Mod, e.KV.Key}]
		switch {
		case delivered:
			c.add("duplicated event", "%s brought %v once more", c.at(step), e)
		case reported:
		case e.KV.Mod <= c.promised:
			c.add("dishonest progress", "%s brought %v after the progress to %d", c.at(step), e, c.promised)
		default:
			c.add("event out of order", "%s brought %v after revision %d", c.at(step), e, c.done)
		}
	}
}

// brings is the step, before the watch starts again, that brings this event.
func brings(steps []Step, number int64, key string) *Step {
	for i, step := range steps {
		if step.Kind == Started {
			return nil
		}
		for _, e := range step.Events {
			if e.KV.Mod == number && e.KV.Key == key {
				return &steps[i]
			}
		}
	}
	return nil
}

// nothingMissing reports events after done and before a revision.
func (c *cursor) nothingMissing(name string, before int64, what string, step Step) {
	first := sort.Search(len(c.ordered), func(i int) bool { return c.ordered[i].number > c.done })
	var missing []string
	var by *revision
	for _, r := range c.ordered[first:] {
		if r.number >= before {
			break
		}
		for _, key := range slices.Sorted(maps.Keys(r.events)) {
			if within(key, c.w.Key, c.w.End) && !r.lost {
				missing = append(missing, fmt.Sprintf("%v (%s)", r.events[key].Event, r.events[key].origin()))
				c.delivered[revisionKey{r.number, key}] = false
				by = r
			}
		}
	}
	switch {
	case len(missing) == 0:
	case len(missing) > 3:
		c.add(name, "%s came to %s without %d events, among them %s", c.at(step), what, len(missing), missing[0])
	default:
		c.add(name, "%s came to %s without %s%s", c.at(step), what, strings.Join(missing, ", "), by.by())
	}
}

// previous checks what an event says that was before it. It may be missing when it was compacted.
func (c *cursor) previous(step Step, e Event) {
	before, live := c.state(e.KV.Key, e.KV.Mod-1)
	switch {
	case e.Prev == nil && live && c.w.PrevKV && c.compactedTo(step.At) < e.KV.Mod:
		c.add("wrong previous", "%s brought %v with nothing before it, there was %v", c.at(step), e, before)
	case e.Prev == nil:
	case !c.w.PrevKV:
		c.add("wrong previous", "%s brought %v with %v before it, which it did not ask for", c.at(step), e, *e.Prev)
	case !live || *e.Prev != before:
		c.add("wrong previous", "%s brought %v with %v before it, there was %s", c.at(step), e, *e.Prev, shown(before, live))
	}
}

func (r *revision) by() string {
	if r.write == nil {
		return ""
	}
	return "\n  " + r.write.String()
}

func (e *event) origin() string {
	if e.derived {
		return "known from the write's answer"
	}
	return e.from
}
