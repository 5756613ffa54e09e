package apiserver

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"

	"tenure.dev/tests/harness"
)

const (
	ownerKey = "tenure.dev/owner"
	roundKey = "tenure.dev/round"
)

var (
	namespaces = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	widgets    = schema.GroupVersionResource{Group: "tenure.dev", Version: "v1", Resource: "widgets"}
)

// The whole life of two control planes, in the order in which it happens; each part builds on those before.
func TestTwoControlPlanes(t *testing.T) {
	server := harness.StartTenured(t, []string{"acme", "globex", "idle"})
	acme := startControlPlane(t, server, "acme")
	globex := startControlPlane(t, server, "globex")
	both := []*controlPlane{acme, globex}

	t.Run("objects of every kind", func(t *testing.T) { testObjects(t, both) })
	t.Run("each sees only its own", func(t *testing.T) { testIsolation(t, acme, globex) })
	t.Run("lists are streamed", func(t *testing.T) { testListStream(t, both) })
	t.Run("a neighbour's writes move no revision", func(t *testing.T) { testNeighbour(t, server, acme, globex) })
	t.Run("each compacts its own history", func(t *testing.T) { testCompaction(t, both) })
	t.Run("kill -9 of tenured", func(t *testing.T) { testCrash(t, server, both) })
}

// Both control planes at once, with the same names, so that a mix-up would show.
func testObjects(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		t.Run(cp.tenant, func(t *testing.T) {
			t.Parallel()
			createWidgetDefinition(t, cp)
			exercise(t, cp, namespaces, "", "Namespace", "v1")
			exercise(t, cp, configMaps, "default", "ConfigMap", "v1")
			exercise(t, cp, widgets, "default", "Widget", "tenure.dev/v1")
		})
	}
}

func createWidgetDefinition(t *testing.T, cp *controlPlane) {
	t.Helper()
	preserve := true
	crd := &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: "widgets.tenure.dev"},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: "tenure.dev",
			Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "widgets", Singular: "widget", Kind: "Widget"},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
				Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
					Type: "object", XPreserveUnknownFields: &preserve,
				}},
			}},
		},
	}
	if _, err := cp.crds.ApiextensionsV1().CustomResourceDefinitions().Create(t.Context(), crd, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "widgets are served", func(ctx context.Context) error {
		_, err := cp.any.Resource(widgets).Namespace("default").List(ctx, metav1.ListOptions{})
		return err
	})
}

// exercise creates, gets, lists in pages, watches, updates and deletes objects of one kind. It leaves object-2 to object-4.
func exercise(t *testing.T, cp *controlPlane, kind schema.GroupVersionResource, namespace, kindName, version string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var objects dynamic.ResourceInterface = cp.any.Resource(kind)
	if namespace != "" {
		objects = cp.any.Resource(kind).Namespace(namespace)
	}
	must := func(object *unstructured.Unstructured, err error) *unstructured.Unstructured {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", kind.Resource, err)
		}
		return object
	}
	before, err := objects.List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	events, err := objects.Watch(ctx, metav1.ListOptions{ResourceVersion: before.GetResourceVersion()})
	if err != nil {
		t.Fatal(err)
	}
	defer events.Stop()

	names := make([]string, 5)
	for i := range names {
		names[i] = "object-" + strconv.Itoa(i)
		object := &unstructured.Unstructured{}
		object.SetAPIVersion(version)
		object.SetKind(kindName)
		object.SetName(names[i])
		object.SetAnnotations(map[string]string{ownerKey: cp.tenant})
		must(objects.Create(ctx, object, metav1.CreateOptions{}))
		if got := must(objects.Get(ctx, names[i], metav1.GetOptions{})); got.GetAnnotations()[ownerKey] != cp.tenant {
			t.Fatalf("%s %s belongs to %q", kind.Resource, names[i], got.GetAnnotations()[ownerKey])
		}
	}
	listed := map[string]bool{}
	pages, next := 0, ""
	for ok := true; ok; ok = next != "" {
		page, err := objects.List(ctx, metav1.ListOptions{Limit: 2, Continue: next})
		if err != nil {
			t.Fatal(err)
		}
		if len(page.Items) > 2 {
			t.Fatalf("a page of %d %s", len(page.Items), kind.Resource)
		}
		for _, item := range page.Items {
			listed[item.GetName()] = true
		}
		pages, next = pages+1, page.GetContinue()
	}
	for _, name := range names {
		if !listed[name] {
			t.Errorf("%s %s is missing in %d pages", kind.Resource, name, pages)
		}
	}
	updated := must(objects.Get(ctx, names[0], metav1.GetOptions{}))
	stale := updated.DeepCopy()
	updated.SetAnnotations(map[string]string{ownerKey: cp.tenant, roundKey: "2"})
	must(objects.Update(ctx, updated, metav1.UpdateOptions{}))
	if _, err := objects.Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update of an old %s: %v", kindName, err)
	}
	for _, name := range names[:2] {
		remove(t, cp, objects, kind, name)
	}
	expectEvents(t, cp, events, []string{
		"ADDED object-0", "ADDED object-1", "ADDED object-2", "ADDED object-3", "ADDED object-4",
		"MODIFIED object-0 round 2", "DELETED object-0", "DELETED object-1",
	})
}

