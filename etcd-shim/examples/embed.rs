//! The whole store inside another program: no server process, no network. Prints what it does.
//!
//! ```text
//! cargo run --release -p tenure-etcd-shim --example embed [data directory]
//! ```
//!
//! Without an argument the data goes to a new directory under the system's temporary one, and is deleted at the end.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::path::PathBuf;
use std::time::Duration;

use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::client::WatchOptions;
use tenure_etcd_shim::storage::{
    Compare, CompareResult, CompareTarget, KeyRange, LeaseId, PutRequest, RangeRequest, TxnOp, TxnRequest,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let data_dir = match &given {
        Some(path) => path.clone(),
        None => std::env::temp_dir().join(format!("tenure-embed-{}", std::process::id())),
    };
    let outcome = run(data_dir.clone()).await;
    if given.is_none() && data_dir.exists() {
        std::fs::remove_dir_all(&data_dir)?;
    }
    outcome
}

async fn run(data_dir: PathBuf) -> Result<(), Box<dyn std::error::Error>> {
    // `.listen("http://127.0.0.1:0")` would serve etcd clients too; this program talks to itself only.
    let tenure = Tenure::builder().data_dir(data_dir).tenant("acme").start().await?;
    let acme = tenure.client("acme").ok_or("the builder made it")?;

    // A watch first, so that it sees what follows.
    let prefix = KeyRange::HalfOpen { start: "/pods/".into(), end: "/pods0".into() };
    let mut watcher = acme.watch(WatchOptions::new(prefix.clone()))?;

    let put = acme.put("/pods/a", "running").await?;
    println!("put /pods/a at revision {}", put.revision);

    // Create only if it does not exist, as Kubernetes does.
    let key = "/pods/b";
    let create = TxnRequest {
        compares: vec![Compare {
            range: KeyRange::Single(key.into()),
            result: CompareResult::Equal,
            target: CompareTarget::Mod(0),
        }],
        success: vec![TxnOp::Put(put_of(key, "pending", LeaseId::NONE))],
        failure: vec![],
    };
    for _ in 0..2 {
        let result = acme.txn(create.clone()).await?;
        println!("create {key}: {}", if result.succeeded { "created" } else { "exists already" });
    }

    let lease = acme.grant_lease(Duration::from_secs(30)).await?;
    acme.put_with(put_of("/pods/leased", "for a while", lease.id)).await?;
    acme.revoke_lease(lease.id).await?;
    println!("revoked lease of {} s with its key", lease.ttl_seconds);

    let found = acme.range(RangeRequest::new(prefix)).await?;
    for kv in &found.kvs {
        let (key, value) = (String::from_utf8_lossy(&kv.key), String::from_utf8_lossy(&kv.value));
        println!("{key} = {value} (revision {})", kv.mod_revision);
    }

    // Four changes: two puts, the leased put, its deletion.
    let mut seen = 0;
    while seen < 4 {
        for event in watcher.next().await? {
            println!("watched {:?} of {}", event.kind, String::from_utf8_lossy(&event.kv.key));
            seen += 1;
        }
    }

    // Another tenant of the same store starts empty, at revision 1, and stays so.
    let other = tenure.client("default").ok_or("every cell has it")?;
    let empty = other.range(RangeRequest::new(KeyRange::From("\0".into()))).await?;
    println!("tenant default: {} keys at revision {}", empty.count, empty.revision);

    drop((watcher, acme, other));
    tenure.stop().await;
    println!("stopped");
    Ok(())
}

fn put_of(key: &'static str, value: &'static str, lease: LeaseId) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), lease, prev_kv: false, ignore_value: false, ignore_lease: false }
}
