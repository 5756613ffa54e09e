//! The edge of a served store: which protocol a connection speaks, whose it is, and how long it may go on.

#![allow(clippy::unwrap_used)]

mod client;

use std::path::Path;
use std::time::Duration;

use prost::Message as _;
use rustls::{CipherSuite, ProtocolVersion};
use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::builder::Builder;
use tenure_etcd_shim::flags::TlsFiles;
use tenure_etcd_shim::listen::ConnectionLimits;
use tenure_etcd_shim::proto::etcdserverpb::RangeRequest;
use tenure_etcd_shim::tls::{MemberTls, PeerTlsFiles};
use tenure_etcd_shim::tls_protocol::TlsProtocol;
use tenure_raft_server::transport::peers::PeerTls as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use client::{Authority, Identity, connect, put, unary, write};

/// A served store with one TLS listener and a tenant `acme`.
async fn serve_tls(dir: &Path, server: &Authority, clients: Option<&Authority>) -> Tenure {
    tls_builder(dir, server, clients).tenant("acme").listen("https://127.0.0.1:0").start().await.unwrap()
}

fn tls_builder(dir: &Path, server: &Authority, clients: Option<&Authority>) -> Builder {
    let identity = server.sign(&[]);
    let files = TlsFiles::Files {
        cert_file: write(dir, "server.crt", &identity.pem),
        key_file: write(dir, "server.key", &identity.key.serialize_pem()),
        trusted_ca_file: clients.map(|ca| write(dir, "ca.crt", &ca.certificate.pem())),
    };
    Tenure::builder().data_dir(dir.join("data")).tls(files)
}

