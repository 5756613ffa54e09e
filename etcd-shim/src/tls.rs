//! TLS of the client listeners and between members: rustls, TLS 1.2 and up, certificates read anew when their files change.
//!
//! ALPN (contract 3.2): the server offers h2 alone. A client that offers only http/1.1, or nothing, is not turned away: it
//! gets no ALPN answer and HTTP/1.1, so the configuration is chosen after its hello was read.
//!
//! Whose certificates count, [`crate::authorities`] says.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tenure_raft_server::transport::peers::PeerTls;

use crate::authorities::{self, Authorities, ByTenant, Judge, Judged};
use crate::flags::TlsFiles;
use crate::tenant::{PeerCertificate, is_served};
use crate::tls_protocol::TlsProtocol;

/// Why the files do not make a TLS server.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {file}: {error}")]
    Pem { file: String, error: rustls::pki_types::pem::Error },
    #[error("use certificate: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("use trusted CA: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Both faces of one server identity.
#[derive(Clone)]
struct Configs {
    h2: Arc<ServerConfig>,
    no_alpn: Arc<ServerConfig>,
    /// What verifies certificates that the cell's CA signed.
    of_cell: Option<Arc<dyn ClientCertVerifier>>,
}

/// The current configuration of a listener.
pub struct Tls {
    files: TlsFiles,
    protocol: TlsProtocol,
    /// Where tenants' own CAs are looked up; `None`: the cell's CA is all there is.
    authorities: Option<Arc<Authorities>>,
    current: Mutex<(FileStates, Configs)>,
    _in_use: InUse,
}

impl Tls {
    /// Reads the files once, so that a mistake shows at start, or makes a certificate for these host names.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(
        files: TlsFiles,
        protocol: TlsProtocol,
        hosts: &[String],
        authorities: Option<Arc<Authorities>>,
    ) -> Result<Self, TlsError> {
        // Before they are read: what changes meanwhile is read again.
        let states = files.states();
        let configs = match &files {
            TlsFiles::Files { cert_file, key_file, trusted_ca_file } => {
                load(&protocol, cert_file, key_file, trusted_ca_file.as_deref(), authorities.as_ref())?
            }
            TlsFiles::Auto => {
                let (certificate, key) = self_signed(hosts)?;
                configs(&protocol, None, vec![certificate], key, None)?
            }
        };
        let in_use = match &files {
            TlsFiles::Files { cert_file, trusted_ca_file, .. } => {
                InUse::new(std::iter::once(cert_file).chain(trusted_ca_file))
            }
            TlsFiles::Auto => InUse::new([]),
        };
        Ok(Tls { current: Mutex::new((states, configs)), files, protocol, authorities, _in_use: in_use })
    }

    /// Whether the cell's CA signed the certificate that a chain begins with.
    pub(crate) fn vouches_for(&self, chain: &[CertificateDer<'_>]) -> bool {
        let of_cell = self.current.lock().1.of_cell.clone();
        of_cell.is_some_and(|of_cell| authorities::verifies(&*of_cell, chain))
    }

    /// The configuration for this hello. Changed files are read first; unreadable ones keep the old certificate.
    pub fn choose(&self, hello: &ClientHello<'_>) -> Arc<ServerConfig> {
        let mut current = self.current.lock();
        let states = self.files.states();
        if let TlsFiles::Files { cert_file, key_file, trusted_ca_file } = &self.files
            && states != current.0
        {
            let trusted_ca_file = trusted_ca_file.as_deref();
            match load(&self.protocol, cert_file, key_file, trusted_ca_file, self.authorities.as_ref()) {
                Ok(configs) => *current = (states, configs),
                Err(error) => tracing::warn!(%error, "keep the old certificate"),
            }
        }
        let only_http1 = hello.alpn().is_none_or(|mut offered| offered.all(|protocol| protocol == b"http/1.1"));
        if only_http1 { Arc::clone(&current.1.no_alpn) } else { Arc::clone(&current.1.h2) }
    }
}

/// Files of certificates that this process uses, and how often. They are the process', as what runs it has one place to look at them.
static IN_USE: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// Has these files looked at for as long as it lives: see [`not_after_seconds`].
#[derive(Debug)]
pub(crate) struct InUse(Vec<PathBuf>);

impl InUse {
    pub(crate) fn new<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Self {
        let paths: Vec<PathBuf> = paths.into_iter().cloned().collect();
        let mut in_use = IN_USE.lock();
        for path in &paths {
            *in_use.entry(path.clone()).or_default() += 1;
        }
        InUse(paths)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut in_use = IN_USE.lock();
        for path in &self.0 {
            if let Some(times) = in_use.get_mut(path) {
                *times -= 1;
            }
        }
        in_use.retain(|_, times| *times > 0);
    }
}

