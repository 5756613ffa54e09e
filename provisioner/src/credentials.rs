//! Credentials of a tenant: a key made here, a certificate signed by the cell, and what a kube-apiserver needs to use them.
//!
//! The key never leaves this machine: the cell gets a signing request. Files are written whole, the key readable by its owner alone, and
//! the flags file last, so that whoever finds it finds all of what it names.

use std::path::Path;

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tenure_admin_api::{TENANT_URI_PREFIX, v1 as api};
use x509_parser::extensions::GeneralName;

use crate::cells::{CellsError, Reached};
use crate::files::{self, Mode};

/// The files of a directory of credentials.
pub const CA_CERT: &str = "ca.crt";
pub const CLIENT_CERT: &str = "client.crt";
pub const CLIENT_KEY: &str = "client.key";
pub const FLAGS: &str = "apiserver-flags";

/// The files of an administrator.
pub const ADMIN_FILES: [&str; 2] = ["admin.crt", "admin.key"];

/// Where a pod mounts them.
const MOUNT_PATH: &str = "/etc/kubernetes/pki/tenure";

/// What goes wrong, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("make a key: {0}")]
    Key(#[from] rcgen::Error),
    #[error("issue credentials: {0}")]
    Refused(#[from] CellsError),
    #[error("write {path}: {error}")]
    Write { path: String, error: std::io::Error },
    #[error("{0} is there already: --force replaces it{1}")]
    Exists(String, &'static str),
    #[error("read {path}: {what}; tenurectl tenant credentials makes new ones")]
    Read { path: String, what: String },
    #[error("{path} is not a certificate of tenant {tenant:?}: say the directory of its own credentials")]
    OtherTenant { path: String, tenant: String },
    #[error("the cell names no URL for clients: start its members with --advertise-client-urls")]
    NoEndpoints,
}

/// Credentials with the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The cell that the tenant is in.
    pub cell: String,
    pub tenant: String,
    pub ca_pem: String,
    pub certificate_pem: String,
    pub key_pem: String,
    /// Hexadecimal.
    pub serial: String,
    pub not_after_ms: i64,
    pub endpoints: Vec<String>,
}

/// Makes a key and has the cell sign it.
///
/// # Errors
/// [`CredentialsError::Refused`], [`CredentialsError::NoEndpoints`].
pub async fn issue(
    reached: &mut Reached,
    tenant: &str,
    user: &str,
    ttl_seconds: u64,
) -> Result<Credentials, CredentialsError> {
    let issued = sign(reached, tenant, user, ttl_seconds, false).await?;
    if issued.endpoints.is_empty() {
        return Err(CredentialsError::NoEndpoints);
    }
    Ok(issued)
}

/// As [`issue`], for an administrator: of no tenant, and with no endpoints.
///
/// # Errors
/// [`CredentialsError::Refused`].
pub async fn issue_admin(reached: &mut Reached, user: &str, ttl_seconds: u64) -> Result<Credentials, CredentialsError> {
    sign(reached, "", user, ttl_seconds, true).await
}

async fn sign(
    reached: &mut Reached,
    tenant: &str,
    user: &str,
    ttl_seconds: u64,
    admin: bool,
) -> Result<Credentials, CredentialsError> {
    let key = KeyPair::generate()?;
    let csr_der = CertificateParams::default().serialize_request(&key)?.der().to_vec();
    let (tenant, user) = (tenant.to_string(), user.to_string());
    let request = api::IssueCredentialsRequest { tenant: tenant.clone(), csr_der, user, ttl_seconds, admin };
    let issued = reached.client.issue_credentials(request).await;
    let issued = issued.map_err(|status| reached.cell.call_error(status))?.into_inner();
    Ok(Credentials {
        cell: reached.cell.name.clone(),
        tenant,
        ca_pem: issued.ca_pem,
        certificate_pem: issued.certificate_pem,
        key_pem: key.serialize_pem(),
        serial: issued.serial,
        not_after_ms: issued.not_after_ms,
        endpoints: issued.endpoints,
    })
}

/// The flags of a kube-apiserver, with the files in this directory.
pub fn apiserver_flags(endpoints: &[String], dir: &str) -> Vec<String> {
    vec![
        format!("--etcd-servers={}", endpoints.join(",")),
        format!("--etcd-cafile={dir}/{CA_CERT}"),
        format!("--etcd-certfile={dir}/{CLIENT_CERT}"),
        format!("--etcd-keyfile={dir}/{CLIENT_KEY}"),
    ]
}

impl Credentials {
    /// Writes `ca.crt`, `client.crt`, `client.key` and `apiserver-flags` to a directory, which is made if it is not there.
    ///
    /// # Errors
    /// [`CredentialsError::Exists`] unless `replace`; [`CredentialsError::Write`].
    pub fn write(&self, dir: &Path, replace: bool) -> Result<(), CredentialsError> {
        check_free(dir, &[CLIENT_CERT, CLIENT_KEY], replace)?;
        let absolute = std::path::absolute(dir).map_err(not_written(dir))?;
        let flags = apiserver_flags(&self.endpoints, &absolute.display().to_string()).join(" ") + "\n";
        write_all(
            dir,
            &[
                (CA_CERT, &self.ca_pem, Mode::Public),
                (CLIENT_KEY, &self.key_pem, Mode::Private),
                (CLIENT_CERT, &self.certificate_pem, Mode::Public),
                (FLAGS, &flags, Mode::Public),
            ],
        )
    }

    /// Writes [`ADMIN_FILES`] to a directory, which is made if it is not there. Of the cell's CA only if it has none: that may be the
    /// directory of the CA itself, or hold more than one.
    ///
    /// # Errors
    /// [`CredentialsError::Write`].
    pub fn write_admin(&self, dir: &Path) -> Result<(), CredentialsError> {
        let [certificate, key] = ADMIN_FILES;
        if !dir.join(CA_CERT).exists() {
            write_all(dir, &[(CA_CERT, &self.ca_pem, Mode::Public)])?;
        }
        write_all(dir, &[(key, &self.key_pem, Mode::Private), (certificate, &self.certificate_pem, Mode::Public)])
    }

    /// A Secret that holds them, and a JSON patch (RFC 6902) that has the first container of a Deployment's pods use it. A merge patch would
    /// put the flags of etcd in the place of all others.
    pub fn kubernetes(&self, namespace: &str, secret: &str) -> [Value; 2] {
        let secret_object = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": secret,
                "namespace": namespace,
                "labels": { "tenure.dev/tenant": self.tenant },
                "annotations": { "tenure.dev/cell": self.cell, "tenure.dev/serial": self.serial },
            },
            "type": "Opaque",
            "stringData": { CA_CERT: self.ca_pem, CLIENT_CERT: self.certificate_pem, CLIENT_KEY: self.key_pem },
        });
        let add = |to: &str, value: Value| json!({ "op": "add", "path": format!("/spec/template/spec/{to}/-"), "value": value });
        let flags = apiserver_flags(&self.endpoints, MOUNT_PATH).into_iter();
        let mut patch: Vec<Value> = flags.map(|flag| add("containers/0/args", json!(flag))).collect();
        let mount = json!({ "name": "tenure", "mountPath": MOUNT_PATH, "readOnly": true });
        patch.push(add("containers/0/volumeMounts", mount));
        let volume = json!({ "name": "tenure", "secret": { "secretName": secret, "defaultMode": 0o400 } });
        patch.push(add("volumes", volume));
        [secret_object, Value::Array(patch)]
    }
}

