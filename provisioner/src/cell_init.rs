//! What a new cell needs before its members start: a CA, and certificates for each member and for an administrator.
//!
//! One CA signs them all, and the tenants' later: it is small, and a cell is one domain of trust. Whoever wants several gives
//! members those of their own making; nothing else here depends on it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use tenure_admin_api::ADMIN_URI;
use time::{Duration, OffsetDateTime};

use crate::files::{self, Mode};

/// How long the CA lives, and what it signs here.
const CA_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 825;

/// What goes wrong, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("--member {0:?}: want NAME=HOST[,HOST]…, hosts by name or address")]
    Member(String),
    #[error(
        "{0} is there already: --add-members signs for further members with the CA there is, --force makes everything anew"
    )]
    Exists(String),
    #[error("read {path}: {what}; without --add-members a CA is made")]
    Read { path: String, what: String },
    #[error("write {path}: {error}")]
    Write { path: String, error: std::io::Error },
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// A member and where it is reached; the first host is the one it is told to others by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub hosts: Vec<String>,
}

impl Member {
    /// Reads `NAME=HOST[,HOST]…`.
    ///
    /// # Errors
    /// [`InitError::Member`].
    pub fn parse(text: &str) -> Result<Self, InitError> {
        let wrong = || InitError::Member(text.to_string());
        let (name, hosts) = text.split_once('=').ok_or_else(wrong)?;
        let hosts: Vec<String> = hosts.split(',').map(|host| host.trim().to_string()).collect();
        let is_word = |word: &str| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '_'))
        };
        if !is_word(name) || hosts.iter().any(|host| !is_word(host)) {
            return Err(wrong());
        }
        Ok(Member { name: name.to_string(), hosts })
    }

    /// Its first host as it stands in a URL.
    fn host(&self) -> String {
        let host = self.hosts.first().map_or("", String::as_str);
        if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_string() }
    }
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Everything anew; refuses if there is a CA.
    New,
    /// Everything anew, whatever is there.
    Force,
    /// The CA that is there signs for further members.
    AddMembers,
}

/// Makes the files below `dir`: `ca.crt`, `ca.key`, `admin.crt`, `admin.key`, and for each member a directory with `server.crt`,
/// `server.key`, `peer.crt`, `peer.key`. `domain` is what stands behind tenants' names in server names, if anything does.
///
/// # Errors
/// [`InitError`].
pub fn init(dir: &Path, domain: Option<&str>, members: &[Member], start: Start) -> Result<(), InitError> {
    let (ca_cert, ca_key) = (dir.join("ca.crt"), dir.join("ca.key"));
    if start == Start::New && ca_cert.exists() {
        return Err(InitError::Exists(ca_cert.display().to_string()));
    }
    files::make_dir(dir).map_err(|error| InitError::Write { path: dir.display().to_string(), error })?;
    let issuer = if start == Start::AddMembers {
        let read = |path: &PathBuf| {
            let failed =
                |error: std::io::Error| InitError::Read { path: path.display().to_string(), what: error.to_string() };
            std::fs::read_to_string(path).map_err(failed)
        };
        Issuer::from_ca_cert_pem(&read(&ca_cert)?, KeyPair::from_pem(&read(&ca_key)?)?)?
    } else {
        let key = KeyPair::generate()?;
        let mut params = lasting(CA_DAYS);
        params.distinguished_name.push(DnType::CommonName, domain.unwrap_or("tenure"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?;
        write(&ca_key, &key.serialize_pem(), Mode::Private)?;
        write(&ca_cert, &certificate.pem(), Mode::Public)?;
        let issuer = Issuer::new(params, key);
        let admin = vec![SanType::URI(ADMIN_URI.try_into()?)];
        sign(&issuer, dir, "admin", "admin", admin, &[ExtendedKeyUsagePurpose::ClientAuth])?;
        issuer
    };
    for member in members {
        let dir = dir.join(&member.name);
        files::make_dir(&dir).map_err(|error| InitError::Write { path: dir.display().to_string(), error })?;
        let mut names = Vec::new();
        for host in member.hosts.iter().map(String::as_str).chain(["localhost", "127.0.0.1", "::1"]) {
            names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.try_into()?),
            });
        }
        let (server, client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
        sign(&issuer, &dir, "peer", &member.name, names.clone(), &[server.clone(), client])?;
        if let Some(domain) = domain {
            names.push(SanType::DnsName(domain.try_into()?));
            names.push(SanType::DnsName(format!("*.{domain}").try_into()?));
        }
        sign(&issuer, &dir, "server", &member.name, names, &[server])?;
    }
    Ok(())
}

