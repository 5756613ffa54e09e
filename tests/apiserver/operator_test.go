package apiserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"tenure.dev/tests/harness"
)

// What README tells a new operator to do, by README's own commands: a cell of three, three tenants, a kube-apiserver for each with the
// flags that tenurectl wrote, and kubectl.
func TestOperator(t *testing.T) {
	o := &operator{dir: t.TempDir()}
	o.run(t, readme(t, "cell"))
	var all []*hosted
	for _, tenant := range []string{"acme", "globex", "initech"} {
		all = append(all, o.host(t, tenant))
	}
	for _, of := range all {
		found, err := of.core.CoreV1().ConfigMaps("default").Get(t.Context(), "hello", metav1.GetOptions{})
		if err != nil || found.Data["of"] != of.tenant {
			t.Errorf("%s has hello of %q: %v", of.tenant, found.Data["of"], err)
		}
	}

	inPod(t, all[2].controlPlane, o.run(t, "tenurectl tenant credentials initech --format kubernetes"))
	o.rotate(t, all[0].controlPlane)

	usage := o.run(t, "tenurectl tenant usage acme")
	if !strings.Contains(usage, "/registry/configmaps/") {
		t.Errorf("usage of acme does not tell of its configmaps:\n%s", usage)
	}
	o.run(t, "tenurectl tenant suspend globex")
	list := o.run(t, "tenurectl tenant list")
	for _, wanted := range []string{"acme", "initech", "suspended"} {
		if !strings.Contains(list, wanted) {
			t.Errorf("the list of tenants has no %q:\n%s", wanted, list)
		}
	}
	o.run(t, "tenurectl tenant resume globex")
	all[1].waitReady(t)
	all[1].end()
	o.run(t, "tenurectl tenant delete globex --yes")
	if list = o.run(t, "tenurectl tenant list"); strings.Contains(list, "globex") {
		t.Errorf("globex was deleted and is in the list:\n%s", list)
	}
	all[2].waitReady(t)
}

// Whoever starts with `make run` is told what README says.
func TestOperatorIsTold(t *testing.T) {
	run, err := exec.Command("make", "-C", "../..", "--dry-run", "run").CombinedOutput()
	if err != nil || !strings.Contains(string(run), "next\n") {
		t.Errorf("make run does not say what is next: %v\n%s", err, run)
	}
	said, err := exec.Command("make", "-C", "../..", "--silent", "next").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	for _, block := range []string{"cell", "tenant"} {
		if !strings.Contains(string(said), readme(t, block)) {
			t.Errorf("block %q of README is not in:\n%s", block, said)
		}
	}
}

// readme are the commands of a block of README: those between "```sh NAME" and "```".
func readme(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "```sh "+name+"\n")
	block, _, closed := strings.Cut(rest, "```\n")
	if !found || !closed {
		t.Fatalf("README has no block %q", name)
	}
	return block
}

// leaveTimeout is how long a member lets requests go on whose certificate was revoked. A write that takes about as long on a busy machine
// may be cut.
const leaveTimeout = 500 * time.Millisecond

// rotate gives acme new credentials while it is written to. Its kube-apiserver goes on, on connections that it makes with the new files;
// the old certificate opens nothing any more.
func (o *operator) rotate(t *testing.T, acme *controlPlane) {
	t.Helper()
	files := filepath.Join(o.dir, acme.tenant)
	old, err := transport.TLSInfo{
		TrustedCAFile: filepath.Join(files, "ca.crt"),
		CertFile:      copied(t, filepath.Join(files, "client.crt")),
		KeyFile:       copied(t, filepath.Join(files, "client.key")),
	}.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	endpoint := "https://127.0.0.11:2379"
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, TLS: old, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = etcd.Close() })
	revision(t, etcd)

	w := startWriter(t, acme)
	w.waitForMore(t, 50)
	o.run(t, "tenurectl tenant rotate acme --revoke-old --out acme")
	w.waitForMore(t, 200)
	eventually(t, "an end of the old certificate", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := etcd.Get(ctx, "a"); err == nil {
			return fmt.Errorf("it is served")
		}
		return nil
	})
	w.verify(t)
	for _, failed := range w.failed {
		if failed.took < leaveTimeout/2 {
			t.Errorf("a write failed, others were %d: %v", len(w.acked), failed.err)
		} else {
			t.Logf("cut, as the machine is too slow for its time to leave: %v", failed.err)
		}
	}
}

func copied(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), filepath.Base(path))
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
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

// operator is whoever types commands, in a directory of its own.
type operator struct{ dir string }

// hosted is the control plane of a tenant, started by README's commands.
type hosted struct {
	*controlPlane
	end func()
}

// host makes a tenant and its control plane as README does, with what it says to change for another one.
func (o *operator) host(t *testing.T, tenant string) *hosted {
	t.Helper()
	_, port, _ := net.SplitHostPort(harness.FreeAddress(t))
	said, end := o.start(t, strings.NewReplacer("acme", tenant, "6443", port).Replace(readme(t, "tenant")))
	if !strings.HasSuffix(said, tenant) {
		t.Errorf("kubectl reads of %s:\n%s", tenant, said)
	}
	cp := &controlPlane{
		name:   tenant,
		tenant: tenant,
		log:    filepath.Join(o.dir, tenant, "log"),
		config: &rest.Config{
			Host:            "https://127.0.0.1:" + port,
			BearerToken:     "secret",
			TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(o.dir, tenant, "serving", "apiserver.crt")},
			QPS:             -1,
		},
	}
	cp.connect(t)
	return &hosted{cp, end}
}

// run gives what the commands print.
func (o *operator) run(t *testing.T, commands string) string {
	t.Helper()
	said, _ := o.start(t, commands)
	return said
}

// start runs commands in a shell that ends at the first that fails, and gives what they print and what ends all that they left running,
// which also the end of the test does. Programs are those of the Makefile; files of the home directory are in the operator's.
func (o *operator) start(t *testing.T, commands string) (said string, end func()) {
	t.Helper()
	programs := []string{filepath.Dir(harness.Built(t, "tenurectl")), filepath.Dir(harness.Tool(t, "kubectl")), os.Getenv("PATH")}
	// One pipe ends at this process' end, the other when all of the group are gone.
	alive, ours := pipe(t)
	gone, theirs := pipe(t)
	out, problems := create(t, o.dir, "out"), create(t, o.dir, "problems")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	shell := exec.CommandContext(ctx, "sh", "-ec", "{ read -r _ <&3 || kill -KILL 0; } &\n"+commands)
	shell.Dir, shell.Stdout, shell.Stderr = o.dir, out, problems
	shell.Env = append(os.Environ(), "PATH="+strings.Join(programs, ":"), "HOME="+o.dir, "XDG_CONFIG_HOME=", "TENURECTL_CONFIG="+filepath.Join(o.dir, "cells.json"))
	shell.ExtraFiles = []*os.File{alive, theirs}
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := shell.Start()
	_, _ = alive.Close(), theirs.Close()
	var once sync.Once
	end = func() {
		once.Do(func() {
			_ = ours.Close()
			_, _ = io.ReadAll(gone)
			_ = gone.Close()
		})
	}
	t.Cleanup(end)
	if err == nil {
		err = shell.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", commands, err, tail(problems.Name(), 20))
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(text), end
}

func pipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	return read, write
}

// create makes a file that is closed after the test.
func create(t *testing.T, dir, pattern string) *os.File {
	t.Helper()
	file, err := os.CreateTemp(dir, pattern)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}
