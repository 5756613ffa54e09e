//! Every error to its gRPC code and exact text (contract 2).
//!
//! Clients recognise an error by its text, so these strings are as much an interface as the messages are. Every `match`
//! here is exhaustive: a new failure does not compile until it has a code.

use tenure_storage::Refusal;
use tenure_storage::limits::LABELS_MAX;
use tonic::{Code, Status};

use crate::cell_error::{CellError, MembershipError};
use crate::check::CheckError;

/// Authentication is not built: what `Authenticate` truthfully answers.
pub fn auth_not_enabled() -> Status {
    Status::failed_precondition("etcdserver: authentication is not enabled")
}

/// A service method that does not exist yet. The README lists them.
pub fn not_built(method: &str) -> Status {
    Status::unimplemented(format!("etcdserver: {method} is not implemented"))
}

/// A bug of ours: the state machine answered a command with another command's reply.
pub(crate) fn mismatched_reply(command: &str) -> Status {
    Status::internal(format!("etcdserver: {command} got the reply of another command"))
}

fn refusal(refusal: &Refusal) -> (Code, &'static str) {
    match refusal {
        Refusal::Compacted { compact_revision: _ } => {
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted")
        }
        Refusal::FutureRevision => (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision"),
        Refusal::LeaseNotFound(_) => (Code::NotFound, "etcdserver: requested lease not found"),
        Refusal::LeaseExists(_) => (Code::FailedPrecondition, "etcdserver: lease already exists"),
        Refusal::KeyNotFound => (Code::InvalidArgument, "etcdserver: key not found"),
        Refusal::NoSpace => (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
        Refusal::Corrupt => (Code::DataLoss, "etcdserver: corrupt cluster"),
        // No etcd text exists: a tenant is found before its requests are.
        Refusal::TenantNotFound => (Code::NotFound, "etcdserver: tenant not found"),
        Refusal::TxnTooLarge => (Code::InvalidArgument, "etcdserver: request is too large"),
        Refusal::MemberNotFound => (Code::NotFound, "etcdserver: member not found"),
        Refusal::MemberExists => (Code::FailedPrecondition, "etcdserver: member ID already exist"),
        Refusal::PeerUrlExists => (Code::FailedPrecondition, "etcdserver: Peer URLs already exists"),
        Refusal::MemberNotLearner => (Code::FailedPrecondition, "etcdserver: can only promote a learner member"),
        Refusal::ReadOnly => (Code::PermissionDenied, "etcdserver: tenant is read-only"),
        Refusal::Suspended => (Code::PermissionDenied, "etcdserver: tenant is suspended"),
        Refusal::TooManyLeases => (Code::ResourceExhausted, "etcdserver: too many requests"),
        // etcd attaches as many as anybody puts.
        Refusal::TooManyLeaseKeys => (Code::ResourceExhausted, "etcdserver: too many keys of one lease"),
        Refusal::MembersChanged => (Code::FailedPrecondition, "etcdserver: the members have changed"),
        Refusal::TooManyLabels => {
            const _: () = assert!(LABELS_MAX == 64);
            (Code::InvalidArgument, "a tenant has at most 64 labels")
        }
        Refusal::TooManyRevoked => (
            Code::ResourceExhausted,
            "too many certificates of this tenant are revoked one by one: revoke all, and issue new ones",
        ),
        Refusal::TooManyTenants => (Code::ResourceExhausted, "etcdserver: too many tenants"),
        // etcd keeps as many as anybody sets.
        Refusal::TooManyAlarms => (Code::ResourceExhausted, "etcdserver: too many alarms"),
    }
}

fn membership(error: &MembershipError) -> Status {
    let code = match error {
        MembershipError::BadUrls => Code::InvalidArgument,
        MembershipError::Unhealthy => Code::Unavailable,
        MembershipError::NotEnoughStarted
        | MembershipError::TooManyLearners
        | MembershipError::LearnerNotReady
        | MembershipError::NotLeader
        | MembershipError::Learner
        | MembershipError::BadTransferee => Code::FailedPrecondition,
        MembershipError::TransferTimeout => Code::Unknown,
        MembershipError::AtLeader { code, .. } => Code::from_i32(*code),
    };
    Status::new(code, error.to_string())
}

impl From<CellError> for Status {
    fn from(error: CellError) -> Status {
        let (code, text) = match &error {
            CellError::Refused(refused) => refusal(refused),
            CellError::NoLeader => (Code::Unavailable, "etcdserver: no leader"),
            CellError::LeaderChanged => (Code::Unavailable, "etcdserver: leader changed"),
            CellError::TimeoutWrite => (Code::DeadlineExceeded, "context deadline exceeded"),
            CellError::TimeoutApply | CellError::TimeoutRead => (Code::Unavailable, "etcdserver: request timed out"),
            CellError::TooManyRequests => (Code::ResourceExhausted, "etcdserver: too many requests"),
            CellError::TooLarge => (Code::InvalidArgument, "etcdserver: request is too large"),
            CellError::Stopped => (Code::Unavailable, "etcdserver: server stopped"),
            CellError::Membership(error) => return membership(error),
            CellError::Fault(fault) => {
                // The client learns nothing of our disk, and that the member is about to go.
                tracing::error!(error = %fault, "answer a request");
                (Code::Unavailable, "etcdserver: server stopped")
            }
        };
        Status::new(code, text)
    }
}

impl From<CheckError> for Status {
    fn from(error: CheckError) -> Status {
        let code = match error {
            CheckError::EmptyKey
            | CheckError::KeyNotFound
            | CheckError::ValueProvided
            | CheckError::LeaseProvided
            | CheckError::TooManyOps
            | CheckError::DuplicateKey
            | CheckError::InvalidSortOption
            | CheckError::RequestTooLarge
            | CheckError::UnknownAlarmAction => Code::InvalidArgument,
            CheckError::LeaseTtlTooLarge => Code::OutOfRange,
            CheckError::StreamSortOrder | CheckError::StreamRevisionFilter => Code::Unimplemented,
        };
        Status::new(code, error.to_string())
    }
}

/// What tonic refuses before a service sees it, in the words of etcd's gRPC library. Anything else stays as it is.
///
/// The gate applies it to the status of an answer; the streaming services apply it to what a client's stream ends with.
pub fn in_etcds_words(status: Status) -> Status {
    if status.code() == Code::OutOfRange
        && let Some((found, limit)) =
            between(status.message(), TOO_LARGE).zip(between(status.message(), TOO_LARGE_LIMIT))
    {
        return Status::resource_exhausted(format!("grpc: received message larger than max ({found} vs. {limit})"));
    }
    if status.code() == Code::Unimplemented
        && let Some(encoding) = between(status.message(), UNKNOWN_ENCODING)
    {
        let text = format!("grpc: Decompressor is not installed for grpc-encoding \"{encoding}\"");
        return Status::unimplemented(text);
    }
    status
}

/// What stands before and behind the parts of tonic's texts.
const TOO_LARGE: (&str, &str) = ("Error, decoded message length too large: found ", " bytes");
const TOO_LARGE_LIMIT: (&str, &str) = ("the limit is: ", " bytes");
const UNKNOWN_ENCODING: (&str, &str) = ("Content is compressed with `", "` which isn't supported");

fn between<'a>(text: &'a str, (before, behind): (&str, &str)) -> Option<&'a str> {
    Some(text.split_once(before)?.1.split_once(behind)?.0)
}

