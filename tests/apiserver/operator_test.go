package apiserver

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"tenure.dev/tests/harness"
)

// What README tells a new operator to do, word for word: a cell of three, three tenants, a kube-apiserver for each with the
// flags that tenurectl wrote, and nothing else about etcd.
func TestOperator(t *testing.T) {
	dir := t.TempDir()
	hosts := []string{"127.71.0.1", "127.71.0.2", "127.71.0.3"}
	args := []string{"cell", "init", "--out", filepath.Join(dir, "cell")}
	for i, host := range hosts {
		args = append(args, "--member", fmt.Sprintf("m%d=%s", i+1, host))
	}
	var members []*operated
	for _, line := range strings.Split(strings.TrimSpace(tenurectl(t, args...)), "\n") {
		members = append(members, startOperated(t, dir, line))
	}
	if len(members) != len(hosts) {
		t.Fatalf("cell init printed %d commands, want %d", len(members), len(hosts))
	}
	for _, m := range members {
		m.awaitReady(t)
	}

	admin := []string{
		"--endpoint", "https://" + hosts[1] + ":2382",
		"--cacert", filepath.Join(dir, "cell", "ca.crt"),
		"--cert", filepath.Join(dir, "cell", "admin.crt"),
		"--key", filepath.Join(dir, "cell", "admin.key"),
	}
	var all []*controlPlane
	for _, tenant := range []string{"acme", "globex", "initech"} {
		out := filepath.Join(dir, tenant)
		tenurectl(t, append([]string{"tenant", "create", tenant}, admin...)...)
		tenurectl(t, append([]string{"tenant", "credentials", tenant, "--out", out}, admin...)...)
		flags, err := os.ReadFile(filepath.Join(out, "apiserver-flags"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, startControlPlaneWith(t, tenant, tenant, strings.Fields(string(flags)), nil))
	}
	for _, cp := range all {
		name := "only-" + cp.tenant
		_, err := cp.core.CoreV1().ConfigMaps("default").Create(t.Context(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"of": cp.tenant}},
			metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, cp := range all {
		found, err := cp.core.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, object := range found.Items {
			if of := object.Data["of"]; strings.HasPrefix(object.Name, "only-") && of != cp.tenant {
				t.Errorf("%s sees %s of %s", cp.tenant, object.Name, of)
			}
		}
	}

	inPod(t, all[2], tenurectl(t, append([]string{"tenant", "credentials", "initech", "--format", "kubernetes"}, admin...)...))

	// New credentials while it runs: kube-apiserver reads its files anew, and the old certificate is refused at once.
	acme := all[0]
	tenurectl(t, append([]string{"tenant", "rotate", "acme", "--revoke-old", "--out", filepath.Join(dir, "acme")}, admin...)...)
	acme.stop(syscall.SIGKILL)
	acme.start(t)
	eventually(t, "a write with new credentials", func(ctx context.Context) error {
		_, err := acme.core.CoreV1().ConfigMaps("default").Update(ctx,
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "only-acme"}, Data: map[string]string{"of": "acme", "again": "1"}},
			metav1.UpdateOptions{})
		return err
	})

	usage := tenurectl(t, append([]string{"tenant", "usage", "acme"}, admin...)...)
	if !strings.Contains(usage, "/registry/configmaps/") {
		t.Errorf("usage of acme does not tell of its configmaps:\n%s", usage)
	}
	tenurectl(t, append([]string{"tenant", "suspend", "globex"}, admin...)...)
	list := tenurectl(t, append([]string{"tenant", "list"}, admin...)...)
	for _, wanted := range []string{"acme", "initech", "suspended"} {
		if !strings.Contains(list, wanted) {
			t.Errorf("the list of tenants has no %q:\n%s", wanted, list)
		}
	}
	tenurectl(t, append([]string{"tenant", "resume", "globex"}, admin...)...)
	all[1].waitReady(t)
	all[1].stop(syscall.SIGKILL)
	tenurectl(t, append([]string{"tenant", "delete", "globex", "--yes"}, admin...)...)
	if list = tenurectl(t, append([]string{"tenant", "list"}, admin...)...); strings.Contains(list, "globex") {
		t.Errorf("globex was deleted and is in the list:\n%s", list)
	}
	all[2].waitReady(t)
}

