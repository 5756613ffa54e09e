package apiserver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
)

// follower watches the load's objects of one kind through one apiserver as an informer does: where a watch ends it opens
// the next, and where the apiserver no longer knows what came between, it lists.
type follower struct {
	cp   *controlPlane
	kind kind

	mu   sync.Mutex
	seen story
	// at is the revision of the last event or list.
	at                 int64
	reopened, relisted int
	broken             error
}

// newFollower makes one that will see what happens after this call.
func newFollower(t *testing.T, cp *controlPlane, k kind) *follower {
	t.Helper()
	now, err := k.of(cp).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return &follower{cp: cp, kind: k, seen: story{}, at: revisionOf(now.GetResourceVersion())}
}

func revisionOf(resourceVersion string) int64 {
	revision, _ := strconv.ParseInt(resourceVersion, 10, 64)
	return revision
}

func (f *follower) run(ctx context.Context) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for ctx.Err() == nil {
		err := f.follow(ctx)
		if apierrors.IsGone(err) || apierrors.IsResourceExpired(err) {
			err = f.relist(ctx)
		}
		f.mu.Lock()
		f.reopened++
		f.mu.Unlock()
		if err != nil {
			<-ticker.C
		}
	}
}

// follow reads one watch until it ends.
func (f *follower) follow(ctx context.Context) error {
	events, err := f.kind.of(f.cp).Watch(ctx, metav1.ListOptions{
		LabelSelector:   batchKey + "=" + loadBatch,
		ResourceVersion: strconv.FormatInt(f.at, 10),
	})
	if err != nil {
		return err
	}
	defer events.Stop()
	for event := range events.ResultChan() {
		object, ok := event.Object.(*unstructured.Unstructured)
		if event.Type == watch.Error || !ok {
			return apierrors.FromObject(event.Object)
		}
		f.note(event.Type, object)
	}
	return nil
}

func (f *follower) note(kind watch.EventType, object *unstructured.Unstructured) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, now := object.GetName(), stateOf(object)
	known := len(f.seen[name]) > 0
	if now.revision <= f.at || known != (kind != watch.Added) {
		f.broken = fmt.Errorf("%s %s %v came after revision %d and %v", kind, name, now, f.at, f.seen[name])
	}
	f.at = now.revision
	if kind == watch.Deleted {
		now = state{}
	}
	f.seen[name] = append(f.seen[name], now)
}

// relist takes the latest state for what was missed.
func (f *follower) relist(ctx context.Context) error {
	listed, err := f.kind.of(f.cp).List(ctx, metav1.ListOptions{LabelSelector: batchKey + "=" + loadBatch})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.relisted++
	f.at = revisionOf(listed.GetResourceVersion())
	missing := f.seen.living()
	for i := range listed.Items {
		name, now := listed.Items[i].GetName(), stateOf(&listed.Items[i])
		if missing[name] != now {
			f.seen[name] = append(f.seen[name], now)
		}
		delete(missing, name)
	}
	for name := range missing {
		f.seen[name] = append(f.seen[name], state{})
	}
	return nil
}

// hasSeen says how the follower's story differs from the true one. Where it had to list, something may be missing before.
func (f *follower) hasSeen(t *testing.T, truth story) error {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil {
		t.Fatalf("%s's watch of %s: %v", f.cp.name, f.kind.Resource, f.broken)
	}
	if f.relisted > 0 {
		for name, seen := range f.seen {
			if !isPart(seen, truth[name]) {
				return fmt.Errorf("%s was %v, the watch showed %v", name, truth[name], seen)
			}
		}
		return difference(truth.living(), f.seen.living())
	}
	names := slices.Concat(slices.Collect(maps.Keys(truth)), slices.Collect(maps.Keys(f.seen)))
	for _, name := range names {
		if !slices.Equal(truth[name], f.seen[name]) {
			return fmt.Errorf("%s was %v, the watch showed %v", name, truth[name], f.seen[name])
		}
	}
	return nil
}

// isPart says whether all of some come in all, in this order.
func isPart(some, all []state) bool {
	for _, s := range all {
		if len(some) > 0 && some[0] == s {
			some = some[1:]
		}
	}
	return len(some) == 0
}
