//! `tenured`: flags in, a serving member out. Everything it does is a call into the library.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use tenure_etcd_shim::cell::{Cell, CellConfig};
use tenure_etcd_shim::flags::{Flags, Parsed, parse, usage};
use tenure_etcd_shim::inflight::{Budget, InFlight};
use tenure_etcd_shim::listen::{Listener, Services, serve};
use tenure_etcd_shim::service::{Context, ETCD_VERSION, Limits, MemberNames};
use tenure_etcd_shim::tls::Tls;
use tenure_etcd_shim::{ids, logging, server};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

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
    logging::start(&flags.log_level);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start threads: {error}")),
    };
    match runtime.block_on(run(flags)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("{error:#}")),
    }
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    for variable in &flags.unknown_variables {
        tracing::warn!(%variable, "unrecognized environment variable");
    }
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let tls = flags.tls.clone().map(Tls::new).transpose()?.map(Arc::new);
    let client_cert_auth = flags.tls.as_ref().is_some_and(|tls| tls.client_cert_auth);
    let mut listeners = Vec::new();
    for url in &flags.listen_client_urls {
        listeners.push(Listener::bind(url, None, tls.clone(), client_cert_auth).await?);
    }
    for (tenant, url) in &flags.tenant_listen {
        listeners.push(Listener::bind(url, Some(tenant.clone()), tls.clone(), client_cert_auth).await?);
    }

    let mut config = CellConfig::new(&flags.data_dir);
    config.quota_backend_bytes = flags.quota_backend_bytes;
    config.tenants = flags.tenant_listen.iter().map(|(name, _)| name.clone()).collect();
    let cell = Cell::open(config).await?;

    let context = Context {
        cell: cell.clone(),
        limits: Limits { max_request_bytes: flags.max_request_bytes, max_txn_ops: flags.max_txn_ops },
        in_flight: InFlight::new(Budget::default()),
        member: Arc::new(MemberNames {
            name: flags.name,
            peer_urls: vec![ids::PEER_URL_DEFAULT.to_string()],
            client_urls: flags.advertise_client_urls,
        }),
    };
    let services = Services { cell: cell.clone(), routes: server::routes(&context, flags.progress_period) };
    let (stop, stopping) = watch::channel(false);
    let mut serving = tokio::task::JoinSet::new();
    for listener in listeners {
        if let Some(address) = listener.local_addr() {
            tracing::info!(%address, "serving client traffic");
        }
        serving.spawn(serve(listener, services.clone(), stopping.clone()));
    }
    tracing::info!("ready to serve client requests");

    let failure = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        failure = cell.failed() => Some(failure),
    };
    if let Some(failure) = failure {
        anyhow::bail!("this member cannot go on: {failure}");
    }
    tracing::info!("stopping");
    stop.send_replace(true);
    while serving.join_next().await.is_some() {}
    cell.stop().await;
    Ok(())
}
