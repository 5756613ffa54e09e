//! A cell of very many tenants: how long one takes to make, what it costs while it is idle, how long a member with all of them takes
//! to start, what it does to the others when a large one is deleted, and how soon connections of one that is shut out are closed.
//!
//! etcd has nothing to compare with: figures are of tenured alone, the latencies of neighbours as ratios of one run.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tenure_admin_api::v1 as api;
use tenure_admin_api::v1::admin_client::AdminClient;
use tenure_provisioner::connect::{TlsFiles, connect};
use tenure_provisioner::credentials::{CLIENT_CERT, of_tenant_in};
use tonic::transport::Channel;

use crate::client::Workload;
use crate::compare::{Audience, Plan, base, disk_bytes};
use crate::load::{self, Held, Load, Measured, Stage, Target};
use crate::server::{Kind, Server, Setup, tenant_name};
use crate::{process, report, tls};

/// Tenants that have clients, and their kube txns a second, all together.
const ACTIVE_TENANTS: usize = 100;
const ACTIVE_RATE: f64 = 500.0;

/// What the deleted tenant's keys hold.
const DELETED_VALUE_BYTES: usize = 1024;

/// Connections, each with a watch, that are held open until they are closed.
const HELD_CONNECTIONS: usize = 100;

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A store is settled when it wrote less than so much in each of so many looks one after the other.
const SETTLED_BYTES: u64 = 1 << 20;
const SETTLED_LOOKS: u32 = 3;
const SETTLE_LOOK: Duration = Duration::from_secs(1);

/// Bounds what should long be over.
const PATIENCE: Duration = Duration::from_secs(300);

/// Measures.
///
/// # Errors
/// If the server cannot be started or driven.
pub fn run(plan: &Plan, audience: &dyn Audience) -> anyhow::Result<Value> {
    let data_dir = plan.dir.join("data").join("scale");
    let tenants = ACTIVE_TENANTS;
    let setup = Setup {
        kind: Kind::Tenured,
        program: plan.tenured.clone(),
        data_dir: data_dir.clone(),
        tenants,
        tls_dir: None,
    };
    let mut server = Server::start(setup)?;
    let made = make(plan, audience, &server, &data_dir)?;
    let restart = server.restart()?;
    audience.line(&format!("a start with all of them: {:.2} s", restart.as_secs_f64()));
    let deleted = delete(plan, audience, &server, &data_dir)?;
    drop(server);
    let closed = close(plan, audience)?;
    Ok(json!({ "made": made, "start_seconds": restart.as_secs_f64(), "deleted": deleted, "closed": closed }))
}

