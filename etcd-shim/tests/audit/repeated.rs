//! A call whose answer was lost is made again: it changes nothing more, and answers what there is.

use std::collections::BTreeSet;

use prost::Message;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tenure_admin_api::v1::{self as api, State};
use tonic::Code;

use crate::client::{Identity, connect, put};
use crate::office::{Office, SERVICE, methods, signing_request};

/// What a repeated call answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// What the first did.
    Same,
    /// The same, and that it was not this call.
    NotThisCall,
    /// Another certificate: the one method that is not idempotent.
    Another,
}

struct Case {
    method: &'static str,
    message: Vec<u8>,
    again: Again,
}

fn case(method: &'static str, message: &impl Message, again: Again) -> Case {
    Case { method, message: message.encode_to_vec(), again }
}

fn cases(ca_pem: String, now_ms: i64) -> Vec<Case> {
    let acme = || "acme".to_string();
    let limits = Some(api::Limits { leases: Some(5), watchers: Some(0), ..Default::default() });
    let labels = || [("team".to_string(), "a".to_string())].into();
    let update = api::UpdateTenantRequest {
        name: acme(),
        limits,
        reset_limits: vec!["connections".to_string()],
        labels: [("env".to_string(), "prod".to_string())].into(),
        remove_labels: vec!["team".to_string()],
    };
    let state = |state: State| api::SetTenantStateRequest { name: acme(), state: state.into() };
    let issue = api::IssueCredentialsRequest { tenant: acme(), csr_der: signing_request(), ..Default::default() };
    let revoke = api::RevokeCredentialsRequest { tenant: acme(), ..Default::default() };
    let serial = api::RevokeCredentialsRequest { serial: "4A:0B".to_string(), ..revoke.clone() };
    let all = api::RevokeCredentialsRequest { all: true, before_ms: now_ms, ..revoke };
    let trust = |ca_pem: &str| api::SetTrustedCaRequest { tenant: acme(), ca_pem: ca_pem.to_string() };
    let cell = api::UpdateCellRequest { default_limits: limits, reset_limits: vec!["streams".to_string()] };
    let create = api::CreateTenantRequest { name: acme(), limits, labels: labels() };
    vec![
        case("CreateTenant", &create, Again::NotThisCall),
        case("GetTenant", &api::GetTenantRequest { name: acme() }, Again::Same),
        case("ListTenants", &api::ListTenantsRequest::default(), Again::Same),
        case("UpdateTenant", &update, Again::Same),
        case("SetTenantState", &state(State::Suspended), Again::Same),
        case("SetTenantState", &state(State::ReadOnly), Again::Same),
        case("SetTenantState", &state(State::Active), Again::Same),
        case("GetUsage", &api::GetUsageRequest { name: acme() }, Again::Same),
        case("Top", &api::TopRequest::default(), Again::Same),
        case("IssueCredentials", &issue, Again::Another),
        case("RevokeCredentials", &serial, Again::Same),
        case("RevokeCredentials", &all, Again::Same),
        case("SetTrustedCa", &trust(&ca_pem), Again::Same),
        case("SetTrustedCa", &trust(""), Again::Same),
        case("UpdateCell", &cell, Again::Same),
        case("GetCell", &api::GetCellRequest {}, Again::Same),
        case("DeleteTenant", &api::DeleteTenantRequest { name: acme(), id: None }, Again::NotThisCall),
    ]
}

fn text<A: Message + Default + std::fmt::Debug>(answer: &[u8], without: impl Fn(&mut A)) -> String {
    let mut answer = A::decode(answer).unwrap();
    without(&mut answer);
    format!("{answer:?}")
}

/// An answer without what only tells the time, and whether it was this call that did it.
fn read(method: &str, answer: &[u8]) -> (String, Option<bool>) {
    let plain = |text: String| (text, None);
    match method {
        "CreateTenant" => {
            let created = api::CreateTenantResponse::decode(answer).unwrap().created;
            (text::<api::CreateTenantResponse>(answer, |of| of.created = false), Some(created))
        }
        "DeleteTenant" => (String::new(), Some(api::DeleteTenantResponse::decode(answer).unwrap().deleted)),
        "GetTenant" => plain(text::<api::GetTenantResponse>(answer, |_| ())),
        "ListTenants" => plain(text::<api::ListTenantsResponse>(answer, |_| ())),
        "UpdateTenant" => plain(text::<api::UpdateTenantResponse>(answer, |_| ())),
        "SetTenantState" => plain(text::<api::SetTenantStateResponse>(answer, |_| ())),
        "GetUsage" => plain(text::<api::GetUsageResponse>(answer, |_| ())),
        "RevokeCredentials" => plain(text::<api::RevokeCredentialsResponse>(answer, |_| ())),
        "SetTrustedCa" => plain(text::<api::SetTrustedCaResponse>(answer, |_| ())),
        "IssueCredentials" => plain(text::<api::IssueCredentialsResponse>(answer, |_| ())),
        "Top" => plain(text::<api::TopResponse>(answer, |of| of.now_ms = 0)),
        "UpdateCell" | "GetCell" => plain(text::<api::GetCellResponse>(answer, |of| {
            (of.now_ms, of.disk_free_bytes) = (0, 0);
        })),
        method => panic!("{method}: how is its answer read?"),
    }
}

