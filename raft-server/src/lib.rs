//! Replication: one raft group's member. Knows bytes and indexes, not keys and values.
//!
//! A member takes commands, has them written by a quorum, and gives them in one order to the same [`StateMachine`] on
//! every member. What a command means is the state machine's business; who may propose, the layers' above.
//!
//! Life of a write. [`Handle::propose`] puts the command in its lane's queue (`lanes`). Raft's thread (`node`) takes
//! a fair batch of many lanes, frames it as one entry (`frame`) and proposes it. The log thread (`writer`) writes and
//! syncs it (`log`) while the next batch fills and peers get their copy ([`transport`]). When a quorum has it, the apply
//! thread (`apply`) hands it to the state machine and answers who waited (`proposals`). A sole voter writes the log on raft's
//! thread, and applies there what is little: fewer changes of threads, and nobody's messages wait for it.
//!
//! Life of a read. [`Handle::read_barrier`] waits until all that was acknowledged before is applied here (`read_index`);
//! the caller then reads the state itself.
//!
//! ```text
//!  propose ─▶ lanes ─▶ raft thread ──writes──▶ log thread ──▶ disk
//!                       │  ▲  ▲                    │
//!              commit   │  │  └────persisted───────┘
//!             watermark ▼  └─applied── apply thread ─▶ state machine, replies
//! ```
//!
//! What must hold:
//! - A reply is given only for an entry that is durable on a quorum and applied here.
//! - Raft's thread waits for no other thread; the others may wait for it. So there is no cycle of waits.
//! - Every queue has a bound, given where it is; overload of one lane refuses that lane.
//! - The log holds whatever the state would lose: it is truncated only up to [`StateMachine::durable_index`].
//! - A fault or a panic on any thread ends the member ([`Config::fault_handler`]): it never carries on with less.
//! - Only this crate names `raft`.
//!
//! A command may be proposed at any member: one that does not lead sends it to the leader (`forward`), and whatever becomes of
//! leaders, it is applied once (`proposals`). A member that is too far behind gets a copy of the state (`snapshot`).

// A test that unwraps says what it expects.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::cast_possible_truncation))]

mod apply;
mod behind;
mod config;
mod error;
mod events;
mod forward;
mod frame;
mod handle;
mod lanes;
mod log;
mod logger;
mod metrics;
mod node;
mod pending;
mod proposals;
mod read_index;
mod ready;
mod replies;
mod server;
mod shared;
#[cfg(test)]
mod sim;
mod snapshot;
#[cfg(test)]
mod tests;
pub mod transport;
mod writer;

pub use crate::apply::{CommittedEntry, StateMachine};
pub use crate::behind::behind_ready_tasks;
pub use crate::config::{Config, FaultHandler};
pub use crate::error::{ChangeError, MemberFault, ProposeError, ReadError, StartError};
pub use crate::handle::{Handle, Status};
pub use crate::log::{Appended, BOOTSTRAP_INDEX, Conf, EngineLog, LogStore, LogWrite, MemoryLog, Position, Recovered};
pub use crate::metrics::{DurationHistogram, HistogramSnapshot, Metrics, RoundTripHistogram, SnapshotHistogram};
pub use crate::node::MembersChange;
pub use crate::server::{JoinGuard, start, start_on};
pub use crate::shared::{Leadership, Progress};
pub use crate::snapshot::{OutgoingSnapshot, SnapshotOffer, Snapshotter};
pub use crate::transport::{NoPeers, Transport};
