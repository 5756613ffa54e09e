//! Servers side by side: the same loads against each in turn, round by round, and the medians of all rounds.
//!
//! The machine is shared and noisy, so no figure stands alone: each server meets each case in each round, close in time, and
//! what is reported beside the medians are ratios of medians. All servers of a section run at once on the same disk with
//! fsync on; only one has work at a time.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use tenure_etcd_shim::proto::etcdserverpb::{CompactionRequest, DefragmentRequest, RangeRequest};

use crate::client::Workload;
use crate::fields::{integer, submessages};
use crate::load::{self, Load, Measured, Stage, Target};
use crate::noise::Noise;
use crate::server::{Kind, Server, Setup};
use crate::{chart, cluster, noisy, process, report, scale, tls};

/// Kube txns a second whose tail is measured: a busy cell, far from its end.
const TAIL_RATE: f64 = 2_000.0;

/// Lists a second meanwhile.
const TAIL_LISTS_RATE: f64 = 1.0;

/// Keys listed meanwhile: the pods of a large cluster.
const TAIL_LISTED_KEYS: u64 = 150_000;

/// Runs without a disturbance, of which the one in the middle counts.
pub(crate) const QUIET_RUNS: usize = 3;

/// What to compare, and for how long.
pub struct Plan {
    pub rounds: usize,
    pub duration: Duration,
    pub warm_up: Duration,
    /// Where data, report and charts go.
    pub dir: PathBuf,
    pub tenured: PathBuf,
    pub etcd: PathBuf,
    /// This program, for the floor.
    pub bench: PathBuf,
    /// Servers that are there already: name and `host:port`.
    pub others: Vec<(String, String)>,
    /// Tenants of the sections with many; 0 leaves them out.
    pub tenants: usize,
    /// Keys of the section with many; 0 leaves it out.
    pub large_keys: u64,
    /// Revisions that are compacted while the tail is measured; 0 leaves that section out.
    pub tail_revisions: u64,
    /// Tenants of the section with idle ones; 0 leaves it out.
    pub idle_tenants: usize,
    /// Writes that one of three members misses; 0 leaves the section with three members out.
    pub catch_up_writes: u64,
    /// Only cases whose name contains this.
    pub only: Option<String>,
}

/// Told of each finished run and of the one under way.
pub trait Audience {
    fn line(&self, line: &str);
    fn progress(&self, what: &str, stage: Stage, part: f64);
}

/// One load with the name it is reported under.
struct Case {
    name: &'static str,
    load: Load,
}

/// Runs of one case and server.
type Runs = Vec<Value>;

struct Comparison<'a> {
    plan: &'a Plan,
    audience: &'a dyn Audience,
    /// By section and case, then server, in the order they were run.
    cases: Vec<(String, BTreeMap<String, Runs>)>,
    /// What the other sections found, by name.
    others: serde_json::Map<String, Value>,
}

/// A server of a section, as the loads see it.
struct Contestant {
    target: Target,
    /// Only these cases; empty = all.
    cases: Vec<&'static str>,
    servers: Vec<Server>,
}

/// Compares, and writes `report.json`, after each section anew, and at the end the charts. Answers the report.
///
/// # Errors
/// If a server cannot be started or driven, or a file not be written.
pub fn compare(plan: &Plan, audience: &dyn Audience) -> anyhow::Result<Value> {
    let data = plan.dir.join("data");
    if data.exists() {
        std::fs::remove_dir_all(&data)?;
    }
    std::fs::create_dir_all(&data)?;
    let fdatasync_us = fdatasync_us(&data)?;
    audience.line(&format!("fdatasync of 4 KiB on this disk: median {fdatasync_us:.0} µs"));
    let mut comparison = Comparison { plan, audience, cases: Vec::new(), others: serde_json::Map::new() };
    comparison.note("fdatasync_us", json!(fdatasync_us))?;
    comparison.section("plain", 1, false, &all_cases(plan))?;
    comparison.section("tls", 1, true, &main_cases(plan, 1))?;
    if plan.tenants > 1 {
        comparison.section("tenants", plan.tenants, false, &main_cases(plan, plan.tenants))?;
        comparison.section("tenants-tls", plan.tenants, true, &main_cases(plan, plan.tenants))?;
    }
    if plan.catch_up_writes > 0 {
        let members = comparison.members()?;
        comparison.note("three_members", json!(members))?;
    }
    if plan.large_keys > 0 {
        let large = comparison.large()?;
        comparison.note("large", json!(large))?;
    }
    if plan.tail_revisions > 0 {
        let tail = comparison.tail()?;
        comparison.note("tail", json!(tail))?;
    }
    if plan.tenants > 1 && comparison.asked_for("noisy") {
        comparison.note("noisy_neighbour", json!(noisy::run(plan, audience)?))?;
    }
    if plan.idle_tenants > 0 {
        let idle = comparison.idle()?;
        comparison.note("idle_tenants", idle)?;
    }
    if plan.idle_tenants > 0 && plan.large_keys > 0 && comparison.asked_for("scale") {
        comparison.note("scale", scale::run(plan, audience)?)?;
    }
    let report = comparison.report();
    chart::write(&plan.dir, &comparison.medians())?;
    std::fs::remove_dir_all(&data)?;
    Ok(report)
}

