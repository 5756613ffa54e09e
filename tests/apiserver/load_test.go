package apiserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

const (
	// loadBatch labels the load's objects and begins their names.
	loadBatch = "load"
	nameKey   = "tenure.dev/name"
)

// state is what one change made of an object; the zero state is that of a deleted one.
type state struct {
	round    int
	revision int64
}

func stateOf(object *unstructured.Unstructured) state {
	round, _ := strconv.Atoi(object.GetAnnotations()[roundKey])
	revision, _ := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
	return state{round, revision}
}

// states are objects by name.
type states map[string]state

func (s states) revisions() map[string]int64 {
	revisions := map[string]int64{}
	for name, state := range s {
		revisions[name] = state.revision
	}
	return revisions
}

// story has all that happened to each object, in order.
type story map[string][]state

// living are the objects that are not deleted at the end of the story.
func (s story) living() states {
	living := states{}
	for name, states := range s {
		if last := states[len(states)-1]; last != (state{}) {
			living[name] = last
		}
	}
	return living
}

// load is a changer and a follower on each apiserver for each kind.
type load struct {
	both      []*controlPlane
	kinds     []kind
	changers  []*changer
	followers []*follower
	// calm is held shared during a change, so that who holds it alone sees none under way.
	calm sync.RWMutex
}