/// Hardened manifests narrow what TLS may be spoken: a client that could do more must not get more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_spoken_than_the_flags_say() {
    let authority = Authority::new();
    for (suites, min, max, spoken) in [
        (None, "", "", (ProtocolVersion::TLSv1_3, CipherSuite::TLS13_AES_256_GCM_SHA384)),
        (
            Some(&["TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"][..]),
            "",
            "TLS1.2",
            (ProtocolVersion::TLSv1_2, CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (protocol, _) = TlsProtocol::new(suites, min, max).unwrap();
        let builder = tls_builder(dir.path(), &authority, None).tls_protocol(protocol);
        let tenure = builder.listen("https://127.0.0.1:0").start().await.unwrap();
        let stream = connect(tenure.addresses()[0], &authority, None, b"h2").await.unwrap();
        let (_, connection) = stream.get_ref();
        let suite = connection.negotiated_cipher_suite().map(|suite| suite.suite());
        assert_eq!(connection.protocol_version().zip(suite), Some(spoken));
        put(stream, "k").await.unwrap();
    }
}

async fn http1<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, path: &str) -> std::io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What a TLS server of these files says to somebody who connects with a certificate: whether it lets them in.
async fn members_let_in(files: PeerTlsFiles, authority: &Authority, identity: Option<&Identity>) -> bool {
    let tls = MemberTls::new(files, TlsProtocol::default(), &[]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = async {
        let (stream, _) = listener.accept().await.unwrap();
        TlsAcceptor::from(tls.server()).accept(stream).await.is_ok()
    };
    // In TLS 1.3 the client is done before the server has looked at its certificate.
    let (accepted, _connected) = tokio::join!(accepted, connect(address, authority, identity, b"h2"));
    accepted
}

async fn revision(tenure: &Tenure, tenant: &str) -> i64 {
    tenure.cell().tenant(tenant).unwrap().reader().state().revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tls_port_speaks_what_was_negotiated() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let tenure = serve_tls(dir.path(), &authority, None).await;
    let address = tenure.addresses()[0];

    put(connect(address, &authority, None, b"h2").await.unwrap(), "k").await.unwrap();
    assert_eq!(revision(&tenure, "default").await, 2);
    let version = http1(connect(address, &authority, None, b"http/1.1").await.unwrap(), "/version").await.unwrap();
    assert!(version.contains("\"etcdserver\":\"3."), "{version}");

    // A client that trusts somebody else, and one that speaks no TLS at all, get nowhere and disturb nobody.
    assert!(connect(address, &Authority::new(), None, b"h2").await.is_err());
    let cleartext = http1(TcpStream::connect(address).await.unwrap(), "/version").await.unwrap_or_default();
    assert!(!cleartext.contains("etcdserver"), "{cleartext}");
    put(connect(address, &authority, None, b"h2").await.unwrap(), "k").await.unwrap();
    tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_certificate_says_whose_a_connection_is() {
    let dir = tempfile::tempdir().unwrap();
    let (server, clients) = (Authority::new(), Authority::new());
    let tenure = serve_tls(dir.path(), &server, Some(&clients)).await;
    let address = tenure.addresses()[0];

    let acme = clients.sign(&["tenure://tenant/acme"]);
    put(connect(address, &server, Some(&acme), b"h2").await.unwrap(), "k").await.unwrap();
    assert_eq!((revision(&tenure, "acme").await, revision(&tenure, "default").await), (2, 1));
    let read = RangeRequest { key: "k".into(), ..RangeRequest::default() }.encode_to_vec();
    let default = clients.sign(&["tenure://tenant/default"]);
    let default = connect(address, &server, Some(&default), b"h2").await.unwrap();
    let answer = unary(default, "/etcdserverpb.KV/Range", &read).await.unwrap();
    assert!(!answer.windows(2).any(|bytes| bytes == b"\x0a\x01"), "acme's key is not default's");

    // No tenant in it, two of them, one that does not exist, a stranger's signature, no certificate.
    let refused = [
        Some(clients.sign(&[])),
        Some(clients.sign(&["https://tenant/acme"])),
        Some(clients.sign(&["tenure://tenant/acme", "tenure://tenant/default"])),
        Some(Authority::new().sign(&["tenure://tenant/acme"])),
        None,
    ];
    for identity in &refused {
        // With TLS 1.3 the client is through before the server has looked at its certificate: the first call tells.
        if let Ok(stream) = connect(address, &server, identity.as_ref(), b"h2").await {
            assert!(put(stream, "x").await.is_err());
        }
    }
    assert_eq!((revision(&tenure, "acme").await, revision(&tenure, "default").await), (2, 1));
    tenure.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_cleartext_port_speaks_both_protocols() {
    let dir = tempfile::tempdir().unwrap();
    let builder = Tenure::builder().data_dir(dir.path()).listen("http://127.0.0.1:0");
    let tenure = builder.metrics_listen("http://127.0.0.1:0").start().await.unwrap();
    let [clients, metrics] = *tenure.addresses() else { panic!("two listeners") };
    let stream = async |address| TcpStream::connect(address).await.unwrap();
    put(stream(clients).await, "k").await.unwrap();
    assert!(http1(stream(clients).await, "/version").await.unwrap().contains("etcdserver"));

    let scraped = http1(stream(metrics).await, "/metrics").await.unwrap();
    let put_calls = "{grpc_code=\"OK\",grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 1";
    assert!(scraped.contains(&format!("grpc_server_handled_total{put_calls}")), "{scraped}");
    assert!(scraped.contains("etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.001\"}"));
    assert!(put(stream(metrics).await, "k").await.is_err(), "no clients here");
    tenure.stop().await;
}

const PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
const PING: &[u8] = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00pingping";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_pings_too_often_is_sent_away() {
    let dir = tempfile::tempdir().unwrap();
    let patient = ConnectionLimits { ping_interval_min: Duration::ZERO, ..ConnectionLimits::default() };
    let tenure = Tenure::builder()
        .data_dir(dir.path())
        .listen("http://127.0.0.1:0")
        .connection_limits(patient)
        .start()
        .await
        .unwrap();
    let mut stream = TcpStream::connect(tenure.addresses()[0]).await.unwrap();
    stream.write_all(PREFACE_AND_SETTINGS).await.unwrap();
    // No request is open, so not even the patient interval counts. The first is free, then there are two strikes.
    for _ in 0..4 {
        stream.write_all(PING).await.unwrap();
    }
    let mut answer = Vec::new();
    // The end may come as a reset, because not everything that was sent has been read.
    let _ = stream.read_to_end(&mut answer).await;
    let goaway = b"\x00\x00\x00\x0btoo_many_pings";
    assert!(answer.windows(goaway.len()).any(|bytes| bytes == goaway), "{}", answer.escape_ascii());
    put(TcpStream::connect(tenure.addresses()[0]).await.unwrap(), "k").await.unwrap();
    tenure.stop().await;
}

// One CA signs for members and clients in a cell as `tenurectl cell init` makes it: a tenant that could speak to members' ports as one of
// them would have every tenant's data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_take_nobody_whom_they_serve() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let own = authority.sign(&[]);
    let files = PeerTlsFiles::Files {
        cert_file: write(dir.path(), "peer.crt", &own.pem),
        key_file: write(dir.path(), "peer.key", &own.key.serialize_pem()),
        trusted_ca_file: Some(write(dir.path(), "ca.crt", &authority.certificate.pem())),
        client: None,
    };
    assert!(members_let_in(files.clone(), &authority, Some(&own)).await);
    assert!(members_let_in(files.clone(), &authority, Some(&authority.sign(&["spiffe://example/m2"]))).await);
    for uris in [
        &["tenure://tenant/acme"][..],
        &["tenure://admin"],
        &["spiffe://example/m2", "tenure://tenant/acme"],
        &["tenure://something/else"],
    ] {
        assert!(!members_let_in(files.clone(), &authority, Some(&authority.sign(uris))).await, "{uris:?}");
    }
    assert!(!members_let_in(files.clone(), &authority, Some(&Authority::new().sign(&[]))).await);
    assert!(!members_let_in(files, &authority, None).await);
}

// Silent clients, more than handshakes may be under way: whoever comes with a certificate gets in all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_clients_keep_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let tenure = serve_tls(dir.path(), &authority, None).await;
    let address = tenure.addresses()[0];
    let mut silent = Vec::new();
    for _ in 0..600 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    put(connect(address, &authority, None, b"h2").await.unwrap(), "k").await.unwrap();
    // The first of them was closed, though it did nothing wrong but wait.
    assert_eq!(silent[0].read(&mut [0; 1]).await.unwrap(), 0);
    tenure.stop().await;
}

