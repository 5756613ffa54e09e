//! Certificates: read from files for a user's server, made here for those that the comparison starts.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// How to talk to servers whose certificate `ca` signed. `identity`: a client certificate and its key.
///
/// # Errors
/// If a file cannot be read or holds something else.
pub fn client(ca: &Path, identity: Option<(&Path, &Path)>) -> anyhow::Result<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match identity {
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Makes a CA, a certificate of a server on 127.0.0.1, and a client certificate of each of these tenants (named by URI, as
/// tenured wants it; other servers only check who signed). Files: `ca.crt`, `server.crt`, `server.key`, and from 0 on
/// `<number>.crt`, `<number>.key`.
///
/// # Errors
/// If the directory cannot be written.
pub fn make(dir: &Path, tenants: &[usize]) -> anyhow::Result<()> {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
    std::fs::create_dir_all(dir)?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    std::fs::write(dir.join("ca.crt"), ca.pem())?;
    let issue = |name: &str, params: CertificateParams| -> anyhow::Result<()> {
        let key = KeyPair::generate()?;
        std::fs::write(dir.join(format!("{name}.crt")), params.signed_by(&key, &ca)?.pem())?;
        Ok(std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?)
    };
    issue("server", CertificateParams::new(["127.0.0.1".to_string()])?)?;
    for (number, tenant) in tenants.iter().enumerate() {
        let mut params = CertificateParams::new(Vec::new())?;
        let uri = format!("tenure://tenant/{}", crate::server::tenant_name(*tenant));
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        issue(&number.to_string(), params)?;
    }
    Ok(())
}
