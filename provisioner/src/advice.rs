//! What to do next when a member says no, or nothing.
//!
//! Most texts of the admin API say what is wanted instead; those get none of this. The others are short and for programs, etcd's words
//! among them: here stands what an operator does about each.

use std::io::ErrorKind;

use tonic::{Code, Status};

const AGAIN: &str = "it may be done or not: give the command again, which does no harm";
const ADMINISTRATORS: &str = "it wants an administrator's certificate (URI tenure://admin) for --cert and --key, or its socket file \
                              on its own machine";

/// What is at the other end, if it is a member at all, hung up. How that shows is a race of its last words and our first.
const HUNG_UP: &str = "the connection broke: is it a member's admin API, and --cert an administrator's certificate (URI \
                       tenure://admin)? The member's log says whom it refused";

/// An answer that is an error, in one line, with what to do next.
pub fn told(status: &Status) -> String {
    let (code, text) = (status.code(), status.message());
    let text = if text.is_empty() { String::new() } else { format!("{text} ") };
    match next(status) {
        Some(next) => format!("{text}({code:?}): {next}"),
        None => format!("{text}({code:?})"),
    }
}

/// `None`: the text says it itself.
pub fn next(status: &Status) -> Option<&'static str> {
    of_text(status.message()).or_else(|| of_code(status.code()))
}

/// How a revocation of all certificates is repeated that had this moment, if it may have been done: as it was first given it would
/// refuse those too that were issued since.
pub fn revoke_again(status: &Status, before: &str) -> Option<String> {
    may_be_done(status).then(|| format!("with --before {before}, which spares certificates that were issued since"))
}

/// Whether it is not known that nothing was done.
fn may_be_done(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

fn of_text(text: &str) -> Option<&'static str> {
    let starts = [
        (
            "etcdserver: no leader",
            "start those members of the cell that are down, see that all reach each other, and try again",
        ),
        ("etcdserver: leader changed", AGAIN),
        ("etcdserver: request timed out", AGAIN),
        ("context deadline exceeded", AGAIN),
        ("Timeout expired", AGAIN),
        ("operation was canceled", HUNG_UP),
        ("transport error", HUNG_UP),
        (
            "etcdserver: server stopped",
            "the member is stopping: another one of the cell, with --endpoint, or the same when it is back",
        ),
        (
            "etcdserver: too many tenants",
            "the cell is full: tenurectl cell list shows which has room, tenant delete makes some, cell add adds a cell",
        ),
        ("etcdserver: too many requests", "the member is busy: again in a moment; tenurectl top shows who keeps it so"),
        (
            "etcdserver: mvcc: database space exceeded",
            "the member's disk is full: make room on it, or ask another one with --endpoint",
        ),
        ("etcdserver: request is too large", "say less at once: fewer or shorter labels"),
        ("a tenant has at most", "take some away: tenurectl tenant labels NAME LABEL-"),
        (
            "too many certificates of this tenant are revoked one by one",
            "tenurectl tenant revoke NAME --all, then tenant credentials",
        ),
        ("there is no tenant", "tenurectl tenant list shows those there are"),
    ];
    // The issuer's, who could not sign.
    let signs = ["read ", "use the CA ", "sign a certificate"];
    let issuer = "the member's --issuer-cert-file and --issuer-key-file must be the cell's CA: its log says more";
    let starts = starts.into_iter().chain(signs.map(|text| (text, issuer)));
    starts.into_iter().find_map(|(start, next)| text.starts_with(start).then_some(next))
}

fn of_code(code: Code) -> Option<&'static str> {
    match code {
        // The text says what is wanted.
        Code::Ok | Code::InvalidArgument | Code::FailedPrecondition => None,
        Code::NotFound => Some("somebody may have deleted it meanwhile: tenurectl tenant list shows those there are"),
        Code::AlreadyExists => Some("take another name, or the one there is: tenurectl tenant get NAME"),
        Code::PermissionDenied | Code::Unauthenticated => Some(ADMINISTRATORS),
        Code::ResourceExhausted => Some("again in a moment; tenurectl top shows who uses it up"),
        Code::Unavailable => Some(
            "try again, or another member with --endpoint; whom it refused for want of an administrator's certificate, its log says",
        ),
        Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => Some(AGAIN),
        Code::OutOfRange => Some("say less at once"),
        Code::Unimplemented => Some("the member runs another release than this tenurectl: take the same"),
        Code::Unknown => Some(HUNG_UP),
        Code::Internal => Some("a fault of the member's: its log says more"),
        Code::DataLoss => Some("the member's data is damaged: its log says what, docs/operations.md what to do"),
    }
}

