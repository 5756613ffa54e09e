package apiserver

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
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

	"tenure.dev/tests/harness"
)

const (
	ownerKey = "tenure.dev/owner"
	roundKey = "tenure.dev/round"
	batchKey = "tenure.dev/batch"
	// compactRevKey is where kube-apiserver notes the revision of its last compaction.
	compactRevKey = "compact_rev_key"
)

// kind is a resource that the tests use, through the dynamic client.
type kind struct {
	schema.GroupVersionResource
	name      string
	namespace string
}

var (
	namespaces = kind{schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}, "Namespace", ""}
	configMaps = kind{schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, "ConfigMap", "default"}
	leases     = kind{schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}, "Lease", "default"}
	widgets    = kind{schema.GroupVersionResource{Group: "tenure.dev", Version: "v1", Resource: "widgets"}, "Widget", "default"}

	kinds = []kind{namespaces, configMaps, widgets}
)

func (k kind) of(cp *controlPlane) dynamic.ResourceInterface { return k.through(cp.any) }

func (k kind) through(client dynamic.Interface) dynamic.ResourceInterface {
	if k.namespace == "" {
		return client.Resource(k.GroupVersionResource)
	}
	return client.Resource(k.GroupVersionResource).Namespace(k.namespace)
}

func (k kind) object(cp *controlPlane, name string) *unstructured.Unstructured {
	object := &unstructured.Unstructured{}
	object.SetGroupVersionKind(k.GroupVersion().WithKind(k.name))
	object.SetName(name)
	object.SetAnnotations(map[string]string{ownerKey: cp.tenant})
	return object
}

// The life of two control planes, in the order in which it happens: each step builds on those before.
func TestTwoControlPlanes(t *testing.T) {
	server := harness.StartTenured(t, []string{"acme", "globex", "idle"})
	acme := startControlPlane(t, "acme", "acme", server.Endpoints["acme"])
	globex := startControlPlane(t, "globex", "globex", server.Endpoints["globex"])
	both := []*controlPlane{acme, globex}

	step := func(name string, run func(t *testing.T)) {
		if !t.Run(name, run) {
			t.FailNow()
		}
	}
	step("objects of every kind", func(t *testing.T) { testObjects(t, both, "object") })
	step("each sees only its own", func(t *testing.T) {
		testSameNames(t, both)
		testOnlyHere(t, acme, globex)
		testOnlyHere(t, globex, acme)
	})
	step("lists are streamed", func(t *testing.T) { testListStream(t, both) })
	step("progress requests let caches answer", func(t *testing.T) { testConsistentReads(t, both) })
	step("a neighbour's writes move no revision", func(t *testing.T) { testNeighbour(t, server, acme, globex) })
	step("each compacts its own history", func(t *testing.T) { testCompaction(t, server, both) })
	step("kill -9 of tenured", func(t *testing.T) { testCrash(t, server, both) })
	step("objects of every kind after the crash", func(t *testing.T) { testObjects(t, both, "recovered") })
}

// testObjects works on both control planes at once, with the same names, so that a mix-up would show.
func testObjects(t *testing.T, both []*controlPlane, prefix string) {
	for _, cp := range both {
		t.Run(cp.tenant, func(t *testing.T) {
			t.Parallel()
			createWidgetDefinition(t, cp)
			for _, k := range kinds {
				exercise(t, cp, k, prefix)
			}
		})
	}
}

// createWidgetDefinition creates the CRD, if it is not there yet, and waits until its objects are served.
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
	if _, err := cp.crds.ApiextensionsV1().CustomResourceDefinitions().Create(t.Context(), crd, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	eventually(t, "widgets are served", func(ctx context.Context) error {
		_, err := widgets.of(cp).List(ctx, metav1.ListOptions{})
		return err
	})
}

// exercise creates, gets, lists in pages, watches, updates and deletes objects of one kind. Of its five objects it leaves
// the last three.
func exercise(t *testing.T, cp *controlPlane, k kind, prefix string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	objects := k.of(cp)
	must := func(object *unstructured.Unstructured, err error) *unstructured.Unstructured {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", k.Resource, err)
		}
		return object
	}
	events := watchFromNow(t, cp, k)
	defer events.Stop()

	names := make([]string, 5)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%d", prefix, i)
		object := k.object(cp, names[i])
		object.SetLabels(map[string]string{batchKey: prefix})
		must(objects.Create(ctx, object, metav1.CreateOptions{}))
		if got := must(objects.Get(ctx, names[i], metav1.GetOptions{})); got.GetAnnotations()[ownerKey] != cp.tenant {
			t.Fatalf("%s %s belongs to %q", k.Resource, names[i], got.GetAnnotations()[ownerKey])
		}
	}
	listed := listInPages(t, cp, k, metav1.ListOptions{Limit: 2, LabelSelector: batchKey + "=" + prefix})
	for _, name := range names {
		if listed[name] != 1 {
			t.Errorf("%s %s was listed %d times", k.Resource, name, listed[name])
		}
	}
	updated := must(objects.Get(ctx, names[0], metav1.GetOptions{}))
	stale := updated.DeepCopy()
	updated.SetAnnotations(map[string]string{ownerKey: cp.tenant, roundKey: "2"})
	must(objects.Update(ctx, updated, metav1.UpdateOptions{}))
	if got := must(objects.Get(ctx, names[0], metav1.GetOptions{})); got.GetAnnotations()[roundKey] != "2" {
		t.Errorf("%s %s after its update: %v", k.Resource, names[0], got.GetAnnotations())
	}
	if _, err := objects.Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update of an old %s: %v", k.name, err)
	}
	wanted := make([]string, 0, 8)
	for _, name := range names {
		wanted = append(wanted, "ADDED "+name)
	}
	wanted = append(wanted, "MODIFIED "+names[0]+" round 2")
	for _, name := range names[:2] {
		remove(t, cp, k, name)
		wanted = append(wanted, "DELETED "+name)
	}
	expectEvents(t, cp, events, wanted)
}