pub(crate) fn base(plan: &Plan, workload: Workload) -> Load {
    Load {
        workload,
        clients: 100,
        connections: 100,
        keys: 10_000,
        value_bytes: 256,
        page_keys: 500,
        rate: None,
        tenants: 1,
        zipf: 1.0,
        watchers: 100,
        warm_up: plan.warm_up,
        duration: plan.duration,
        prefix: format!("/bench/{}/", workload.name()),
        cut: None,
    }
}

fn all_cases(plan: &Plan) -> Vec<Case> {
    let case = |name, workload, change: &dyn Fn(&mut Load)| {
        let mut load = base(plan, workload);
        change(&mut load);
        Case { name, load }
    };
    let list = |load: &mut Load| (load.clients, load.connections, load.value_bytes) = (4, 4, 1024);
    let single = |load: &mut Load| (load.clients, load.connections) = (1, 1);
    let thousand = |load: &mut Load| load.clients = 1000;
    vec![
        case("put, 1 client", Workload::Put, &single),
        case("put", Workload::Put, &|_| {}),
        case("put, 1000 clients", Workload::Put, &thousand),
        case("kube-txn, 1 client", Workload::KubeTxn, &single),
        case("kube-txn", Workload::KubeTxn, &|_| {}),
        case("kube-txn, 1000 clients", Workload::KubeTxn, &thousand),
        case("get, 1 client", Workload::Get, &single),
        case("get", Workload::Get, &|_| {}),
        case("get, 1000 clients", Workload::Get, &thousand),
        case("get-serializable", Workload::GetSerializable, &|_| {}),
        case("list", Workload::List, &list),
        case("list-paged", Workload::ListPaged, &list),
        case("stream", Workload::Stream, &list),
        case("watch", Workload::Watch, &|load| (load.clients, load.connections, load.rate) = (10, 10, Some(1000.0))),
        case("lease-grant", Workload::LeaseGrant, &|_| {}),
        case("lease-keep-alive", Workload::LeaseKeepAlive, &|_| {}),
        case("mixed", Workload::Mixed, &|load| (load.clients, load.connections, load.watchers) = (50, 50, 20)),
        case("fill", Workload::Fill, &|load| {
            (load.clients, load.connections, load.value_bytes, load.keys) = (16, 16, 1024, u64::MAX)
        }),
    ]
}

/// Those of the budget that are measured under TLS and with many tenants too.
fn main_cases(plan: &Plan, tenants: usize) -> Vec<Case> {
    let mut cases = all_cases(plan);
    cases.retain(|case| ["put", "kube-txn", "get", "list", "watch"].contains(&case.name));
    for case in &mut cases {
        case.load.tenants = tenants;
        if tenants > 1 {
            // Each tenant has a connection of its own, and its share of the keys.
            case.load.connections = 1;
            case.load.keys = if case.name == "list" { 100 } else { 10 };
        }
    }
    cases
}

