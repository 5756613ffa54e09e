//! The registry of tenants under kill -9: equal on all members, and every call all or nothing.
//!
//! Why: a tenant that exists on one member and not on another, or has half of its limits, is a customer's outage that nobody can
//! explain. Operators of different members make, change and delete tenants while members are killed in turn; then all members
//! must tell the same, and what was acknowledged must be so.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tenure_admin_api::v1 as api;
use tenure_admin_api::v1::admin_client::AdminClient;
use tenure_tests::admin;
use tenure_tests::cluster::{Cluster, Member};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Bounds what should long be over; it judges nothing.
const PATIENCE: Duration = Duration::from_secs(300);

const ROUNDS: usize = 6;
const OPERATORS: usize = 3;

/// What one operator knows of its tenants: the number that both limits and a label were set to last, `None`: deleted. A call that was
/// not answered may have been done: both are right then.
type Known = BTreeMap<String, Vec<Option<u64>>>;

/// Under this name, which no tenant can have, what is known of the cell's own limits.
const CELL: &str = "(cell)";

fn connect(member: &Path) -> AdminClient<Channel> {
    admin::connect(&member.join("admin.sock"))
}

/// Whether the call may have been done, or may be tried again.
fn is_unclear(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
    )
}

fn both(value: u64) -> Option<api::Limits> {
    Some(api::Limits { leases: Some(value), watchers: Some(value), ..Default::default() })
}

fn labelled(value: u64) -> HashMap<String, String> {
    [("value".to_string(), value.to_string())].into()
}

/// Makes, changes, suspends and deletes tenants of its own, and the first one the cell's limits, until it is stopped, each time through the next member.
async fn operate(number: usize, members: Vec<std::path::PathBuf>, stop: Arc<AtomicBool>) -> Known {
    let cells = (number == 0).then(|| (CELL.to_string(), vec![Some(1)]));
    let mut known: Known = cells.into_iter().collect();
    for turn in 0_usize.. {
        let value = turn as u64;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("t{number}-{}", turn / 5);
        let mut admin = connect(&members[(turn + number) % members.len()]);
        // Each tenant is made, changed, shut out, and every second one deleted.
        let (name, wanted, answer) = match turn % 5 {
            0 => {
                let request = api::CreateTenantRequest { name: name.clone(), limits: both(1), labels: labelled(1) };
                (name, Some(1), admin.create_tenant(request).await.map(drop))
            }
            1 => {
                let (limits, labels) = (both(value), labelled(value));
                let request = api::UpdateTenantRequest { name: name.clone(), limits, labels, ..Default::default() };
                (name, Some(value), admin.update_tenant(request).await.map(drop))
            }
            2 => {
                let request = api::SetTenantStateRequest { name: name.clone(), state: api::State::Suspended.into() };
                match admin.set_tenant_state(request).await {
                    Ok(_) => {}
                    Err(status) => assert!(is_unclear(&status) || status.code() == Code::NotFound, "{status:?}"),
                }
                continue;
            }
            3 if number == 0 => {
                let request = api::UpdateCellRequest { default_limits: both(value), ..Default::default() };
                (CELL.to_string(), Some(value), admin.update_cell(request).await.map(drop))
            }
            4 if (turn / 5) % 2 == 0 => {
                let request = api::DeleteTenantRequest { name: name.clone(), id: None };
                (name, None, admin.delete_tenant(request).await.map(drop))
            }
            _ => continue,
        };
        let before = known.entry(name.clone()).or_insert_with(|| vec![None]);
        match answer {
            Ok(()) => *before = vec![wanted],
            // The one that was to be made is not there.
            Err(status) if status.code() == Code::NotFound => assert!(before.contains(&None), "{name}: {status:?}"),
            Err(status) => {
                assert!(is_unclear(&status), "{name}: {status:?}");
                before.push(wanted);
            }
        }
    }
    known
}

/// All that is the same on every member: tenants whole, those being deleted, and what the cell says of itself.
#[derive(Debug, PartialEq)]
struct Told {
    tenants: BTreeMap<String, api::Tenant>,
    deleting: BTreeMap<u32, String>,
    cell: api::GetCellResponse,
}