// remove deletes an object and waits until it is gone; of a namespace it does what the namespace controller would.
func remove(t *testing.T, cp *controlPlane, objects dynamic.ResourceInterface, kind schema.GroupVersionResource, name string) {
	t.Helper()
	if err := objects.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if kind == namespaces {
		namespace, err := cp.core.CoreV1().Namespaces().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		namespace.Spec.Finalizers = nil
		if _, err := cp.core.CoreV1().Namespaces().Finalize(t.Context(), namespace, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := objects.Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("%s %s after its deletion: %v", kind.Resource, name, err)
	}
}

// expectEvents reads until the wanted events have come, in this order; others may come between, but none of another tenant.
func expectEvents(t *testing.T, cp *controlPlane, events watch.Interface, wanted []string) {
	t.Helper()
	deadline := time.After(patience)
	var seen []string
	for len(wanted) > 0 {
		select {
		case event, open := <-events.ResultChan():
			if !open {
				t.Fatalf("the watch ended; still wanted %q of %q", wanted, seen)
			}
			object, ok := event.Object.(*unstructured.Unstructured)
			if !ok {
				t.Fatalf("event %v", event)
			}
			annotations := object.GetAnnotations()
			if owner := annotations[ownerKey]; owner != "" && owner != cp.tenant {
				t.Errorf("%s's watch saw %s of %s", cp.tenant, object.GetName(), owner)
			}
			text := fmt.Sprintf("%s %s", event.Type, object.GetName())
			if event.Type == watch.Modified && annotations[roundKey] != "" {
				text += " round " + annotations[roundKey]
			}
			seen = append(seen, text)
			if text == wanted[0] {
				wanted = wanted[1:]
			}
		case <-deadline:
			t.Fatalf("no event %q; seen %q", wanted[0], seen)
		}
	}
}

func testIsolation(t *testing.T, acme, globex *controlPlane) {
	ctx := t.Context()
	for _, cp := range []*controlPlane{acme, globex} {
		maps, err := cp.core.CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, item := range maps.Items {
			if owner := item.Annotations[ownerKey]; owner != "" && owner != cp.tenant {
				t.Errorf("%s lists %s of %s", cp.tenant, item.Name, owner)
			}
		}
	}
	secret := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "only-here"}}
	if _, err := acme.core.CoreV1().ConfigMaps("default").Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := globex.core.CoreV1().ConfigMaps("default").Get(ctx, "only-here", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("globex gets acme's object: %v", err)
	}
	if err := acme.core.CoreV1().ConfigMaps("default").Delete(ctx, "object-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := globex.core.CoreV1().ConfigMaps("default").Get(ctx, "object-2", metav1.GetOptions{}); err != nil {
		t.Errorf("acme's delete reached globex: %v", err)
	}
	// The same below Kubernetes: no key of the one is readable through the endpoint of the other.
	answer, err := globex.etcd.Get(ctx, "/registry/configmaps/default/only-here")
	if err != nil || len(answer.Kvs) != 0 {
		t.Errorf("globex's etcd: %v, %v", answer, err)
	}
}

// Kubernetes 1.37 reads its lists through RangeStream and falls back silently where the server lacks it.
func testListStream(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		metrics, err := cp.core.RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if count := sumOf(string(metrics), `etcd_request_duration_seconds_count`, `operation="listStream"`); count == 0 {
			t.Errorf("%s's kube-apiserver streamed no list", cp.tenant)
		}
		if count := sumOf(string(metrics), `etcd_request_errors_total`, `operation="listStream"`); count != 0 {
			t.Errorf("%v streamed lists of %s's kube-apiserver failed", count, cp.tenant)
		}
	}
}

