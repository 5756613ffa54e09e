//! What a caller of this crate can be told, and what it should do then.

use tenure_storage::Fault;

/// Why a proposal has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The lane's share of the queue is used up. Nothing was proposed: the caller tells its client to slow down.
    #[error("too many requests are waiting")]
    QueueFull,
    /// The command is larger than `command_bytes_max`. Nothing was proposed; a retry fails alike.
    #[error("command is too large")]
    TooLarge,
    /// The member stopped, or its state was replaced by a snapshot, while the command was on its way. **The outcome is
    /// unknown**: it may still take effect. Retry only what may be applied twice, or read first.
    #[error("outcome is unknown: the member lost track of the command")]
    Dropped,
    /// The command took effect; its reply was dropped, because replies that nobody has fetched yet take all the room there is.
    #[error("the command was applied, and there was no room for its reply")]
    NoRoomForReply,
    /// The command was for a term that this member does not lead, or not any more. It was not applied and never will be.
    #[error("the member does not lead the term that the command was for")]
    OtherTerm,
    /// The member is stopping. Nothing was proposed: retry at another member.
    #[error("the member is stopping")]
    Stopped,
}

/// Why a change of members was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// This member does not lead. Nothing was proposed: retry at `leader`, or here after a moment if it is `None`.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader { leader: Option<u64> },
    /// An earlier change is not complete. Nothing was proposed: retry after a moment.
    #[error("another change of members is under way")]
    UnderWay,
    /// Raft refuses it: it would leave no voter, for instance. Nothing was proposed; a retry fails alike.
    #[error("the change of members is not possible")]
    Invalid,
    /// As for a command; [`ProposeError::Dropped`] too if leadership was lost: the change may still be made.
    #[error(transparent)]
    Propose(#[from] ProposeError),
}

/// Why a linearizable read point could not be given. Reads change nothing: every one of these may be retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed the read within `read_timeout_ticks`. Retry here or elsewhere.
    #[error("no leader confirmed the read in time")]
    Timeout,
    /// `read_waiters_max` reads wait already: the caller tells its client to slow down.
    #[error("too many reads are waiting")]
    QueueFull,
    /// The member is stopping: retry at another one.
    #[error("the member is stopping")]
    Stopped,
}

/// Why the member did not start. Nothing serves; an operator has to look.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("configuration: {0}")]
    Config(String),
    /// The log was written by another member: the directories were mixed up.
    #[error("the log belongs to member {found}, not {expected}")]
    OtherMember { found: u64, expected: u64 },
    /// `force_sole_voter`, but the log says nothing of this member's being in the group.
    #[error("the member is not in the group that it should go on alone as: it never got its data")]
    NotAMember,
    /// The state lacks entries that the log has already dropped: it was restored from somewhere older, or lost.
    #[error("the state ends at index {applied}, but the log begins at {first}")]
    StateBehindLog { applied: u64, first: u64 },
    /// The state has entries that the log lacks: the log was lost or restored from somewhere older.
    #[error("the state contains index {applied}, but the log ends at {last}")]
    LogBehindState { applied: u64, last: u64 },
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("raft: {0}")]
    Raft(String),
    #[error("start thread: {0}")]
    Thread(std::io::Error),
}

/// What stopped the member, as its `fault_handler` is told.
#[derive(Clone, Debug)]
pub struct MemberFault {
    /// The thread it happened on.
    pub thread: &'static str,
    /// The fault, or the panic's message.
    pub cause: String,
}
