//! How a request to the cell can fail.

use std::sync::Arc;

use tenure_storage::{Fault, ReadError, Refusal};

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
    /// A write was not answered in time: it may or may not happen.
    #[error("write timed out")]
    TimeoutWrite,
    /// A read was not answered in time; asking again is safe.
    #[error("read timed out")]
    TimeoutRead,
    /// More writes are waiting than this member lets in. Nothing was proposed.
    #[error("too many requests")]
    TooManyRequests,
    /// The command is larger than a log entry may be. Nothing was proposed.
    #[error("request is too large")]
    TooLarge,
    /// This member is stopping. A write may or may not happen.
    #[error("stopped")]
    Stopped,
    /// This member cannot read or write its own state and is about to stop.
    #[error("fault: {0}")]
    Fault(Arc<Fault>),
}

impl From<Fault> for CellError {
    fn from(fault: Fault) -> Self {
        CellError::Fault(Arc::new(fault))
    }
}

impl From<ReadError> for CellError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Refused(refusal) => CellError::Refused(refusal),
            ReadError::Fault(fault) => fault.into(),
        }
    }
}
