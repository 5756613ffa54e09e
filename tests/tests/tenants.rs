//! The registry of tenants under kill -9: equal on all members, and every call all or nothing.
//!
//! Why: a tenant that exists on one member and not on another, or has half of its limits, is a customer's outage that nobody can
//! explain. Operators of different members make, change and delete tenants while members are killed in turn; then all members
//! must tell the same, and what was acknowledged must be so.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
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

/// What one operator knows of its tenants: the number that both limits were set to last, `None`: deleted. A call that was not
/// answered may have been done: both are right then.
type Known = BTreeMap<String, Vec<Option<u64>>>;

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

/// Makes, changes and deletes tenants of its own until it is stopped, each time through the next member.
async fn operate(number: usize, members: Vec<std::path::PathBuf>, stop: Arc<AtomicBool>) -> Known {
    let mut known = Known::new();
    for turn in 0_usize.. {
        let value = turn as u64;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("t{number}-{}", turn / 3);
        let mut admin = connect(&members[(turn + number) % members.len()]);
        // Each tenant is made, changed, and every second one deleted.
        let (wanted, answer) = match turn % 3 {
            0 => {
                let request = api::CreateTenantRequest { name: name.clone(), limits: both(1), ..Default::default() };
                (Some(1), admin.create_tenant(request).await.map(drop))
            }
            1 => {
                let request =
                    api::UpdateTenantRequest { name: name.clone(), limits: both(value), ..Default::default() };
                (Some(value), admin.update_tenant(request).await.map(drop))
            }
            _ if (turn / 3) % 2 == 0 => {
                let request = api::DeleteTenantRequest { name: name.clone(), id: None };
                (None, admin.delete_tenant(request).await.map(drop))
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

/// Every tenant with its id and both limits, as one member tells it.
async fn told(member: &Member) -> BTreeMap<String, (u32, Option<u64>, Option<u64>)> {
    let mut look = tokio::time::interval(Duration::from_millis(50));
    let listed = async {
        loop {
            look.tick().await;
            let mut admin = connect(&member.data_dir);
            match admin.list_tenants(api::ListTenantsRequest::default()).await {
                Ok(answer) => return answer.into_inner(),
                Err(status) => assert!(is_unclear(&status), "{status:?}"),
            }
        }
    };
    let listed = tokio::time::timeout(PATIENCE, listed).await.expect("the member answers");
    assert!(listed.next_page_token.is_empty(), "one page");
    let of = |tenant: api::Tenant| {
        let limits = tenant.limits.unwrap_or_default();
        (tenant.name, (tenant.id, limits.leases, limits.watchers))
    };
    listed.tenants.into_iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_is_equal_and_every_call_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let members: Vec<_> = cluster.members.iter().map(|member| member.data_dir.clone()).collect();
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

    let first = told(&cluster.members[0]).await;
    for member in &cluster.members[1..] {
        assert_eq!(told(member).await, first, "all members tell the same");
    }
    let mut ids: Vec<u32> = first.values().map(|(id, _, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), first.len(), "an id is one tenant's");
    for (name, possible) in &known {
        let is = first.get(name).map(|(_, leases, watchers)| {
            assert_eq!(leases, watchers, "{name} has half of a change");
            leases.unwrap()
        });
        assert!(possible.contains(&is), "{name} is {is:?}, of {possible:?}");
    }
}