/// Of a member that was not reached.
pub fn of_connecting(kind: Option<ErrorKind>) -> &'static str {
    match kind {
        Some(ErrorKind::NotFound) => {
            "there is no such file or host: the socket file is admin.sock in the --data-dir of a tenured that runs; \
             --endpoint unix:PATH or https://HOST:2382 says where"
        }
        Some(ErrorKind::ConnectionRefused) => "nothing listens there: is tenured running, with --listen-admin-urls?",
        Some(ErrorKind::PermissionDenied) => {
            "the socket file is for the user that tenured runs as: be that user, or take --endpoint https://HOST:2382 with an \
             administrator's certificate"
        }
        Some(
            ErrorKind::BrokenPipe
            | ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::NotConnected
            | ErrorKind::UnexpectedEof,
        ) => HUNG_UP,
        Some(ErrorKind::InvalidData) => {
            "TLS: --cacert must be the CA that signed the member's certificate, which must name this host, and --cert an \
             administrator's of the cell"
        }
        _ => "is the host right, and can it be reached from here? --endpoint takes another member",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Every error that the admin API answers: codes and texts are the member's, see etcd-shim/src/{status,admin,issuer}.rs.
    #[test]
    fn whatever_a_member_says_there_is_a_next_step() {
        for (code, text, wanted) in [
            // Those that say it themselves.
            (
                Code::InvalidArgument,
                "name: invalid tenant name \"A\": want 1 to 63 of a-z, 0-9 and inner hyphens",
                "want 1 to 63",
            ),
            (Code::InvalidArgument, "reset_limits: \"x\": want one of stored_bytes", "want one of"),
            (Code::InvalidArgument, "state: want ACTIVE, READ_ONLY or SUSPENDED", "want ACTIVE"),
            (Code::InvalidArgument, "csr_der: want a PKCS #10 certificate signing request in DER", "want a PKCS"),
            (
                Code::FailedPrecondition,
                "tenant \"default\" belongs to the cell: suspend it instead",
                "suspend it instead",
            ),
            (
                Code::FailedPrecondition,
                "this member has no CA to sign with: start it with --issuer-cert-file",
                "start it with",
            ),
            // Those that do not.
            (Code::InvalidArgument, "a tenant has at most 64 labels", "tenant labels NAME LABEL-"),
            (Code::InvalidArgument, "etcdserver: request is too large", "fewer or shorter labels"),
            (Code::NotFound, "there is no tenant \"a\": see the list of tenants", "tenurectl tenant list"),
            (Code::NotFound, "etcdserver: tenant not found", "tenurectl tenant list"),
            (Code::AlreadyExists, "", "tenurectl tenant get"),
            (Code::PermissionDenied, "", "tenure://admin"),
            (Code::Unauthenticated, "", "tenure://admin"),
            (Code::ResourceExhausted, "etcdserver: too many tenants", "tenurectl cell list"),
            (Code::ResourceExhausted, "etcdserver: too many requests", "tenurectl top"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", "make room"),
            (
                Code::ResourceExhausted,
                "too many certificates of this tenant are revoked one by one: revoke all, and issue new ones",
                "tenant revoke NAME --all",
            ),
            (Code::FailedPrecondition, "read /x/ca.key: No such file or directory (os error 2)", "--issuer-key-file"),
            (Code::FailedPrecondition, "use the CA /x/ca.crt: nonsense", "--issuer-cert-file"),
            (Code::FailedPrecondition, "sign a certificate: nonsense", "--issuer-cert-file"),
            (Code::Unavailable, "etcdserver: no leader", "start those members"),
            (Code::Unavailable, "etcdserver: leader changed", "give the command again"),
            (Code::Unavailable, "etcdserver: request timed out", "give the command again"),
            (Code::Unavailable, "etcdserver: server stopped", "--endpoint"),
            (Code::Unavailable, "tcp connect error", "--endpoint"),
            (Code::DeadlineExceeded, "context deadline exceeded", "give the command again"),
            (Code::Cancelled, "Timeout expired", "give the command again"),
            (Code::Aborted, "", "give the command again"),
            (Code::OutOfRange, "Error, decoded message length too large", "say less"),
            (Code::Unimplemented, "", "release"),
            (Code::Internal, "signing failed", "its log"),
            (Code::Unknown, "transport error", "whom it refused"),
            (Code::Cancelled, "operation was canceled", "whom it refused"),
            (Code::DataLoss, "etcdserver: corrupt cluster", "docs/operations.md"),
        ] {
            let said = told(&Status::new(code, text));
            assert!(said.starts_with(text) && said.contains(wanted), "{code:?} {text:?}: {said}");
            assert!(said.contains(&format!("({code:?})")) && !said.contains('\n') && !said.starts_with(' '), "{said}");
        }
    }

    #[test]
    fn a_revocation_is_repeated_only_if_it_may_have_been_done() {
        for (code, may_be) in [
            (Code::Unavailable, true),
            (Code::DeadlineExceeded, true),
            (Code::Cancelled, true),
            (Code::Unknown, true),
            (Code::NotFound, false),
            (Code::InvalidArgument, false),
            (Code::ResourceExhausted, false),
        ] {
            let said = revoke_again(&Status::new(code, ""), "2026-01-31T12:00:00Z");
            assert_eq!(
                said.is_some_and(|said| said.starts_with("with --before 2026-01-31T12:00:00Z")),
                may_be,
                "{code:?}"
            );
        }
    }

    #[test]
    fn whoever_is_not_reached_there_is_a_next_step() {
        for (kind, wanted) in [
            (Some(ErrorKind::NotFound), "--data-dir"),
            (Some(ErrorKind::ConnectionRefused), "is tenured running"),
            (Some(ErrorKind::PermissionDenied), "be that user"),
            (Some(ErrorKind::InvalidData), "--cacert"),
            (Some(ErrorKind::ConnectionReset), "whom it refused"),
            (Some(ErrorKind::TimedOut), "--endpoint"),
            (None, "--endpoint"),
        ] {
            assert!(of_connecting(kind).contains(wanted), "{kind:?}");
        }
    }
}
