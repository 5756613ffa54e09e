package apiserver

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
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