// listInPages counts how often each name comes in the pages of a list with a limit.
func listInPages(t *testing.T, cp *controlPlane, k kind, options metav1.ListOptions) map[string]int {
	t.Helper()
	listed := map[string]int{}
	for pages := 0; pages == 0 || options.Continue != ""; pages++ {
		page, err := k.of(cp).List(t.Context(), options)
		if err != nil {
			t.Fatalf("page %d of %s: %v", pages, k.Resource, err)
		}
		if int64(len(page.Items)) > options.Limit {
			t.Fatalf("a page of %d %s", len(page.Items), k.Resource)
		}
		for _, item := range page.Items {
			listed[item.GetName()]++
		}
		options.Continue = page.GetContinue()
	}
	return listed
}

// watchFromNow opens a watch that shows what happens after this call.
func watchFromNow(t *testing.T, cp *controlPlane, k kind) watch.Interface {
	t.Helper()
	now, err := k.of(cp).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	events, err := k.of(cp).Watch(t.Context(), metav1.ListOptions{ResourceVersion: now.GetResourceVersion()})
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// remove deletes an object; of a namespace it also does what the namespace controller would.
func remove(t *testing.T, cp *controlPlane, k kind, name string) {
	t.Helper()
	if err := k.of(cp).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if k == namespaces {
		namespace, err := cp.core.CoreV1().Namespaces().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		namespace.Spec.Finalizers = nil
		if _, err := cp.core.CoreV1().Namespaces().Finalize(t.Context(), namespace, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.of(cp).Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("%s %s after its deletion: %v", k.Resource, name, err)
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

// testSameNames reads what testObjects left under the same names in both.
func testSameNames(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		for _, k := range kinds {
			for _, name := range []string{"object-2", "object-3", "object-4"} {
				object, err := k.of(cp).Get(t.Context(), name, metav1.GetOptions{})
				if err != nil || object.GetAnnotations()[ownerKey] != cp.tenant {
					t.Errorf("%s %s of %s: %v, %v", k.Resource, name, cp.tenant, object, err)
				}
			}
		}
	}
}

// testOnlyHere changes objects here and finds that there nothing is seen of it.
func testOnlyHere(t *testing.T, here, there *controlPlane) {
	for _, k := range []kind{configMaps, widgets} {
		events := watchFromNow(t, there, k)
		defer events.Stop()
		name := "only-in-" + here.tenant
		if _, err := k.of(here).Create(t.Context(), k.object(here, name), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		remove(t, here, k, "object-2")
		if _, err := k.of(there).Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("%s gets %s's %s: %v", there.tenant, here.tenant, k.Resource, err)
		}
		if listInPages(t, there, k, metav1.ListOptions{Limit: 100})[name] != 0 {
			t.Errorf("%s lists %s's %s", there.tenant, here.tenant, k.Resource)
		}
		again, err := k.of(there).Get(t.Context(), "object-3", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		again.SetLabels(map[string]string{"seen-by": there.tenant})
		if _, err := k.of(there).Update(t.Context(), again, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		// What the neighbour did would have come before.
		select {
		case event := <-events.ResultChan():
			if object, ok := event.Object.(*unstructured.Unstructured); !ok || event.Type != watch.Modified || object.GetName() != "object-3" {
				t.Errorf("%s's watch of %s begins with %v", there.tenant, k.Resource, event)
			}
		case <-time.After(patience):
			t.Errorf("%s's watch of %s shows nothing", there.tenant, k.Resource)
		}
		// The same below Kubernetes.
		answer, err := there.etcd.Get(t.Context(), "/registry/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range answer.Kvs {
			if strings.Contains(string(kv.Key), name) {
				t.Errorf("%s's etcd holds %s", there.tenant, kv.Key)
			}
		}
	}
	// Put the first object back, so that the other direction starts as this one did.
	for _, k := range []kind{configMaps, widgets} {
		if _, err := k.of(here).Create(t.Context(), k.object(here, "object-2"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// testListStream: Kubernetes 1.37 reads its lists through RangeStream and falls back silently where the server lacks it.
func testListStream(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		metrics := cp.metrics(t)
		if count := sumOf(metrics, `etcd_request_duration_seconds_count`, `operation="listStream"`); count == 0 {
			t.Errorf("%s's kube-apiserver streamed no list", cp.tenant)
		}
		if count := sumOf(metrics, `etcd_request_errors_total`, `operation="listStream"`); count != 0 {
			t.Errorf("%v streamed lists of %s's kube-apiserver failed", count, cp.tenant)
		}
	}
}

// testConsistentReads: nothing under the widgets' prefix has happened there, so only a progress request can tell the cache.
func testConsistentReads(t *testing.T, both []*controlPlane) {
	for _, cp := range both {
		waitForCache(t, cp, widgets)
	}
}

// waitForCache waits until a list of the latest state comes from the watch cache, which it does once that knows that it has
// seen everything up to the latest revision. Nobody else may list objects of this kind meanwhile.
func waitForCache(t *testing.T, cp *controlPlane, k kind) {
	t.Helper()
	fromCache := fmt.Sprintf(`fallback="false",group="%s",resource="%s",success="true"`, k.Group, k.Resource)
	served := func() float64 {
		return sumOf(cp.metrics(t), "apiserver_watch_cache_consistent_read_total", fromCache)
	}
	eventually(t, fmt.Sprintf("a consistent read of %s through %s from the cache", k.Resource, cp.name), func(ctx context.Context) error {
		if _, err := cp.etcd.Put(ctx, "elsewhere", ""); err != nil {
			return err
		}
		before := served()
		if _, err := k.of(cp).List(ctx, metav1.ListOptions{}); err != nil {
			return err
		}
		if served() == before {
			return errors.New("the list came from etcd")
		}
		return nil
	})
}

func testNeighbour(t *testing.T, server *harness.Server, acme, globex *controlPlane) {
	const objects, writers = 10_000, 32
	// A running kube-apiserver writes on its own (its lease, its endpoints), so globex's is stopped while its revision must stand.
	globex.stop(syscall.SIGTERM)
	idle := etcdClient(t, server.Endpoints["idle"])
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

// testCompaction writes nothing through the apiservers: what they write by themselves moves the revision far enough.
func testCompaction(t *testing.T, server *harness.Server, both []*controlPlane) {
	idle := etcdClient(t, server.Endpoints["idle"])
	first, err := idle.Put(t.Context(), "history", "1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := idle.Put(t.Context(), "history", "2"); err != nil {
		t.Fatal(err)
	}
	old := make([]int64, len(both))
	for i, cp := range both {
		old[i] = revision(t, cp.etcd)
	}
	for i, cp := range both {
		eventually(t, fmt.Sprintf("%s's revision %d is compacted", cp.tenant, old[i]), func(ctx context.Context) error {
			_, err := cp.etcd.Get(ctx, "history", clientv3.WithRev(old[i]))
			if errors.Is(err, rpctypes.ErrCompacted) {
				return nil
			}
			return fmt.Errorf("a read of it: %v", err)
		})
		answer, err := cp.etcd.Get(t.Context(), compactRevKey)
		if err != nil || len(answer.Kvs) != 1 {
			t.Fatalf("%s of %s: %v, %v", compactRevKey, cp.tenant, answer, err)
		}
		if noted, err := strconv.ParseInt(string(answer.Kvs[0].Value), 10, 64); err != nil || noted <= old[i] {
			t.Errorf("%s of %s is %q, was compacted past %d", compactRevKey, cp.tenant, answer.Kvs[0].Value, old[i])
		}
	}
	answer, err := idle.Get(t.Context(), "history", clientv3.WithRev(first.Header.Revision))
	if err != nil || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != "1" {
		t.Errorf("the idle tenant's history: %v, %v", answer, err)
	}
}

// crashes is how often testCrash kills tenured.
const crashes = 3

// testCrash kills tenured under writers of both control planes. The apiservers are not restarted.
func testCrash(t *testing.T, server *harness.Server, both []*controlPlane) {
	writers := make([]*writer, len(both))
	started := make([]float64, len(both))
	for i, cp := range both {
		writers[i] = startWriter(t, cp)
		started[i] = startTime(t, cp)
	}
	for range crashes {
		for _, w := range writers {
			w.waitForMore(t, 20)
		}
		server.Restart()
		for _, cp := range both {
			cp.waitReady(t)
		}
	}
	for i, w := range writers {
		w.waitForMore(t, 20)
		w.verify(t)
		if now := startTime(t, w.cp); now != started[i] {
			t.Errorf("%s's kube-apiserver was started at %v, then at %v", w.cp.tenant, started[i], now)
		}
	}
}

// startTime is when the process that answers now was started.
func startTime(t *testing.T, cp *controlPlane) float64 {
	t.Helper()
	at := sumOf(cp.metrics(t), "process_start_time_seconds", "")
	if at == 0 {
		t.Fatalf("%s's kube-apiserver does not say when it was started", cp.tenant)
	}
	return at
}