/// Asks until the member answers both.
async fn told(member: &Member) -> Told {
    let mut look = tokio::time::interval(Duration::from_millis(50));
    let answered = async {
        loop {
            look.tick().await;
            let mut admin = connect(&member.data_dir);
            let request = api::ListTenantsRequest { deleting: true, ..Default::default() };
            let answers =
                async { Ok((admin.list_tenants(request).await?, admin.get_cell(api::GetCellRequest {}).await?)) };
            match answers.await {
                Ok((list, cell)) => return (list.into_inner(), cell.into_inner()),
                Err::<_, Status>(status) => assert!(is_unclear(&status), "{status:?}"),
            }
        }
    };
    let (list, mut cell) = tokio::time::timeout(PATIENCE, answered).await.expect("the member answers");
    assert!(list.next_page_token.is_empty(), "one page");
    let (deleting, tenants): (Vec<_>, Vec<_>) =
        list.tenants.into_iter().partition(|tenant| tenant.state() == api::State::Deleting);
    let whole = |mut tenant: api::Tenant| {
        // Those are of the member that answers.
        if let Some(usage) = &mut tenant.usage {
            (usage.watchers, usage.connections) = (0, 0);
        }
        (tenant.name.clone(), tenant)
    };
    // So are these, and the moment; who leads may change between two answers.
    (cell.disk_free_bytes, cell.now_ms) = (0, 0);
    cell.members.iter_mut().for_each(|member| member.is_leader = false);
    Told {
        tenants: tenants.into_iter().map(whole).collect(),
        deleting: deleting.into_iter().map(|tenant| (tenant.id, tenant.name)).collect(),
        cell,
    }
}

/// As [`told`], once nothing is being deleted any more: until then members may be asked between two steps of it.
async fn told_at_last(member: &Member) -> Told {
    let settled = async {
        loop {
            let told = told(member).await;
            if told.deleting.is_empty() {
                return told;
            }
        }
    };
    tokio::time::timeout(PATIENCE, settled).await.expect("what is deleted is forgotten")
}

fn both_of(limits: Option<api::Limits>) -> u64 {
    let limits = limits.unwrap();
    assert_eq!(limits.leases, limits.watchers, "half of a change");
    limits.leases.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_is_equal_and_every_call_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let members: Vec<_> = cluster.members.iter().map(|member| member.data_dir.clone()).collect();
    let defaults = api::UpdateCellRequest { default_limits: both(1), ..Default::default() };
    connect(&members[0]).update_cell(defaults).await.unwrap();
    let operators: Vec<_> =
        (0..OPERATORS).map(|number| tokio::spawn(operate(number, members.clone(), Arc::clone(&stop)))).collect();
    for round in 0..ROUNDS {
        let at = round % cluster.members.len();
        let mut cluster_then = cluster;
        // Both wait for the process.
        cluster = tokio::task::spawn_blocking(move || {
            cluster_then.members[at].kill();
            cluster_then.members[at].start();
            cluster_then
        })
        .await
        .unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let mut known = Known::new();
    for operator in operators {
        known.extend(tokio::time::timeout(PATIENCE, operator).await.expect("an operator is answered").unwrap());
    }
    assert!(known.len() > OPERATORS, "something was done: {known:?}");

    let first = told_at_last(&cluster.members[0]).await;
    for member in &cluster.members[1..] {
        assert_eq!(told_at_last(member).await, first, "all members tell the same");
    }
    let mut ids: Vec<u32> = first.tenants.values().map(|tenant| tenant.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), first.tenants.len(), "an id is one tenant's");
    let defaults = both_of(first.cell.default_limits);
    assert!(known.remove(CELL).unwrap().contains(&Some(defaults)), "the cell's limits are {defaults}");
    for (name, possible) in &known {
        let is = first.tenants.get(name).map(|tenant| {
            let value = both_of(tenant.limits);
            assert_eq!(tenant.labels["value"], value.to_string(), "{name} has half of a change");
            value
        });
        assert!(possible.contains(&is), "{name} is {is:?}, of {possible:?}");
    }
}