impl Office {
    /// Everything that there is.
    async fn everything(&self) -> [String; 2] {
        let all: api::ListTenantsResponse =
            self.call("ListTenants", &api::ListTenantsRequest::default()).await.unwrap();
        let cell = self.call_with(&format!("{SERVICE}GetCell"), b"").await.unwrap();
        [format!("{all:?}"), read("GetCell", &cell).0]
    }

    async fn now_ms(&self) -> i64 {
        self.call::<api::GetCellResponse>("GetCell", &api::GetCellRequest {}).await.unwrap().now_ms
    }

    async fn credentials(&self, tenant: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let csr_der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let request = api::IssueCredentialsRequest { tenant: tenant.to_string(), csr_der, ..Default::default() };
        let pem = self.call::<api::IssueCredentialsResponse>("IssueCredentials", &request).await.unwrap();
        let pem = pem.certificate_pem;
        Identity { certificate: CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().into_owned(), pem, key }
    }

    async fn gets_in(&self, identity: &Identity) -> bool {
        match connect(self.tenure.addresses()[0], &self.authority, Some(identity), b"h2").await {
            Ok(stream) => put(stream, "k").await.is_ok(),
            Err(_) => false,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_may_be_repeated() {
    let office = Office::open().await;
    let cases = cases(office.authority.certificate.pem(), office.now_ms().await);
    let covered: BTreeSet<String> = cases.iter().map(|case| case.method.to_string()).collect();
    assert_eq!(covered, methods());
    for Case { method, message, again } in cases {
        let path = format!("{SERVICE}{method}");
        let (first, was_this) = read(method, &office.call_with(&path, &message).await.unwrap());
        let after_first = office.everything().await;
        let (second, was_this_again) = read(method, &office.call_with(&path, &message).await.unwrap());
        assert_eq!(office.everything().await, after_first, "{method}");
        match again {
            Again::Same => assert_eq!((&second, was_this_again), (&first, was_this), "{method}"),
            Again::NotThisCall => {
                assert_eq!((&second, was_this, was_this_again), (&first, Some(true), Some(false)), "{method}");
            }
            Again::Another => assert_ne!(second, first, "{method}"),
        }
    }
    office.close().await;
}

// All certificates are revoked, new ones are given out, and then somebody repeats the first call because its answer was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_revocation_spares_who_came_after_it() {
    let office = Office::open().await;
    let create = api::CreateTenantRequest { name: "acme".to_string(), ..Default::default() };
    office.call::<api::CreateTenantResponse>("CreateTenant", &create).await.unwrap();
    let revoke = async |before_ms| {
        let request =
            api::RevokeCredentialsRequest { tenant: "acme".to_string(), all: true, before_ms, ..Default::default() };
        let answer = office.call::<api::RevokeCredentialsResponse>("RevokeCredentials", &request).await?;
        Ok::<_, tonic::Status>(answer.tenant.unwrap().credentials_valid_from_ms)
    };
    let before = office.credentials("acme").await;
    assert!(office.gets_in(&before).await);
    let moment_ms = office.now_ms().await;
    let valid_from_ms = revoke(moment_ms).await.unwrap();
    assert!(valid_from_ms > moment_ms && !office.gets_in(&before).await);

    let after = office.credentials("acme").await;
    assert_eq!(revoke(moment_ms).await.unwrap(), valid_from_ms);
    assert_eq!(revoke(1).await.unwrap(), valid_from_ms, "an earlier moment gives nothing back");
    assert!(office.gets_in(&after).await && !office.gets_in(&before).await);

    // Nobody is refused in advance.
    let hour_ms = 3_600_000;
    let asked_ms = office.now_ms().await;
    let valid_from_ms = revoke(asked_ms + hour_ms).await.unwrap();
    assert!(valid_from_ms < asked_ms + hour_ms, "{valid_from_ms}");
    assert!(!office.gets_in(&after).await);
    let last = office.credentials("acme").await;
    assert!(office.gets_in(&last).await);

    assert_eq!(revoke(-1).await.unwrap_err().code(), Code::InvalidArgument);
    let one = api::RevokeCredentialsRequest {
        tenant: "acme".to_string(),
        serial: "4a".to_string(),
        before_ms: moment_ms,
        ..Default::default()
    };
    let refused = office.call::<api::RevokeCredentialsResponse>("RevokeCredentials", &one).await.unwrap_err();
    assert!(refused.message().starts_with("before_ms: "), "{refused}");
    assert!(office.gets_in(&last).await);
    office.close().await;
}
