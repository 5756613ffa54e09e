package harness

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Faults are what a member's system does to it: see faults/faults.c, which the Makefile builds. A tenured of a cluster that
// was started with StartOnFaults has them; none acts until it is set, each until it is set again, over restarts of the member.
type Faults struct {
	t    testing.TB
	path string
	file *os.File
}

func newFaults(t testing.TB, dir string) *Faults {
	t.Helper()
	f := &Faults{t: t, path: filepath.Join(dir, "faults")}
	file, err := os.Create(f.path)
	if err != nil {
		t.Fatal(err)
	}
	f.file = file
	t.Cleanup(func() { _ = file.Close() })
	f.Clear()
	return f
}

// env makes a process have the faults.
func (f *Faults) env() []string {
	return append(os.Environ(), "LD_PRELOAD="+Tool(f.t, "faults.so"), "TENURE_FAULTS="+f.path)
}

// Clear ends all faults.
func (f *Faults) Clear() {
	f.t.Helper()
	for place := range int64(4) {
		f.set(place, 0)
	}
}

// SlowSync makes each sync of a file take so much longer.
func (f *Faults) SlowSync(delay time.Duration) { f.set(0, delay.Microseconds()) }

// ShiftClock makes the wall clock show so much more than it should, or less.
func (f *Faults) ShiftClock(offset time.Duration) { f.set(1, offset.Milliseconds()) }

// FreeBytes is what all disks say that is free, at most.
func (f *Faults) FreeBytes(most int64) { f.set(2, most+1) }

// AllBytes lets disks say what is free again.
func (f *Faults) AllBytes() { f.set(2, 0) }

// NoRoom makes every write to a file fail for want of room.
func (f *Faults) NoRoom(none bool) {
	var value int64
	if none {
		value = 1
	}
	f.set(3, value)
}

func (f *Faults) set(place, value int64) {
	f.t.Helper()
	if _, err := f.file.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(value)), place*8); err != nil {
		f.t.Fatal(err)
	}
}
