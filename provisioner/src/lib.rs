//! Tenants come and go through here: `tenurectl` and what a controller can share with it.
//!
//! Everything goes through the admin API of a cell (`tenure.admin.v1`); this crate depends on no other part of Tenure. A fleet is
//! several cells that know nothing of each other: which one a new tenant goes to is decided here ([`cells::place`]), by asking all.
//!
//! Life of a command: the cells it concerns are read from the configuration or the flags ([`cells`]), each is reached over its
//! socket file or TLS ([`connect`]), the answer is printed as a table, JSON or YAML ([`output`]), an error with what to do about it ([`advice`]). Keys are made where they are used
//! ([`credentials`]) and never sent.
//!
//! Left out: a Kubernetes controller; the state of what was provisioned, which is the cells' own.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod advice;
pub mod cell_init;
pub mod cells;
pub mod connect;
pub mod credentials;
pub mod files;
pub mod limits;
pub mod output;
