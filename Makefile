# Two commands do everything on a fresh Debian machine with Rust and Go: `make run` and `make test`.
# One target directory, outside the clone, and one profile: RocksDB is built once and shared by both.

CACHE ?= $(or $(TENURE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tenure)
export CARGO_TARGET_DIR ?= $(CACHE)/target
ARGS ?=

.PHONY: run build test lint needs

# Builds and serves: tenant `default` on 127.0.0.1:2379, data in ./default.tenure. Flags: make run ARGS="--name m1".
run: build
	exec $(CARGO_TARGET_DIR)/release/tenured $(ARGS)

build: needs
	cargo build --release --locked --workspace

# Every test there is, on real processes where that is what is tested.
test: needs
	cargo test --release --locked --workspace --features tenure-storage/mirror

lint: needs
	cargo fmt --all --check
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