// startLoad starts a load that ends with the test.
func startLoad(t *testing.T, both []*controlPlane, kinds []kind) *load {
	t.Helper()
	l := &load{both: both, kinds: kinds}
	for _, k := range kinds {
		for i, cp := range both {
			l.followers = append(l.followers, newFollower(t, cp, k))
			l.changers = append(l.changers, &changer{
				kind: k, here: cp, there: both[1-i], client: plainClient(t, cp), calm: &l.calm, story: story{}, last: map[string]*object{},
			})
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for _, f := range l.followers {
		group.Go(func() { f.run(ctx) })
	}
	for _, c := range l.changers {
		group.Go(func() { c.run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		group.Wait()
	})
	return l
}

// waitForMore waits until each changer made so many more changes.
func (l *load) waitForMore(t *testing.T, more int) {
	t.Helper()
	for _, c := range l.changers {
		goal := c.count(t) + more
		eventually(t, fmt.Sprintf("changes of %s through %s", c.kind.Resource, c.here.name), func(context.Context) error {
			if got := c.count(t); got < goal {
				return fmt.Errorf("%d of %d acknowledged", got, goal)
			}
			return nil
		})
	}
}

// story of all objects of one kind, while no change is under way.
func (l *load) story(t *testing.T, k kind) story {
	t.Helper()
	all := story{}
	for _, c := range l.changers {
		if c.kind == k {
			c.count(t)
			maps.Copy(all, c.story)
		}
	}
	return all
}

// slowest is how long the slowest change took since the last call, with all attempts, until the other apiserver showed it.
func (l *load) slowest() time.Duration {
	slowest := time.Duration(0)
	for _, c := range l.changers {
		c.mu.Lock()
		slowest, c.slowest = max(slowest, c.slowest), 0
		c.mu.Unlock()
	}
	return slowest
}

func (l *load) report(t *testing.T) {
	for _, c := range l.changers {
		c.mu.Lock()
		t.Logf("%s through %s: %d changes acknowledged, %d attempts failed", c.kind.Resource, c.here.name, c.changes, c.failures)
		for _, text := range c.failed {
			t.Logf("  such as: %s", text)
		}
		c.mu.Unlock()
	}
	for _, f := range l.followers {
		f.mu.Lock()
		t.Logf("%s's watch of %s: opened again %d times, listed again %d times", f.cp.name, f.kind.Resource, f.reopened, f.relisted)
		f.mu.Unlock()
	}
}

// changer creates, updates and deletes objects of one kind through one apiserver, one after the other. Nobody else changes
// them and no name comes twice, so it knows at any time what must be there.
type changer struct {
	kind        kind
	here, there *controlPlane
	client      dynamic.Interface
	calm        *sync.RWMutex

	// last and story belong to who holds calm.
	last  map[string]*object
	story story

	mu       sync.Mutex
	changes  int
	failures int
	failed   []string
	slowest  time.Duration
	// broken says what was seen that must not be.
	broken error
}

// object is a living one as the apiserver last answered it.
type object struct {
	*unstructured.Unstructured
	// uncertain says that an attempt to create it failed, which may yet be carried out. Deleted it could come back.
	uncertain bool
}

// plainClient shows each answer to its caller. By itself client-go repeats a request whose answer says when to come back,
// and then nobody could tell that a create was tried twice.
func plainClient(t *testing.T, cp *controlPlane) dynamic.Interface {
	t.Helper()
	config := rest.CopyConfig(cp.config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(request *http.Request) (*http.Response, error) {
			response, err := next.RoundTrip(request)
			if err == nil {
				response.Header.Del("Retry-After")
			}
			return response, err
		})
	})
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

type roundTripper func(*http.Request) (*http.Response, error)

func (r roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return r(request) }

func (c *changer) run(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		c.make(ctx, c.create, n)
		c.make(ctx, c.update, n)
		// Objects from before a crash change after it too; only the younger half stays.
		c.make(ctx, c.update, n/2)
		if n%2 == 0 {
			c.make(ctx, c.remove, n/2)
		}
	}
}

// make carries out one change, unless the object is gone, and then looks at the object through the other apiserver.
func (c *changer) make(ctx context.Context, change func(context.Context, string) error, n int) {
	c.calm.RLock()
	defer c.calm.RUnlock()
	name := fmt.Sprintf("%s-%s-%05d", loadBatch, c.here.name, n)
	if states := c.story[name]; ctx.Err() != nil || c.isBroken() || (states != nil && c.last[name] == nil) {
		return
	}
	began := time.Now()
	err := change(ctx, name)
	if err == nil {
		err = c.compare(ctx, name)
	}
	took := time.Since(began)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	c.slowest = max(c.slowest, took)
	if err != nil && ctx.Err() == nil {
		c.broken = fmt.Errorf("%s %s through %s: %w", c.kind.Resource, name, c.here.name, err)
	}
}

func (c *changer) create(ctx context.Context, name string) error {
	wanted := c.kind.object(c.here, name)
	wanted.SetLabels(map[string]string{batchKey: loadBatch, nameKey: name})
	wanted.SetAnnotations(map[string]string{ownerKey: c.here.name, roundKey: "0"})
	created := &object{}
	err := c.settle(ctx, func(ctx context.Context, again bool) (err error) {
		created.uncertain = again
		created.Unstructured, err = c.objects().Create(ctx, wanted, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) && again {
			created.Unstructured, err = c.objects().Get(ctx, name, metav1.GetOptions{})
		}
		return err
	})
	return c.note(name, created, 0, err)
}

// update is refused if the object is not the one that was acknowledged last.
func (c *changer) update(ctx context.Context, name string) error {
	last := c.last[name]
	round := len(c.story[name])
	wanted := last.DeepCopy()
	wanted.SetAnnotations(map[string]string{ownerKey: c.here.name, roundKey: strconv.Itoa(round)})
	updated := &object{uncertain: last.uncertain}
	err := c.settle(ctx, func(ctx context.Context, again bool) (err error) {
		updated.Unstructured, err = c.objects().Update(ctx, wanted, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) && again {
			updated.Unstructured, err = c.objects().Get(ctx, name, metav1.GetOptions{})
		}
		return err
	})
	return c.note(name, updated, round, err)
}

func (c *changer) remove(ctx context.Context, name string) error {
	last := c.last[name]
	if last.uncertain {
		return nil
	}
	uid := last.GetUID()
	err := c.settle(ctx, func(ctx context.Context, again bool) error {
		err := c.objects().Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		if apierrors.IsNotFound(err) && again {
			return nil
		}
		return err
	})
	if err == nil {
		delete(c.last, name)
		c.story[name] = append(c.story[name], state{})
	}
	return err
}

// note keeps what was acknowledged.
func (c *changer) note(name string, now *object, round int, err error) error {
	if err != nil {
		return err
	}
	state := stateOf(now.Unstructured)
	if state.round != round {
		return fmt.Errorf("is of round %d, wrote %d", state.round, round)
	}
	c.last[name] = now
	c.story[name] = append(c.story[name], state)
	return nil
}

// compare finds in the other apiserver what this one has acknowledged: a list of the latest state must not be older, though
// it comes from a cache. That it is chosen by label keeps the apiserver from reading the one key.
func (c *changer) compare(ctx context.Context, name string) error {
	return c.settle(ctx, func(ctx context.Context, _ bool) error {
		listed, err := c.kind.of(c.there).List(ctx, metav1.ListOptions{LabelSelector: nameKey + "=" + name})
		if err != nil {
			return err
		}
		got, wanted := state{}, c.story[name][len(c.story[name])-1]
		if len(listed.Items) > 0 {
			got = stateOf(&listed.Items[0])
		}
		if got != wanted {
			return stale{fmt.Errorf("%s lists it as %v at revision %s, acknowledged was %v", c.there.name, got, listed.GetResourceVersion(), wanted)}
		}
		return nil
	})
}

func (c *changer) objects() dynamic.ResourceInterface { return c.kind.through(c.client) }

// stale is a list that is older than it may be.
type stale struct{ error }

// settle repeats an attempt until it is answered. One that failed may have been carried out, so the next one knows that it
// comes again.
func (c *changer) settle(ctx context.Context, attempt func(ctx context.Context, again bool) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for again := false; ; again = true {
		err := c.try(ctx, attempt, again)
		if !mayPass(err) {
			return err
		}
		c.mu.Lock()
		if c.failures++; len(c.failed) < 3 {
			c.failed = append(c.failed, err.Error())
		}
		c.mu.Unlock()
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("was not answered: %w", err)
		}
	}
}

// try gives one attempt little time: a request may hang where another one finds a member that answers.
func (c *changer) try(ctx context.Context, attempt func(ctx context.Context, again bool) error, again bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return attempt(ctx, again)
}

// mayPass says whether the same request may succeed later: it was not answered, or the apiserver says that it could not
// find out.
func mayPass(err error) bool {
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		code := status.Status().Code
		return code >= http.StatusInternalServerError || code == http.StatusTooManyRequests
	}
	return err != nil && !errors.As(err, &stale{})
}

func (c *changer) isBroken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken != nil
}

// count of the changes so far, if all went as it must.
func (c *changer) count(t *testing.T) int {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		t.Fatal(c.broken)
	}
	return c.changes
}
