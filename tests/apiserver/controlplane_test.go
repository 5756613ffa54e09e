package apiserver

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tenure.dev/tests/harness"
)

// patience bounds waits that would hang if something is broken; it judges nothing.
const patience = 3 * time.Minute

// token is what the tests authenticate with; its group may do everything.
const token = "first-light"

// controlPlane is one kube-apiserver on one tenant, and its clients.
type controlPlane struct {
	// name tells it from the others of the test, several of which may share a tenant.
	name   string
	tenant string

	args   []string
	log    string
	cmd    *exec.Cmd
	config *rest.Config

	core *kubernetes.Clientset
	any  *dynamic.DynamicClient
	crds *apiextensions.Clientset
	// etcd talks to the tenant directly, past the apiserver.
	etcd *clientv3.Client
}

// startControlPlane starts a kube-apiserver on the tenant's endpoints and returns when it is ready. It is killed after the test.
func startControlPlane(t *testing.T, name, tenant string, endpoints ...string) *controlPlane {
	t.Helper()
	flags := []string{"--etcd-servers=" + strings.Join(endpoints, ",")}
	return startControlPlaneWith(t, name, tenant, flags, etcdClient(t, endpoints...))
}

// startControlPlaneWith does so with these flags about etcd.
func startControlPlaneWith(t *testing.T, name, tenant string, flags []string, etcd *clientv3.Client) *controlPlane {
	t.Helper()
	dir := t.TempDir()
	private, public := serviceAccountKeys(t, dir)
	tokens := filepath.Join(dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(token+`,admin,1,"system:masters"`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	address := harness.FreeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	cp := &controlPlane{
		name:   name,
		tenant: tenant,
		log:    filepath.Join(dir, "kube-apiserver.log"),
		etcd:   etcd,
		args: append([]string{
			"--etcd-compaction-interval=10s",
			"--bind-address=127.0.0.1",
			"--secure-port=" + port,
			"--cert-dir=" + filepath.Join(dir, "certificates"),
			"--token-auth-file=" + tokens,
			"--service-account-issuer=https://" + tenant + ".example",
			"--service-account-key-file=" + public,
			"--service-account-signing-key-file=" + private,
			"--service-cluster-ip-range=10.0.0.0/24",
		}, flags...),
		config: &rest.Config{
			Host:            "https://" + address,
			BearerToken:     token,
			TLSClientConfig: rest.TLSClientConfig{Insecure: true},
			// The server decides how much is too much.
			QPS: -1,
		},
	}
	cp.connect(t)
	t.Cleanup(func() {
		cp.stop(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("last lines of kube-apiserver %s:\n%s", name, tail(cp.log, 40))
		}
	})
	cp.start(t)
	return cp
}

// connect makes its clients.
func (cp *controlPlane) connect(t *testing.T) {
	t.Helper()
	var err error
	if cp.core, err = kubernetes.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
	if cp.any, err = dynamic.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
	if cp.crds, err = apiextensions.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
}

// start runs the process, which must not be running, and waits until it is ready.
func (cp *controlPlane) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(cp.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cp.cmd = exec.Command(harness.Tool(t, "kube-apiserver"), cp.args...)
	cp.cmd.Stdout, cp.cmd.Stderr = log, log
	cp.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cp.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cp.waitReady(t)
}

// stop ends the process and waits until it is gone; a second call does nothing.
func (cp *controlPlane) stop(signal syscall.Signal) {
	if cp.cmd == nil || cp.cmd.ProcessState != nil {
		return
	}
	_ = cp.cmd.Process.Signal(signal)
	_ = cp.cmd.Wait()
}

// waitReady waits until the process finds all of itself ready.
func (cp *controlPlane) waitReady(t *testing.T) {
	t.Helper()
	cp.waitHealthy(t, "/readyz")
}

// waitHealthy waits until a health check, or all checks below a path, answer 200.
func (cp *controlPlane) waitHealthy(t *testing.T, path string) {
	t.Helper()
	client, err := rest.HTTPClientFor(cp.config)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, cp.name+"'s "+path, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, cp.config.Host+path, nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("status %s", response.Status)
		}
		return nil
	})
}

// metrics are what the process says of itself, in Prometheus' text format.
func (cp *controlPlane) metrics(t *testing.T) string {
	t.Helper()
	metrics, err := cp.core.RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(metrics)
}

// revision is the tenant's, read from its etcd past any apiserver.
func revision(t *testing.T, etcd *clientv3.Client) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	answer, err := etcd.Get(ctx, "revision-probe")
	if err != nil {
		t.Fatal(err)
	}
	return answer.Header.Revision
}

func etcdClient(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	etcd, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = etcd.Close() })
	return etcd
}

// eventually calls check until it returns no error.
func eventually(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func serviceAccountKeys(t *testing.T, dir string) (private, public string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	publicBytes, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, bytes []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	private = write("service-account.key", "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
	public = write("service-account.pub", "PUBLIC KEY", publicBytes)
	return private, public
}

func tail(path string, lines int) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
