//! Tenure's front: the etcd v3 API over a [`Cell`](cell::Cell), for network clients and for the program it is embedded in.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod admin;
pub mod audit;
pub mod authorities;
pub mod auto_compaction;
pub mod builder;
pub mod cell;
pub mod cell_error;
pub mod check;
pub mod client;
pub mod codec;
mod config_file;
pub mod convert;
mod cork;
pub mod data_dir;
mod delivery;
pub mod disk;
pub mod flags;
pub mod gate;
mod handshakes;
pub mod http_endpoints;
pub mod ids;
pub mod inflight;
pub mod issuer;
pub mod lessor;
pub mod listen;
pub mod logging;
mod metrics;
mod own_requests;
pub mod ping_guard;
pub mod priority;
pub mod proto;
pub mod read_pool;
pub mod reclaim;
mod request_body;
mod rotation;
pub mod rpc_metrics;
mod seldom;
mod send_rate;
pub mod server;
pub mod service;
pub mod service_manager;
pub mod serving;
pub mod status;
pub mod tenant;
pub mod throttle;
pub mod tls;
pub mod tls_protocol;
pub mod turns;
pub mod urls;
pub mod wire;

pub use tenure_storage as storage;

pub use crate::builder::Tenure;