/// The certificate files that this process uses, and when the first of the certificates in each ends, in seconds since 1970. `None`: it
/// cannot be read. A few small files are read for it.
pub(crate) fn not_after_seconds() -> Vec<(PathBuf, Option<i64>)> {
    let paths: Vec<PathBuf> = IN_USE.lock().keys().cloned().collect();
    let ends = |certificate: &CertificateDer<'_>| {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        Some(certificate.validity().not_after.timestamp())
    };
    let first = |path: &Path| certificates(path).ok()?.iter().map(ends).min()?;
    paths.into_iter().map(|path| (first(&path), path)).map(|(first, path)| (path, first)).collect()
}

/// What tells a file from another one under its name, whichever is older: when it was written and where it is. `None`: there is none.
type FileStates = Vec<Option<(SystemTime, u64)>>;

impl TlsFiles {
    fn states(&self) -> FileStates {
        let TlsFiles::Files { cert_file, key_file, trusted_ca_file } = self else { return FileStates::new() };
        states_of([cert_file, key_file].into_iter().chain(trusted_ca_file))
    }
}

fn states_of<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> FileStates {
    let state = |path: &PathBuf| {
        let metadata = path.metadata().ok()?;
        Some((metadata.modified().ok()?, metadata.ino()))
    };
    paths.map(state).collect()
}

/// The certificates of a PEM text.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn certificates_of(pem: &str) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |error| TlsError::Pem { file: path.display().to_string(), error };
    CertificateDer::pem_file_iter(path).map_err(error)?.collect::<Result<_, _>>().map_err(error)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let error = |error| TlsError::Pem { file: path.display().to_string(), error };
    PrivateKeyDer::from_pem_file(path).map_err(error)
}

fn roots_of(ca: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// Whom the operating system trusts: those of its certificates that can be read.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "read a certificate that the system trusts");
    }
    roots.add_parsable_certificates(found.certs);
    roots
}

fn load(
    protocol: &TlsProtocol,
    cert_file: &Path,
    key_file: &Path,
    client_ca: Option<&Path>,
    authorities: Option<&Arc<Authorities>>,
) -> Result<Configs, TlsError> {
    configs(protocol, client_ca, certificates(cert_file)?, private_key(key_file)?, authorities)
}

/// With a CA, clients must show a certificate of it, or of their tenant's.
fn configs(
    protocol: &TlsProtocol,
    client_ca: Option<&Path>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: Option<&Arc<Authorities>>,
) -> Result<Configs, TlsError> {
    let builder = protocol.server()?;
    let provider = Arc::clone(protocol.provider());
    let of_cell = match client_ca {
        Some(ca) => Some(WebPkiClientVerifier::builder_with_provider(Arc::new(roots_of(ca)?), provider).build()?),
        None => None,
    };
    let builder = match (of_cell.clone(), authorities.cloned()) {
        (Some(of_cell), Some(authorities)) => {
            builder.with_client_cert_verifier(Arc::new(Judged { base: of_cell, judge: ByTenant(authorities) }))
        }
        (Some(of_cell), None) => builder.with_client_cert_verifier(of_cell),
        (None, _) => builder.with_no_client_auth(),
    };
    let mut no_alpn = builder.with_single_cert(chain, key)?;
    if of_cell.is_some() {
        // A session that goes on would go by what was trusted when it began.
        no_alpn.session_storage = Arc::new(NoServerSessionStorage {});
        no_alpn.send_tls13_tickets = 0;
    }
    let mut h2 = no_alpn.clone();
    h2.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Configs { h2: Arc::new(h2), no_alpn: Arc::new(no_alpn), of_cell })
}

/// A certificate that nobody but itself vouches for.
fn self_signed(hosts: &[String]) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
    let made = rcgen::generate_simple_self_signed(hosts.to_vec())?;
    Ok((made.cert.der().clone(), PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into())))
}

/// The certificates of a member among members: `--peer-cert-file` and the rest.
#[derive(Clone, Debug)]
pub enum PeerTlsFiles {
    Files {
        cert_file: PathBuf,
        key_file: PathBuf,
        /// Who signs the certificates of members: those that connect must show one then. Without it they need not, and whoever
        /// the system trusts signs the one of the member that is connected to.
        trusted_ca_file: Option<PathBuf>,
        /// Certificate and key where this member connects, if those are others.
        client: Option<(PathBuf, PathBuf)>,
    },
    /// Certificates made at start, which nobody checks: `--peer-auto-tls`. Against listeners, not against impostors.
    Auto,
}

/// The current configurations of both sides of the connections between members.
#[derive(Debug)]
pub struct MemberTls {
    files: PeerTlsFiles,
    protocol: TlsProtocol,
    current: Mutex<(FileStates, MemberConfigs)>,
    _in_use: InUse,
}

