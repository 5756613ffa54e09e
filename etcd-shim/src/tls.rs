//! TLS of the client listeners: rustls, TLS 1.2 and up, certificates read anew when their files change.
//!
//! ALPN (contract 3.2): the server offers h2 alone. A client that offers only http/1.1, or nothing, is not turned away: it
//! gets no ALPN answer and HTTP/1.1, so the configuration is chosen after its hello was read.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use crate::flags::TlsFiles;
use crate::tenant::PeerCertificate;

/// Why the files do not make a TLS server.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {file}: {error}")]
    Pem { file: String, error: rustls::pki_types::pem::Error },
    #[error("use certificate: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("use trusted CA: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Both faces of one server identity.
#[derive(Clone)]
struct Configs {
    h2: Arc<ServerConfig>,
    no_alpn: Arc<ServerConfig>,
}

/// The current configuration of a listener.
pub struct Tls {
    files: TlsFiles,
    current: Mutex<(Option<SystemTime>, Configs)>,
}

impl Tls {
    /// Reads the files once, so that a mistake shows at start.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(files: TlsFiles) -> Result<Self, TlsError> {
        let configs = load(&files)?;
        Ok(Tls { current: Mutex::new((newest_change(&files), configs)), files })
    }

    /// The configuration for this hello. Changed files are read first; unreadable ones keep the old certificate.
    pub fn choose(&self, hello: &ClientHello<'_>) -> Arc<ServerConfig> {
        let mut current = self.current.lock();
        let changed = newest_change(&self.files);
        if changed != current.0 {
            match load(&self.files) {
                Ok(configs) => *current = (changed, configs),
                Err(error) => tracing::warn!(%error, "keep the old certificate"),
            }
        }
        let only_http1 = hello.alpn().is_none_or(|mut offered| offered.all(|protocol| protocol == b"http/1.1"));
        if only_http1 { Arc::clone(&current.1.no_alpn) } else { Arc::clone(&current.1.h2) }
    }
}

fn newest_change(files: &TlsFiles) -> Option<SystemTime> {
    let paths = [Some(&files.cert_file), Some(&files.key_file), files.trusted_ca_file.as_ref()];
    paths.into_iter().flatten().filter_map(|path| path.metadata().ok()?.modified().ok()).max()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |error| TlsError::Pem { file: path.display().to_string(), error };
    CertificateDer::pem_file_iter(path).map_err(error)?.collect::<Result<_, _>>().map_err(error)
}

fn load(files: &TlsFiles) -> Result<Configs, TlsError> {
    let chain = certificates(&files.cert_file)?;
    let key = PrivateKeyDer::from_pem_file(&files.key_file)
        .map_err(|error| TlsError::Pem { file: files.key_file.display().to_string(), error })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.trusted_ca_file {
        Some(ca) if files.client_cert_auth => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(ca)? {
                roots.add(certificate)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
        Some(_) | None => builder.with_no_client_auth(),
    };
    let no_alpn = builder.with_single_cert(chain, key)?;
    let mut h2 = no_alpn.clone();
    h2.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Configs { h2: Arc::new(h2), no_alpn: Arc::new(no_alpn) })
}

/// What a verified certificate says; empty if it cannot be read.
pub fn peer_certificate(der: &CertificateDer<'_>) -> PeerCertificate {
    use x509_parser::extensions::GeneralName;
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else { return PeerCertificate::default() };
    let names = certificate.subject_alternative_name().ok().flatten().map(|san| &san.value.general_names);
    let uri = |name: &GeneralName<'_>| if let GeneralName::URI(uri) = name { Some(uri.to_string()) } else { None };
    let uris = names.into_iter().flatten().filter_map(uri);
    let common_name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    PeerCertificate { uris: uris.collect(), common_name: common_name.map(str::to_string) }
}
