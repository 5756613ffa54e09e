//! Credentials of tenants: client certificates signed by the cell's own CA, for keys that their owners made and keep.
//!
//! A request is a PKCS #10 signing request. Its key is taken, and its signature proves that the asker has the private one; the names
//! in it are not looked at: who the certificate is for is decided by whoever may call the admin API. What it says is a URI
//! ([`TENANT_URI_PREFIX`] and the tenant's name, or [`ADMIN_URI`]), a common name (the user inside the tenant) and that it is for
//! clients.
//!
//! The CA's files are read for each certificate, so they can be replaced while the member runs. Nothing is kept of what was
//! issued: a certificate is refused by its serial number or by its age, see [`Profile`](tenure_storage::Profile).

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rand::Rng as _;
use rcgen::{
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer as Signer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};

use crate::tenant::{ADMIN_URI, TENANT_URI_PREFIX};

/// How long a certificate lives if nothing is said: a year.
pub const TTL_DEFAULT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The longest life of a certificate: ten years.
pub const TTL_MAX: Duration = Duration::from_secs(3650 * 24 * 3600);

/// The CA that signs.
#[derive(Clone, Debug)]
pub struct IssuerFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// Whom a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    Tenant { name: &'a str, user: &'a str },
    Admin { user: &'a str },
}

/// A certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    pub certificate_pem: String,
    /// Big endian.
    pub serial: Vec<u8>,
    pub not_after_ms: i64,
}

/// Why none was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("read {0}: {1}")]
    File(String, std::io::Error),
    #[error("use the CA {0}: {1}")]
    Authority(String, rcgen::Error),
    /// The asker's mistake.
    #[error("csr_der: want a PKCS #10 certificate signing request in DER: {0}")]
    Request(rcgen::Error),
    #[error("sign a certificate: {0}")]
    Sign(rcgen::Error),
}

impl IssuerFiles {
    /// The CA's certificate.
    ///
    /// # Errors
    /// [`IssueError::File`].
    pub fn ca_pem(&self) -> Result<String, IssueError> {
        read(&self.cert_file)
    }

    /// Signs a certificate that is valid from now on. Reads files: not for an async thread.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue(&self, csr_der: &[u8], subject: Subject<'_>, ttl: Duration) -> Result<Issued, IssueError> {
        let of_ca = |error| IssueError::Authority(self.cert_file.display().to_string(), error);
        let key = KeyPair::from_pem(&read(&self.key_file)?).map_err(of_ca)?;
        let signer = Signer::from_ca_cert_pem(&self.ca_pem()?, key).map_err(of_ca)?;
        let mut request = CertificateSigningRequestParams::from_der(&csr_der.into()).map_err(IssueError::Request)?;
        let (uri, user) = match subject {
            Subject::Tenant { name, user } => (format!("{TENANT_URI_PREFIX}{name}"), user),
            Subject::Admin { user } => (ADMIN_URI.to_string(), user),
        };
        // Positive, and of a length that nobody minds.
        let mut serial: [u8; 16] = rand::rng().random();
        serial[0] = serial[0] & 0x7f | 0x40;
        // Certificates tell whole seconds.
        let now = SystemTime::now();
        let not_after = now + ttl.min(TTL_MAX);
        let params = &mut request.params;
        params.not_before = now.into();
        params.not_after = not_after.into();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(IssueError::Sign)?)];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.name_constraints = None;
        params.crl_distribution_points = Vec::new();
        params.custom_extensions = Vec::new();
        params.use_authority_key_identifier_extension = true;
        let certificate = request.signed_by(&signer).map_err(IssueError::Sign)?;
        let not_after_ms = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        Ok(Issued {
            certificate_pem: certificate.pem(),
            serial: serial.to_vec(),
            not_after_ms: i64::try_from(not_after_ms).unwrap_or(i64::MAX),
        })
    }
}

fn read(path: &std::path::Path) -> Result<String, IssueError> {
    std::fs::read_to_string(path).map_err(|error| IssueError::File(path.display().to_string(), error))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams};
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::tls::read_certificate;

    fn authority(dir: &std::path::Path) -> IssuerFiles {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let files = IssuerFiles { cert_file: dir.join("ca.crt"), key_file: dir.join("ca.key") };
        std::fs::write(&files.cert_file, params.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(&files.key_file, key.serialize_pem()).unwrap();
        files
    }

    /// A request decides about its key and nothing else: names, or being a CA, are not for the asker to say.
    #[test]
    fn a_certificate_says_what_the_operator_said() {
        let dir = tempfile::tempdir().unwrap();
        let files = authority(dir.path());
        let mut asked = CertificateParams::new(vec!["other.example".to_string()]).unwrap();
        asked.subject_alt_names.push(SanType::URI("tenure://admin".try_into().unwrap()));
        asked.distinguished_name.push(DnType::CommonName, "root");
        let key = KeyPair::generate().unwrap();
        let csr = asked.serialize_request(&key).unwrap();
        let subject = Subject::Tenant { name: "acme", user: "apiserver" };
        let issued = files.issue(csr.der(), subject, Duration::from_secs(60)).unwrap();
        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        let seen = read_certificate(&der).unwrap();
        assert_eq!(seen.uris, ["tenure://tenant/acme"]);
        assert_eq!(seen.common_name.as_deref(), Some("apiserver"));
        assert_eq!(seen.serial, issued.serial);
        assert!(seen.not_before_ms % 1_000 == 0 && issued.not_after_ms > seen.not_before_ms);
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(*parsed.public_key().subject_public_key.data, *key.public_key_raw());
        let admin = files.issue(csr.der(), Subject::Admin { user: "me" }, TTL_DEFAULT).unwrap();
        let der = CertificateDer::from_pem_slice(admin.certificate_pem.as_bytes()).unwrap();
        assert_eq!(read_certificate(&der).unwrap().uris, [ADMIN_URI]);
        assert_ne!(admin.serial, issued.serial);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = authority(dir.path());
        let subject = Subject::Admin { user: "me" };
        let issue = |files: &IssuerFiles| files.issue(b"nonsense", subject, TTL_DEFAULT).unwrap_err().to_string();
        assert!(issue(&files).starts_with("csr_der: want a PKCS #10"));
        std::fs::write(&files.cert_file, "nonsense").unwrap();
        assert!(issue(&files).starts_with("use the CA "));
        std::fs::remove_file(&files.key_file).unwrap();
        assert!(issue(&files).starts_with("read "));
    }
}
