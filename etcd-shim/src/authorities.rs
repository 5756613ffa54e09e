//! Who signs the certificates of a tenant's clients: the cell's CA (`--trusted-ca-file`), or CAs of the tenant's own.
//!
//! A certificate says which tenant it is for (URI SAN `tenure://tenant/<name>`). If that tenant has CAs of its own, one of them must
//! have signed it; the cell's does not count then. Everybody else's must be signed by the cell's CA. So a tenant's CA opens that
//! tenant and no other, whatever it signs: a certificate that names any other `tenure://` identity beside it, an administrator's for
//! instance, goes to the cell's CA like one that names none. Listeners of the admin API know no tenants' CAs at all.
//!
//! Life of a connection: during its handshake [`ByTenant`] chooses by the certificate. A tenant can also be told by the listener or by
//! the server name, and what it trusts can change meanwhile, so when the tenant of the connection is known its certificate is verified
//! once more ([`crate::listen`]). When the tenant's CAs change, connections that were made before are closed. Sessions are not resumed
//! where certificates are asked for: that would go by what was trusted once.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};

use crate::cell::Cell;
use crate::tenant::sole_tenant_of;
use crate::tls::{TlsError, read_certificate};

/// Looks tenants' CAs up, from when the cell is open. Before that no tenant has any, and nobody is served.
#[derive(Default)]
pub struct Authorities(OnceLock<Cell>);

impl Authorities {
    /// From now on they are looked up here. Once.
    pub(crate) fn open(&self, cell: Cell) {
        let _ = self.0.set(cell);
    }

    /// DER; empty: the cell's CA.
    fn of(&self, tenant: &str) -> Vec<Bytes> {
        let tenant = self.0.get().and_then(|cell| cell.tenant(tenant));
        tenant.map(|tenant| tenant.profile().trusted_ca.clone()).unwrap_or_default()
    }
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorities")
    }
}

/// What verifies certificates that these CAs signed.
///
/// # Errors
/// [`TlsError`], if one of them cannot be read.
pub(crate) fn verifier_of(authorities: &[Bytes]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for der in authorities {
        roots.add(CertificateDer::from(der.as_ref()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
}

/// Whether one of these CAs signed the certificate that a chain begins with.
pub(crate) fn vouch_for(authorities: &[Bytes], chain: &[CertificateDer<'_>]) -> bool {
    verifier_of(authorities).is_ok_and(|verifier| verifies(&*verifier, chain))
}

pub(crate) fn verifies(verifier: &dyn ClientCertVerifier, chain: &[CertificateDer<'_>]) -> bool {
    let now = UnixTime::now();
    chain.split_first().is_some_and(|(first, rest)| verifier.verify_client_cert(first, rest, now).is_ok())
}

/// Who decides whose certificates count.
pub(crate) trait Judge: fmt::Debug + Send + Sync {
    /// The CAs that clients are told; `base` knows its own.
    fn hints<'a>(&self, base: &'a dyn ClientCertVerifier) -> &'a [DistinguishedName];

    /// # Errors
    /// Why it does not count.
    fn judge(
        &self,
        base: &dyn ClientCertVerifier,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error>;
}

/// Verifies as `base` does, but for whose certificates count.
#[derive(Debug)]
pub(crate) struct Judged<J> {
    pub(crate) base: Arc<dyn ClientCertVerifier>,
    pub(crate) judge: J,
}

impl<J: Judge> ClientCertVerifier for Judged<J> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.judge.hints(&*self.base)
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge.judge(&*self.base, end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.base.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.base.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.base.supported_verify_schemes()
    }
}

/// See the module's essay; the base is the cell's CA.
#[derive(Debug)]
pub(crate) struct ByTenant(pub(crate) Arc<Authorities>);

impl Judge for ByTenant {
    // Clients send no certificate of a CA that is not listed, and the tenants' cannot be listed to strangers.
    fn hints<'a>(&self, _: &'a dyn ClientCertVerifier) -> &'a [DistinguishedName] {
        &[]
    }

    fn judge(
        &self,
        of_cell: &dyn ClientCertVerifier,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let certificate = read_certificate(end_entity).ok_or(CertificateError::BadEncoding)?;
        let own = sole_tenant_of(&certificate).map(|tenant| self.0.of(tenant)).unwrap_or_default();
        if own.is_empty() {
            return of_cell.verify_client_cert(end_entity, intermediates, now);
        }
        let verifier = verifier_of(&own).map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_client_cert(end_entity, intermediates, now)
    }
}
