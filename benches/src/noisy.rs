//! Fifty quiet tenants and one that is not: what its floods do to their latency.
//!
//! The quiet ones make kube txns at a steady rate, all together far from what the server can do, and their p99 is taken alone and
//! under each kind of noise ([`crate::noise`]). etcd has prefixes instead of tenants. Figures are ratios of one run, side by side. Tenured is measured twice: as it is, and with limits of the cell for
//! all its tenants, as an operator would set them (`tenurectl cell limits`).

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tenure_admin_api::v1 as api;

use crate::client::Workload;
use crate::compare::{Audience, Plan, base};
use crate::load::{self, Load, Measured, Stage, Target};
use crate::noise::Noise;
use crate::scale::admin;
use crate::server::{Kind, Server, Setup};
use crate::{process, report};

/// Tenants that behave, and their kube txns a second, all together.
const QUIET_TENANTS: usize = 50;
const QUIET_RATE: f64 = 500.0;

/// What an operator would hold every tenant to on a machine of two processors: several times what a kube-apiserver of a hundred nodes
/// asks for.
const LIMIT_REQUESTS_PER_SECOND: u64 = 1_000;
const LIMIT_REQUEST_BYTES_PER_SECOND: u64 = 8 << 20;
const LIMIT_RESPONSE_BYTES_PER_SECOND: u64 = 16 << 20;

/// Keys of 1 KiB that the noisy tenant lists: 10 MB an answer.
const LISTED_KEYS: u64 = 10_000;

const NOISY_WATCHERS: u64 = 10_000;

/// Of the noise's keys.
const PREFIX: &str = "/noisy/";

/// The noise stands for so long before what is measured.
const NOISE_BEFORE: Duration = Duration::from_secs(1);

/// A kind of noise; together they are all of it.
fn noises(plan: &Plan) -> Vec<(&'static str, Load)> {
    let of = |workload: Workload| Load { prefix: format!("{PREFIX}{}/", workload.name()), ..base(plan, workload) };
    vec![
        // First: beside the others a tenant with limits would open them for minutes.
        (
            "watchers",
            Load { clients: 4, connections: 20, rate: Some(50.0), watchers: NOISY_WATCHERS, ..of(Workload::Watch) },
        ),
        ("puts", of(Workload::Put)),
        ("lists", Load { clients: 4, connections: 4, keys: LISTED_KEYS, value_bytes: 1024, ..of(Workload::List) }),
        ("leases", of(Workload::LeaseGrant)),
        ("connections", Load { clients: 500, connections: 500, keys: 100, ..of(Workload::Get) }),
    ]
}

/// Measures; one entry a server.
///
/// # Errors
/// If a server cannot be started or driven.
pub fn run(plan: &Plan, audience: &dyn Audience) -> anyhow::Result<Vec<Value>> {
    audience.line(&format!("\nnoisy neighbour: p99 of {QUIET_TENANTS} quiet tenants, {QUIET_RATE} kube txns a second"));
    let mut figures = Vec::new();
    for (name, kind, limited) in
        [("tenured", Kind::Tenured, false), ("tenured, limited", Kind::Tenured, true), ("etcd", Kind::Etcd, false)]
    {
        let program = if kind == Kind::Etcd { &plan.etcd } else { &plan.tenured };
        let data_dir = plan.dir.join("data").join(format!("noisy-{}-{limited}", kind.name()));
        let setup = Setup { kind, program: program.clone(), data_dir, tenants: QUIET_TENANTS + 1, tls_dir: None };
        let server = Server::start(setup.clone())?;
        let limit_at = limited.then_some(setup.data_dir.as_path());
        figures.push(of_server(plan, audience, name, &server, limit_at)?);
    }
    Ok(figures)
}

/// Holds every tenant to what it may.
async fn limit(data_dir: &Path) -> anyhow::Result<()> {
    let mut admin = admin(data_dir).await?;
    let limits = api::Limits {
        requests_per_second: Some(LIMIT_REQUESTS_PER_SECOND),
        request_bytes_per_second: Some(LIMIT_REQUEST_BYTES_PER_SECOND),
        response_bytes_per_second: Some(LIMIT_RESPONSE_BYTES_PER_SECOND),
        ..Default::default()
    };
    let request = api::UpdateCellRequest { default_limits: Some(limits), ..Default::default() };
    admin.update_cell(request).await.context("limit the cell's tenants")?;
    Ok(())
}

