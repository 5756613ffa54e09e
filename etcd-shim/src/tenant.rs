//! Which tenant a connection is (design: a tenant is never a field of a request).
//!
//! Decided once, when a connection is accepted, from where it came in and which certificate it showed. Every request of
//! the connection carries the answer in its extensions; nothing a client sends later can change it.

use std::sync::{Arc, OnceLock};

pub use tenure_admin_api::{ADMIN_URI, TENANT_URI_PREFIX};
use tenure_storage::TenantId;

use crate::cell::{Cell, DEFAULT_TENANT, Tenant};

/// What every URI of ours begins with.
const OUR_URIS: &str = "tenure:";

/// Who is on the other end of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionIdentity {
    tenant: Arc<str>,
    /// The one that had the name when the connection was let in.
    admitted: Option<TenantId>,
    /// The tenant as it was found first: mostly that is the one.
    found: Arc<OnceLock<Tenant>>,
    /// The client certificate's common name: the user inside the tenant, once there are users.
    pub common_name: Option<Arc<str>>,
}

impl ConnectionIdentity {
    pub fn new(tenant: &str, common_name: Option<&str>) -> Self {
        ConnectionIdentity {
            tenant: tenant.into(),
            admitted: None,
            found: Arc::default(),
            common_name: common_name.map(Into::into),
        }
    }

    /// The connection was let in as this tenant, and stays that one's: another may get the name.
    pub fn admit(&mut self, tenant: TenantId) {
        self.admitted = Some(tenant);
    }

    /// The tenant, if it is there: the one that was let in, where there was one.
    pub fn tenant_in(&self, cell: &Cell) -> Option<Tenant> {
        if let Some(found) = self.found.get()
            && !found.is_deleted()
        {
            return Some(found.clone());
        }
        let found = cell.tenant(&self.tenant)?;
        if self.admitted.is_some_and(|admitted| admitted != found.id()) {
            return None;
        }
        // If that one goes and another gets the name, it is looked up each time.
        let _ = self.found.set(found.clone());
        Some(found)
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
    /// As it stands in the certificate, big endian.
    pub serial: Vec<u8>,
    /// From when on it is valid. Milliseconds since 1970; certificates tell whole seconds.
    pub not_before_ms: i64,
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
    #[error(
        "the client asks for the server name of tenant {name:?}, its certificate or the listener is tenant {other:?}"
    )]
    NameDisagrees { name: String, other: String },
    #[error("the tenant is suspended")]
    Suspended,
    #[error("the tenant is no more the one that it was")]
    Gone,
    #[error("the client certificate was revoked")]
    Revoked,
    #[error("the client certificate is not signed by a CA of the tenant's")]
    OtherAuthority,
    #[error("the tenant has as many connections as it may")]
    TooManyConnections,
    #[error("the client certificate is no administrator's (URI SAN {ADMIN_URI})")]
    NotAdmin,
}

/// The tenant that a server name stands for: `acme` of `acme.etcd.example`, if that is the cell's domain.
pub fn tenant_of_server_name<'a>(server_name: &'a str, cell_domain: &str) -> Option<&'a str> {
    let name = server_name.strip_suffix(cell_domain)?.strip_suffix('.')?;
    (!name.contains('.')).then_some(name)
}

/// The tenant that a certificate names, if that is all that it names of us.
pub(crate) fn sole_tenant_of(certificate: &PeerCertificate) -> Option<&str> {
    let mut ours = certificate.uris.iter().filter(|uri| uri.starts_with(OUR_URIS));
    let name = ours.next()?.strip_prefix(TENANT_URI_PREFIX)?;
    ours.next().is_none().then_some(name)
}

/// Whether a certificate names somebody whom the cell serves, a tenant or an administrator: its members' name nobody.
pub(crate) fn is_served(certificate: &PeerCertificate) -> bool {
    certificate.uris.iter().any(|uri| uri.starts_with(OUR_URIS))
}

/// Whether a certificate is an administrator's.
///
/// # Errors
/// [`NoTenant::NotAdmin`].
pub fn check_admin(certificate: &PeerCertificate) -> Result<(), NoTenant> {
    if certificate.uris.iter().any(|uri| uri == ADMIN_URI) { Ok(()) } else { Err(NoTenant::NotAdmin) }
}

