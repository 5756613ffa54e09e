//! How a cell's admin API is reached: a socket file on this machine, or TLS with an administrator's certificate.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tenure_admin_api::v1::admin_client::AdminClient;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::advice;

/// Longest time to reach a member.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for an answer: members give up sooner.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// What a client shows and whom it trusts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    pub cacert: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// Why a member was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("endpoint {0:?}: want unix:PATH or https://HOST:PORT")]
    Endpoint(String),
    #[error(
        "{0} needs --cacert, --cert and --key: the CA of the cell, and an administrator's certificate (tenure://admin)"
    )]
    NoCertificate(String),
    #[error("read {file}: {error}")]
    File { file: String, error: rustls::pki_types::pem::Error },
    #[error("use {file}: {error}")]
    Tls { file: String, error: rustls::Error },
    #[error("reach {endpoint}: {error}: {}", advice::of_connecting(*.kind))]
    Transport { endpoint: String, error: String, kind: Option<ErrorKind> },
}

/// Connects to one member.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(endpoint: &str, tls: &TlsFiles) -> Result<AdminClient<Channel>, ConnectError> {
    let failed = |error: tonic::transport::Error| {
        let (mut text, mut kind) = (error.to_string(), None);
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(next) = cause {
            text = next.to_string();
            kind = next.downcast_ref::<std::io::Error>().map(std::io::Error::kind).or(kind);
            cause = next.source();
        }
        ConnectError::Transport { endpoint: endpoint.to_string(), error: text, kind }
    };
    if let Some(path) = endpoint.strip_prefix("unix:") {
        let path = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let to = Endpoint::from_static("http://admin").connect_timeout(CONNECT_TIMEOUT).timeout(CALL_TIMEOUT);
        return Ok(AdminClient::new(to.connect_with_connector(connector).await.map_err(failed)?));
    }
    let Some(address) = endpoint.strip_prefix("https://").map(|rest| rest.trim_end_matches('/').to_string()) else {
        return Err(ConnectError::Endpoint(endpoint.to_string()));
    };
    let host = address.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_string());
    let name = host.and_then(|host| ServerName::try_from(host).ok());
    let name = name.ok_or_else(|| ConnectError::Endpoint(endpoint.to_string()))?;
    let connector = TlsConnector::from(Arc::new(client_config(endpoint, tls)?));
    let for_socket = address.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (address, name, connector) = (for_socket.clone(), name.clone(), connector.clone());
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    // What is behind the connector is TLS; the channel need not know.
    let to = Endpoint::from_shared(format!("http://{address}"));
    let to = to.map_err(failed)?.connect_timeout(CONNECT_TIMEOUT).timeout(CALL_TIMEOUT);
    Ok(AdminClient::new(to.connect_with_connector(connector).await.map_err(failed)?))
}

fn client_config(endpoint: &str, tls: &TlsFiles) -> Result<ClientConfig, ConnectError> {
    let TlsFiles { cacert: Some(cacert), cert: Some(cert), key: Some(key) } = tls else {
        return Err(ConnectError::NoCertificate(endpoint.to_string()));
    };
    let pem = |path: &Path, error| ConnectError::File { file: path.display().to_string(), error };
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, ConnectError> {
        let all = CertificateDer::pem_file_iter(path).map_err(|error| pem(path, error))?;
        all.collect::<Result<_, _>>().map_err(|error| pem(path, error))
    };
    let bad = |path: &Path| {
        let file = path.display().to_string();
        move |error| ConnectError::Tls { file, error }
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(cacert)? {
        roots.add(certificate).map_err(bad(cacert))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(bad(cacert))?.with_root_certificates(roots);
    let private_key = PrivateKeyDer::from_pem_file(key).map_err(|error| pem(key, error))?;
    let mut config = builder.with_client_auth_cert(certificates(cert)?, private_key).map_err(bad(cert))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