/// `limit_at`: the data directory of the server whose tenants are to be limited.
fn of_server(
    plan: &Plan,
    audience: &dyn Audience,
    name: &str,
    server: &Server,
    limit_at: Option<&Path>,
) -> anyhow::Result<Value> {
    let addresses = server.addresses();
    let target = |addresses: Vec<String>| Target {
        name: name.to_string(),
        addresses,
        tls: Vec::new(),
        members: Vec::new(),
        pids: vec![server.pid()],
    };
    // Behind one address all are prefixes of one store.
    let last = addresses.last().context("an address")?.clone();
    let (quiet_target, noisy_target) = (target(addresses), target(vec![last]));
    let told = |stage: Stage, part: f64| audience.progress(&format!("{name} noisy"), stage, part);
    let quiet = Load {
        clients: 200,
        connections: 1,
        keys: 10,
        tenants: QUIET_TENANTS,
        zipf: 0.0,
        rate: Some(QUIET_RATE),
        duration: 2 * plan.duration,
        ..base(plan, Workload::KubeTxn)
    };
    let noises = noises(plan);
    for (_, noise) in noises.iter().filter(|(_, noise)| noise.workload.needs_keys()) {
        load::block_on(load::fill(&noisy_target, noise, &told))?;
    }
    if let Some(data_dir) = limit_at {
        load::block_on(limit(data_dir))?;
    }
    let p99 = |measured: &Measured| measured.latency_us.value_at_quantile(0.99);
    load::block_on(load::fill(&quiet_target, &quiet, &told))?;
    let calm = || {
        process::settle(server.pid());
        load::block_on(load::run_filled(&quiet_target, &quiet, &told))
    };
    // Before, between and behind the noises: a single one may be disturbed by the machine, and all ratios are of it.
    let mut calm_runs = vec![calm()?];
    let (mut measured_under, mut noise_made) = (Vec::new(), Vec::new());
    let each_count = noises.len();
    let together: Vec<&Load> = noises.iter().map(|(_, noise)| noise).collect();
    let each = noises.iter().map(|(kind, noise)| (*kind, vec![noise]));
    for (kind, loads) in each.chain([("together", together)]) {
        let mut noise = Vec::new();
        for load in loads {
            let mut begun = Noise::begin(&plan.bench, &noisy_target.addresses[0], load)?;
            begun.stand()?;
            noise.push(begun);
        }
        std::thread::sleep(NOISE_BEFORE);
        let measured = load::block_on(load::run_filled(&quiet_target, &quiet, &told))?;
        let made: Vec<Value> = noise.into_iter().map(|noise| noise.end().unwrap_or_default()).collect();
        if let [made] = &made[..] {
            noise_made.push(match made["units_per_second"].as_f64() {
                Some(units) => format!("{kind} {units:.0} {}", made["unit"].as_str().unwrap_or("units")),
                None => format!("{kind} cut off"),
            });
        }
        measured_under.push((kind, measured, made));
        if measured_under.len() == each_count / 2 {
            calm_runs.push(calm()?);
        }
    }
    calm_runs.push(calm()?);
    calm_runs.sort_by_key(p99);
    let alone = calm_runs.swap_remove(calm_runs.len() / 2);
    let mut lines = vec![format!("alone {} µs", p99(&alone))];
    let mut under = Vec::new();
    for (kind, measured, made) in measured_under {
        let ratio = p99(&measured) as f64 / p99(&alone).max(1) as f64;
        lines.push(format!("{kind} {} µs (× {ratio:.1})", p99(&measured)));
        under.push(json!({
            "noise": kind,
            "p99_ratio": ratio,
            "made": made,
            "quiet": report::json(Workload::KubeTxn, name, &measured),
        }));
    }
    audience.line(&format!("{name:<17} {}", lines.join(", ")));
    audience.line(&format!("{:<17} the noise: {}", "", noise_made.join(", ")));
    Ok(json!({ "server": name, "alone": report::json(Workload::KubeTxn, name, &alone), "under": under }))
}
