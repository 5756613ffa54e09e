# Two commands do everything on a fresh Debian machine with Rust and Go: `make run` and `make test`.
# One target directory, outside the clone, and one profile: RocksDB is built once and shared by both.

CACHE ?= $(or $(TENURE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tenure)
export CARGO_TARGET_DIR ?= $(CACHE)/target
# The real programs that the Go tests run: etcd, etcdctl, kube-apiserver and kubectl, at the versions of their modules in tests/.
export TENURE_TOOLS = $(CACHE)/bin
export TENURED = $(CARGO_TARGET_DIR)/release/tenured
ARGS ?=
FUZZ_SECONDS ?= 600

KUBERNETES = $(shell sed -n 's|.*k8s.io/kubernetes \(v[0-9.]*\).*|\1|p' tests/apiserver/go.mod)
KUBERNETES_VERSION = -X k8s.io/component-base/version.gitVersion=$(KUBERNETES)

.PHONY: run next build programs test test-rust test-go test-etcd test-faults test-systemd test-apiserver tools lint fuzz sim bench bench-smoke etcd needs needs-go needs-fuzz

# Builds and serves: tenant `default` on 127.0.0.1:2379, data in ./default.tenure. Flags: make run ARGS="--name m1".
run: build
	@$(MAKE) -s --no-print-directory next
	exec $(TENURED) $(ARGS)

# What `run` says before it serves: README's commands, which a test runs, and where the programs are.
next:
	@echo
	@echo '# A cell with certificates and a control plane on it, in another terminal (README.md):'
	@echo 'PATH=$(abspath $(dir $(TENURED))):$$PATH'
	@sed -n '/^```sh /,/^```$$/{/^```/!p}' README.md
	@echo

build: needs
	cargo build --release --locked --workspace

# Every test there is, on real processes where that is what is tested.
test: test-rust test-go

# tenured as `test-rust` builds it too: with the features that the tests' own dependencies bring, so that nothing is built twice.
programs: needs
	cargo test --release --locked --workspace --no-run

test-rust: needs
	cargo test --release --locked --workspace

# What etcd's own clients and Kubernetes say: tests in Go.
test-go: test-etcd test-apiserver

test-etcd: programs tools
	cd tests/etcd && go vet ./... && go test -count=1 -v -timeout 30m ./client ./etcdctl ./history
	cd tests/etcd && go test -count=1 -v -timeout 30m -parallel 2 -run 'Test(Auto|Max|Member|Move|NoStrict|Planted|PreVote|Quorum|Readyz)' ./cluster

# Cells of real processes under faults, with recorded histories that are checked; longer than the others, TENURE_FAULT_ROUNDS says how much.
test-faults: programs tools
	cd tests/etcd && go vet ./... && go test -count=1 -v -timeout 60m -parallel 1 ./cluster

# The unit of deploy/systemd, in a container with a systemd of its own: root, debootstrap and systemd-nspawn are needed, so it is no part of `test`.
test-systemd: build
	@command -v debootstrap >/dev/null && command -v systemd-nspawn >/dev/null \
	  || { echo "tenure: install debootstrap and systemd-container first" >&2; exit 1; }
	./tests/systemd/run.sh $(TENURED) $(dir $(TENURED))tenurectl

test-apiserver: programs tools
	cd tests/apiserver && go vet ./... && go test -count=1 -v -timeout 30m ./...

# And what the fault tests put between a member and its system.
tools: etcd
	cc -shared -fPIC -O2 -Wall -Wextra -Werror -o $(TENURE_TOOLS)/faults.so tests/harness/faults/faults.c -ldl
	cd tests/etcd && go build -o $(TENURE_TOOLS)/etcdctl go.etcd.io/etcd/etcdctl/v3
	cd tests/apiserver && go build -ldflags "-s -w $(KUBERNETES_VERSION)" -o $(TENURE_TOOLS)/kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
	cd tests/apiserver && go build -ldflags "-s -w $(KUBERNETES_VERSION)" -o $(TENURE_TOOLS)/kubectl k8s.io/kubernetes/cmd/kubectl

etcd: needs-go
	mkdir -p $(TENURE_TOOLS)
	cd tests/etcd && go build -o $(TENURE_TOOLS)/etcd go.etcd.io/etcd/server/v3

# tenured beside a real etcd on this machine, every workload: a table, target/bench/report.json, a chart a workload. More
# servers: make bench ARGS="--endpoint kine=127.0.0.1:2399"; other options: tenure-bench compare --help.
bench: build etcd
	$(COMPARE) $(ARGS)

# The same, shorter: one round, fewer keys and tenants.
bench-smoke: build etcd
	$(COMPARE) --rounds 1 --duration 0.7 --warm-up 0.3 --tenants 50 --large-keys 50000 --tail-revisions 20000 \
	  --idle-tenants 1000 $(ARGS)

COMPARE = $(CARGO_TARGET_DIR)/release/tenure-bench compare --tenured $(TENURED) --etcd $(TENURE_TOOLS)/etcd --dir target/bench

# Each fuzz target for FUZZ_SECONDS, on nightly Rust, in a target directory of its own; RocksDB is taken from the release build.
fuzz: build needs-fuzz
	@rocksdb=$$(ls -t $(CARGO_TARGET_DIR)/release/build/librocksdb-sys-*/out/librocksdb.a | head -n 1); \
	for target in key_decoding requests; do \
	  mkdir -p $(CACHE)/fuzz-corpus/$$target; \
	  PATH=$(CACHE)/cargo-fuzz/bin:$$PATH CARGO_TARGET_DIR=$(CACHE)/fuzz-target ROCKSDB_LIB_DIR=$$(dirname $$rocksdb) ROCKSDB_STATIC=1 \
	    cargo +nightly fuzz run --fuzz-dir fuzz $$target $(CACHE)/fuzz-corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=4096 \
	    || exit 1; \
	done

# Seeds of the simulation, without end unless SEEDS says otherwise; FIRST is the first of them.
FIRST ?= 1000
SEEDS ?= 0
sim: needs
	TENURE_SIM_FIRST=$(FIRST) TENURE_SIM_SEEDS=$(SEEDS) cargo test --release --locked --workspace --lib sim::tests::no_seed

lint: needs
	cargo fmt --all --check && cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml > /dev/null
	cargo clippy --release --locked --workspace --all-targets -- -D warnings

# What the build needs beside Rust: a C++ compiler for RocksDB and libclang for its bindings.
needs:
	@command -v cargo >/dev/null || { echo "tenure: install Rust (rustup) first: cargo is not on the PATH" >&2; exit 1; }
	@if ! command -v c++ >/dev/null || ! ls /usr/lib/llvm-*/lib/libclang*.so* 2>/dev/null | grep -qv 'libclang-cpp' \
	    || ! ls -d /usr/lib/llvm-*/lib/clang/*/include >/dev/null 2>&1; then \
	  command -v apt-get >/dev/null || { echo "tenure: install g++, make and libclang-dev" >&2; exit 1; }; \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++ make libclang-dev; \
	fi

needs-go:
	@command -v go >/dev/null || { echo "tenure: install Go 1.26 or newer first (go.dev/dl): the tests build etcd and kube-apiserver" >&2; exit 1; }

needs-fuzz:
	@rustup run nightly rustc --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
	@[ -x $(CACHE)/cargo-fuzz/bin/cargo-fuzz ] || CARGO_TARGET_DIR=$(CACHE)/fuzz-target cargo install cargo-fuzz --locked --root $(CACHE)/cargo-fuzz
