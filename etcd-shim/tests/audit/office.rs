//! A cell and its administrators' door: every method of the admin API, by its name and with any bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use http::Request;
use prost::Message;
use rcgen::{CertificateParams, KeyPair};
use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::builder::ADMIN_SOCKET;
use tenure_etcd_shim::flags::TlsFiles;
use tenure_etcd_shim::issuer::IssuerFiles;
use tokio::net::UnixStream;
use tonic::{Code, Status};

use crate::client::{Authority, write};

pub(crate) const SERVICE: &str = "/tenure.admin.v1.Admin/";

pub(crate) struct Office {
    _dir: tempfile::TempDir,
    pub(crate) tenure: Tenure,
    pub(crate) authority: Authority,
    socket: PathBuf,
}

/// The methods that exist, from the definition.
pub(crate) fn methods() -> BTreeSet<String> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../admin-api/proto/tenure/admin/v1/admin.proto");
    let text = std::fs::read_to_string(proto).unwrap();
    let methods = text.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next());
    let methods: BTreeSet<String> = methods.map(|method| method.trim().to_string()).collect();
    assert!(methods.len() >= 13, "{methods:?}");
    methods
}

impl Office {
    pub(crate) async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let server = authority.sign(&[]);
        let ca = write(dir.path(), "ca.crt", &authority.certificate.pem());
        let files = TlsFiles::Files {
            cert_file: write(dir.path(), "server.crt", &server.pem),
            key_file: write(dir.path(), "server.key", &server.key.serialize_pem()),
            trusted_ca_file: None,
        };
        let key_file = write(dir.path(), "ca.key", &authority.issuer.key().serialize_pem());
        let tenure = Tenure::builder()
            .data_dir(dir.path().join("data"))
            .tls(files)
            .issuer(IssuerFiles { cert_file: ca, key_file })
            .listen("https://127.0.0.1:0")
            .admin_listen("https://127.0.0.1:0")
            .admin_socket();
        let tenure = tenure.start().await.unwrap();
        let socket = dir.path().join("data").join(ADMIN_SOCKET);
        Office { _dir: dir, tenure, authority, socket }
    }

    /// Calls a method with these bytes as its message, on a connection of its own.
    pub(crate) async fn call_with(&self, path: &str, message: &[u8]) -> Result<Bytes, Status> {
        let mut requests = self.connect().await;
        answer_of(send(&mut requests, path, message).await).await
    }

    pub(crate) async fn call<A: Message + Default>(&self, method: &str, message: &impl Message) -> Result<A, Status> {
        let answer = self.call_with(&format!("{SERVICE}{method}"), &message.encode_to_vec()).await?;
        Ok(A::decode(answer).unwrap())
    }

    /// Stops when the space of deleted tenants is given back: nothing writes to the directory any more.
    pub(crate) async fn close(self) {
        let mut changes = self.tenure.cell().tenants_changed();
        while !self.tenure.cell().deleted_tenants().is_empty() {
            changes.changed().await.unwrap();
        }
        self.tenure.stop().await;
    }

    pub(crate) async fn connect(&self) -> h2::client::SendRequest<Bytes> {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        let (requests, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        requests.ready().await.unwrap()
    }
}

fn request(path: &str) -> Request<()> {
    let request = Request::post(format!("http://admin{path}")).header("content-type", "application/grpc");
    request.header("te", "trailers").body(()).unwrap()
}

/// Sends a call whole.
pub(crate) async fn send(
    requests: &mut h2::client::SendRequest<Bytes>,
    path: &str,
    message: &[u8],
) -> h2::client::ResponseFuture {
    let (response, mut body) = requests.send_request(request(path), false).unwrap();
    let mut framed = BytesMut::from(&[0u8][..]);
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    body.send_data(framed.freeze(), true).unwrap();
    response
}

/// Sends the head of a call, and nothing behind it.
pub(crate) fn send_head(
    requests: &mut h2::client::SendRequest<Bytes>,
    path: &str,
) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
    requests.send_request(request(path), false).unwrap()
}

/// A message, or the error that was answered.
pub(crate) async fn answer_of(response: h2::client::ResponseFuture) -> Result<Bytes, Status> {
    let response = response.await.unwrap();
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(status);
    }
    let mut body = response.into_body();
    let mut answer = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        answer.extend_from_slice(&data);
    }
    let status = Status::from_header_map(&body.trailers().await.unwrap().unwrap()).unwrap();
    assert_eq!(status.code(), Code::Ok);
    Ok(answer.split_off(5).freeze())
}

/// A signing request for a new key.
pub(crate) fn signing_request() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
}
