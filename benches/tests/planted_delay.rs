//! The harness must find a slow server: a measure that cannot see a planted slowdown measures nothing.
//!
//! Two floors serve side by side, one of which waits a millisecond before each answer. That is a lower bound for what each of
//! its calls takes, whatever else the machine does.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tenure_benches::client::Workload;
use tenure_benches::floor::Floor;
use tenure_benches::load::{self, Load, Measured, Target};

/// Serves on a thread of its own and answers where.
fn floor(delay: Duration) -> String {
    let (told, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            told.send(socket.local_addr().unwrap().to_string()).unwrap();
            Floor { delay }.serve(socket).await.unwrap();
        });
    });
    address.recv().unwrap()
}

fn measure(address: &str, rate: Option<f64>) -> Measured {
    let target = Target {
        name: "floor".to_string(),
        addresses: vec![address.to_string()],
        tls: Vec::new(),
        members: Vec::new(),
        pids: vec![std::process::id()],
    };
    let load = Load {
        workload: Workload::Put,
        clients: 4,
        connections: 2,
        keys: 100,
        value_bytes: 100_000,
        page_keys: 10,
        rate,
        tenants: 1,
        zipf: 1.0,
        watchers: 0,
        warm_up: Duration::from_millis(200),
        duration: Duration::from_millis(800),
        prefix: "/bench/".to_string(),
    };
    load::block_on(load::run(&target, &load, &|_, _| {})).unwrap()
}

#[test]
fn a_millisecond_is_seen() {
    let (quick, slow) = (floor(Duration::ZERO), floor(Duration::from_millis(1)));
    for rate in [None, Some(200.0)] {
        let (quick, slow) = (measure(&quick, rate), measure(&slow, rate));
        assert_eq!((quick.errors, slow.errors), (0, 0), "{:?} {:?}", quick.error, slow.error);
        assert!(slow.operations > 0 && slow.latency_us.min() >= 1_000, "no call is quicker than the delay");
        let median = |measured: &Measured| measured.latency_us.value_at_quantile(0.5);
        assert!(median(&slow) >= 1_000 && median(&slow) > median(&quick), "{} and {}", median(&slow), median(&quick));
        // Four clients that wait for each other's millisecond make at most 4,000 a second.
        assert!(slow.operations_per_second() <= 4_000.0);
    }
}

/// A server that does not answer has none of its requests counted as done, and one that does not do what is asked has errors.
#[test]
fn what_is_not_done_is_an_error() {
    let address = floor(Duration::ZERO);
    let target = Target {
        name: "floor".to_string(),
        addresses: vec![address],
        tls: Vec::new(),
        members: Vec::new(),
        pids: Vec::new(),
    };
    let load = Load {
        workload: Workload::KubeTxn,
        clients: 1,
        connections: 1,
        keys: 10,
        value_bytes: 10,
        page_keys: 10,
        rate: None,
        tenants: 1,
        zipf: 1.0,
        watchers: 0,
        warm_up: Duration::ZERO,
        duration: Duration::from_millis(100),
        prefix: "/bench/".to_string(),
    };
    let measured = load::block_on(load::run(&target, &load, &|_, _| {})).unwrap();
    assert_eq!((measured.operations, measured.units), (0, 0));
    assert!(measured.errors > 0 && measured.error.unwrap().contains("code 12"));
}