/// The command that starts a member of the cell of these.
pub fn command(dir: &Path, domain: Option<&str>, members: &[Member], member: &Member) -> String {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    let (all, own, host) = (dir.display(), dir.join(&member.name), member.host());
    let own = own.display();
    let cluster: Vec<String> =
        members.iter().map(|other| format!("{}=https://{}:2380", other.name, other.host())).collect();
    let mut words = vec![
        "tenured".to_string(),
        format!("--name {}", member.name),
        format!("--data-dir {}.tenure", member.name),
        format!("--listen-client-urls https://{host}:2379 --advertise-client-urls https://{host}:2379"),
        format!("--cert-file {own}/server.crt --key-file {own}/server.key --trusted-ca-file {all}/ca.crt"),
        format!("--listen-peer-urls https://{host}:2380 --initial-advertise-peer-urls https://{host}:2380"),
        format!("--peer-cert-file {own}/peer.crt --peer-key-file {own}/peer.key --peer-trusted-ca-file {all}/ca.crt"),
        format!("--initial-cluster {}", cluster.join(",")),
        format!("--listen-admin-urls https://{host}:2382"),
        format!("--issuer-cert-file {all}/ca.crt --issuer-key-file {all}/ca.key"),
    ];
    if let Some(domain) = domain {
        words.push(format!("--cell-domain {domain}"));
    }
    words.join(" ")
}

fn lasting(days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    // Clocks differ.
    params.not_before = OffsetDateTime::now_utc() - Duration::HOUR;
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    params
}

fn sign(
    issuer: &Issuer<'_, KeyPair>,
    dir: &Path,
    file: &str,
    name: &str,
    names: Vec<SanType>,
    uses: &[ExtendedKeyUsagePurpose],
) -> Result<(), InitError> {
    let key = KeyPair::generate()?;
    let mut params = lasting(LEAF_DAYS);
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = uses.to_vec();
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer)?;
    write(&dir.join(format!("{file}.key")), &key.serialize_pem(), Mode::Private)?;
    write(&dir.join(format!("{file}.crt")), &certificate.pem(), Mode::Public)
}

fn write(path: &Path, content: &str, mode: Mode) -> Result<(), InitError> {
    let written = files::write(path, content.as_bytes(), mode);
    written.map_err(|error| InitError::Write { path: path.display().to_string(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_named_with_their_hosts() {
        let member = Member::parse("m1=10.0.0.1,m1.example").unwrap();
        assert_eq!((member.name.as_str(), member.hosts.len()), ("m1", 2));
        assert_eq!(Member::parse("m1=fd00::1").unwrap().host(), "[fd00::1]");
        for bad in ["m1", "=a", "m1=", "m1=a,,b", "m1=a b", "m 1=a", "m1=a/b"] {
            assert!(Member::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cell_gets_certificates_once_and_more_members_later() {
        let dir = tempfile::tempdir().unwrap();
        let members = [Member::parse("m1=10.0.0.1").unwrap(), Member::parse("m2=m2.example").unwrap()];
        init(dir.path(), Some("etcd.example"), &members[..1], Start::New).unwrap();
        let ca = std::fs::read(dir.path().join("ca.crt")).unwrap();
        assert!(matches!(init(dir.path(), None, &members, Start::New), Err(InitError::Exists(_))));
        init(dir.path(), None, &members[1..], Start::AddMembers).unwrap();
        assert_eq!(std::fs::read(dir.path().join("ca.crt")).unwrap(), ca);
        for file in ["admin.crt", "admin.key", "m1/server.crt", "m1/peer.key", "m2/server.key", "m2/peer.crt"] {
            assert!(dir.path().join(file).exists(), "{file}");
        }
        init(dir.path(), None, &members, Start::Force).unwrap();
        assert_ne!(std::fs::read(dir.path().join("ca.crt")).unwrap(), ca);
        let line = command(dir.path(), Some("etcd.example"), &members, &members[0]);
        assert!(line.contains("--initial-cluster m1=https://10.0.0.1:2380,m2=https://m2.example:2380"), "{line}");
        assert!(line.ends_with("--cell-domain etcd.example"));
    }
}