#[derive(Clone, Debug)]
struct MemberConfigs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl MemberTls {
    /// Reads the files once, so that a mistake shows at start, or makes certificates for these host names.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(files: PeerTlsFiles, protocol: TlsProtocol, hosts: &[String]) -> Result<Self, TlsError> {
        let states = files.states();
        let configs = MemberConfigs::load(&files, &protocol, hosts)?;
        let in_use = match &files {
            PeerTlsFiles::Files { cert_file, trusted_ca_file, client, .. } => {
                let of_client = client.as_ref().map(|(cert_file, _)| cert_file);
                InUse::new(std::iter::once(cert_file).chain(trusted_ca_file).chain(of_client))
            }
            PeerTlsFiles::Auto => InUse::new([]),
        };
        Ok(MemberTls { current: Mutex::new((states, configs)), files, protocol, _in_use: in_use })
    }

    /// Changed files are read first; unreadable ones keep the old certificates.
    fn current(&self) -> MemberConfigs {
        let mut current = self.current.lock();
        let states = self.files.states();
        if states != current.0 {
            match MemberConfigs::load(&self.files, &self.protocol, &[]) {
                Ok(configs) => *current = (states, configs),
                Err(error) => tracing::warn!(%error, "keep the old certificate of this member"),
            }
        }
        current.1.clone()
    }
}

impl PeerTls for MemberTls {
    fn server(&self) -> Arc<ServerConfig> {
        self.current().server
    }

    fn client(&self) -> Arc<ClientConfig> {
        self.current().client
    }
}

impl PeerTlsFiles {
    fn states(&self) -> FileStates {
        let PeerTlsFiles::Files { cert_file, key_file, trusted_ca_file, client } = self else {
            return FileStates::new();
        };
        let client = client.iter().flat_map(|(cert_file, key_file)| [cert_file, key_file]);
        states_of([cert_file, key_file].into_iter().chain(trusted_ca_file).chain(client))
    }
}

impl MemberConfigs {
    fn load(files: &PeerTlsFiles, protocol: &TlsProtocol, hosts: &[String]) -> Result<Self, TlsError> {
        let (server, client) = (protocol.server()?, protocol.client()?);
        let provider = Arc::clone(protocol.provider());
        let (mut server, mut client) = match files {
            PeerTlsFiles::Files { cert_file, key_file, trusted_ca_file, client: of_client } => {
                let (server, roots) = match trusted_ca_file {
                    Some(ca) => {
                        let roots = Arc::new(roots_of(ca)?);
                        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider);
                        (
                            server.with_client_cert_verifier(Arc::new(Judged {
                                base: verifier.build()?,
                                judge: MembersAlone,
                            })),
                            roots,
                        )
                    }
                    None => (server.with_no_client_auth(), Arc::new(system_roots())),
                };
                let (own_cert_file, own_key_file) =
                    of_client.as_ref().map_or((cert_file, key_file), |(cert_file, key_file)| (cert_file, key_file));
                let client = client.with_root_certificates(roots);
                let client = client.with_client_auth_cert(certificates(own_cert_file)?, private_key(own_key_file)?)?;
                (server.with_single_cert(certificates(cert_file)?, private_key(key_file)?)?, client)
            }
            PeerTlsFiles::Auto => {
                let (certificate, key) = self_signed(hosts)?;
                let server = server.with_no_client_auth().with_single_cert(vec![certificate], key)?;
                let verifier = Arc::new(AnyCertificate(provider));
                (server, client.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
            }
        };
        server.alpn_protocols = vec![b"h2".to_vec()];
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(MemberConfigs { server: Arc::new(server), client: Arc::new(client) })
    }
}

/// Takes no certificate of somebody whom the cell serves. Often one CA signs for members and clients, and a tenant that passed for a
/// member would have all tenants' data.
#[derive(Debug)]
struct MembersAlone;

impl Judge for MembersAlone {
    fn hints<'a>(&self, base: &'a dyn ClientCertVerifier) -> &'a [DistinguishedName] {
        base.root_hint_subjects()
    }

    fn judge(
        &self,
        base: &dyn ClientCertVerifier,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = base.verify_client_cert(end_entity, intermediates, now)?;
        match read_certificate(end_entity) {
            Some(certificate) if !is_served(&certificate) => Ok(verified),
            Some(_) | None => {
                tracing::warn!(
                    "refuse a connection to the members: its certificate is a tenant's or an administrator's"
                );
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }
    }
}

/// Takes every certificate whose holder has its key: all that `--peer-auto-tls` promises.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What a certificate says. `None`: it cannot be read, and its holder must not be let in as somebody without a name.
pub fn read_certificate(der: &CertificateDer<'_>) -> Option<PeerCertificate> {
    use x509_parser::extensions::GeneralName;
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    // One that cannot be read may name anybody.
    let names = certificate.subject_alternative_name().ok()?.map(|san| &san.value.general_names);
    let uri = |name: &GeneralName<'_>| if let GeneralName::URI(uri) = name { Some(uri.to_string()) } else { None };
    let uris = names.into_iter().flatten().filter_map(uri);
    let not_before_ms = certificate.validity().not_before.timestamp().saturating_mul(1_000);
    // DER puts a zero in front of a number whose first bit is set.
    let serial = certificate.raw_serial().iter().copied().skip_while(|byte| *byte == 0).collect();
    let common_name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let common_name = common_name.map(str::to_string);
    Some(PeerCertificate { uris: uris.collect(), common_name, serial, not_before_ms })
}
