//! A served cell with everything an operator has, and what tests of several files do with it.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tenure_admin_api::v1::admin_client::AdminClient;
use tenure_admin_api::v1::{self as api, State};
use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::builder::ADMIN_SOCKET;
use tenure_etcd_shim::flags::TlsFiles;
use tenure_etcd_shim::issuer::IssuerFiles;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::client::{Authority, Identity, Secured, connect, put, write};

/// A cell with TLS and certificates, a CA of tenants, the admin socket. It listens for clients, administrators and scrapes, in this order.
pub(crate) struct Scene {
    _dir: tempfile::TempDir,
    pub(crate) tenure: Tenure,
    pub(crate) authority: Authority,
    pub(crate) admin: AdminClient<Channel>,
}

async fn admin_at(socket: PathBuf) -> AdminClient<Channel> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://admin").connect_with_connector(connector).await.unwrap();
    AdminClient::new(channel)
}

async fn serve(dir: &Path, authority: &Authority) -> Tenure {
    let server = authority.sign(&[]);
    let ca = write(dir, "ca.crt", &authority.certificate.pem());
    let files = TlsFiles::Files {
        cert_file: write(dir, "server.crt", &server.pem),
        key_file: write(dir, "server.key", &server.key.serialize_pem()),
        trusted_ca_file: None,
    };
    let issuer = IssuerFiles { cert_file: ca, key_file: write(dir, "ca.key", &authority.issuer.key().serialize_pem()) };
    Tenure::builder()
        .data_dir(dir.join("data"))
        .tls(files)
        .issuer(issuer)
        .cell_domain("cell.example")
        .listen("https://127.0.0.1:0")
        .admin_listen("https://127.0.0.1:0")
        .metrics_listen("http://127.0.0.1:0")
        .admin_socket()
        .start()
        .await
        .unwrap()
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let tenure = serve(dir.path(), &authority).await;
        let admin = admin_at(dir.path().join("data").join(ADMIN_SOCKET)).await;
        Scene { _dir: dir, tenure, authority, admin }
    }

    pub(crate) async fn create(&mut self, name: &str) -> api::Tenant {
        let request = api::CreateTenantRequest { name: name.to_string(), ..Default::default() };
        self.admin.create_tenant(request).await.unwrap().into_inner().tenant.unwrap()
    }

    pub(crate) async fn set_state(&mut self, name: &str, state: State) {
        let request = api::SetTenantStateRequest { name: name.to_string(), state: state.into() };
        self.admin.set_tenant_state(request).await.unwrap();
    }

    pub(crate) async fn credentials(&mut self, tenant: &str) -> (Identity, api::IssueCredentialsResponse) {
        let key = KeyPair::generate().unwrap();
        let csr_der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let request = api::IssueCredentialsRequest { tenant: tenant.to_string(), csr_der, ..Default::default() };
        let issued = self.admin.issue_credentials(request).await.unwrap().into_inner();
        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap().into_owned();
        (Identity { certificate: der, pem: issued.certificate_pem.clone(), key }, issued)
    }

    pub(crate) async fn connect(&self, identity: &Identity) -> std::io::Result<Secured> {
        connect(self.tenure.addresses()[0], &self.authority, Some(identity), b"h2").await
    }

    /// A connection that the server has let in. A handshake is over at this end before the server has looked who came.
    pub(crate) async fn admitted(&self, identity: &Identity) -> Secured {
        let mut stream = self.connect(identity).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        stream.read_exact(&mut [0; 9]).await.unwrap();
        stream
    }

    pub(crate) async fn gets_in(&self, identity: &Identity) -> bool {
        match self.connect(identity).await {
            Ok(stream) => put(stream, "k").await.is_ok(),
            Err(_) => false,
        }
    }
}

/// Waits until the server closes the connection.
pub(crate) async fn closed(mut stream: Secured) {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}
