//! The way to the other members. Raft repeats what gets lost and puts in order what arrives twice or late, so a transport
//! promises little: it never blocks raft's thread, and may drop anything.
//!
//! What comes in from peers goes to [`Handle::deliver`](crate::Handle::deliver).

mod memory;

pub use raft::eraftpb::Message;

pub use self::memory::{Endpoint, Network};

/// Owned by raft's thread.
pub trait Transport: Send {
    /// Sends each message towards its `to`. Must not block; may drop, at a bound of its own.
    fn send(&mut self, messages: Vec<Message>);
}

/// For a group of one: there is nobody to send to.
pub struct NoPeers;

impl Transport for NoPeers {
    fn send(&mut self, messages: Vec<Message>) {
        debug_assert!(messages.is_empty(), "a single voter has no peers");
    }
}
