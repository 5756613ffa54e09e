//! The victim of the crash test: writes without pause and says on stdout what was acknowledged, until it is killed.

#![allow(clippy::unwrap_used)]

use std::io::Write as _;

use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::storage::{LeaseId, PutRequest, TxnOp, TxnRequest};

const WRITERS: u64 = 8;

fn put(key: String, value: &str) -> PutRequest {
    PutRequest {
        key: key.into(),
        value: value.to_string().into(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let (dir, round) = (arguments.next().unwrap(), arguments.next().unwrap());
    let tenure = Tenure::builder().data_dir(dir).tenant("acme").start().await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let client = tenure.client("acme").unwrap();
        let round = round.clone();
        writers.spawn(async move {
            for number in 0u64.. {
                // Both halves of a pair, or neither.
                let name = format!("{round}/{writer}/{number}");
                let halves = ["left", "right"].map(|half| TxnOp::Put(put(format!("{half}/{name}"), &name)));
                let request = TxnRequest { success: halves.to_vec(), ..TxnRequest::default() };
                let revision = client.txn(request).await.unwrap().revision;
                // One write call a line: a line is whole or missing.
                std::io::stdout().write_all(format!("{name} {revision}\n").as_bytes()).unwrap();
            }
        });
    }
    writers.join_next().await;
}
