//! The harness must find a slow server: a measure that cannot see a planted slowdown measures nothing.
//!
//! Two floors serve side by side, one of which waits a millisecond before each answer. That is a lower bound for what each of
//! its calls takes, whatever else the machine does. An upper bound there is not: a machine that is shared may make every call slow.
//! But not for ever, so one that is quick is waited for where one is wanted.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tenure_benches::client::Workload;
use tenure_benches::floor::Floor;
use tenure_benches::load::{self, Load, Measured, Target};
use tenure_benches::report;

/// Of the planted delay, in microseconds.
const DELAY_US: u64 = 1_000;

/// Runs until one has what the test is about. Each is longer than the one before.
const RUNS_MAX: u32 = 8;

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

/// Measures until a run is as wanted; what is always to hold is checked for each.
fn measure_until(load: &Load, address: &str, wanted: impl Fn(&Measured) -> bool) -> Measured {
    for run in 1..=RUNS_MAX {
        let load = Load { duration: run * load.duration, ..load.clone() };
        let measured = measure(&load, address);
        if wanted(&measured) {
            return measured;
        }
    }
    panic!("no run in {RUNS_MAX} is as wanted");
}

fn measure(load: &Load, address: &str) -> Measured {
    let target = Target {
        name: "floor".to_string(),
        addresses: vec![address.to_string()],
        tls: Vec::new(),
        members: Vec::new(),
        pids: vec![std::process::id()],
    };
    load::block_on(load::run(&target, load, &|_, _| {})).unwrap()
}

fn puts(rate: Option<f64>) -> Load {
    Load {
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
        cut: None,
    }
}

#[test]
fn a_millisecond_is_seen() {
    let (quick, slow) = (floor(Duration::ZERO), floor(Duration::from_micros(DELAY_US)));
    for rate in [None, Some(200.0)] {
        let load = puts(rate);
        // What is seen of the slow one is its delay, not the harness' own.
        let is_quick = |measured: &Measured| measured.operations > 0 && measured.latency_us.min() < DELAY_US;
        let quick = measure_until(&load, &quick, is_quick);
        let slow = measure_until(&load, &slow, |measured| measured.operations > 0);
        assert_eq!((quick.errors, slow.errors), (0, 0), "{:?} {:?}", quick.error, slow.error);
        assert!(slow.latency_us.min() >= DELAY_US, "no call is quicker than the delay: {}", slow.latency_us.min());
        let report = report::json(Workload::Put, "floor", &slow);
        for figure in ["p50_us", "p99_us", "p999_us", "max_us"] {
            let reported = report["latency"][figure].as_u64().unwrap();
            assert!(reported >= DELAY_US, "{figure} is reported as {reported}");
        }
        // Four clients that wait for each other's millisecond make at most four operations in each, and have four on their way at
        // the beginning.
        let most = 4.0 * (slow.seconds * 1e6 / DELAY_US as f64) + 4.0;
        assert!(slow.operations as f64 <= most, "{} operations in {} s", slow.operations, slow.seconds);
    }
}

/// A server that does not answer has none of its requests counted as done, and one that does not do what is asked has errors.
#[test]
fn what_is_not_done_is_an_error() {
    let load = Load {
        workload: Workload::LeaseGrant,
        clients: 1,
        connections: 1,
        keys: 10,
        value_bytes: 10,
        warm_up: Duration::ZERO,
        duration: Duration::from_millis(100),
        ..puts(None)
    };
    let measured = measure_until(&load, &floor(Duration::ZERO), |measured| {
        assert_eq!((measured.operations, measured.units), (0, 0));
        measured.errors > 0
    });
    assert!(measured.error.unwrap().contains("code 12"));
}