impl Comparison<'_> {
    fn wanted(&self, name: &str) -> bool {
        self.plan.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }

    /// Sections that take minutes are run only by name, so that the rest takes a quarter of an hour.
    fn asked_for(&self, name: &str) -> bool {
        self.plan.only.is_some() && self.wanted(name)
    }

    fn section(&mut self, section: &str, tenants: usize, with_tls: bool, cases: &[Case]) -> anyhow::Result<()> {
        let named = |case: &Case| format!("{section}: {}", case.name);
        if !cases.iter().any(|case| self.wanted(&named(case))) {
            return Ok(());
        }
        let contestants = self.contestants(section, tenants, with_tls)?;
        self.rounds(section, &contestants, cases)?;
        self.save()
    }

    /// Adds what a section found to the report.
    fn note(&mut self, name: &str, found: Value) -> anyhow::Result<()> {
        self.others.insert(name.to_owned(), found);
        self.save()
    }

    /// Writes what there is by now: whoever ends a run early keeps the sections that it has gone through.
    fn save(&self) -> anyhow::Result<()> {
        let report = serde_json::to_string_pretty(&self.report())?;
        let (new, path) = (self.plan.dir.join("report.json.new"), self.plan.dir.join("report.json"));
        std::fs::write(&new, report)?;
        Ok(std::fs::rename(new, path)?)
    }

    fn report(&self) -> Value {
        let mut report = self.others.clone();
        report.insert("rounds".to_owned(), json!(self.plan.rounds));
        report.insert("seconds_per_run".to_owned(), json!(self.plan.duration.as_secs_f64()));
        report.insert("medians".to_owned(), json!(self.medians()));
        let runs: Vec<Value> =
            self.cases.iter().map(|(case, servers)| json!({ "case": case, "servers": servers })).collect();
        report.insert("runs".to_owned(), json!(runs));
        Value::Object(report)
    }

    fn rounds(&mut self, section: &str, contestants: &[Contestant], cases: &[Case]) -> anyhow::Result<()> {
        self.audience.line(&format!("\n{section}\n{}", report::head()));
        for case in cases {
            let name = format!("{section}: {}", case.name);
            if !self.wanted(&name) {
                continue;
            }
            let mut servers: BTreeMap<String, Runs> = BTreeMap::new();
            for round in 0..self.plan.rounds {
                for contestant in contestants.iter().filter(|c| c.cases.is_empty() || c.cases.contains(&case.name)) {
                    // Its keys stay from round to round.
                    let measured = self.run(&contestant.target, &case.load, round > 0)?;
                    let run = report::json(case.load.workload, &contestant.target.name, &measured);
                    servers.entry(contestant.target.name.clone()).or_default().push(run);
                }
            }
            for (server, runs) in &servers {
                self.audience.line(&report::median_row(case.name, server, &median(runs)));
            }
            self.cases.push((name, servers));
        }
        Ok(())
    }

    /// Three members of each on this machine: the same loads, the time without a leader, and how a member catches up.
    fn members(&mut self) -> anyhow::Result<Vec<Value>> {
        const SECTION: &str = "three members";
        const CASES: [&str; 4] = ["put", "put, 1 client", "kube-txn", "get"];
        let mut cases = all_cases(self.plan);
        cases.retain(|case| CASES.contains(&case.name));
        let is_wanted = cases.iter().any(|case| self.wanted(&format!("{SECTION}: {}", case.name)));
        if !is_wanted && !self.wanted(SECTION) {
            return Ok(Vec::new());
        }
        let mut contestants = Vec::new();
        for (kind, program) in [(Kind::Tenured, &self.plan.tenured), (Kind::Etcd, &self.plan.etcd)] {
            let data_dir = self.plan.dir.join("data").join(format!("members-{}", kind.name()));
            let setup = Setup { kind, program: program.clone(), data_dir, tenants: 1, tls_dir: None };
            let servers = Server::start_cell(&setup, 3)?;
            let members: Vec<String> = servers.iter().flat_map(Server::addresses).collect();
            let target = Target {
                name: kind.name().to_string(),
                addresses: members[..1].to_vec(),
                tls: Vec::new(),
                members,
                pids: servers.iter().map(Server::pid).collect(),
            };
            contestants.push(Contestant { target, cases: Vec::new(), servers });
        }
        self.rounds(SECTION, &contestants, &cases)?;
        if !self.wanted(SECTION) {
            return Ok(Vec::new());
        }
        let mut leaderless: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for _ in 0..self.plan.rounds {
            for contestant in &mut contestants {
                let name = contestant.target.name.clone();
                self.audience.progress(&format!("{name} kill -9"), Stage::Measuring, 0.0);
                let seconds = cluster::leaderless_seconds(&mut contestant.servers, &contestant.target)?;
                leaderless.entry(name).or_default().push(seconds);
            }
        }
        let writes = self.plan.catch_up_writes;
        let mut figures = Vec::new();
        for contestant in &mut contestants {
            let name = contestant.target.name.clone();
            let told = |stage: Stage, part: f64| self.audience.progress(&format!("{name} catch-up"), stage, part);
            let load = Load { keys: writes, clients: 16, connections: 16, ..base(self.plan, Workload::Fill) };
            let caught = cluster::catch_up(&mut contestant.servers, &contestant.target, &load, &told)?;
            let mut without = leaderless.remove(&name).unwrap_or_default();
            let median = median_of(&mut without).context("a round")?;
            let longest = without[without.len() - 1];
            self.audience.line(&format!(
                "{name:<8} no leader after kill -9: {median:.2} s median, {longest:.2} s longest of {}; \
                 {writes} keys missed: written by the others in {:.1} s, caught up {:.2} s after its start",
                without.len(),
                caught.written_seconds,
                caught.seconds,
            ));
            figures.push(json!({
                "server": name,
                "leaderless_seconds": without,
                "catch_up_writes": writes,
                "written_seconds": caught.written_seconds,
                "catch_up_seconds": caught.seconds,
            }));
        }
        Ok(figures)
    }

    fn run(&self, target: &Target, load: &Load, is_filled: bool) -> anyhow::Result<Measured> {
        let what = format!("{} {}", target.name, load.workload.name());
        let told = |stage: Stage, part: f64| self.audience.progress(&what, stage, part);
        if is_filled {
            load::block_on(load::run_filled(target, load, &told))
        } else {
            load::block_on(load::run(target, load, &told))
        }
    }

    fn contestants(&self, section: &str, tenants: usize, with_tls: bool) -> anyhow::Result<Vec<Contestant>> {
        let tls_dir = with_tls.then(|| self.plan.dir.join("data").join(format!("{section}-certificates")));
        let mut client_tls = Vec::new();
        if let Some(dir) = &tls_dir {
            let named = if tenants > 1 { 0..tenants } else { 0..0 };
            tls::make(dir, &named.collect::<Vec<_>>())?;
            for tenant in 0..tenants {
                let files = (dir.join(format!("{tenant}.crt")), dir.join(format!("{tenant}.key")));
                let identity = (tenants > 1).then_some((files.0.as_path(), files.1.as_path()));
                client_tls.push(Arc::new(tls::client(&dir.join("ca.crt"), identity)?));
            }
        }
        let mut contestants = Vec::new();
        for kind in [Kind::Tenured, Kind::Etcd, Kind::Floor] {
            // The floor has neither TLS nor tenants.
            if kind == Kind::Floor && (with_tls || tenants > 1) {
                continue;
            }
            let program = match kind {
                Kind::Tenured => &self.plan.tenured,
                Kind::Etcd => &self.plan.etcd,
                Kind::Floor => &self.plan.bench,
            };
            let server = Server::start(Setup {
                kind,
                program: program.clone(),
                data_dir: self.plan.dir.join("data").join(format!("{section}-{}", kind.name())),
                tenants,
                tls_dir: tls_dir.clone(),
            })?;
            let target = Target {
                name: kind.name().to_string(),
                addresses: server.addresses(),
                tls: client_tls.clone(),
                members: Vec::new(),
                pids: vec![server.pid()],
            };
            let cases =
                if kind == Kind::Floor { vec!["put", "put, 1 client", "put, 1000 clients"] } else { Vec::new() };
            contestants.push(Contestant { target, cases, servers: vec![server] });
        }
        if !with_tls && tenants == 1 {
            for (name, address) in &self.plan.others {
                let target = Target {
                    name: name.clone(),
                    addresses: vec![address.clone()],
                    tls: Vec::new(),
                    members: Vec::new(),
                    pids: Vec::new(),
                };
                contestants.push(Contestant { target, cases: Vec::new(), servers: Vec::new() });
            }
        }
        Ok(contestants)
    }

    /// Many keys: memory, pages, start-up. One round: filling takes long, and what is measured is large.
    fn large(&mut self) -> anyhow::Result<Vec<Value>> {
        let keys = self.plan.large_keys;
        if !self.wanted("large") {
            return Ok(Vec::new());
        }
        self.audience.line(&format!("\nlarge: {keys} keys of 1 KiB"));
        let mut figures = Vec::new();
        for (kind, program) in [(Kind::Tenured, &self.plan.tenured), (Kind::Etcd, &self.plan.etcd)] {
            let data_dir = self.plan.dir.join("data").join(format!("large-{}", kind.name()));
            let setup = Setup { kind, program: program.clone(), data_dir: data_dir.clone(), tenants: 1, tls_dir: None };
            let mut server = Server::start(setup)?;
            let target = |server: &Server| Target {
                name: kind.name().to_string(),
                addresses: server.addresses(),
                tls: Vec::new(),
                members: Vec::new(),
                pids: vec![server.pid()],
            };
            let load =
                Load { clients: 16, connections: 16, keys, value_bytes: 1024, ..base(self.plan, Workload::ListPaged) };
            let told = |stage: Stage, part: f64| self.audience.progress(&format!("{} large", kind.name()), stage, part);
            let from = Instant::now();
            load::block_on(load::fill(&target(&server), &load, &told))?;
            let fill_seconds = from.elapsed().as_secs_f64();
            let rss_filled = process::rss_bytes(server.pid());
            let pages = load::block_on(load::run_filled(
                &target(&server),
                &Load { clients: 1, connections: 1, ..load.clone() },
                &told,
            ))?;
            let get = Load {
                keys,
                clients: 100,
                connections: 100,
                prefix: load.prefix.clone(),
                value_bytes: 1024,
                ..base(self.plan, Workload::Get)
            };
            let gets = load::block_on(load::run_filled(&target(&server), &get, &told))?;
            let rss_read = process::rss_bytes(server.pid());
            let peak_rss = process::peak_rss_bytes(server.pid());
            let restart = server.restart()?;
            let page_us = pages.server_cpu.map_or(0.0, |cpu| cpu.as_secs_f64() * 1e6 / pages.operations.max(1) as f64);
            let disk_bytes = disk_bytes(&data_dir)?;
            let figure = json!({
                "server": kind.name(),
                "keys": keys,
                "fill_seconds": fill_seconds,
                "rss_bytes_filled": rss_filled,
                "rss_bytes_after_reads": rss_read,
                "peak_rss_bytes": peak_rss,
                "page_cpu_us": page_us,
                "page_p50_us": pages.latency_us.value_at_quantile(0.5),
                "page_errors": pages.errors,
                "get_cpu_us": gets.server_cpu_us_per_unit(),
                "start_seconds": restart.as_secs_f64(),
                "disk_bytes": disk_bytes,
            });
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            self.audience.line(&format!(
                "{:<8} fill {fill_seconds:.1} s, RSS {:.0} MiB filled, {:.0} MiB after reads, page of 500: {page_us:.0} µs CPU, p50 {} µs, \
                 wrong counts {}, get {:.1} µs CPU, start {:.2} s, disk {:.0} MiB",
                kind.name(),
                mib(rss_filled),
                mib(rss_read),
                pages.latency_us.value_at_quantile(0.5),
                pages.errors,
                gets.server_cpu_us_per_unit().unwrap_or(0.0),
                restart.as_secs_f64(),
                mib(disk_bytes),
            ));
            figures.push(figure);
        }
        Ok(figures)
    }

    /// How long kube txns take at a steady rate, alone and while a long history is compacted, everything is listed again and
    /// again, and the engine is flushed.
    fn tail(&mut self) -> anyhow::Result<Vec<Value>> {
        if !self.wanted("tail") {
            return Ok(Vec::new());
        }
        self.audience.line(&format!(
            "\ntail of kube-txn at {TAIL_RATE} a second, {} revisions compacted",
            self.plan.tail_revisions
        ));
        let mut figures = Vec::new();
        for (kind, program) in [(Kind::Tenured, &self.plan.tenured), (Kind::Etcd, &self.plan.etcd)] {
            let data_dir = self.plan.dir.join("data").join(format!("tail-{}", kind.name()));
            let server = Server::start(Setup { kind, program: program.clone(), data_dir, tenants: 1, tls_dir: None })?;
            let target = Target {
                name: kind.name().to_string(),
                addresses: server.addresses(),
                tls: Vec::new(),
                members: Vec::new(),
                pids: vec![server.pid()],
            };
            let told = |stage: Stage, part: f64| self.audience.progress(&format!("{} tail", kind.name()), stage, part);
            // One after the other, but not without a pause: that would measure the machine's scheduler.
            let rate = Some(TAIL_LISTS_RATE);
            let list =
                Load { clients: 1, connections: 1, keys: TAIL_LISTED_KEYS, rate, ..base(self.plan, Workload::List) };
            load::block_on(load::fill(&target, &list, &told))?;
            let put =
                Load { warm_up: Duration::ZERO, duration: Duration::from_secs(2), ..base(self.plan, Workload::Put) };
            let mut revisions = 0;
            while revisions < self.plan.tail_revisions {
                revisions += load::block_on(load::run(&target, &put, &told))?.operations;
            }
            let txn =
                Load { rate: Some(TAIL_RATE), duration: 4 * self.plan.duration, ..base(self.plan, Workload::KubeTxn) };
            load::block_on(load::fill(&target, &txn, &told))?;
            // The first one alone would be of a server that still writes what it was filled with.
            process::settle(server.pid());
            let mut quiet_runs = Vec::new();
            for _ in 0..QUIET_RUNS {
                quiet_runs.push(load::block_on(load::run_filled(&target, &txn, &told))?);
            }
            quiet_runs.sort_by_key(|run| run.latency_us.value_at_quantile(0.999));
            let quiet = quiet_runs.swap_remove(QUIET_RUNS / 2);
            let mut lists = Noise::begin(&self.plan.bench, &target.addresses[0], &list)?;
            lists.stand()?;
            let maintained = std::thread::spawn({
                let target = target.clone();
                move || load::block_on(maintain(&target))
            });
            let disturbed = load::block_on(load::run_filled(&target, &txn, &told))?;
            maintained.join().map_err(|_| anyhow::anyhow!("the compaction panicked"))??;
            let lists = lists.end().and_then(|lists| lists["operations"].as_u64()).context("the lists failed")?;
            let p999 = |measured: &Measured| measured.latency_us.value_at_quantile(0.999);
            let ratio = p999(&disturbed) as f64 / p999(&quiet).max(1) as f64;
            self.audience.line(&format!(
                "{:<8} p50 {} µs, p99 {} µs, p99.9 {} µs quiet; p50 {} µs, p99 {} µs, p99.9 {} µs disturbed ({lists} lists of {TAIL_LISTED_KEYS} keys): \
                 p99.9 × {ratio:.1}",
                kind.name(),
                quiet.latency_us.value_at_quantile(0.5),
                quiet.latency_us.value_at_quantile(0.99),
                p999(&quiet),
                disturbed.latency_us.value_at_quantile(0.5),
                disturbed.latency_us.value_at_quantile(0.99),
                p999(&disturbed),
            ));
            figures.push(json!({
                "server": kind.name(),
                "revisions": revisions,
                "lists": lists,
                "quiet": report::json(Workload::KubeTxn, kind.name(), &quiet),
                "disturbed": report::json(Workload::KubeTxn, kind.name(), &disturbed),
                "p999_ratio": ratio,
            }));
        }
        Ok(figures)
    }

    /// What tenants cost that do nothing: counted in a process of its own, `tenure-bench idle-tenants`.
    fn idle(&mut self) -> anyhow::Result<Value> {
        if !self.wanted("idle") {
            return Ok(Value::Null);
        }
        let tenants = self.plan.idle_tenants;
        self.audience.line(&format!("\nidle: {tenants} tenants with a key each"));
        let counted = std::process::Command::new(&self.plan.bench)
            .args(["idle-tenants", "--tenants", &tenants.to_string(), "--dir"])
            .arg(self.plan.dir.join("data").join("idle"))
            .output()?;
        anyhow::ensure!(counted.status.success(), "idle-tenants: {}", String::from_utf8_lossy(&counted.stderr));
        let bytes: u64 = String::from_utf8_lossy(&counted.stdout).trim().parse()?;
        self.audience.line(&format!("tenured  {bytes} bytes of resident memory a tenant"));
        Ok(json!({ "tenants": tenants, "rss_bytes_per_tenant": bytes }))
    }

    /// One entry a case: its servers' medians, and tenured's ratios to etcd.
    fn medians(&self) -> Vec<Value> {
        let entry = |(case, servers): &(String, BTreeMap<String, Runs>)| {
            let medians: BTreeMap<&String, Value> =
                servers.iter().map(|(server, runs)| (server, median(runs))).collect();
            json!({ "case": case, "servers": medians, "ratios": ratios(&medians) })
        };
        self.cases.iter().map(entry).collect()
    }
}

