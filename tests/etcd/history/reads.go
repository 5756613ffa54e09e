package history

import "slices"

// answers checks that each answer is what the past was at the revision it names.
func (p *past) answers(h *History) {
	for _, op := range h.Ops {
		if op.Outcome != OK {
			continue
		}
		switch {
		case op.Kind == Read:
			p.readAnswer(op)
		case op.Kind == Write && !op.Succeeded:
			p.failedCondition(op)
		case op.Kind == Write:
			p.succeeded(op)
		}
	}
}

func (p *past) readAnswer(op *Op) {
	at := op.Revision
	if op.At != 0 {
		at = op.At
		if at > op.Revision {
			p.add("wrong read", "of the future:\n  %v", op)
			return
		}
	}
	want := p.list(op.Key, op.End, at)
	// etcd counts all keys of the range, whatever the limit.
	if op.Count != int64(len(want)) {
		p.add(p.readName(op, want), "it counts %d keys, there were %d:\n  %v%s", op.Count, len(want), op, p.difference(op.KVs, want, op))
		return
	}
	if op.CountOnly {
		return
	}
	more := op.Limit > 0 && op.Limit < int64(len(want))
	if more {
		want = want[:op.Limit]
	}
	if op.More != more {
		p.add("wrong read", "more is %v:\n  %v", op.More, op)
	}
	p.same(op, want)
}

// same compares keys that were answered with those that were there.
func (p *past) same(op *Op, want []KV) {
	if !slices.Equal(op.KVs, want) {
		p.add(p.readName(op, want), "%v%s", op, p.difference(op.KVs, want, op))
	}
}

// readName is stale when all that is wrong is older than it claims to be.
func (p *past) readName(op *Op, want []KV) string {
	got := map[string]KV{}
	for _, kv := range op.KVs {
		got[kv.Key] = kv
	}
	for _, kv := range want {
		old, there := got[kv.Key]
		delete(got, kv.Key)
		if !there || old == kv {
			// A key that is missing may be not there yet.
			continue
		}
		if was, live := p.state(kv.Key, old.Mod); !live || was != old || old.Mod > kv.Mod {
			return "wrong read"
		}
	}
	for key, kv := range got {
		if was, live := p.state(key, kv.Mod); !live || was != kv {
			return "wrong read"
		}
	}
	return "stale read"
}

// difference shows the first key that differs, and the write that should have shown.
func (p *past) difference(got, want []KV, op *Op) string {
	i := 0
	for i < len(got) && i < len(want) && got[i] == want[i] {
		i++
	}
	text := "\n  got  "
	var last int64
	if i < len(got) {
		text += got[i].String()
		last = p.lastChange(got[i].Key, op.Revision)
	} else {
		text += "no more"
	}
	text += "\n  want "
	if i < len(want) {
		text += want[i].String()
		last = want[i].Mod
	} else {
		text += "no more"
	}
	if r := p.revisions[last]; r != nil && r.write != nil {
		text += "\n  after " + r.write.String()
	}
	return text
}

// lastChange is the revision at which a key was last written.
func (p *past) lastChange(key string, at int64) int64 {
	var last int64
	for _, v := range p.keys[key] {
		if v.mod <= at {
			last = v.mod
		}
	}
	return last
}

// failedCondition checks a txn that answered that its condition failed, and what it read instead.
func (p *past) failedCondition(op *Op) {
	if op.Compare == nil {
		p.add("wrong answer", "a write without a condition failed it:\n  %v", op)
		return
	}
	if kv, _ := p.state(op.Compare.Key, op.Revision); kv.Mod == op.Compare.Mod {
		p.add("wrong compare", "the condition held:\n  %v", op)
	}
	p.same(op, p.list(op.Compare.Key, "", op.Revision))
}

// succeeded checks a write that was answered but made no revision: there was nothing to delete. Where there is one, it
// was checked with its revision.
func (p *past) succeeded(op *Op) {
	if p.placed(op) != nil {
		return
	}
	if !onlyDeletes(op) || op.Deleted != 0 {
		// Of the past without a watch: reported as lost, or by the holes.
		if r := p.revisions[op.Revision]; r == nil || r.acknowledged != op {
			p.add("lost write", "nothing is left of it:\n  %v", op)
		}
		return
	}
	for _, change := range op.Changes {
		if kv, live := p.state(change.Key, op.Revision); live {
			p.add("wrong answer", "it found nothing to delete, but there was %v:\n  %v", kv, op)
		}
	}
	if op.Compare != nil {
		if kv, _ := p.state(op.Compare.Key, op.Revision); kv.Mod != op.Compare.Mod {
			p.add("wrong compare", "%s had mod %d:\n  %v", op.Compare.Key, kv.Mod, op)
		}
	}
}
