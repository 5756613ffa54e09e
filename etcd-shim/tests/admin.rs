//! The admin API as an operator meets it: tenants come, change and go, and whoever has to leave is sent away.

#![allow(clippy::unwrap_used)]

mod client;
mod scene;

use prost::Message as _;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tenure_admin_api::v1::{self as api, State};
use tenure_etcd_shim::proto::etcdserverpb::RangeRequest;
use tenure_etcd_shim::wire::RangeResponse;
use tonic::Code;

use client::{Authority, connect, put};
use scene::{Scene, closed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_come_change_and_go() {
    let mut scene = Scene::new().await;
    let request = api::CreateTenantRequest {
        name: "acme".to_string(),
        limits: Some(api::Limits { leases: Some(5), ..Default::default() }),
        labels: [("team".to_string(), "a".to_string())].into(),
    };
    let made = scene.admin.create_tenant(request.clone()).await.unwrap().into_inner();
    let tenant = made.tenant.unwrap();
    assert!(made.created && tenant.created_at_ms > 0 && tenant.state() == State::Active);
    // A repeated call answers what there is, and changes nothing.
    let again = api::CreateTenantRequest { limits: None, labels: Default::default(), ..request };
    let again = scene.admin.create_tenant(again).await.unwrap().into_inner();
    assert!(!again.created && again.tenant.unwrap() == tenant);

    let update = api::UpdateTenantRequest {
        name: "acme".to_string(),
        limits: Some(api::Limits { stored_bytes: Some(1 << 20), ..Default::default() }),
        reset_limits: vec!["leases".to_string()],
        labels: [("env".to_string(), "prod".to_string())].into(),
        remove_labels: vec!["team".to_string()],
    };
    for _ in 0..2 {
        let changed = scene.admin.update_tenant(update.clone()).await.unwrap().into_inner().tenant.unwrap();
        let limits = changed.limits.unwrap();
        assert_eq!((limits.stored_bytes, limits.leases), (Some(1 << 20), None));
        assert_eq!(changed.labels.into_iter().collect::<Vec<_>>(), [("env".to_string(), "prod".to_string())]);
        assert_eq!(changed.effective_limits.unwrap().stored_bytes, Some(1 << 20));
    }

    scene.create("globex").await;
    let list = |page_size, page_token: &str| api::ListTenantsRequest {
        page_size,
        page_token: page_token.to_string(),
        ..Default::default()
    };
    let names = |answer: &api::ListTenantsResponse| {
        answer.tenants.iter().map(|tenant| tenant.name.clone()).collect::<Vec<_>>().join(" ")
    };
    let page = scene.admin.list_tenants(list(2, "")).await.unwrap().into_inner();
    assert_eq!((names(&page), page.next_page_token.as_str()), ("acme default".to_string(), "default"));
    let page = scene.admin.list_tenants(list(2, &page.next_page_token)).await.unwrap().into_inner();
    assert_eq!((names(&page), page.next_page_token.as_str()), ("globex".to_string(), ""));

    let client = scene.tenure.client("acme").unwrap();
    for key in ["/registry/pods/a", "/registry/pods/b", "compact_rev_key"] {
        client.put(key, "1234").await.unwrap();
    }
    let usage = api::GetUsageRequest { name: "acme".to_string() };
    let usage = scene.admin.get_usage(usage).await.unwrap().into_inner();
    let rows: Vec<_> = usage.prefixes.iter().map(|row| (row.prefix.as_str(), row.keys, row.bytes)).collect();
    assert_eq!(rows, [("", 1, 19), ("/registry/pods/", 2, 40)]);
    assert_eq!(usage.usage.unwrap().keys, 3);

    // Gone at once, and the name makes another tenant.
    let delete = api::DeleteTenantRequest { name: "acme".to_string(), id: None };
    assert!(scene.admin.delete_tenant(delete.clone()).await.unwrap().into_inner().deleted);
    assert!(!scene.admin.delete_tenant(delete).await.unwrap().into_inner().deleted);
    assert!(client.get("compact_rev_key").await.is_err(), "who still holds it reads nothing");
    assert!(client.put("k", "v").await.is_err());
    let other = scene.create("acme").await;
    assert!(other.id > tenant.id && other.cluster_id != tenant.cluster_id);
    assert_eq!(other.usage.unwrap().keys, 0);
    let only_old = api::DeleteTenantRequest { name: "acme".to_string(), id: Some(tenant.id) };
    assert!(!scene.admin.delete_tenant(only_old).await.unwrap().into_inner().deleted, "another tenant's id");
    // Space is given back in the background; then nothing is left to say of it.
    let mut changes = scene.tenure.cell().tenants_changed();
    while !scene.tenure.cell().deleted_tenants().is_empty() {
        changes.changed().await.unwrap();
    }
    scene.tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_named() {
    let mut scene = Scene::new().await;
    let create = |name: &str| api::CreateTenantRequest { name: name.to_string(), ..Default::default() };
    let error = scene.admin.create_tenant(create("Acme")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("name: invalid tenant name"), "{error}");
    let labels = [(String::new(), String::new())].into();
    let error = scene.admin.create_tenant(api::CreateTenantRequest { labels, ..create("a") }).await.unwrap_err();
    assert!(error.message().starts_with("labels: "), "{error}");

    let missing = api::GetTenantRequest { name: "nobody".to_string() };
    let error = scene.admin.get_tenant(missing).await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::NotFound, "there is no tenant \"nobody\": see the list of tenants")
    );
    let update = api::UpdateTenantRequest { reset_limits: vec!["speed".to_string()], ..Default::default() };
    let error = scene.admin.update_tenant(update).await.unwrap_err();
    assert!(error.message().starts_with("reset_limits: \"speed\": want one of stored_bytes"), "{error}");
    let state = api::SetTenantStateRequest { name: "default".to_string(), state: State::Deleting.into() };
    assert_eq!(scene.admin.set_tenant_state(state).await.unwrap_err().code(), Code::InvalidArgument);
    let delete = api::DeleteTenantRequest { name: "default".to_string(), id: None };
    assert_eq!(scene.admin.delete_tenant(delete).await.unwrap_err().code(), Code::FailedPrecondition);
    let issue = api::IssueCredentialsRequest { tenant: "default".to_string(), ..Default::default() };
    let error = scene.admin.issue_credentials(issue).await.unwrap_err();
    assert!(error.message().starts_with("csr_der: want a PKCS #10"), "{error}");
    for (serial, all) in [("", false), ("12", true), ("xyz", false)] {
        let (tenant, serial) = ("default".to_string(), serial.to_string());
        let revoke = api::RevokeCredentialsRequest { tenant, serial, all, before_ms: 0 };
        assert_eq!(scene.admin.revoke_credentials(revoke).await.unwrap_err().code(), Code::InvalidArgument);
    }
    scene.tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_stay_is_sent_away() {
    let mut scene = Scene::new().await;
    scene.create("acme").await;
    scene.create("globex").await;
    let (acme, _) = scene.credentials("acme").await;
    let (globex, _) = scene.credentials("globex").await;
    assert!(scene.gets_in(&acme).await && scene.gets_in(&globex).await);
    let neighbour = scene.connect(&globex).await.unwrap();

    let open = scene.admitted(&acme).await;
    scene.set_state("acme", State::Suspended).await;
    closed(open).await;
    assert!(!scene.gets_in(&acme).await);
    scene.set_state("acme", State::Active).await;
    assert!(scene.gets_in(&acme).await);

    // One certificate is revoked, another of the same tenant is not.
    let (second, issued) = scene.credentials("acme").await;
    let (open, stays) = (scene.admitted(&second).await, scene.connect(&acme).await.unwrap());
    let revoke = |serial: &str, all| api::RevokeCredentialsRequest {
        tenant: "acme".to_string(),
        serial: serial.to_string(),
        all,
        before_ms: 0,
    };
    scene.admin.revoke_credentials(revoke(&issued.serial, false)).await.unwrap();
    closed(open).await;
    assert!(!scene.gets_in(&second).await);
    put(stays, "k").await.unwrap();

    // All of them: new ones get in, those before do not.
    let open = scene.admitted(&acme).await;
    scene.admin.revoke_credentials(revoke("", true)).await.unwrap();
    closed(open).await;
    assert!(!scene.gets_in(&acme).await);
    let (third, _) = scene.credentials("acme").await;
    assert!(scene.gets_in(&third).await);

    // Deleted, and the name given to somebody else: certificates of the one before open nothing.
    let open = scene.admitted(&third).await;
    let delete = api::DeleteTenantRequest { name: "acme".to_string(), id: None };
    scene.admin.delete_tenant(delete).await.unwrap();
    closed(open).await;
    scene.create("acme").await;
    assert!(!scene.gets_in(&third).await);
    let (fourth, _) = scene.credentials("acme").await;
    assert!(scene.gets_in(&fourth).await);

    put(neighbour, "k").await.unwrap();
    scene.tenure.stop().await;
}

// A hosting company's customer who brings a CA: it opens this tenant and nothing else, and the cell's CA does not open it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_may_trust_a_ca_of_its_own() {
    let mut scene = Scene::new().await;
    scene.create("acme").await;
    scene.create("globex").await;
    let (of_cell, _) = scene.credentials("acme").await;
    let (globex, _) = scene.credentials("globex").await;
    let authority = Authority::new();
    let own = authority.sign(&["tenure://tenant/acme"]);
    assert!(!scene.gets_in(&own).await && scene.gets_in(&of_cell).await);

    let (open, neighbour) = (scene.admitted(&of_cell).await, scene.connect(&globex).await.unwrap());
    let trust = |ca_pem: String| api::SetTrustedCaRequest { tenant: "acme".to_string(), ca_pem };
    for _ in 0..2 {
        let answer = scene.admin.set_trusted_ca(trust(authority.certificate.pem())).await.unwrap().into_inner();
        let shown = answer.tenant.unwrap().trusted_ca_pem;
        let shown = CertificateDer::from_pem_slice(shown.as_bytes()).unwrap();
        assert_eq!(&shown, authority.certificate.der());
    }
    closed(open).await;
    assert!(scene.gets_in(&own).await);
    for other in [
        of_cell,
        authority.sign(&["tenure://tenant/globex"]),
        authority.sign(&["tenure://tenant/acme", "tenure://tenant/globex"]),
        authority.sign(&["tenure://tenant/acme", "tenure://admin"]),
        authority.sign(&[]),
    ] {
        assert!(!scene.gets_in(&other).await);
    }
    let address = scene.tenure.addresses()[1];
    for uris in [&["tenure://admin"][..], &["tenure://tenant/acme", "tenure://admin"], &["tenure://tenant/acme"]] {
        if let Ok(stream) = connect(address, &scene.authority, Some(&authority.sign(uris)), b"h2").await {
            assert!(client::unary(stream, "/tenure.admin.v1.Admin/ListTenants", &[]).await.is_err(), "{uris:?}");
        }
    }
    put(neighbour, "k").await.unwrap();
    assert!(scene.gets_in(&globex).await);

    // What the cell signed would open nothing; and what is no certificate changes nothing.
    let key = KeyPair::generate().unwrap();
    let csr_der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let request = api::IssueCredentialsRequest { tenant: "acme".to_string(), csr_der, ..Default::default() };
    assert_eq!(scene.admin.issue_credentials(request).await.unwrap_err().code(), Code::FailedPrecondition);
    let not_one = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let leaf = authority.sign(&["tenure://tenant/acme"]).pem;
    for bad in ["certificate".to_string(), not_one.to_string(), leaf, authority.certificate.pem().repeat(100)] {
        assert_eq!(scene.admin.set_trusted_ca(trust(bad)).await.unwrap_err().code(), Code::InvalidArgument);
    }
    assert!(scene.gets_in(&own).await);

    let open = scene.admitted(&own).await;
    scene.admin.set_trusted_ca(trust(String::new())).await.unwrap();
    closed(open).await;
    let (of_cell, _) = scene.credentials("acme").await;
    assert!(!scene.gets_in(&own).await && scene.gets_in(&of_cell).await);
    scene.tenure.stop().await;
}