/// Whether none of these files is in the way.
///
/// # Errors
/// [`CredentialsError::Exists`] unless they may be replaced.
pub fn check_free(dir: &Path, names: &[&str], replace: bool) -> Result<(), CredentialsError> {
    match names.iter().find(|name| !replace && dir.join(name).exists()) {
        Some(there) => {
            let renews = if *there == CLIENT_CERT { ", tenurectl tenant rotate renews it" } else { "" };
            Err(CredentialsError::Exists(dir.join(there).display().to_string(), renews))
        }
        None => Ok(()),
    }
}

fn not_written(path: &Path) -> impl FnOnce(std::io::Error) -> CredentialsError + use<> {
    let path = path.display().to_string();
    move |error| CredentialsError::Write { path, error }
}

fn write_all(dir: &Path, all: &[(&str, &String, Mode)]) -> Result<(), CredentialsError> {
    files::make_dir(dir).map_err(not_written(dir))?;
    for (name, content, mode) in all {
        let path = dir.join(name);
        files::write(&path, content.as_bytes(), *mode).map_err(not_written(&path))?;
    }
    Ok(())
}

/// What the certificate in a directory of credentials says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// Hexadecimal.
    pub serial: String,
    /// The user inside the tenant.
    pub user: Option<String>,
}

/// The certificate in a directory of credentials, which must be this tenant's.
///
/// # Errors
/// [`CredentialsError::Read`]; [`CredentialsError::OtherTenant`]: a control plane that is started with these files would get another
/// one's data.
pub fn of_tenant_in(dir: &Path, tenant: &str) -> Result<Current, CredentialsError> {
    let path = dir.join(CLIENT_CERT);
    let failed = |what: String| CredentialsError::Read { path: path.display().to_string(), what };
    let der = CertificateDer::from_pem_file(&path).map_err(|error| failed(error.to_string()))?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).map_err(|error| failed(error.to_string()))?;
    let names = certificate.subject_alternative_name().map_err(|error| failed(error.to_string()))?;
    let uri = format!("{TENANT_URI_PREFIX}{tenant}");
    let is_it = |name: &GeneralName<'_>| matches!(name, GeneralName::URI(of) if *of == uri);
    if !names.is_some_and(|names| names.value.general_names.iter().any(is_it)) {
        let (path, tenant) = (path.display().to_string(), tenant.to_string());
        return Err(CredentialsError::OtherTenant { path, tenant });
    }
    let bytes = certificate.raw_serial().iter().skip_while(|byte| **byte == 0);
    let user = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    Ok(Current { serial: bytes.map(|byte| format!("{byte:02x}")).collect(), user: user.map(str::to_string) })
}

