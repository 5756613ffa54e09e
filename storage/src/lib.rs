//! Tenure's storage: many virtual etcds on one ordered engine.
//!
//! This crate holds all replicated state and everything that etcd's semantics say about it. It knows no network, no clock
//! and no randomness: time and chance come in as commands, so every member that applies the same log holds the
//! same state, and a seed replays a run.
//!
//! Life of a write: raft commits an entry, [`StateMachine::apply`] runs its commands on an overlay of the engine, the
//! batch becomes visible atomically together with the applied index, watchers are told, the outcome is returned. Life of
//! a read: [`Store::reader`] gives a tenant's [`TenantReader`], whose calls each look at one point in time.
//!
//! What must hold is written where it is kept: [`engine`] (atomicity, durability), [`apply`] (determinism), `mvcc`
//! (history), [`watch`] (events), `key` (isolation: every key starts with its tenant).
//!
//! Left out on purpose: leases do not expire here (the leader proposes revokes), nothing is authenticated here (the
//! edge decides which tenant and user a request is), and one group or many is not known here.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::cast_possible_truncation))]

pub mod apply;
mod codec;
pub mod command;
mod counts;
pub mod engine;
pub mod error;
mod key;
pub mod key_value;
pub mod limits;
mod members;
mod mvcc;
pub mod profile;
pub mod reply;
pub mod rules;
mod store;
#[cfg(all(test, feature = "rocksdb"))]
mod testscripts;
pub mod types;
pub mod watch;

pub use crate::apply::{Copier, NoObserver, Observer, StateMachine, TenantChange, next_second_ms};
pub use crate::command::{Command, Envelope, MembersCommand, TenantCommand};
#[cfg(feature = "rocksdb")]
#[doc(hidden)]
pub use crate::engine::RocksLog;
pub use crate::engine::{Engine, MemoryEngine};
#[cfg(feature = "rocksdb")]
pub use crate::engine::{RocksEngine, RocksOptions};
pub use crate::error::{Fault, ReadError, Refusal};
pub use crate::mvcc::read::Sink;
pub use crate::mvcc::txn::{is_read_only, put_cost, quota_cost};
pub use crate::profile::{Labels, Limit, Profile, TenantLimits, TenantPhase};
pub use crate::reply::{Outcome, Reply};
pub use crate::rules::Rules;
pub use crate::store::{HashKv, RangeSummary, Store, TenantReader, TenantState};
pub use crate::types::*;
pub use crate::watch::{CreateRefusal, Event, EventBatch, EventKind, WatchMessage, WatchSpec, WatchStream};

/// Entry points for the fuzzer; not part of the interface.
#[doc(hidden)]
pub mod fuzz {
    pub use crate::key::version::fuzz_decode as decode_version_key;
    pub use crate::key::{fuzz_escape as escape, fuzz_unescape as unescape};
}
