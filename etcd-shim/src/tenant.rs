//! Which tenant a connection is (design: a tenant is never a field of a request).
//!
//! Decided once, when a connection is accepted, from where it came in and which certificate it showed. Every request of
//! the connection carries the answer in its extensions; nothing a client sends later can change it.

use std::sync::Arc;

use crate::cell::DEFAULT_TENANT;

/// What stands before the name in a client certificate's URI SAN.
pub const TENANT_URI_PREFIX: &str = "tenure://tenant/";

/// Who is on the other end of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionIdentity {
    tenant: Arc<str>,
    /// The client certificate's common name: the user inside the tenant, once there are users.
    pub common_name: Option<Arc<str>>,
}

impl ConnectionIdentity {
    pub fn new(tenant: &str, common_name: Option<&str>) -> Self {
        ConnectionIdentity { tenant: tenant.into(), common_name: common_name.map(Into::into) }
    }

    /// Name of the tenant.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    #[cfg(test)]
    pub(crate) fn for_tests(tenant: &str) -> Self {
        ConnectionIdentity::new(tenant, None)
    }
}

/// What the client's certificate says, after the TLS library has verified it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Every URI SAN.
    pub uris: Vec<String>,
    pub common_name: Option<String>,
}

/// Why a connection belongs to nobody. It is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTenant {
    #[error("the client certificate names no tenant (URI SAN {TENANT_URI_PREFIX}<name>)")]
    CertificateWithout,
    #[error("the client certificate names several tenants")]
    Several,
    #[error("the client certificate is tenant {certificate:?}, the listener is tenant {listener:?}")]
    Disagree { certificate: String, listener: String },
}

/// The tenant of a connection: the listener's own one, else the certificate's, else `default` where no certificate is asked
/// for.
///
/// # Errors
/// [`NoTenant`]; the connection is closed without an answer.
pub fn resolve(listener: Option<&str>, certificate: Option<&PeerCertificate>) -> Result<String, NoTenant> {
    let named = certificate.map(tenant_of_certificate).transpose()?.flatten();
    match (listener, certificate, named) {
        (Some(listener), _, Some(named)) if named != listener => {
            Err(NoTenant::Disagree { certificate: named, listener: listener.to_string() })
        }
        (Some(listener), _, _) => Ok(listener.to_string()),
        (None, _, Some(named)) => Ok(named),
        (None, Some(_), None) => Err(NoTenant::CertificateWithout),
        (None, None, None) => Ok(DEFAULT_TENANT.to_string()),
    }
}

fn tenant_of_certificate(certificate: &PeerCertificate) -> Result<Option<String>, NoTenant> {
    let mut names = certificate.uris.iter().filter_map(|uri| uri.strip_prefix(TENANT_URI_PREFIX));
    let first = names.next();
    if names.any(|other| Some(other) != first) {
        return Err(NoTenant::Several);
    }
    Ok(first.map(str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(uris: &[&str]) -> PeerCertificate {
        PeerCertificate { uris: uris.iter().map(ToString::to_string).collect(), common_name: None }
    }

    #[test]
    fn cleartext_is_the_listeners_tenant_or_default() {
        assert_eq!(resolve(None, None).unwrap(), "default");
        assert_eq!(resolve(Some("acme"), None).unwrap(), "acme");
    }

    #[test]
    fn a_certificate_decides_and_must_name_exactly_one_tenant() {
        assert_eq!(resolve(None, Some(&certificate(&["https://x", "tenure://tenant/acme"]))).unwrap(), "acme");
        assert_eq!(resolve(None, Some(&certificate(&["https://x"]))), Err(NoTenant::CertificateWithout));
        let two = certificate(&["tenure://tenant/a", "tenure://tenant/b"]);
        assert_eq!(resolve(None, Some(&two)), Err(NoTenant::Several));
    }

    #[test]
    fn listener_and_certificate_must_agree() {
        let acme = certificate(&["tenure://tenant/acme"]);
        assert_eq!(resolve(Some("acme"), Some(&acme)).unwrap(), "acme");
        assert!(matches!(resolve(Some("globex"), Some(&acme)), Err(NoTenant::Disagree { .. })));
        assert_eq!(resolve(Some("acme"), Some(&certificate(&[]))).unwrap(), "acme");
    }
}