/// Compacts everything, physically, flushes and rewrites the engine.
async fn maintain(target: &Target) -> anyhow::Result<()> {
    let header =
        load::call(target, "/etcdserverpb.KV/Range", &RangeRequest { key: "x".into(), ..RangeRequest::default() })
            .await?;
    let revision = integer(submessages(&header, 1).next().unwrap_or_default(), 3).cast_signed();
    load::call(target, "/etcdserverpb.KV/Compact", &CompactionRequest { revision, physical: true }).await?;
    load::call(target, "/etcdserverpb.Maintenance/Defragment", &DefragmentRequest::default()).await?;
    Ok(())
}

/// Tenured's figures divided by etcd's.
fn ratios(medians: &BTreeMap<&String, Value>) -> Value {
    let find = |name: &str| medians.iter().find(|(server, _)| server.as_str() == name).map(|(_, median)| median);
    let (Some(ours), Some(etcds)) = (find("tenured"), find("etcd")) else { return Value::Null };
    let ratio = |name: &str| Some(ours.get(name)?.as_f64()? / etcds.get(name)?.as_f64()?);
    json!({
        "units_per_second": ratio("units_per_second"),
        "p50_us": ratio("p50_us"),
        "p99_us": ratio("p99_us"),
        "server_cpu_us_per_unit": ratio("server_cpu_us_per_unit"),
    })
}

