//! What a member answers to an administrator, and what `tenurectl` says to do about it: two crates that share nothing but texts.

#![allow(clippy::unwrap_used)]

use tenure_etcd_shim::cell_error::CellError;
use tenure_etcd_shim::issuer::IssueError;
use tenure_etcd_shim::storage::Refusal;
use tenure_provisioner::advice;
use tonic::Status;

#[test]
fn tenurectl_knows_a_members_words() {
    let refused = |refusal: Refusal| Status::from(CellError::from(refusal));
    let no_file = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let cases: [(Status, &str); 16] = [
        (refused(Refusal::TenantNotFound), "tenurectl tenant list"),
        (refused(Refusal::TooManyLabels), "tenurectl tenant labels"),
        (refused(Refusal::TooManyRevoked), "tenurectl tenant revoke NAME --all"),
        (refused(Refusal::TooManyTenants), "tenurectl cell list"),
        (refused(Refusal::NoSpace), "make room"),
        (CellError::NoLeader.into(), "start those members"),
        (CellError::LeaderChanged.into(), "give the command again"),
        (CellError::TimeoutWrite.into(), "give the command again"),
        (CellError::TimeoutApply.into(), "give the command again"),
        (CellError::TimeoutRead.into(), "give the command again"),
        (CellError::TooManyRequests.into(), "tenurectl top"),
        (CellError::TooLarge.into(), "fewer or shorter labels"),
        (CellError::Stopped.into(), "another one of the cell"),
        (IssueError::File("ca.key".to_string(), no_file()).into(), "--issuer-key-file"),
        (
            IssueError::Authority("ca.crt".to_string(), rcgen::Error::CouldNotParseCertificate).into(),
            "--issuer-cert-file",
        ),
        (IssueError::Sign(rcgen::Error::RemoteKeyError).into(), "--issuer-cert-file"),
    ];
    for (status, wanted) in cases {
        let next = advice::next(&status).unwrap_or_else(|| panic!("{status}: what next?"));
        assert!(next.contains(wanted), "{status}: {next}");
    }
}
