//! `tenure-bench`: drives servers of the etcd v3 API and says what they did. See the library's essay.

use std::cell::Cell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tenure_benches::client::Workload;
use tenure_benches::floor::Floor;
use tenure_benches::load::{self, Load, Stage, Target};
use tenure_benches::noise::STANDING;
use tenure_benches::{compare, idle, report, tls};

/// As in tenured: what it does is measured here too.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
    /// Start tenured, etcd and the floor, and drive each with the same loads in turn.
    Compare(CompareArgs),
    /// Make tenants with a key each, and print what memory each takes while it does nothing.
    IdleTenants {
        #[arg(long, default_value_t = 10_000)]
        tenants: usize,
        /// Where their data goes.
        #[arg(long)]
        dir: PathBuf,
    },
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
    /// `host:port` of every member of a cell, over which connections are spread; instead of `--endpoints`, for one tenant.
    #[arg(long, value_delimiter = ',')]
    members: Vec<String>,
    /// Process ids of the server, for its CPU time, memory and disk writes.
    #[arg(long = "pid", value_delimiter = ',')]
    pids: Vec<u32>,
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
    /// The keys are there already.
    #[arg(long)]
    filled: bool,
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
    /// Print a line when connections and watches are open and the load begins; end it when the standard input ends.
    #[arg(long)]
    announce: bool,
}

#[derive(Args)]
struct CompareArgs {
    /// The tenured to measure.
    #[arg(long)]
    tenured: PathBuf,
    /// The etcd to measure.
    #[arg(long)]
    etcd: PathBuf,
    /// Where data, report and charts go. The data is on its disk.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 1.5)]
    duration: f64,
    /// Seconds before each run.
    #[arg(long, default_value_t = 0.3)]
    warm_up: f64,
    /// Tenants of the sections with many; 0 leaves them out.
    #[arg(long, default_value_t = 1000)]
    tenants: usize,
    /// Keys of the section with many; 0 leaves it out.
    #[arg(long, default_value_t = 1_000_000)]
    large_keys: u64,
    /// Revisions that are compacted while the tail is measured; 0 leaves that section out.
    #[arg(long, default_value_t = 1_000_000)]
    tail_revisions: u64,
    /// Tenants of the section with idle ones; 0 leaves it out.
    #[arg(long, default_value_t = 10_000)]
    idle_tenants: usize,
    /// Keys, written in txns of many, that one of three members misses, to catch up with; 0 leaves the section with three members out.
    #[arg(long, default_value_t = 50_000)]
    catch_up_writes: u64,
    /// Only cases whose name contains this, such as `plain: put`. `noisy` and `scale` are run only so.
    #[arg(long)]
    only: Option<String>,
    /// One more server that runs already, as NAME=HOST:PORT; may be given again.
    #[arg(long = "endpoint", value_parser = named_endpoint)]
    endpoints: Vec<(String, String)>,
}

fn named_endpoint(text: &str) -> Result<(String, String), String> {
    let named = text.split_once('=').filter(|(name, address)| !name.is_empty() && address.contains(':'));
    named
        .map(|(name, address)| (name.to_string(), address.to_string()))
        .ok_or_else(|| "want NAME=HOST:PORT".to_string())
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Compare(args) => compare(args),
        Command::IdleTenants { tenants, dir } => {
            let runtime = tokio::runtime::Runtime::new()?;
            say(&runtime.block_on(idle::rss_bytes_per_tenant(dir, tenants))?.to_string());
            Ok(())
        }
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
    let target = Target {
        name: args.name.clone(),
        addresses: args.endpoints.clone(),
        tls,
        members: args.members.clone(),
        pids: args.pids.clone(),
    };
    if !args.json {
        say(&report::head());
    }
    let cut = args.announce.then(|| {
        let cut = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&cut);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            told.store(true, Ordering::Relaxed);
        });
        cut
    });
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
            cut: cut.clone(),
        };
        let bar = progress_bar();
        let announced = Cell::new(!args.announce);
        let told = |stage: Stage, part: f64| {
            if stage != Stage::Preparing && !announced.replace(true) {
                say(STANDING);
            }
            show(&bar, &workload.name(), stage, part);
        };
        let measured = if args.filled {
            load::block_on(load::run_filled(&target, &load, &told))
        } else {
            load::block_on(load::run(&target, &load, &told))
        };
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

struct Terminal(ProgressBar);

impl compare::Audience for Terminal {
    fn line(&self, line: &str) {
        self.0.suspend(|| say(line));
    }

    fn progress(&self, what: &str, stage: Stage, part: f64) {
        show(&self.0, what, stage, part);
    }
}

fn compare(args: CompareArgs) -> anyhow::Result<()> {
    let plan = compare::Plan {
        rounds: args.rounds.max(1),
        duration: Duration::from_secs_f64(args.duration),
        warm_up: Duration::from_secs_f64(args.warm_up),
        dir: args.dir,
        tenured: args.tenured,
        etcd: args.etcd,
        bench: std::env::current_exe()?,
        others: args.endpoints,
        tenants: args.tenants,
        large_keys: args.large_keys,
        tail_revisions: args.tail_revisions,
        idle_tenants: args.idle_tenants,
        catch_up_writes: args.catch_up_writes,
        only: args.only,
    };
    let terminal = Terminal(progress_bar());
    let compared = compare::compare(&plan, &terminal);
    terminal.0.finish_and_clear();
    say(&report::ratio_table(&compared?));
    say(&format!("report and charts: {}", plan.dir.display()));
    Ok(())
}

fn show(bar: &ProgressBar, what: &str, stage: Stage, part: f64) {
    bar.set_message(format!("{what}: {stage:?}"));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a thousand")]
    bar.set_position((part.clamp(0.0, 1.0) * 1000.0) as u64);
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:32} {bar:40} {percent:>3}%").expect("a fixed template");
    ProgressBar::new(1000).with_style(style)
}

#[expect(clippy::print_stdout, reason = "what the program is for")]
fn say(line: &str) {
    println!("{line}");
}
