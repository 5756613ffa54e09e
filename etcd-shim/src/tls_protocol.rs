//! What TLS may be spoken: `--cipher-suites`, `--tls-min-version` and `--tls-max-version`, for clients, administrators and members alike.
//!
//! As in etcd the suites are those of TLS 1.2; what TLS 1.3 has is never narrowed. Every name that Go knows is taken. rustls has none
//! of the suites without forward secrecy, with CBC, RC4 or 3DES: naming them adds nothing, and the caller is told.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CipherSuite, ClientConfig, ConfigBuilder, ProtocolVersion, ServerConfig, SupportedProtocolVersion, WantsVerifier,
};

/// Versions and suites that a handshake may agree on. Default: all that rustls has, TLS 1.2 and 1.3.
#[derive(Clone, Debug)]
pub struct TlsProtocol {
    provider: Arc<CryptoProvider>,
    versions: &'static [&'static SupportedProtocolVersion],
}

static ONLY_TLS12: [&SupportedProtocolVersion; 1] = [&TLS12];
static ONLY_TLS13: [&SupportedProtocolVersion; 1] = [&TLS13];

/// Why there would be nothing to agree on, in etcd's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsProtocolError {
    #[error("unexpected TLS version {0:?} (must be one of: TLS1.2, TLS1.3)")]
    Version(String),
    #[error("min version ({min}) is greater than max version ({max})")]
    Versions { min: String, max: String },
    #[error("unexpected TLS cipher suite {0:?}")]
    Suite(String),
    #[error("cipher suites cannot be configured when only TLS1.3 is enabled")]
    SuitesOfTls13,
    #[error("none of the cipher suites is offered here, and TLS1.3 is not enabled")]
    NoSuite,
}

/// By Go's names. `None`: rustls has no such suite, or it is one of TLS 1.3, which stay as they are.
const SUITES: &[(&str, Option<CipherSuite>)] = &[
    ("TLS_AES_128_GCM_SHA256", None),
    ("TLS_AES_256_GCM_SHA384", None),
    ("TLS_CHACHA20_POLY1305_SHA256", None),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384)),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256)),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256)),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256)),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384)),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", Some(CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256)),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", Some(CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256)),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", None),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256", None),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", None),
    ("TLS_ECDHE_ECDSA_WITH_RC4_128_SHA", None),
    ("TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA", None),
    ("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", None),
    ("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256", None),
    ("TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", None),
    ("TLS_ECDHE_RSA_WITH_RC4_128_SHA", None),
    ("TLS_RSA_WITH_3DES_EDE_CBC_SHA", None),
    ("TLS_RSA_WITH_AES_128_CBC_SHA", None),
    ("TLS_RSA_WITH_AES_128_CBC_SHA256", None),
    ("TLS_RSA_WITH_AES_128_GCM_SHA256", None),
    ("TLS_RSA_WITH_AES_256_CBC_SHA", None),
    ("TLS_RSA_WITH_AES_256_GCM_SHA384", None),
    ("TLS_RSA_WITH_RC4_128_SHA", None),
];

impl Default for TlsProtocol {
    fn default() -> Self {
        TlsProtocol { provider: Arc::new(rustls::crypto::ring::default_provider()), versions: rustls::ALL_VERSIONS }
    }
}

