//! `tenured`: flags in, a serving member out. Everything it does is a call into the library.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::builder::{Builder, StartError};
use tenure_etcd_shim::cell::OpenError;
use tenure_etcd_shim::flags::{Flags, Parsed, parse, usage};
use tenure_etcd_shim::logging;
use tenure_etcd_shim::priority::{SERVING, step_back};
use tenure_etcd_shim::service::{ETCD_VERSION, Limits};
use tenure_etcd_shim::service_manager;
use tenure_etcd_shim::serving::{ServingThreads, ServingWatch};
use tokio::signal::unix::{SignalKind, signal};

/// Small blocks that live briefly and on other threads than they were made on: a request's, and RocksDB's, which takes this
/// allocator too.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Answers of many megabytes are made and gone many times a second. By default the allocator gives blocks of 8 MiB and more back to the
/// operating system at once and has them mapped anew, which was a third of a large list's CPU (decision 0003); this lets it keep
/// them for its usual ten seconds.
// SAFETY: the allocator reads a pointer to a C string under this name, once, before `main`. The first word of a reference to a
// slice is that pointer, and the bytes end with a zero. There is no safe way to set an option before the first allocation.
#[unsafe(export_name = "malloc_conf")]
static MALLOC_CONF: &[u8] = b"oversize_threshold:0\0";

/// Tasks that a thread polls before it looks for those that other threads have woken, as raft's does with several replies; and for those
/// that the network has, or raft's thread with a single reply. The runtime's own 61 of each are a millisecond while all are busy (decision 0005).
const GLOBAL_QUEUE_INTERVAL: u32 = 7;
const EVENT_INTERVAL: u32 = 16;

/// What it ends with where its cell has removed it for good: starting it again is of no use. The unit of systemd says so too
/// (`RestartPreventExitStatus=`). One that is removed while it runs ends with 0.
const REMOVED: u8 = 3;

fn main() -> ExitCode {
    match parse(std::env::args().skip(1), std::env::vars()) {
        Ok(Parsed::Help) => print(&usage()),
        Ok(Parsed::Version) => print(&version()),
        Ok(Parsed::Run(flags)) => start(*flags),
        Err(error) => fail(&error.to_string()),
    }
}

#[expect(clippy::print_stdout, reason = "what was asked for on the command line")]
fn print(text: &str) -> ExitCode {
    print!("{text}");
    ExitCode::SUCCESS
}

fn fail(line: &str) -> ExitCode {
    eprintln!("tenured: {line}");
    ExitCode::FAILURE
}

/// etcd's form, which tools parse: the first line names the etcd release whose behaviour this is.
fn version() -> String {
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: Not provided (tenured {})\nGo Version: none (Rust)\nGo OS/Arch: {}/{}\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
    )
}

fn start(flags: Flags) -> ExitCode {
    if let Err(error) = logging::start(&flags.log) {
        return fail(&format!("open the log: {error}"));
    }
    raise_files_limit();
    // Dropped in the opposite order.
    let (runtime, _watch) = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start threads: {error}")),
    };
    match runtime.block_on(run(flags)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failed = fail(&format!("{error:#}"));
            let is_removed = matches!(error.downcast_ref(), Some(StartError::Open(OpenError::Removed)));
            if is_removed { ExitCode::from(REMOVED) } else { failed }
        }
    }
}