#[cfg(test)]
mod tests {
    use rcgen::{DnType, SanType};

    use super::*;

    fn credentials() -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.serial_number = Some(vec![0xab, 0xcd].into());
        params.subject_alt_names = vec![SanType::URI("tenure://tenant/acme".try_into().unwrap())];
        params.distinguished_name.push(DnType::CommonName, "scheduler");
        Credentials {
            cell: "east".to_string(),
            tenant: "acme".to_string(),
            ca_pem: "ca".to_string(),
            certificate_pem: params.self_signed(&key).unwrap().pem(),
            key_pem: key.serialize_pem(),
            serial: "abcd".to_string(),
            not_after_ms: 0,
            endpoints: vec!["https://a:2379".to_string(), "https://b:2379".to_string()],
        }
    }

    #[test]
    fn a_directory_holds_all_that_an_apiserver_needs() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("acme");
        let first = credentials();
        first.write(&out, false).unwrap();
        let flags = std::fs::read_to_string(out.join(FLAGS)).unwrap();
        let at = out.display();
        assert_eq!(
            flags,
            format!(
                "--etcd-servers=https://a:2379,https://b:2379 --etcd-cafile={at}/ca.crt \
                 --etcd-certfile={at}/client.crt --etcd-keyfile={at}/client.key\n"
            )
        );
        let current = Current { serial: "abcd".to_string(), user: Some("scheduler".to_string()) };
        assert_eq!(of_tenant_in(&out, "acme").unwrap(), current);
        assert!(matches!(of_tenant_in(&out, "globex"), Err(CredentialsError::OtherTenant { .. })));
        assert!(matches!(first.write(&out, false), Err(CredentialsError::Exists(..))));
        let second = credentials();
        second.write(&out, true).unwrap();
        // An administrator's may go where the CA is.
        let ca = std::fs::read(out.join(CA_CERT)).unwrap();
        Credentials { ca_pem: "another".to_string(), ..credentials() }.write_admin(&out).unwrap();
        assert_eq!(std::fs::read(out.join(CA_CERT)).unwrap(), ca);
        assert!(matches!(check_free(&out, &ADMIN_FILES, false), Err(CredentialsError::Exists(_, ""))));
        check_free(&out, &ADMIN_FILES, true).unwrap();
        assert_eq!(std::fs::read_to_string(out.join(CLIENT_KEY)).unwrap(), second.key_pem);
    }

    #[test]
    fn a_pod_mounts_what_its_flags_name() {
        let [secret, patch] = credentials().kubernetes("hosted-acme", "acme-etcd");
        assert_eq!(secret["stringData"].as_object().unwrap().len(), 3);
        let [args @ .., mount, volume] = patch.as_array().unwrap().as_slice() else { panic!("{patch}") };
        assert_eq!(volume["value"]["secret"]["secretName"], "acme-etcd");
        let mounted_at = mount["value"]["mountPath"].as_str().unwrap();
        assert_eq!(args.len(), 4);
        assert!(args.iter().skip(1).all(|arg| arg["value"].as_str().unwrap().contains(mounted_at)));
    }
}