// What a tenant is sent waits while it is more than it may have in a second, and leaves when it may: here, once the limit is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_answer_leaves_as_fast_as_it_may() {
    let mut scene = Scene::new().await;
    scene.create("acme").await;
    let (acme, _) = scene.credentials("acme").await;
    let client = scene.tenure.client("acme").unwrap();
    for key in ["a", "b"] {
        client.put(key, vec![7_u8; 300 << 10]).await.unwrap();
    }
    let throttled = async |scene: &mut Scene| {
        let top = scene.admin.top(api::TopRequest { limit: 0 }).await.unwrap().into_inner();
        top.rows.iter().find(|row| row.tenant == "acme").unwrap().throttled
    };
    let limit_to = async |scene: &mut Scene, bytes| {
        let limits = api::Limits { response_bytes_per_second: Some(bytes), ..Default::default() };
        let update = api::UpdateTenantRequest { name: "acme".to_string(), limits: Some(limits), ..Default::default() };
        scene.admin.update_tenant(update).await.unwrap();
    };
    let range = RangeRequest { key: "a".into(), range_end: "c".into(), ..RangeRequest::default() }.encode_to_vec();
    let ask = async |stream| {
        let answer = client::unary(stream, "/etcdserverpb.KV/Range", &range).await.unwrap();
        let answer = RangeResponse::decode(answer).unwrap();
        assert_eq!(answer.kvs.iter().filter(|kv| kv.len() > 300 << 10).count(), 2);
    };
    ask(scene.connect(&acme).await.unwrap()).await;
    assert_eq!(throttled(&mut scene).await, 0, "there is no limit");

    // At a byte a second it would leave in a week.
    limit_to(&mut scene, 1).await;
    let stream = scene.connect(&acme).await.unwrap();
    let change = async {
        while throttled(&mut scene).await == 0 {
            tokio::task::yield_now().await;
        }
        limit_to(&mut scene, 0).await;
    };
    tokio::join!(ask(stream), change);
    scene.tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_administrators_administrate() {
    let mut scene = Scene::new().await;
    scene.create("acme").await;
    let (acme, _) = scene.credentials("acme").await;
    let address = scene.tenure.addresses()[1];
    let list = |stream| client::unary(stream, "/tenure.admin.v1.Admin/ListTenants", &[]);
    if let Ok(stream) = connect(address, &scene.authority, Some(&acme), b"h2").await {
        assert!(list(stream).await.is_err(), "a tenant is no administrator");
    }
    if let Ok(stream) = connect(address, &scene.authority, None, b"h2").await {
        assert!(list(stream).await.is_err(), "nor is nobody");
    }
    let admin = scene.authority.sign(&["tenure://admin"]);
    let stream = connect(address, &scene.authority, Some(&admin), b"h2").await.unwrap();
    assert!(list(stream).await.unwrap().windows(4).any(|bytes| bytes == b"acme"));
    // And an administrator is no tenant.
    assert!(!scene.gets_in(&admin).await);
    // Nor does the admin API answer on a port of clients.
    let stream = scene.connect(&acme).await.unwrap();
    assert!(list(stream).await.is_err());
    scene.tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_is_held_to_its_limits() {
    let mut scene = Scene::new().await;
    scene.create("acme").await;
    scene.create("globex").await;
    let (acme, _) = scene.credentials("acme").await;
    let (globex, _) = scene.credentials("globex").await;
    let limits = api::Limits { connections: Some(1), request_bytes: Some(200), ..Default::default() };
    let update = api::UpdateTenantRequest { name: "acme".to_string(), limits: Some(limits), ..Default::default() };
    scene.admin.update_tenant(update).await.unwrap();
    let first = scene.connect(&acme).await.unwrap();
    put(first, "k").await.unwrap();
    // The cell's limits are those of tenants that have none of their own, also of those there will be.
    let limits = api::Limits { request_bytes: Some(1), leases: Some(3), ..Default::default() };
    let update = api::UpdateCellRequest { default_limits: Some(limits), ..Default::default() };
    let cell = scene.admin.update_cell(update).await.unwrap().into_inner().default_limits.unwrap();
    assert_eq!((cell.request_bytes, cell.leases, cell.requests_per_second), (Some(1), Some(3), Some(0)));
    let effective = async |scene: &mut Scene, name: &str| {
        let request = api::GetTenantRequest { name: name.to_string() };
        let tenant = scene.admin.get_tenant(request).await.unwrap().into_inner().tenant.unwrap();
        let limits = tenant.effective_limits.unwrap();
        (limits.request_bytes, limits.leases)
    };
    scene.create("initech").await;
    assert_eq!(effective(&mut scene, "acme").await, (Some(200), Some(3)));
    assert_eq!(effective(&mut scene, "initech").await, (Some(1), Some(3)));
    let reset = |name: &str| api::UpdateCellRequest { reset_limits: vec![name.to_string()], ..Default::default() };
    scene.admin.update_cell(reset("request_bytes")).await.unwrap();
    assert_eq!(scene.admin.update_cell(reset("bytes")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(effective(&mut scene, "initech").await, (Some(0), Some(3)));
    let top = scene.admin.top(api::TopRequest { limit: 0 }).await.unwrap().into_inner();
    let row = top.rows.iter().find(|row| row.tenant == "acme").unwrap();
    assert!(row.requests == 1 && row.received_bytes > 0 && row.sent_bytes > 0, "{row:?}");
    assert!(scene.gets_in(&globex).await, "a neighbour's limits are its own");
    scene.tenure.stop().await;
}