/// The threads that serve connections step back behind those that all writes go through. The first threads that the runtime starts are
/// these; those for what blocks come later.
fn runtime() -> std::io::Result<(tokio::runtime::Runtime, ServingWatch)> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let started = AtomicUsize::new(0);
    let threads = Arc::<ServingThreads>::default();
    let joined = Arc::clone(&threads);
    let step_back_if_serving = move || {
        if started.fetch_add(1, Ordering::Relaxed) < workers {
            step_back(SERVING);
            joined.join();
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .global_queue_interval(GLOBAL_QUEUE_INTERVAL)
        .event_interval(EVENT_INTERVAL)
        .on_thread_start(step_back_if_serving)
        .enable_all()
        .build()?;
    let watch = ServingWatch::start(threads, workers, runtime.handle().clone())?;
    Ok((runtime, watch))
}

/// Every connection is an open file, and the soft limit is often meant for interactive programs.
fn raise_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "raise the limit of open files");
    }
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    for variable in &flags.unknown_variables {
        tracing::warn!(%variable, "unrecognized environment variable or key of the configuration file");
    }
    for flag in &flags.without_effect {
        tracing::warn!(%flag, "this flag has no effect");
    }
    for suite in &flags.suites_without_effect {
        tracing::warn!(%suite, "this TLS 1.2 cipher suite is not offered; those of TLS 1.3 always are");
    }
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    // As etcd does not end with them. Once they were asked for, they do nothing for as long as the process lives.
    for harmless in [SignalKind::user_defined1(), SignalKind::user_defined2(), SignalKind::alarm()] {
        drop(signal(harmless).context("watch for a signal")?);
    }
    // A member may wait for the others for as long as it takes; it stops when it is told to.
    let tenure = tokio::select! {
        tenure = builder(flags).start() => tenure?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    for address in tenure.addresses() {
        tracing::info!(%address, "serving client traffic");
    }
    tracing::info!("ready to serve client requests");
    service_manager::tell(service_manager::READY);

    let failure = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        failure = tenure.cell().failed() => Some(failure),
        () = tenure.cell().removed() => {
            tracing::warn!("the member has been permanently removed from the cluster");
            None
        }
    };
    if let Some(failure) = failure {
        anyhow::bail!("this member cannot go on: {failure}");
    }
    tracing::info!("stopping");
    service_manager::tell(service_manager::STOPPING);
    // Whoever asks twice does not want to wait for clients.
    let again = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tenure.stop_hurried_by(again).await;
    tracing::info!("stopped");
    Ok(())
}

fn builder(flags: Flags) -> Builder {
    let mut builder = Tenure::builder()
        .admin_socket()
        .data_dir(flags.data_dir)
        .name(flags.name)
        .quota_backend_bytes(flags.quota_backend_bytes)
        .limits(Limits { max_request_bytes: flags.max_request_bytes, max_txn_ops: flags.max_txn_ops })
        .watch_progress_notify_interval(flags.progress_period)
        .timing(flags.heartbeat_interval, flags.election_timeout)
        .connection_limits(flags.connections)
        .tls_protocol(flags.tls_protocol)
        .http_access(flags.access)
        .bootstrap(flags.advertise_peer_urls, flags.cluster_token)
        .initial_cluster(flags.initial_cluster, flags.cluster_state)
        .reconfiguration(flags.strict_reconfig_check, flags.max_learners)
        .pre_vote(flags.pre_vote)
        .slow_apply(flags.slow_apply)
        .snapshots(flags.snapshot_count, flags.snapshot_catchup_entries);
    if let Some(kept) = flags.auto_compaction {
        builder = builder.auto_compaction(kept);
    }
    if let Some(bytes) = flags.disk_reserve_bytes {
        builder = builder.disk_reserve_bytes(bytes);
    }
    if flags.force_new_cluster {
        builder = builder.force_new_cluster();
    }
    if let Some(files) = flags.peer_tls {
        builder = builder.peer_tls(files);
    }
    for url in flags.listen_peer_urls {
        builder = builder.peer_listen(url);
    }
    if let Some(files) = flags.tls {
        builder = builder.tls(files);
    }
    if let Some(domain) = flags.cell_domain {
        builder = builder.cell_domain(domain);
    }
    if let Some(issuer) = flags.issuer {
        builder = builder.issuer(issuer);
    }
    for url in flags.listen_admin_urls {
        builder = builder.admin_listen(url);
    }
    for url in flags.listen_client_urls {
        builder = if flags.listen_client_http_urls.is_empty() { builder.listen(url) } else { builder.grpc_listen(url) };
    }
    for url in flags.listen_client_http_urls {
        builder = builder.http_listen(url);
    }
    for url in flags.listen_metrics_urls {
        builder = builder.metrics_listen(url);
    }
    for url in flags.advertise_client_urls {
        builder = builder.advertise_client_url(url);
    }
    for (tenant, url) in flags.tenant_listen {
        builder = builder.tenant_listen(tenant, url);
    }
    builder
}
