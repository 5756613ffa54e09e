//! What an administrator does: each call is written down, and each may be repeated.

#![allow(clippy::unwrap_used)]

#[path = "../client/mod.rs"]
mod client;
mod log;
mod office;
mod repeated;
