//! What an administrator does: each call is written down.

#![allow(clippy::unwrap_used)]

#[path = "../client/mod.rs"]
mod client;
mod log;
mod office;
