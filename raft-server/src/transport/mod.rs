//! The way to the other members. Raft repeats what gets lost and puts in order what arrives twice or late, and so does
//! [`forward`](crate::forward); so a transport promises little: it never blocks raft's thread, and may drop anything.
//!
//! What comes in from peers goes to [`Handle::deliver`]. Two exist: [`Network`], inside one process, and [`peers`], over gRPC.

mod memory;
pub mod peers;
mod wire;

use std::sync::Arc;

pub use raft::eraftpb::Message;

pub use self::memory::{Endpoint, Network};
pub use crate::forward::{Forward, Forwarded};
use crate::handle::Handle;
use crate::log::Position;
use crate::snapshot::{OutgoingSnapshot, SnapshotOffer};

/// What members say to each other.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    Raft(Box<Message>),
    Forward(Forward),
    Forwarded(Forwarded),
}

impl PeerMessage {
    pub fn to(&self) -> u64 {
        match self {
            PeerMessage::Raft(message) => message.to,
            PeerMessage::Forward(message) => message.to,
            PeerMessage::Forwarded(message) => message.to,
        }
    }

    pub fn from(&self) -> u64 {
        match self {
            PeerMessage::Raft(message) => message.from,
            PeerMessage::Forward(message) => message.from,
            PeerMessage::Forwarded(message) => message.from,
        }
    }
}

/// Owned by raft's thread.
pub trait Transport: Send {
    /// Sends each message towards its receiver. Must not block; may drop, at a bound of its own.
    fn send(&mut self, messages: Vec<PeerMessage>);

    /// The same way out, for any thread. Without one, raft's thread has to see all that readers ask and are answered.
    fn sender(&self) -> Option<Arc<dyn SendFromAnywhere>> {
        None
    }

    /// Begins to fetch a snapshot; [`Handle::snapshot_fetched`] tells how it ended. Of several offers the last one counts. Must
    /// not block.
    fn fetch(&mut self, offer: SnapshotOffer);
}

/// See [`Transport::sender`].
pub trait SendFromAnywhere: Send + Sync {
    /// As [`Transport::send`]. Messages of several threads are in no order.
    fn send(&self, message: PeerMessage);
}

/// For a group of one: there is nobody to send to.
pub struct NoPeers;

impl Transport for NoPeers {
    fn send(&mut self, messages: Vec<PeerMessage>) {
        debug_assert!(messages.is_empty(), "a single voter has no peers");
    }

    fn fetch(&mut self, _: SnapshotOffer) {
        debug_assert!(false, "a single voter has no peers");
    }
}

/// A member as a transport reaches it, whatever its replies are.
trait Local: Send + Sync {
    fn deliver(&self, messages: Vec<PeerMessage>);
    fn outgoing_snapshot(&self, at: Position) -> Option<Arc<OutgoingSnapshot>>;
    fn snapshot_fetched(&self, offer: SnapshotOffer, complete: bool);
    fn report_unreachable(&self, id: u64);
    fn report_removed(&self);
}

impl<R: Send + 'static> Local for Handle<R> {
    fn deliver(&self, messages: Vec<PeerMessage>) {
        Handle::deliver_all(self, messages);
    }

    fn outgoing_snapshot(&self, at: Position) -> Option<Arc<OutgoingSnapshot>> {
        Handle::outgoing_snapshot(self, at)
    }

    fn snapshot_fetched(&self, offer: SnapshotOffer, complete: bool) {
        Handle::snapshot_fetched(self, offer, complete);
    }

    fn report_unreachable(&self, id: u64) {
        Handle::report_unreachable(self, id);
    }

    fn report_removed(&self) {
        Handle::report_removed(self);
    }
}