impl TlsProtocol {
    /// The suites by Go's names, or `None` for all; the versions as etcd writes them, empty for no bound. Answers the names that
    /// add nothing, too.
    ///
    /// # Errors
    /// [`TlsProtocolError`].
    pub fn new<'a>(suites: Option<&[&'a str]>, min: &str, max: &str) -> Result<(Self, Vec<&'a str>), TlsProtocolError> {
        let mut protocol = TlsProtocol::default();
        protocol.versions = match (version(min)?, version(max)?) {
            (Some(ProtocolVersion::TLSv1_3), Some(ProtocolVersion::TLSv1_2)) => {
                return Err(TlsProtocolError::Versions { min: min.to_string(), max: max.to_string() });
            }
            (Some(ProtocolVersion::TLSv1_3), _) => &ONLY_TLS13,
            (_, Some(ProtocolVersion::TLSv1_2)) => &ONLY_TLS12,
            _ => protocol.versions,
        };
        let Some(names) = suites else { return Ok((protocol, Vec::new())) };
        let (mut chosen, mut without_effect) = (Vec::new(), Vec::new());
        for name in names {
            match SUITES.iter().find(|(known, _)| known == name) {
                Some((_, Some(suite))) => chosen.push(*suite),
                Some((_, None)) => without_effect.push(*name),
                None => return Err(TlsProtocolError::Suite(name.to_string())),
            }
        }
        let has = |version| protocol.versions.iter().any(|of| of.version == version);
        if !has(ProtocolVersion::TLSv1_2) {
            return Err(TlsProtocolError::SuitesOfTls13);
        }
        if chosen.is_empty() && !has(ProtocolVersion::TLSv1_3) {
            return Err(TlsProtocolError::NoSuite);
        }
        let provider = Arc::make_mut(&mut protocol.provider);
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || chosen.contains(&suite.suite()));
        Ok((protocol, without_effect))
    }

    pub(crate) fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// # Errors
    /// The certificates' kind has no suite.
    pub(crate) fn server(&self) -> Result<ConfigBuilder<ServerConfig, WantsVerifier>, rustls::Error> {
        ServerConfig::builder_with_provider(Arc::clone(&self.provider)).with_protocol_versions(self.versions)
    }

    /// # Errors
    /// As [`Self::server`].
    pub(crate) fn client(&self) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, rustls::Error> {
        ClientConfig::builder_with_provider(Arc::clone(&self.provider)).with_protocol_versions(self.versions)
    }
}

/// `None`: no bound.
fn version(text: &str) -> Result<Option<ProtocolVersion>, TlsProtocolError> {
    match text {
        "" => Ok(None),
        "TLS1.2" => Ok(Some(ProtocolVersion::TLSv1_2)),
        "TLS1.3" => Ok(Some(ProtocolVersion::TLSv1_3)),
        other => Err(TlsProtocolError::Version(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreed(suites: Option<&[&str]>, min: &str, max: &str) -> Result<String, String> {
        let (protocol, without_effect) = TlsProtocol::new(suites, min, max).map_err(|error| error.to_string())?;
        protocol.server().map_err(|error| error.to_string())?;
        let versions = protocol.versions.iter().map(|version| format!("{:?}", version.version));
        let of_tls12 = protocol.provider.cipher_suites.iter().filter(|suite| suite.tls13().is_none());
        let suites = of_tls12.map(|suite| format!("{:?}", suite.suite()));
        let left_out = without_effect.iter().map(|name| format!("not {name}"));
        Ok(versions.chain(suites).chain(left_out).collect::<Vec<_>>().join(" "))
    }

    /// Hardened manifests name suites and versions: a server that takes them must not offer more.
    #[test]
    fn no_more_is_offered_than_asked_for() {
        const GCM: &str = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256";
        const CBC: &str = "TLS_RSA_WITH_AES_128_CBC_SHA";
        assert_eq!(agreed(None, "", "").unwrap().matches("ECDHE").count(), 6);
        assert_eq!(agreed(Some(&[GCM, CBC]), "TLS1.2", ""), Ok(format!("TLSv1_3 TLSv1_2 {GCM} not {CBC}")));
        assert_eq!(agreed(Some(&[GCM]), "", "TLS1.2"), Ok(format!("TLSv1_2 {GCM}")));
        let chacha = agreed(Some(&["TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"]), "", "TLS1.2").unwrap();
        assert_eq!(chacha, "TLSv1_2 TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256");
        assert_eq!(agreed(Some(&[CBC]), "", ""), Ok(format!("TLSv1_3 TLSv1_2 not {CBC}")));
        assert!(agreed(None, "TLS1.3", "TLS1.3").unwrap().starts_with("TLSv1_3 TLS_ECDHE"));
        for (suites, min, max, error) in [
            (Some(&[""][..]), "", "", "unexpected TLS cipher suite \"\""),
            (None, "TLS1.1", "", "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)"),
            (None, "TLS1.3", "TLS1.2", "min version (TLS1.3) is greater than max version (TLS1.2)"),
            (Some(&[GCM]), "TLS1.3", "", "cipher suites cannot be configured when only TLS1.3 is enabled"),
            (Some(&[CBC]), "", "TLS1.2", "none of the cipher suites is offered here, and TLS1.3 is not enabled"),
        ] {
            assert_eq!(agreed(suites, min, max), Err(error.to_string()));
        }
    }
}