func testNeighbour(t *testing.T, server *harness.Server, acme, globex *controlPlane) {
	const objects, writers = 10_000, 32
	// A running kube-apiserver writes on its own (its lease, its endpoints), so globex's is stopped while its revision must stand.
	globex.stop(syscall.SIGTERM)
	idle := etcdClient(t, server, "idle")
	idleBefore, globexBefore := revision(t, idle), revision(t, globex.etcd)

	maps := acme.core.CoreV1().ConfigMaps("default")
	var next, failed atomic.Int64
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for n := next.Add(1); n <= objects; n = next.Add(1) {
				object := &corev1.ConfigMap{
					ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("many-%05d", n), Labels: map[string]string{"many": "yes"}},
					Data:       map[string]string{"n": strconv.FormatInt(n, 10)},
				}
				if _, err := maps.Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
					failed.Add(1)
					t.Errorf("create %s: %v", object.Name, err)
					return
				}
			}
		})
	}
	group.Wait()
	if failed.Load() > 0 {
		return
	}
	if now := revision(t, idle); now != idleBefore {
		t.Errorf("the idle tenant's revision went from %d to %d", idleBefore, now)
	}
	if now := revision(t, globex.etcd); now != globexBefore {
		t.Errorf("globex's revision went from %d to %d", globexBefore, now)
	}
	list, err := maps.List(t.Context(), metav1.ListOptions{LabelSelector: "many=yes"})
	if err != nil || len(list.Items) != objects {
		t.Errorf("listed %d of %d: %v", len(list.Items), objects, err)
	}
	globex.start(t)
}

func testCompaction(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		t.Run(cp.tenant, func(t *testing.T) {
			t.Parallel()
			old := revision(t, cp.etcd)
			n := 0
			eventually(t, "revision "+strconv.FormatInt(old, 10)+" is compacted", func(ctx context.Context) error {
				n++
				object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "tick-" + strconv.Itoa(n)}}
				if _, err := cp.core.CoreV1().ConfigMaps("default").Create(ctx, object, metav1.CreateOptions{}); err != nil {
					return err
				}
				_, err := cp.etcd.Get(ctx, "x", clientv3.WithRev(old))
				if errors.Is(err, rpctypes.ErrCompacted) {
					return nil
				}
				return fmt.Errorf("readable: %w", err)
			})
		})
	}
}

// testCrash kills tenured under writers of both control planes, three times. The apiservers are not restarted.
func testCrash(t *testing.T, server *harness.Server, both []*controlPlane) {
	writers := make([]*writer, len(both))
	pids := make([]int, len(both))
	for i, cp := range both {
		writers[i] = startWriter(t, cp)
		pids[i] = cp.cmd.Process.Pid
	}
	for range 3 {
		for _, w := range writers {
			w.waitForMore(t, 20)
		}
		server.Restart()
		for i, cp := range both {
			cp.waitReady(t)
			if err := cp.cmd.Process.Signal(syscall.Signal(0)); err != nil || cp.cmd.Process.Pid != pids[i] {
				t.Fatalf("%s's kube-apiserver did not survive: %v", cp.tenant, err)
			}
		}
	}
	for _, w := range writers {
		w.waitForMore(t, 20)
		w.verify(t)
	}
}

// writer creates one object after the other and remembers which were acknowledged; an informer follows beside it.
type writer struct {
	cp       *controlPlane
	stop     context.CancelFunc
	done     chan struct{}
	informed func(name string) bool

	mu    sync.Mutex
	acked []string
}

func startWriter(t *testing.T, cp *controlPlane) *writer {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	factory := informers.NewSharedInformerFactoryWithOptions(cp.core, 0, informers.WithNamespace("default"))
	lister := factory.Core().V1().ConfigMaps().Lister().ConfigMaps("default")
	factory.Start(ctx.Done())
	w := &writer{cp: cp, stop: cancel, done: make(chan struct{})}
	w.informed = func(name string) bool {
		_, err := lister.Get(name)
		return err == nil
	}
	t.Cleanup(cancel)
	go func() {
		defer close(w.done)
		for n := 0; ctx.Err() == nil; n++ {
			w.write(ctx, fmt.Sprintf("crash-%05d", n))
		}
	}()
	return w
}

func (w *writer) write(ctx context.Context, name string) {
	// While tenured is down a request may hang; the next one then finds out whether it is back.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"owner": w.cp.tenant}}
	if _, err := w.cp.core.CoreV1().ConfigMaps("default").Create(ctx, object, metav1.CreateOptions{}); err == nil {
		w.mu.Lock()
		w.acked = append(w.acked, name)
		w.mu.Unlock()
	}
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

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

// verify stops the writer and finds every acknowledged object, in a read from storage and in the informer.
func (w *writer) verify(t *testing.T) {
	t.Helper()
	last := w.count()
	eventually(t, w.cp.tenant+"'s informer follows", func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, name := range w.acked[:last] {
			if !w.informed(name) {
				return fmt.Errorf("%s has not come", name)
			}
		}
		return nil
	})
	w.stop()
	<-w.done
	for _, name := range w.acked {
		object, err := w.cp.core.CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || object.Data["owner"] != w.cp.tenant {
			t.Errorf("%s was acknowledged to %s: %v", name, w.cp.tenant, err)
		}
	}
	t.Logf("%s: %d objects acknowledged around three crashes, all there", w.cp.tenant, len(w.acked))
}
