//! What the tests of real processes share: the server as a child process, and a client that need not behave.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

pub mod admin;
pub mod child;
pub mod client;
pub mod cluster;
pub mod load;
pub mod server;
