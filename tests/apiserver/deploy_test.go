package apiserver

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"tenure.dev/tests/harness"
)

// What operators apply to Kubernetes is what its API takes: each object by server-side apply, as a dry run, with strict fields.
func TestDeploy(t *testing.T) {
	server := harness.StartTenured(t, nil)
	cp := startControlPlane(t, "deploy", "default", server.Endpoint())
	objects := kustomized(t, "../../deploy/kubernetes/base")
	var kinds []string
	for _, object := range objects {
		kinds = append(kinds, object.GetKind())
		if err := dryRun(t, cp, object); err != nil {
			t.Errorf("%s %s: %v", object.GetKind(), object.GetName(), err)
		}
	}
	for _, wanted := range []string{"StatefulSet", "Service", "PodDisruptionBudget", "ServiceAccount", "NetworkPolicy"} {
		if !slices.Contains(kinds, wanted) {
			t.Errorf("no %s among %v", wanted, kinds)
		}
	}
	// The check can fail.
	misspelt := objects[slices.Index(kinds, "StatefulSet")].DeepCopy()
	if err := unstructured.SetNestedField(misspelt.Object, "tenure", "spec", "serviceNam"); err != nil {
		t.Fatal(err)
	}
	if err := dryRun(t, cp, misspelt); err == nil || !strings.Contains(err.Error(), "serviceNam") {
		t.Errorf("a misspelt field was taken: %v", err)
	}
	for _, object := range kustomized(t, "../../deploy/kubernetes/cert-manager") {
		if group := object.GroupVersionKind().Group; group != "cert-manager.io" {
			t.Errorf("%s %s is of group %q", object.GetKind(), object.GetName(), group)
		}
	}
}

// What docs/operations.md has operators do to the StatefulSet is what a kube-apiserver takes, in that order. Nobody makes pods of it here:
// what members do that are started so, tests/tests/cells.rs shows.
func TestDeployIsOperated(t *testing.T) {
	server := harness.StartTenured(t, nil)
	cp := startControlPlane(t, "operated", "default", server.Endpoint())
	objects := kustomized(t, "../../deploy/kubernetes/base")
	set := objects[slices.IndexFunc(objects, func(object *unstructured.Unstructured) bool { return object.GetKind() == "StatefulSet" })]
	sets := cp.any.Resource(schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "statefulsets"}).Namespace("default")
	if _, err := sets.Create(t.Context(), set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	var given []string
	for _, block := range strings.Split(string(text), "```sh kubernetes\n")[1:] {
		commands, _, _ := strings.Cut(block, "```\n")
		for _, line := range strings.Split(commands, "\n") {
			if strings.HasPrefix(line, "kubectl ") {
				given = append(given, line)
			}
		}
	}
	if len(given) < 8 {
		t.Fatalf("only %q", given)
	}
	kubectl := "kubectl() { command kubectl --server=" + cp.config.Host + " --insecure-skip-tls-verify --token=" + token + " \"$@\"; }\n"
	o := &operator{dir: t.TempDir()}
	var alone bool
	for _, line := range given {
		o.run(t, kubectl+line)
		now := &appsv1.StatefulSet{}
		found, err := sets.Get(t.Context(), set.GetName(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(found.Object, now); err != nil {
			t.Fatal(err)
		}
		spec := now.Spec
		forced := slices.ContainsFunc(spec.Template.Spec.Containers[0].Env, func(of corev1.EnvVar) bool { return of.Name == "ETCD_FORCE_NEW_CLUSTER" })
		if pods := *spec.Replicas; forced && pods > 1 {
			t.Errorf("after %q %d pods have --force-new-cluster", line, pods)
		}
		alone = alone || forced && *spec.Replicas == 1 && spec.Ordinals != nil && spec.Ordinals.Start == 2
		set.Object = found.Object
	}
	replicas, _, _ := unstructured.NestedInt64(set.Object, "spec", "replicas")
	start, _, _ := unstructured.NestedInt64(set.Object, "spec", "ordinals", "start")
	if !alone || replicas != 3 || start != 0 {
		t.Errorf("the survivor was alone: %v; in the end there are %d pods from %d on", alone, replicas, start)
	}
}

// kustomized are the objects of a kustomization that does nothing but list files.
func kustomized(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	var list struct {
		APIVersion string   `json:"apiVersion"`
		Kind       string   `json:"kind"`
		Resources  []string `json:"resources"`
	}
	read := func(name string) []byte {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	if err := yaml.UnmarshalStrict(read("kustomization.yaml"), &list); err != nil {
		t.Fatal(err)
	}
	var objects []*unstructured.Unstructured
	for _, name := range list.Resources {
		for _, document := range strings.Split(string(read(name)), "\n---\n") {
			object := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(document), &object.Object); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			objects = append(objects, object)
		}
	}
	return objects
}

func dryRun(t *testing.T, cp *controlPlane, object *unstructured.Unstructured) error {
	t.Helper()
	kind := object.GroupVersionKind()
	resource := schema.GroupVersionResource{
		Group: kind.Group, Version: kind.Version, Resource: map[string]string{
			"StatefulSet": "statefulsets", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets",
			"ServiceAccount": "serviceaccounts", "Secret": "secrets", "NetworkPolicy": "networkpolicies",
		}[kind.Kind],
	}
	body, err := yaml.Marshal(object.Object)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	force := true
	_, err = cp.any.Resource(resource).Namespace("default").Patch(ctx, object.GetName(), "application/apply-patch+yaml", body,
		metav1.PatchOptions{
			DryRun: []string{metav1.DryRunAll}, FieldManager: "deploy", FieldValidation: "Strict", Force: &force,
		})
	return err
}