/// The admin API of a server that may just be starting.
pub(crate) async fn admin(data_dir: &Path) -> anyhow::Result<AdminClient<Channel>> {
    let endpoint = format!("unix:{}", std::path::absolute(data_dir.join("admin.sock"))?.display());
    let from = Instant::now();
    loop {
        match connect(&endpoint, &TlsFiles::default()).await {
            Ok(admin) => return Ok(admin),
            Err(error) if from.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

fn target(server: &Server, tenants: std::ops::Range<usize>) -> anyhow::Result<Target> {
    let addresses = server.addresses().get(tenants).context("so many tenants")?.to_vec();
    Ok(Target {
        name: "tenured".to_string(),
        addresses,
        tls: Vec::new(),
        members: Vec::new(),
        pids: vec![server.pid()],
    })
}

fn active(plan: &Plan, tenants: usize) -> Load {
    Load {
        clients: 200,
        connections: 1,
        keys: 10,
        tenants,
        zipf: 0.0,
        rate: Some(ACTIVE_RATE),
        duration: 2 * plan.duration,
        ..base(plan, Workload::KubeTxn)
    }
}

fn p99(measured: &Measured) -> u64 {
    measured.latency_us.value_at_quantile(0.99)
}

/// Makes tenants one after the other while others work.
fn make(plan: &Plan, audience: &dyn Audience, server: &Server, data_dir: &Path) -> anyhow::Result<Value> {
    let tenants = plan.idle_tenants;
    audience.line(&format!("\nscale: {tenants} tenants made one after the other, {ACTIVE_TENANTS} others at work"));
    let load = active(plan, ACTIVE_TENANTS);
    let neighbours = target(server, 0..ACTIVE_TENANTS)?;
    let quiet = |_: Stage, _: f64| {};
    // What they take of memory is taken before counting begins.
    let alone = load::block_on(load::run(&neighbours, &load, &quiet))?;
    let rss_before = process::rss_bytes(server.pid());
    let working = std::thread::spawn({
        let (neighbours, load) = (neighbours.clone(), load.clone());
        move || load::block_on(load::run_filled(&neighbours, &load, &|_, _| {}))
    });
    let mut took_us = Histogram::<u64>::new(3)?;
    load::block_on(async {
        let mut admin = admin(data_dir).await?;
        for number in 0..tenants {
            let request = api::CreateTenantRequest { name: format!("idle-{number:05}"), ..Default::default() };
            let from = Instant::now();
            let answer = admin.create_tenant(request).await?.into_inner();
            anyhow::ensure!(answer.created, "a new tenant");
            took_us.saturating_record(u64::try_from(from.elapsed().as_micros())?);
            audience.progress("tenured create", Stage::Measuring, number as f64 / tenants as f64);
        }
        anyhow::Ok(())
    })?;
    let meanwhile = working.join().map_err(|_| anyhow::anyhow!("the neighbours panicked"))??;
    let rss_bytes_each = process::rss_bytes(server.pid()).saturating_sub(rss_before) / tenants.max(1) as u64;
    let quantile = |quantile| took_us.value_at_quantile(quantile);
    audience.line(&format!(
        "to make one: p50 {} µs, p99 {} µs, max {} µs; {rss_bytes_each} bytes of resident memory each; p99 of the others' kube txns {} µs alone, {} µs \
         meanwhile, errors {}",
        quantile(0.5),
        quantile(0.99),
        took_us.max(),
        p99(&alone),
        p99(&meanwhile),
        meanwhile.errors,
    ));
    Ok(json!({
        "tenants": tenants,
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "max_us": took_us.max(),
        "rss_bytes_each": rss_bytes_each,
        "others_alone": report::json(Workload::KubeTxn, "tenured", &alone),
        "others_meanwhile": report::json(Workload::KubeTxn, "tenured", &meanwhile),
    }))
}

/// Whether a tenant is there or being deleted: of those the last page of a list tells.
async fn is_listed(admin: &mut AdminClient<Channel>, name: &str) -> anyhow::Result<bool> {
    let mut request = api::ListTenantsRequest { deleting: true, ..Default::default() };
    loop {
        let page = admin.list_tenants(request.clone()).await?.into_inner();
        if page.tenants.iter().any(|tenant| tenant.name == name) {
            return Ok(true);
        }
        if page.next_page_token.is_empty() {
            return Ok(false);
        }
        request.page_token = page.next_page_token;
    }
}

/// Waits until the engine writes nothing of its own any more: what was filled is flushed and compacted, or 'alone' would have that beside it.
fn settle(server: &Server) -> anyhow::Result<()> {
    let (from, mut quiet) = (Instant::now(), 0);
    let mut before = process::usage(server.pid())?.written_bytes;
    while quiet < SETTLED_LOOKS {
        anyhow::ensure!(from.elapsed() < PATIENCE, "the store does not settle");
        std::thread::sleep(SETTLE_LOOK);
        let now = process::usage(server.pid())?.written_bytes;
        quiet = if now.saturating_sub(before) < SETTLED_BYTES { quiet + 1 } else { 0 };
        before = now;
    }
    Ok(())
}

/// Fills the last of the active tenants and deletes it while the others work.
fn delete(plan: &Plan, audience: &dyn Audience, server: &Server, data_dir: &Path) -> anyhow::Result<Value> {
    let (keys, large) = (plan.large_keys, ACTIVE_TENANTS - 1);
    let fill =
        Load { clients: 16, connections: 16, keys, value_bytes: DELETED_VALUE_BYTES, ..base(plan, Workload::Fill) };
    let told = |stage: Stage, part: f64| audience.progress("tenured delete", stage, part);
    load::block_on(load::fill(&target(server, large..large + 1)?, &fill, &told))?;
    settle(server)?;
    let bytes_before = disk_bytes(data_dir)?;
    let (others, load) = (target(server, 0..large)?, active(plan, large));
    let alone = load::block_on(load::run(&others, &load, &told))?;
    let working = std::thread::spawn({
        let (others, load) = (others.clone(), load.clone());
        move || load::block_on(load::run_filled(&others, &load, &|_, _| {}))
    });
    let name = tenant_name(large);
    let (answered, freed) = load::block_on(async {
        // When what is measured has begun.
        tokio::time::sleep(load.warm_up + load.duration / 10).await;
        let mut admin = admin(data_dir).await?;
        let from = Instant::now();
        let request = api::DeleteTenantRequest { name: name.clone(), ..Default::default() };
        anyhow::ensure!(admin.delete_tenant(request).await?.into_inner().deleted, "there was such a tenant");
        let answered = from.elapsed();
        while from.elapsed() < PATIENCE {
            if !is_listed(&mut admin, &name).await? {
                return Ok((answered, from.elapsed()));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        anyhow::bail!("tenant {name} is still being deleted")
    })?;
    let meanwhile = working.join().map_err(|_| anyhow::anyhow!("the others panicked"))??;
    let bytes_after = disk_bytes(data_dir)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    audience.line(&format!(
        "a tenant of {keys} keys of 1 KiB deleted: answered after {:.1} ms, forgotten after {:.1} s, disk {:.0} MiB before, {:.0} MiB after; p99 of the \
         others' kube txns {} µs alone, {} µs meanwhile (× {:.1}), errors {}",
        answered.as_secs_f64() * 1e3,
        freed.as_secs_f64(),
        mib(bytes_before),
        mib(bytes_after),
        p99(&alone),
        p99(&meanwhile),
        p99(&meanwhile) as f64 / p99(&alone).max(1) as f64,
        meanwhile.errors,
    ));
    Ok(json!({
        "keys": keys,
        "answered_seconds": answered.as_secs_f64(),
        "freed_seconds": freed.as_secs_f64(),
        "disk_bytes_before": bytes_before,
        "disk_bytes_after": bytes_after,
        "others_alone": report::json(Workload::KubeTxn, "tenured", &alone),
        "others_meanwhile": report::json(Workload::KubeTxn, "tenured", &meanwhile),
    }))
}

/// Shuts a tenant out under load, over TLS, in each way there is, and waits until its connections are closed.
fn close(plan: &Plan, audience: &dyn Audience) -> anyhow::Result<Value> {
    let (data_dir, tls_dir) = (plan.dir.join("data").join("closing"), plan.dir.join("data").join("closing-tls"));
    // Two of the first tenant's: what it has, and what it is given in its place.
    let [has, other, given] = [0, 1, 2];
    tls::make(&tls_dir, &[0, 1, 0])?;
    std::fs::copy(tls_dir.join(format!("{has}.crt")), tls_dir.join(CLIENT_CERT))?;
    let serial = of_tenant_in(&tls_dir, &tenant_name(0))?.serial;
    let mut client_tls = Vec::new();
    for number in [has, other, given] {
        let (certificate, key) = (tls_dir.join(format!("{number}.crt")), tls_dir.join(format!("{number}.key")));
        client_tls.push(std::sync::Arc::new(tls::client(&tls_dir.join("ca.crt"), Some((&certificate, &key)))?));
    }
    let program = plan.tenured.clone();
    let setup = Setup { kind: Kind::Tenured, program, data_dir: data_dir.clone(), tenants: 2, tls_dir: Some(tls_dir) };
    let server = Server::start(setup)?;
    let with = |identity: usize| Target {
        name: "tenured".to_string(),
        addresses: server.addresses(),
        tls: vec![client_tls[identity].clone()],
        members: Vec::new(),
        pids: vec![server.pid()],
    };
    let (neighbour, renewed) = (with(other), with(given));
    let name = tenant_name(0);
    let state = |state: api::State| api::SetTenantStateRequest { name: name.clone(), state: state.into() };
    let load = Load { duration: 2 * plan.duration, ..base(plan, Workload::Put) };
    let working = std::thread::spawn({
        let load = Load { rate: Some(ACTIVE_RATE), duration: 4 * plan.duration, ..load.clone() };
        move || load::block_on(load::run(&neighbour, &load, &|_, _| {}))
    });
    let mut figures = Vec::new();
    for way in ["suspend", "rotate", "revoke"] {
        let shut_out = if way == "revoke" { renewed.clone() } else { with(has) };
        // Who has its new credentials already sees nothing of it.
        let goes_on = (way == "rotate").then(|| {
            let (target, load) = (renewed.clone(), load.clone());
            std::thread::spawn(move || load::block_on(load::run(&target, &load, &|_, _| {})))
        });
        let noise = std::thread::spawn({
            let (target, load) = (shut_out.clone(), load.clone());
            // It is cut off, which is an error of its own.
            move || drop(load::block_on(load::run(&target, &load, &|_, _| {})))
        });
        let (answered, closed) = load::block_on(async {
            let mut admin = admin(&data_dir).await?;
            let held = Held::open(&shut_out, HELD_CONNECTIONS).await?;
            tokio::time::sleep(load.warm_up).await;
            let from = Instant::now();
            let call = async {
                let tenant = name.clone();
                let revoke = match way {
                    "suspend" => {
                        admin.set_tenant_state(state(api::State::Suspended)).await?;
                        return Ok(from.elapsed());
                    }
                    "rotate" => api::RevokeCredentialsRequest { tenant, serial: serial.clone(), ..Default::default() },
                    _ => api::RevokeCredentialsRequest { tenant, all: true, ..Default::default() },
                };
                admin.revoke_credentials(revoke).await?;
                anyhow::Ok(from.elapsed())
            };
            let closed = async {
                tokio::time::timeout(PATIENCE, held.closed()).await.context("connections stay open")?;
                anyhow::Ok(from.elapsed())
            };
            let (answered, closed) = tokio::try_join!(call, closed)?;
            anyhow::ensure!(Held::open(&shut_out, 1).await.is_err(), "{way}: it is let in again");
            if way == "suspend" {
                admin.set_tenant_state(state(api::State::Active)).await?;
                drop(Held::open(&shut_out, 1).await.context("it was resumed")?);
            }
            anyhow::Ok((answered, closed))
        })?;
        noise.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        if let Some(goes_on) = goes_on {
            let measured = goes_on.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
            anyhow::ensure!(measured.errors == 0, "{way}: {} errors with the new credentials", measured.errors);
        }
        audience.line(&format!(
            "{way} under load: answered after {:.1} ms, the last of {HELD_CONNECTIONS} connections closed after {:.1} ms",
            answered.as_secs_f64() * 1e3,
            closed.as_secs_f64() * 1e3,
        ));
        figures.push(json!({
            "way": way,
            "answered_seconds": answered.as_secs_f64(),
            "closed_seconds": closed.as_secs_f64(),
        }));
    }
    let meanwhile = working.join().map_err(|_| anyhow::anyhow!("the neighbour panicked"))??;
    audience.line(&format!("meanwhile the neighbour: p99 {} µs, errors {}", p99(&meanwhile), meanwhile.errors));
    Ok(json!({ "ways": figures, "neighbour": report::json(Workload::Put, "tenured", &meanwhile) }))
}
