//! A client of a served store, and who vouches for it. Certificates are made in the test, so nothing expires and no key is kept.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::Request;
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tenure_etcd_shim::proto::etcdserverpb::PutRequest;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A certificate authority, and what it has signed.
pub(crate) struct Authority {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: rcgen::Certificate,
}

/// A certificate with its key.
pub(crate) struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
    pub(crate) key: KeyPair,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Authority { issuer: Issuer::new(params, key), certificate }
    }

    pub(crate) fn sign(&self, uris: &[&str]) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity { pem: certificate.pem(), certificate: certificate.der().clone(), key }
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        roots
    }
}

pub(crate) fn write(dir: &Path, name: &str, pem: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, pem).unwrap();
    path
}

pub(crate) type Secured = tokio_rustls::client::TlsStream<TcpStream>;

/// Connects with TLS, and reads until the server has accepted the client's certificate or not.
pub(crate) async fn connect(
    address: SocketAddr,
    server: &Authority,
    client: Option<&Identity>,
    protocol: &[u8],
) -> std::io::Result<Secured> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(server.roots());
    let mut config = match client {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let chain: Vec<CertificateDer<'static>> = vec![identity.certificate.clone()];
            let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await?;
    // As gRPC clients do.
    stream.set_nodelay(true)?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
}

/// One gRPC call; the answer's message, or that nothing at the other end speaks gRPC.
pub(crate) async fn unary<S>(stream: S, path: &str, message: &[u8]) -> Result<Bytes, h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let request = Request::post(format!("https://localhost{path}")).header("content-type", "application/grpc");
    let request = request.header("te", "trailers").body(()).unwrap();
    let (response, mut body) = requests.ready().await?.send_request(request, false)?;
    let mut framed = BytesMut::from(&[0u8][..]);
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    body.send_data(framed.freeze(), true)?;
    let mut response = response.await?.into_body();
    let mut answer = BytesMut::new();
    while let Some(data) = response.data().await {
        let data = data?;
        response.flow_control().release_capacity(data.len())?;
        answer.extend_from_slice(&data);
    }
    let Some(trailers) = response.trailers().await? else { return Err(h2::Reason::PROTOCOL_ERROR.into()) };
    assert_eq!(trailers.get("grpc-status").unwrap(), "0", "{trailers:?}");
    Ok(answer.split_off(5).freeze())
}

pub(crate) async fn put<S>(stream: S, key: &'static str) -> Result<Bytes, h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = PutRequest { key: key.into(), value: "v".into(), ..PutRequest::default() };
    unary(stream, "/etcdserverpb.KV/Put", &request.encode_to_vec()).await
}
