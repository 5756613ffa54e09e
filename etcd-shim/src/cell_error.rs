//! How a request to the cell can fail.

use std::sync::Arc;

use tenure_raft_server::ProposeError;
use tenure_storage::{Fault, Refusal};

/// Why the cell did not do what it was asked. `status.rs` gives each its code and text.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CellError {
    /// The replicated state said no. Final: asking again gives the same answer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nobody leads at the moment. Nothing was proposed; asking again later is safe.
    #[error("no leader")]
    NoLeader,
    /// The leader changed while the write was on its way: it may or may not happen.
    #[error("leader changed")]
    LeaderChanged,
    /// A write found no leader in time: it may or may not happen.
    #[error("write timed out")]
    TimeoutWrite,
    /// A write that a leader was there for was not answered in time: it may or may not happen.
    #[error("write timed out under way")]
    TimeoutApply,
    /// A read was not answered in time; asking again is safe.
    #[error("read timed out")]
    TimeoutRead,
    /// More writes are waiting than this member lets in. Nothing was proposed.
    #[error("too many requests")]
    TooManyRequests,
    /// The command is larger than a log entry may be. Nothing was proposed.
    #[error("request is too large")]
    TooLarge,
    /// Who is in the cell was not changed: see [`MembershipError`].
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// This member is stopping. A write may or may not happen.
    #[error("stopped")]
    Stopped,
    /// This member cannot read or write its own state and is about to stop.
    #[error("fault: {0}")]
    Fault(Arc<Fault>),
}

/// Why a change of members or of the leader is refused. The texts are etcd's (contract 1.4, 2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    #[error("etcdserver: given member URLs are invalid")]
    BadUrls,
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("etcdserver: unhealthy cluster")]
    Unhealthy,
    #[error("etcdserver: too many learner members in cluster")]
    TooManyLearners,
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    #[error("etcdserver: rpc not supported for learner")]
    Learner,
    #[error("etcdserver: not leader")]
    NotLeader,
    #[error("etcdserver: bad leader transferee")]
    BadTransferee,
    #[error("etcdserver: request timed out, leader transfer took too long")]
    TransferTimeout,
    /// As the leader answered a member that asked for its client.
    #[error("{text}")]
    AtLeader { code: i32, text: String },
}

impl From<ProposeError> for CellError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::QueueFull => CellError::TooManyRequests,
            ProposeError::TooLarge => CellError::TooLarge,
            ProposeError::Dropped | ProposeError::OtherTerm => CellError::LeaderChanged,
            // It was done, and nobody can say what it answered.
            ProposeError::NoRoomForReply => CellError::TimeoutApply,
            ProposeError::Stopped => CellError::Stopped,
        }
    }
}

impl From<Fault> for CellError {
    fn from(fault: Fault) -> Self {
        CellError::Fault(Arc::new(fault))
    }
}
