package apiserver

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// writer creates one object after the other, whatever happens, and notes which were acknowledged. Beside it one watch
// of one client follows, opened at the start and never again.
type writer struct {
	cp     *controlPlane
	stop   context.CancelFunc
	ended  sync.WaitGroup
	events watch.Interface

	mu    sync.Mutex
	acked []string
	// failed are the answers that were none, with how long they took.
	failed  []failure
	watched map[string]bool
	// broken says why the watch is worth nothing any more.
	broken error
}

type failure struct {
	took time.Duration
	err  error
}

func startWriter(t *testing.T, cp *controlPlane) *writer {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &writer{cp: cp, stop: cancel, events: watchFromNow(t, cp, configMaps), watched: map[string]bool{}}
	w.ended.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			w.write(ctx, fmt.Sprintf("crash-%05d", n))
		}
	})
	w.ended.Go(func() { w.follow(ctx) })
	t.Cleanup(w.end)
	return w
}

func (w *writer) write(ctx context.Context, name string) {
	// While tenured is down a request may hang; the next one then finds out whether it is back.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"owner": w.cp.tenant}}
	began := time.Now()
	_, err := w.cp.core.CoreV1().ConfigMaps("default").Create(ctx, object, metav1.CreateOptions{})
	took := time.Since(began)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err == nil:
		w.acked = append(w.acked, name)
	case !errors.Is(err, context.Canceled):
		w.failed = append(w.failed, failure{took, fmt.Errorf("%s after %v: %w", name, took, err)})
	}
}

// follow notes what the watch shows: every object once, in the order of its revisions.
func (w *writer) follow(ctx context.Context) {
	last := int64(0)
	for event := range w.events.ResultChan() {
		w.mu.Lock()
		last = w.note(event, last)
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken == nil && ctx.Err() == nil {
		w.broken = fmt.Errorf("it ended")
	}
}

func (w *writer) note(event watch.Event, last int64) int64 {
	object, ok := event.Object.(metav1.Object)
	if !ok || event.Type != watch.Added {
		w.broken = fmt.Errorf("event %v", event)
		return last
	}
	at, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
	if err != nil || at <= last {
		w.broken = fmt.Errorf("%s at revision %q after revision %d", object.GetName(), object.GetResourceVersion(), last)
	}
	w.watched[object.GetName()] = true
	return at
}

func (w *writer) end() {
	w.stop()
	w.events.Stop()
	w.ended.Wait()
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// waitForMore waits until so many more objects are acknowledged.
func (w *writer) waitForMore(t *testing.T, more int) {
	t.Helper()
	goal := w.count() + more
	eventually(t, w.cp.tenant+"'s writes", func(context.Context) error {
		if got := w.count(); got < goal {
			return fmt.Errorf("%d of %d acknowledged", got, goal)
		}
		return nil
	})
}

// verify finds every acknowledged object in the watch, in a list and by itself, and ends the writer.
func (w *writer) verify(t *testing.T) {
	t.Helper()
	acked := w.count()
	eventually(t, w.cp.tenant+"'s watch", func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.broken != nil {
			t.Fatalf("%s's watch: %v", w.cp.tenant, w.broken)
		}
		for _, name := range w.acked[:acked] {
			if !w.watched[name] {
				return fmt.Errorf("%s has not come", name)
			}
		}
		return nil
	})
	w.end()
	listed := listInPages(t, w.cp, configMaps, metav1.ListOptions{Limit: 500})
	for _, name := range w.acked {
		if listed[name] != 1 {
			t.Errorf("%s was acknowledged by %s and is listed %d times", name, w.cp.tenant, listed[name])
		}
		object, err := w.cp.core.CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || object.Data["owner"] != w.cp.tenant {
			t.Errorf("%s was acknowledged by %s: %v", name, w.cp.tenant, err)
		}
	}
	t.Logf("%s: %d objects acknowledged, %d refused, all that were acknowledged are there", w.cp.tenant, len(w.acked), len(w.failed))
}
