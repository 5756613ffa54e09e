//! Measuring Tenure beside other servers of the etcd API.
//!
//! The binary `tenure-bench` drives any endpoint ([`load`]: simulated clients over a client of its own, [`http2`]) and compares
//! servers round by round (`compare`). The criterion benches in `benches/` measure single paths instead.

// A test that unwraps says what it expects.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::cast_possible_truncation))]
#![allow(clippy::cast_precision_loss, reason = "figures for people")]

pub mod chart;
pub mod client;
pub mod cluster;
pub mod compare;
pub mod fields;
pub mod floor;
pub mod http2;
pub mod idle;
pub mod load;
pub mod noise;
pub mod noisy;
pub mod process;
pub mod report;
pub mod scale;
pub mod server;
pub mod tls;
