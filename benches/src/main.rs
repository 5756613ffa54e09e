//! `tenure-bench`: drives servers of the etcd v3 API and says what they did. See the library's essay.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tenure_benches::client::Workload;
use tenure_benches::floor::Floor;
use tenure_benches::load::{self, Load, Stage, Target};
use tenure_benches::{report, tls};

/// Measures servers of the etcd v3 API.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive one server with one or more workloads.
    Run(RunArgs),
    /// Serve the floor: answers every Put with nothing.
    Floor {
        /// Where.
        #[arg(long, default_value = "127.0.0.1:2399")]
        listen: SocketAddr,
        /// Wait before each answer.
        #[arg(long, default_value_t = 0)]
        delay_ms: u64,
    },
}

#[derive(Args)]
struct RunArgs {
    /// What the clients do; several run one after the other.
    #[arg(value_enum, required = true)]
    workloads: Vec<Workload>,
    /// `host:port`, one for each tenant; the last one serves all further tenants.
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:2379")]
    endpoints: Vec<String>,
    /// Process id of the server, for its CPU time, memory and disk writes.
    #[arg(long)]
    pid: Option<u32>,
    #[arg(long, default_value_t = 100)]
    clients: u64,
    /// Connections per tenant, shared by the clients.
    #[arg(long, default_value_t = 10)]
    connections: usize,
    /// Different keys, per tenant.
    #[arg(long, default_value_t = 10_000)]
    keys: u64,
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Keys per page of list-paged and mixed.
    #[arg(long, default_value_t = 500)]
    page_keys: i64,
    /// Operations per second of all clients together (open loop); without it each client waits for its answer (closed loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Tenants, each with an endpoint or a key prefix of its own.
    #[arg(long, default_value_t = 1)]
    tenants: usize,
    /// Exponent of the tenants' weights.
    #[arg(long, default_value_t = 1.0)]
    zipf: f64,
    /// Watchers, for watch and mixed.
    #[arg(long, default_value_t = 100)]
    watchers: u64,
    /// Seconds before measuring.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Seconds measured.
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    /// Start of all keys.
    #[arg(long, default_value = "/bench/")]
    prefix: String,
    /// Trust servers whose certificate this CA signed, and talk TLS.
    #[arg(long)]
    cacert: Option<PathBuf>,
    /// Client certificate and key.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,
    /// What the table calls the server.
    #[arg(long, default_value = "server")]
    name: String,
    /// Print JSON, one line a workload, instead of the table.
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Floor { listen, delay_ms } => {
            let runtime = tokio::runtime::Runtime::new()?;
            runtime.block_on(Floor { delay: Duration::from_millis(delay_ms) }.serve_at(listen))
        }
    }
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let tls = match &args.cacert {
        Some(ca) => vec![Arc::new(tls::client(ca, args.cert.as_deref().zip(args.key.as_deref()))?)],
        None => Vec::new(),
    };
    let target = Target { name: args.name.clone(), addresses: args.endpoints.clone(), tls, pid: args.pid };
    if !args.json {
        say(&report::head());
    }
    for workload in &args.workloads {
        let load = Load {
            workload: *workload,
            clients: args.clients,
            connections: args.connections,
            keys: args.keys,
            value_bytes: args.value_bytes,
            page_keys: args.page_keys,
            rate: args.rate,
            tenants: args.tenants,
            zipf: args.zipf,
            watchers: args.watchers,
            warm_up: Duration::from_secs_f64(args.warm_up),
            duration: Duration::from_secs_f64(args.duration),
            prefix: format!("{}{}/", args.prefix, workload.name()),
        };
        let bar = progress_bar();
        let told = |stage: Stage, part: f64| {
            bar.set_message(format!("{} {stage:?}", workload.name()));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a thousand")]
            bar.set_position((part.clamp(0.0, 1.0) * 1000.0) as u64);
        };
        let measured = load::block_on(load::run(&target, &load, &told));
        bar.finish_and_clear();
        let measured = measured.with_context(|| workload.name())?;
        if args.json {
            say(&report::json(*workload, &args.name, &measured).to_string());
        } else {
            say(&report::row(*workload, &args.name, &measured));
            if let Some(error) = &measured.error {
                say(&format!("  first error: {error}"));
            }
        }
    }
    Ok(())
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:32} {bar:40} {percent:>3}%").expect("a fixed template");
    ProgressBar::new(1000).with_style(style)
}

#[expect(clippy::print_stdout, reason = "what the program is for")]
fn say(line: &str) {
    println!("{line}");
}