// inPod checks that Kubernetes takes what was printed for a kube-apiserver in a pod, and that the flags it had are kept.
func inPod(t *testing.T, cp *controlPlane, printed string) {
	t.Helper()
	documents := strings.SplitN(printed, "\n---\n", 2)
	if len(documents) != 2 {
		t.Fatalf("want a Secret and a patch:\n%s", printed)
	}
	secret := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(documents[0]), &secret.Object); err != nil {
		t.Fatal(err)
	}
	if err := dryRun(t, cp, secret); err != nil {
		t.Errorf("the Secret: %v", err)
	}
	labels := map[string]string{"app": "kube-apiserver"}
	pod := corev1.PodSpec{
		Containers: []corev1.Container{{
			Name: "kube-apiserver", Image: "kube-apiserver", Args: []string{"--v=2"},
			VolumeMounts: []corev1.VolumeMount{{Name: "pki", MountPath: "/pki"}},
		}},
		Volumes: []corev1.Volume{{Name: "pki"}},
	}
	deployments := cp.core.AppsV1().Deployments("default")
	_, err := deployments.Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "kube-apiserver"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pod},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	patch, err := yaml.YAMLToJSON([]byte(documents[1]))
	if err != nil {
		t.Fatal(err)
	}
	patched, err := deployments.Patch(t.Context(), "kube-apiserver", types.JSONPatchType, patch, metav1.PatchOptions{FieldValidation: "Strict"})
	if err != nil {
		t.Fatalf("the patch: %v\n%s", err, documents[1])
	}
	spec := patched.Spec.Template.Spec
	args := strings.Join(spec.Containers[0].Args, " ")
	if !strings.HasPrefix(args, "--v=2 --etcd-servers=https://") || strings.Count(args, "--etcd-") != 4 {
		t.Errorf("arguments of the patched kube-apiserver: %s", args)
	}
	if volumes := spec.Volumes; len(volumes) != 2 || volumes[1].Secret == nil || volumes[1].Secret.SecretName != secret.GetName() {
		t.Errorf("volumes of the patched kube-apiserver: %v", volumes)
	}
}

// tenurectl runs it as an operator does and gives what it printed.
func tenurectl(t *testing.T, args ...string) string {
	t.Helper()
	command := exec.Command(harness.Built(t, "tenurectl"), args...)
	command.Env = append(os.Environ(), "TENURECTL_CONFIG="+filepath.Join(t.TempDir(), "cells.json"))
	var out, problems bytes.Buffer
	command.Stdout, command.Stderr = &out, &problems
	if err := command.Run(); err != nil {
		t.Fatalf("tenurectl %s: %v\n%s", strings.Join(args, " "), err, problems.String())
	}
	return out.String()
}

// operated is a member started by a command that tenurectl printed.
type operated struct {
	log string
	cmd *exec.Cmd
}

func startOperated(t *testing.T, dir, line string) *operated {
	t.Helper()
	words := strings.Fields(line)
	if words[0] != "tenured" {
		t.Fatalf("a command to start a member begins with tenured: %s", line)
	}
	m := &operated{log: filepath.Join(t.TempDir(), "tenured.log")}
	log, err := os.Create(m.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	// Its data directory is in the directory where it is started.
	m.cmd = exec.Command(harness.Built(t, "tenured"), words[1:]...)
	m.cmd.Dir, m.cmd.Stdout, m.cmd.Stderr = dir, log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	t.Cleanup(func() {
		once.Do(func() {
			_ = m.cmd.Process.Kill()
			_ = m.cmd.Wait()
			if t.Failed() {
				t.Logf("last lines of a member:\n%s", tail(m.log, 30))
			}
		})
	})
	return m
}

func (m *operated) awaitReady(t *testing.T) {
	t.Helper()
	eventually(t, "a member that is ready", func(context.Context) error {
		text, err := os.ReadFile(m.log)
		if err == nil && !bytes.Contains(text, []byte("ready to serve client requests")) {
			err = fmt.Errorf("it says: %s", tail(m.log, 3))
		}
		return err
	})
}