/// The median of each figure over the runs.
fn median(runs: &[Value]) -> Value {
    let of = |pointer: &str| {
        median_of(&mut runs.iter().filter_map(|run| run.pointer(pointer)?.as_f64()).collect::<Vec<_>>())
    };
    json!({
        "operations_per_second": of("/operations_per_second"),
        "units_per_second": of("/units_per_second"),
        "p50_us": of("/latency/p50_us"),
        "p99_us": of("/latency/p99_us"),
        "p999_us": of("/latency/p999_us"),
        "max_us": of("/latency/max_us"),
        "event_p50_us": of("/event_latency/p50_us"),
        "event_p99_us": of("/event_latency/p99_us"),
        "progress_p50_us": of("/progress_latency/p50_us"),
        "server_cpu_us_per_unit": of("/server_cpu_us_per_unit"),
        "client_cpu_us_per_unit": of("/client_cpu_us_per_unit"),
        "peak_rss_bytes": of("/peak_rss_bytes"),
        "written_bytes": of("/written_bytes"),
        "units": of("/units"),
        "errors": of("/errors"),
        "unit": runs.first().and_then(|run| run.get("unit")),
    })
}

/// The middle one, or the mean of the two in the middle. Sorts them.
pub(crate) fn median_of(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(low.midpoint(*high))
}