/// The tenant of a connection: the listener's own one, else the certificate's, else that of the server name that the client asked
/// for (`server_name`: the tenant it stands for), else `default` where no certificate is asked for. Where several say one, they
/// must say the same. A certificate that names nobody of ours will do on a tenant's own listener, whose CA is the operator's choice.
///
/// # Errors
/// [`NoTenant`]; the connection is closed without an answer.
pub fn resolve(
    listener: Option<&str>,
    certificate: Option<&PeerCertificate>,
    server_name: Option<&str>,
) -> Result<String, NoTenant> {
    let named = certificate.map(tenant_of_certificate).transpose()?.flatten();
    let other = listener.or(named.as_deref());
    if let (Some(name), Some(other)) = (server_name, other)
        && name != other
    {
        return Err(NoTenant::NameDisagrees { name: name.to_string(), other: other.to_string() });
    }
    match (listener, certificate, named) {
        (Some(listener), _, Some(named)) if named != listener => {
            Err(NoTenant::Disagree { certificate: named, listener: listener.to_string() })
        }
        // An administrator's, say.
        (Some(_), Some(certificate), None) if is_served(certificate) => Err(NoTenant::CertificateWithout),
        (Some(listener), _, _) => Ok(listener.to_string()),
        (None, _, Some(named)) => Ok(named),
        (None, Some(_), None) => Err(NoTenant::CertificateWithout),
        (None, None, None) => Ok(server_name.unwrap_or(DEFAULT_TENANT).to_string()),
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
        PeerCertificate { uris: uris.iter().map(ToString::to_string).collect(), ..PeerCertificate::default() }
    }

    #[test]
    fn cleartext_is_the_listeners_tenant_or_default() {
        assert_eq!(resolve(None, None, None).unwrap(), "default");
        assert_eq!(resolve(Some("acme"), None, None).unwrap(), "acme");
    }

    #[test]
    fn a_certificate_decides_and_must_name_exactly_one_tenant() {
        let resolve = |certificate: &PeerCertificate| resolve(None, Some(certificate), None);
        assert_eq!(resolve(&certificate(&["https://x", "tenure://tenant/acme"])).unwrap(), "acme");
        assert_eq!(resolve(&certificate(&["https://x"])), Err(NoTenant::CertificateWithout));
        let two = certificate(&["tenure://tenant/a", "tenure://tenant/b"]);
        assert_eq!(resolve(&two), Err(NoTenant::Several));
    }

    #[test]
    fn listener_and_certificate_must_agree() {
        let acme = certificate(&["tenure://tenant/acme"]);
        assert_eq!(resolve(Some("acme"), Some(&acme), None).unwrap(), "acme");
        assert!(matches!(resolve(Some("globex"), Some(&acme), None), Err(NoTenant::Disagree { .. })));
        assert_eq!(resolve(Some("acme"), Some(&certificate(&[])), None).unwrap(), "acme");
        let admin = certificate(&["tenure://admin"]);
        assert_eq!(resolve(Some("acme"), Some(&admin), None), Err(NoTenant::CertificateWithout));
    }

    #[test]
    fn a_server_name_stands_for_a_tenant_and_must_agree() {
        assert_eq!(tenant_of_server_name("acme.etcd.example", "etcd.example"), Some("acme"));
        for other in ["etcd.example", "acme.example", "a.b.etcd.example", "acmeetcd.example"] {
            assert_eq!(tenant_of_server_name(other, "etcd.example"), None, "{other}");
        }
        let acme = certificate(&["tenure://tenant/acme"]);
        assert_eq!(resolve(None, None, Some("acme")).unwrap(), "acme");
        assert_eq!(resolve(None, Some(&acme), Some("acme")).unwrap(), "acme");
        assert!(matches!(resolve(None, Some(&acme), Some("globex")), Err(NoTenant::NameDisagrees { .. })));
        assert!(matches!(resolve(Some("acme"), None, Some("globex")), Err(NoTenant::NameDisagrees { .. })));
        // A certificate without a tenant gets none by a name.
        assert_eq!(resolve(None, Some(&certificate(&[])), Some("acme")), Err(NoTenant::CertificateWithout));
    }

    // A tenant's CA may sign what it likes: whatever else a certificate of it says must not count.
    #[test]
    fn a_certificate_that_names_more_is_no_tenants_own() {
        let sole = |uris: &[&str]| sole_tenant_of(&certificate(uris)).map(str::to_string);
        assert_eq!(sole(&["spiffe://x/y", "tenure://tenant/acme"]).as_deref(), Some("acme"));
        for more in [
            &["tenure://tenant/acme", "tenure://admin"][..],
            &["tenure://admin", "tenure://tenant/acme"],
            &["tenure://tenant/acme", "tenure://tenant/globex"],
            &["tenure://tenant/acme", "tenure://tenant/acme"],
            &["tenure://admin"],
            &["https://x"],
            &[],
        ] {
            assert_eq!(sole(more), None, "{more:?}");
        }
    }

    #[test]
    fn an_administrator_says_so() {
        assert_eq!(check_admin(&certificate(&["tenure://admin"])), Ok(()));
        assert_eq!(check_admin(&certificate(&["tenure://tenant/admin"])), Err(NoTenant::NotAdmin));
    }
}