// A certificate outlives its tenant. Whoever has it may not take the place of those whose tenants there are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_tenant_takes_no_other_ones_place() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let tenure = serve_tls(dir.path(), &authority, Some(&authority)).await;
    let address = tenure.addresses()[0];
    let [ghost, acme] = ["tenure://tenant/ghost", "tenure://tenant/acme"].map(|uri| authority.sign(&[uri]));
    let mut held = Vec::new();
    let mut refused = false;
    for _ in 0..257 {
        let mut stream = connect(address, &authority, Some(&ghost), b"h2").await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        // The server says its settings first, or nothing more.
        match stream.read(&mut [0; 64]).await {
            Ok(bytes) if bytes > 0 => held.push(stream),
            Ok(_) | Err(_) => refused = true,
        }
    }
    assert!(refused && !held.is_empty(), "{} are held", held.len());
    put(connect(address, &authority, Some(&acme), b"h2").await.unwrap(), "k").await.unwrap();
    // Who is known gets in beside them, and they may wait for their tenant.
    tenure.cell().create_tenant("ghost").await.unwrap();
    put(connect(address, &authority, Some(&ghost), b"h2").await.unwrap(), "k").await.unwrap();
    tenure.stop().await;
}

// A certificate is replaced by one that is older than the key beside it, as tools do that keep the times of files; then the CA.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_change_are_read_again_whatever_their_age() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (Authority::new(), Authority::new());
    let tenure = serve_tls(dir.path(), &before, Some(&before)).await;
    let address = tenure.addresses()[0];
    let acme = |authority: &Authority| authority.sign(&["tenure://tenant/acme"]);
    let is_served =
        async |server: &Authority, client: &Authority| match connect(address, server, Some(&acme(client)), b"h2").await
        {
            Ok(stream) => put(stream, "k").await.is_ok(),
            Err(_) => false,
        };
    let replace = |name: &str, pem: &str, years: u64| {
        let path = write(dir.path(), &format!("{name}.new"), pem);
        let old = std::time::SystemTime::now() - Duration::from_secs(years * 365 * 86_400);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        std::fs::rename(path, dir.path().join(name)).unwrap();
    };
    assert!(is_served(&before, &before).await);

    // Half of a pair: the old one serves on.
    let identity = after.sign(&[]);
    replace("server.crt", &identity.pem, 2);
    assert!(is_served(&before, &before).await && !is_served(&after, &before).await);
    replace("server.key", &identity.key.serialize_pem(), 3);
    assert!(is_served(&after, &before).await && !is_served(&before, &before).await);

    let both = [before.certificate.pem(), after.certificate.pem()].concat();
    replace("ca.crt", &both, 4);
    assert!(is_served(&after, &before).await && is_served(&after, &after).await);
    replace("ca.crt", &after.certificate.pem(), 5);
    assert!(is_served(&after, &after).await && !is_served(&after, &before).await);
    tenure.stop().await;
}