/// Bytes of all files below a directory. One that goes away meanwhile counts nothing.
pub(crate) fn disk_bytes(path: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        bytes += match entry.file_type() {
            Ok(kind) if kind.is_dir() => disk_bytes(&entry.path())?,
            Ok(_) => entry.metadata().map_or(0, |metadata| metadata.len()),
            Err(_) => 0,
        };
    }
    Ok(bytes)
}

/// The disk's own floor: overwriting 4 KiB of a file that is there, and fdatasync.
fn fdatasync_us(dir: &Path) -> anyhow::Result<f64> {
    const BLOCK: [u8; 4096] = [1; 4096];
    let mut file = std::fs::File::create(dir.join("fdatasync"))?;
    for _ in 0..256 {
        file.write_all(&BLOCK)?;
    }
    file.sync_all()?;
    let mut took = Vec::new();
    for number in 0..200 {
        file.seek(std::io::SeekFrom::Start(number % 256 * 4096))?;
        let from = Instant::now();
        file.write_all(&BLOCK)?;
        rustix::fs::fdatasync(file.as_fd())?;
        took.push(from.elapsed().as_secs_f64() * 1e6);
    }
    median_of(&mut took).context("a sync")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_two_is_between_them() {
        assert_eq!(median_of(&mut []), None);
        assert_eq!(median_of(&mut [3.0, 1.0]), Some(2.0));
        assert_eq!(median_of(&mut [9.0, 1.0, 4.0]), Some(4.0));
    }
}