#[cfg(test)]
mod tests {
    use tenure_storage::LeaseId;

    use super::*;

    #[test]
    fn errors_have_etcds_code_and_text() {
        let refused = [
            (
                Refusal::Compacted { compact_revision: 7 },
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
            ),
            (Refusal::FutureRevision, Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision"),
            (Refusal::LeaseNotFound(LeaseId(5)), Code::NotFound, "etcdserver: requested lease not found"),
            (Refusal::LeaseExists(LeaseId(5)), Code::FailedPrecondition, "etcdserver: lease already exists"),
            (Refusal::KeyNotFound, Code::InvalidArgument, "etcdserver: key not found"),
            (Refusal::NoSpace, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
            (Refusal::Corrupt, Code::DataLoss, "etcdserver: corrupt cluster"),
            (Refusal::TxnTooLarge, Code::InvalidArgument, "etcdserver: request is too large"),
            (Refusal::MemberNotFound, Code::NotFound, "etcdserver: member not found"),
            (Refusal::MemberExists, Code::FailedPrecondition, "etcdserver: member ID already exist"),
            (Refusal::PeerUrlExists, Code::FailedPrecondition, "etcdserver: Peer URLs already exists"),
            (Refusal::MemberNotLearner, Code::FailedPrecondition, "etcdserver: can only promote a learner member"),
            (Refusal::ReadOnly, Code::PermissionDenied, "etcdserver: tenant is read-only"),
            (Refusal::Suspended, Code::PermissionDenied, "etcdserver: tenant is suspended"),
            (Refusal::TooManyLeases, Code::ResourceExhausted, "etcdserver: too many requests"),
        ];
        let failed = [
            (CellError::NoLeader, Code::Unavailable, "etcdserver: no leader"),
            (CellError::LeaderChanged, Code::Unavailable, "etcdserver: leader changed"),
            (CellError::TimeoutWrite, Code::DeadlineExceeded, "context deadline exceeded"),
            (CellError::TimeoutApply, Code::Unavailable, "etcdserver: request timed out"),
            (CellError::TimeoutRead, Code::Unavailable, "etcdserver: request timed out"),
            (CellError::TooManyRequests, Code::ResourceExhausted, "etcdserver: too many requests"),
            (CellError::TooLarge, Code::InvalidArgument, "etcdserver: request is too large"),
            (CellError::Stopped, Code::Unavailable, "etcdserver: server stopped"),
            (
                CellError::Membership(MembershipError::BadUrls),
                Code::InvalidArgument,
                "etcdserver: given member URLs are invalid",
            ),
            (CellError::Membership(MembershipError::Unhealthy), Code::Unavailable, "etcdserver: unhealthy cluster"),
            (
                CellError::Membership(MembershipError::NotEnoughStarted),
                Code::FailedPrecondition,
                "etcdserver: re-configuration failed due to not enough started members",
            ),
            (
                CellError::Membership(MembershipError::TooManyLearners),
                Code::FailedPrecondition,
                "etcdserver: too many learner members in cluster",
            ),
            (
                CellError::Membership(MembershipError::LearnerNotReady),
                Code::FailedPrecondition,
                "etcdserver: can only promote a learner member which is in sync with leader",
            ),
            (CellError::Membership(MembershipError::NotLeader), Code::FailedPrecondition, "etcdserver: not leader"),
            (
                CellError::Membership(MembershipError::Learner),
                Code::FailedPrecondition,
                "etcdserver: rpc not supported for learner",
            ),
            (
                CellError::Membership(MembershipError::BadTransferee),
                Code::FailedPrecondition,
                "etcdserver: bad leader transferee",
            ),
            (
                CellError::Membership(MembershipError::TransferTimeout),
                Code::Unknown,
                "etcdserver: request timed out, leader transfer took too long",
            ),
        ];
        let refused = refused.into_iter().map(|(refusal, code, text)| (CellError::from(refusal), code, text));
        let failed = refused.chain(failed).map(|(error, code, text)| (Status::from(error), code, text));
        let checked = [
            (CheckError::EmptyKey, Code::InvalidArgument, "etcdserver: key is not provided"),
            (CheckError::KeyNotFound, Code::InvalidArgument, "etcdserver: key not found"),
            (CheckError::ValueProvided, Code::InvalidArgument, "etcdserver: value is provided"),
            (CheckError::LeaseProvided, Code::InvalidArgument, "etcdserver: lease is provided"),
            (CheckError::DuplicateKey, Code::InvalidArgument, "etcdserver: duplicate key given in txn request"),
            (CheckError::TooManyOps, Code::InvalidArgument, "etcdserver: too many operations in txn request"),
            (CheckError::InvalidSortOption, Code::InvalidArgument, "etcdserver: invalid sort option"),
            (CheckError::RequestTooLarge, Code::InvalidArgument, "etcdserver: request is too large"),
            (CheckError::LeaseTtlTooLarge, Code::OutOfRange, "etcdserver: too large lease TTL"),
            (CheckError::StreamSortOrder, Code::Unimplemented, "RangeStream does not support custom sort orders"),
            (CheckError::StreamRevisionFilter, Code::Unimplemented, "RangeStream does not support revision filters"),
        ];
        let checked = checked.into_iter().map(|(error, code, text)| (Status::from(error), code, text));
        for (status, code, text) in failed.chain(checked) {
            assert_eq!((status.code(), status.message()), (code, text));
        }
    }

    #[test]
    fn tonics_texts_become_etcds() {
        let large = "Error, decoded message length too large: found 2097172 bytes, the limit is: 2097152 bytes";
        let large = in_etcds_words(Status::out_of_range(large));
        let expected = "grpc: received message larger than max (2097172 vs. 2097152)";
        assert_eq!((large.code(), large.message()), (Code::ResourceExhausted, expected));
        let zstd = in_etcds_words(Status::unimplemented("Content is compressed with `zstd` which isn't supported"));
        let expected = "grpc: Decompressor is not installed for grpc-encoding \"zstd\"";
        assert_eq!((zstd.code(), zstd.message()), (Code::Unimplemented, expected));
        let ours: Status = CellError::from(Refusal::FutureRevision).into();
        assert_eq!(in_etcds_words(ours.clone()).message(), ours.message());
    }
}
