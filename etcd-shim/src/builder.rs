//! Putting a member together: store, services, listeners. `tenured` is this with its settings read from flags.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tenure_etcd_shim::Tenure;
//!
//! let tenure = Tenure::builder()
//!     .data_dir("/var/lib/acme/store")
//!     .tenant("acme")
//!     .tenant_listen("acme", "http://127.0.0.1:2401") // or no listener at all
//!     .start()
//!     .await?;
//! let client = tenure.client("acme").ok_or("the builder made it")?;
//! client.put("greeting", "hello").await?;
//! tenure.stop().await;
//! # Ok(())
//! # }
//! ```
//!
//! Listeners are bound before the store is opened: a port that is taken shows at once, and clients that connect early wait
//! instead of being turned away. They are served once the log is replayed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tenure_admin_api::v1::admin_server::AdminServer;
use tenure_raft_server::transport::peers::{self, PeerTls};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use url::Url;

use crate::admin::AdminService;
use crate::authorities::Authorities;
use crate::auto_compaction::AutoCompaction;
use crate::cell::{Cell, CellConfig, ClusterState, DEFAULT_TENANT, InitialCluster, MemberNames, OpenError};
use crate::client::Client;
use crate::flags::TlsFiles;
use crate::http_endpoints::HttpAccess;
use crate::inflight::{Budget, InFlight};
use crate::issuer::IssuerFiles;
use crate::listen::{ConnectionLimits, ListenError, Listener, Serves, Services, Stop, bind_peer, serve};
use crate::rpc_metrics::RpcMetrics;
use crate::server::Router;
use crate::service::watch::PROGRESS_PERIOD_DEFAULT;
use crate::service::{Context, Limits};
use crate::tls::{MemberTls, PeerTlsFiles, Tls, TlsError};
use crate::tls_protocol::TlsProtocol;

/// The file in the data directory on which administrators of this machine are served.
pub const ADMIN_SOCKET: &str = "admin.sock";

/// What [`Tenure::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    cell: CellConfig,
    limits: Limits,
    progress_period: Duration,
    listen: Vec<Listen>,
    advertise_client_urls: Vec<String>,
    tls: Option<TlsFiles>,
    tls_protocol: TlsProtocol,
    peer_listen: Vec<String>,
    peer_tls: Option<PeerTlsFiles>,
    connections: ConnectionLimits,
    access: HttpAccess,
    cell_domain: Option<String>,
    issuer: Option<IssuerFiles>,
    admin_socket: bool,
}

#[derive(Clone, Debug)]
struct Listen {
    url: String,
    tenant: Option<String>,
    serves: Serves,
}

/// Why a member did not start. Each is one clear line; nothing runs then.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listen on {url:?}: {error}")]
    Url { url: String, error: url::ParseError },
    #[error("listen on {0:?}: TLS needs a certificate and its key")]
    NoCertificate(String),
    #[error("listen for peers: all URLs must be https, or none")]
    MixedPeers,
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A running member: the store, and whatever it listens on.
pub struct Tenure {
    cell: Cell,
    addresses: Vec<SocketAddr>,
    serving: JoinSet<()>,
    stop: watch::Sender<Stop>,
    /// Serves other members.
    peer_serving: JoinSet<()>,
}

impl Tenure {
    /// etcd's defaults, no listener.
    pub fn builder() -> Builder {
        Builder {
            cell: CellConfig::new("default.tenure"),
            limits: Limits::default(),
            progress_period: PROGRESS_PERIOD_DEFAULT,
            listen: Vec::new(),
            advertise_client_urls: Vec::new(),
            tls: None,
            tls_protocol: TlsProtocol::default(),
            peer_listen: Vec::new(),
            peer_tls: None,
            connections: ConnectionLimits::default(),
            access: HttpAccess::default(),
            cell_domain: None,
            issuer: None,
            admin_socket: false,
        }
    }

    /// The in-process client of a tenant; `None` if there is no such tenant.
    pub fn client(&self, tenant: &str) -> Option<Client> {
        self.cell.tenant(tenant).map(Client::new)
    }

    /// The store itself: its tenants, its state, and whether it has failed.
    pub fn cell(&self) -> &Cell {
        &self.cell
    }

    /// The TCP addresses it listens on, in the order they were given: with port 0, the ports the system chose.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Stops: no more connections, running requests end (open streams are cut after some seconds, as in etcd), everything
    /// applied is flushed. The data directory is free again when all clients and watchers are dropped too.
    pub async fn stop(self) {
        self.stop_hurried_by(std::future::pending()).await;
    }

    /// As [`Tenure::stop`], but requests that still run when `hurry` ends are cut at once.
    pub async fn stop_hurried_by(mut self, hurry: impl Future<Output = ()>) {
        self.stop.send_replace(Stop::Drain);
        let served = async { while self.serving.join_next().await.is_some() {} };
        tokio::pin!(served);
        tokio::select! {
            () = &mut served => {}
            () = hurry => {
                tracing::info!("cut the requests that still run");
                self.stop.send_replace(Stop::Cut);
                served.await;
            }
        }
        // Others are still served, so that one of them can take over.
        self.cell.stop().await;
        self.peer_serving.shutdown().await;
    }
}

impl Builder {
    /// Where everything is kept; made if it does not exist. Default `default.tenure` in the working directory.
    pub fn data_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.cell.data_dir = path.into();
        self
    }

    /// What the member calls itself in member lists. Default `default`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.cell.names.name = name.into();
        self
    }

    /// A tenant that is to exist, beside `default`.
    pub fn tenant(mut self, name: impl Into<String>) -> Self {
        self.cell.tenants.push(name.into());
        self
    }

    /// Serves etcd clients on `http://`, `https://`, `unix:` or `unixs:`. They belong to the tenant that their certificate
    /// names or, where no certificate is asked for, to `default`.
    pub fn listen(mut self, url: impl Into<String>) -> Self {
        self.listen.push(Listen { url: url.into(), tenant: None, serves: Serves::Everything });
        self
    }

    /// As [`Builder::listen`], for gRPC alone.
    pub fn grpc_listen(mut self, url: impl Into<String>) -> Self {
        self.listen.push(Listen { url: url.into(), tenant: None, serves: Serves::Grpc });
        self
    }

    /// As [`Builder::listen`], for HTTP alone.
    pub fn http_listen(mut self, url: impl Into<String>) -> Self {
        self.listen.push(Listen { url: url.into(), tenant: None, serves: Serves::Http });
        self
    }

    /// Serves `/metrics` and the health checks of the tenant `default`, and no clients.
    pub fn metrics_listen(mut self, url: impl Into<String>) -> Self {
        let tenant = Some(DEFAULT_TENANT.to_string());
        self.listen.push(Listen { url: url.into(), tenant, serves: Serves::Metrics });
        self
    }

    /// Serves etcd clients of one tenant, which is made if it does not exist.
    pub fn tenant_listen(mut self, tenant: impl Into<String>, url: impl Into<String>) -> Self {
        let tenant = tenant.into();
        self.listen.push(Listen { url: url.into(), tenant: Some(tenant.clone()), serves: Serves::Everything });
        self.tenant(tenant)
    }

    /// Serves the admin API on `https://`, to clients whose certificate is an administrator's; see [`crate::admin`].
    pub fn admin_listen(mut self, url: impl Into<String>) -> Self {
        self.listen.push(Listen { url: url.into(), tenant: None, serves: Serves::Admin });
        self
    }

    /// Serves the admin API on the socket file [`ADMIN_SOCKET`] in the data directory, to this process's user. Default: no.
    pub fn admin_socket(mut self) -> Self {
        self.admin_socket = true;
        self
    }

    /// The CA that signs certificates of tenants. Unless [`Builder::tls`] names a CA of client certificates, it is that too.
    pub fn issuer(mut self, files: IssuerFiles) -> Self {
        self.issuer = Some(files);
        self
    }

    /// A TLS client that calls the server `NAME.DOMAIN` is tenant `NAME`, if no certificate says so. Default: none.
    pub fn cell_domain(mut self, domain: impl Into<String>) -> Self {
        self.cell_domain = Some(domain.into());
        self
    }

    /// Where clients are told to connect. Default: the URLs of [`Builder::listen`], as they were given.
    pub fn advertise_client_url(mut self, url: impl Into<String>) -> Self {
        self.advertise_client_urls.push(url.into());
        self
    }

    /// The certificate of all TLS listeners.
    pub fn tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }

    /// What TLS may be spoken with clients and members. Default: TLS 1.2 and 1.3 with every suite that rustls has.
    pub fn tls_protocol(mut self, protocol: TlsProtocol) -> Self {
        self.tls_protocol = protocol;
        self
    }

    /// Bytes each tenant may hold; 0 is 2 GiB, negative is no limit.
    pub fn quota_backend_bytes(mut self, bytes: i64) -> Self {
        self.cell.quota_backend_bytes = bytes;
        self
    }

    /// Which revisions of tenants go without anybody's asking. Default: none.
    pub fn auto_compaction(mut self, kept: AutoCompaction) -> Self {
        self.cell.auto_compaction = Some(kept);
        self
    }

    /// The largest request and txn of network clients.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Period of watch progress notifications to network clients.
    pub fn watch_progress_notify_interval(mut self, period: Duration) -> Self {
        self.progress_period = period;
        self
    }

    /// Raft's clock: between heartbeats, and longest without a leader before an election. The latter also decides the
    /// shortest lease and how long a request may take.
    pub fn timing(mut self, heartbeat_interval: Duration, election_timeout: Duration) -> Self {
        self.cell.heartbeat_interval = heartbeat_interval;
        self.cell.election_timeout = election_timeout;
        self
    }

    /// What one network connection may do.
    pub fn connection_limits(mut self, limits: ConnectionLimits) -> Self {
        self.connections = limits;
        self
    }

    /// Which web pages and host names the HTTP side serves. Default: all.
    pub fn http_access(mut self, access: HttpAccess) -> Self {
        self.access = access;
        self
    }

    /// Free bytes on the disk of the data directory below which writes are refused; see [`crate::disk`].
    pub fn disk_reserve_bytes(mut self, bytes: u64) -> Self {
        self.cell.disk_reserve_bytes = Some(bytes);
        self
    }

    /// Goes on alone with what the data directory holds, and removes the other members: when a majority is lost for ever.
    pub fn force_new_cluster(mut self) -> Self {
        self.cell.force_new_cluster = true;
        self
    }

    /// What etcd's formulas make the ids of a new data directory from. An existing one keeps its ids.
    pub fn bootstrap(mut self, peer_urls: Vec<String>, cluster_token: impl Into<String>) -> Self {
        self.cell.names.peer_urls = peer_urls;
        self.cell.cluster_token = cluster_token.into();
        self
    }

    /// Serves other members on `http://` or `https://`. Without it the member is alone for ever.
    pub fn peer_listen(mut self, url: impl Into<String>) -> Self {
        self.peer_listen.push(url.into());
        self
    }

    /// The certificates of members among each other.
    pub fn peer_tls(mut self, files: PeerTlsFiles) -> Self {
        self.peer_tls = Some(files);
        self
    }

    /// The members of a new cell, or of the one that this member joins. Default: this one alone.
    pub fn initial_cluster(mut self, members: InitialCluster, state: ClusterState) -> Self {
        self.cell.initial_cluster = members;
        self.cell.cluster_state = state;
        self
    }

    /// What is asked for before the members of the cell change, and how many may be learners at a time.
    pub fn reconfiguration(mut self, strict_check: bool, max_learners: usize) -> Self {
        self.cell.strict_reconfig_check = strict_check;
        self.cell.max_learners = max_learners;
        self
    }

    /// Whether a member asks if it could win before it disturbs the others with an election. Default true.
    pub fn pre_vote(mut self, pre_vote: bool) -> Self {
        self.cell.pre_vote = pre_vote;
        self
    }

    /// How long applying a round of entries may take before it is counted and logged. Default 100 ms.
    pub fn slow_apply(mut self, longest: Duration) -> Self {
        self.cell.slow_apply = longest;
        self
    }

    /// After how many log entries the state is made durable (0: by their bytes alone), and how many are kept for members that are
    /// behind.
    pub fn snapshots(mut self, count: u64, catchup_entries: u64) -> Self {
        self.cell.snapshot_count = count;
        self.cell.snapshot_catchup_entries = catchup_entries;
        self
    }

    /// Opens the store and serves. Must be called in a multi-threaded tokio runtime with its drivers enabled; the member
    /// lives there.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(mut self) -> Result<Tenure, StartError> {
        if let (Some(TlsFiles::Files { trusted_ca_file, .. }), Some(issuer)) = (&mut self.tls, &self.issuer) {
            trusted_ca_file.get_or_insert_with(|| issuer.cert_file.clone());
        }
        let authorities = Arc::new(Authorities::default());
        let listeners = self.bind(&authorities).await?;
        let addresses = listeners.iter().filter_map(Listener::local_addr).collect();
        let peer_hosts = self.cell.names.peer_urls.iter().filter_map(|url| host_of(url));
        let peer_tls = match self.peer_tls.take() {
            Some(files) => Some(MemberTls::new(files, self.tls_protocol.clone(), &peer_hosts.collect::<Vec<_>>())?),
            None => None,
        };
        let peer_tls = peer_tls.map(|tls| Arc::new(tls) as Arc<dyn PeerTls>);
        let (peer_listeners, peer_secure) = self.bind_peers(peer_tls.is_some()).await?;
        self.cell.peer_tls.clone_from(&peer_tls);
        self.cell.names = self.member_names();
        let opening = Cell::begin(self.cell.clone()).await?;
        let mut peer_serving = JoinSet::new();
        if !peer_listeners.is_empty() {
            let server_tls = peer_tls.filter(|_| peer_secure);
            let peers = opening.peers().clone();
            peer_serving.spawn(peers::serve(peer_listeners, server_tls, peers, std::future::pending()));
        }
        let cell = opening.cell().clone();
        authorities.open(cell.clone());
        let open_requests = cell.open_requests();
        let in_flight = InFlight::new(Budget::default(), open_requests.clone());
        let context = Context { cell: cell.clone(), limits: self.limits, in_flight };
        let rpc_metrics = RpcMetrics::default();
        let admin = AdminService::new(cell.clone(), rpc_metrics.clone(), self.issuer.clone());
        let services = Services {
            cell: cell.clone(),
            router: Router::new(&context, self.progress_period),
            admin: AdminServer::new(admin),
            arriving: InFlight::new(Budget::default(), open_requests.clone()),
            rpc_metrics,
            turns: cell.turns(),
            access: Arc::new(self.access.clone()),
            limits: self.connections,
            refused: Arc::default(),
            refused_administration: Arc::default(),
        };
        let (stop, stopping) = watch::channel(Stop::NotYet);
        let mut serving = JoinSet::new();
        // Whoever watches this member wants to see it wait for the others; clients wait until it serves.
        let (for_watchers, for_clients): (Vec<_>, Vec<_>) =
            listeners.into_iter().partition(|listener| listener.serves() == Serves::Metrics);
        for listener in for_watchers {
            serving.spawn(serve(listener, services.clone(), stopping.clone()));
        }
        opening.complete().await?;
        for listener in for_clients.into_iter().chain(self.bind_admin_socket()) {
            serving.spawn(serve(listener, services.clone(), stopping.clone()));
        }
        Ok(Tenure { cell, addresses, serving, stop, peer_serving })
    }

    /// Not worth a member: the name of a socket file may be too long, its file system may have none.
    fn bind_admin_socket(&self) -> Option<Listener> {
        if !self.admin_socket {
            return None;
        }
        let path = self.cell.data_dir.join(ADMIN_SOCKET);
        match Listener::bind_admin_socket(path.clone()) {
            Ok(listener) => {
                tracing::info!(path = %path.display(), "serving the admin API: tenurectl --endpoint unix:PATH");
                Some(listener)
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "serve the admin API on a socket file");
                None
            }
        }
    }

    async fn bind(&self, authorities: &Arc<Authorities>) -> Result<Vec<Listener>, StartError> {
        let hosts: Vec<String> = self.listen.iter().filter_map(|listen| host_of(&listen.url)).collect();
        let with = |authorities: Option<Arc<Authorities>>| {
            let tls = self.tls.clone().map(|files| Tls::new(files, self.tls_protocol.clone(), &hosts, authorities));
            tls.transpose().map(|tls| tls.map(Arc::new))
        };
        // Certificates of administrators, and of whoever watches members, are the cell's, whatever tenants trust.
        let (tls, of_admins) = (with(Some(Arc::clone(authorities)))?, with(None)?);
        let client_cert_auth = self.tls.as_ref().is_some_and(TlsFiles::client_cert_auth);
        let mut listeners = Vec::with_capacity(self.listen.len());
        for Listen { url: text, tenant, serves } in &self.listen {
            let url = Url::parse(text).map_err(|error| StartError::Url { url: text.clone(), error })?;
            if tls.is_none() && matches!(url.scheme(), "https" | "unixs") {
                return Err(StartError::NoCertificate(text.clone()));
            }
            let (tenant, domain) = (tenant.clone(), self.cell_domain.clone());
            let of_cell = matches!(serves, Serves::Admin | Serves::Metrics);
            let tls = if of_cell { of_admins.clone() } else { tls.clone() };
            listeners.push(Listener::bind(&url, tenant, *serves, tls, client_cert_auth, domain).await?);
        }
        Ok(listeners)
    }

    /// The listeners for other members, and whether they speak TLS: all of them, or none.
    async fn bind_peers(&self, has_tls: bool) -> Result<(Vec<TcpListener>, bool), StartError> {
        let mut listeners = Vec::new();
        let mut secure = None;
        for text in &self.peer_listen {
            let url = Url::parse(text).map_err(|error| StartError::Url { url: text.clone(), error })?;
            let is_secure = url.scheme() == "https";
            if is_secure && !has_tls {
                return Err(StartError::NoCertificate(text.clone()));
            }
            if secure.replace(is_secure).is_some_and(|before| before != is_secure) {
                return Err(StartError::MixedPeers);
            }
            listeners.push(bind_peer(&url).await?);
        }
        Ok((listeners, secure.unwrap_or(false)))
    }

    fn member_names(&self) -> MemberNames {
        let serves_grpc = |serves| matches!(serves, Serves::Everything | Serves::Grpc);
        let listened = self.listen.iter().filter(|listen| listen.tenant.is_none() && serves_grpc(listen.serves));
        let client_urls = match self.advertise_client_urls.as_slice() {
            [] => listened.map(|listen| listen.url.clone()).collect(),
            given => given.to_vec(),
        };
        let mut tenant_client_urls = BTreeMap::<String, Vec<String>>::new();
        for listen in self.listen.iter().filter(|listen| serves_grpc(listen.serves)) {
            if let Some(tenant) = &listen.tenant {
                // As a person writes it: a parsed URL has got a slash behind its authority.
                let url = listen.url.trim_end_matches('/').to_string();
                tenant_client_urls.entry(tenant.clone()).or_default().push(url);
            }
        }
        let MemberNames { name, peer_urls, .. } = self.cell.names.clone();
        MemberNames { name, peer_urls, client_urls, tenant_client_urls }
    }
}

fn host_of(url: &str) -> Option<String> {
    Some(Url::parse(url).ok()?.host_str()?.trim_matches(['[', ']']).to_string())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_store_serves_the_network_and_its_program() {
        let dir = tempfile::tempdir().unwrap();
        let tenure = Tenure::builder()
            .data_dir(dir.path())
            .listen("http://127.0.0.1:0")
            .tenant_listen("acme", "http://127.0.0.1:0")
            .start()
            .await
            .unwrap();
        let [first, of_acme] = *tenure.addresses() else { panic!("two listeners") };
        assert!(get(first, "/health").await.ends_with(r#"{"health":"true","reason":""}"#));
        tenure.client("acme").unwrap().put("k", "v").await.unwrap();
        let revision = "etcd_debugging_mvcc_current_revision";
        assert!(get(of_acme, "/metrics").await.contains(&format!("{revision} 2")));
        assert!(get(first, "/metrics").await.contains(&format!("{revision} 1")), "another tenant's");
        tenure.stop().await;
        assert!(tokio::net::TcpStream::connect(first).await.is_err(), "closed");
    }

    #[tokio::test]
    async fn what_cannot_be_served_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let start = async |url: &str| {
            let started = Tenure::builder().data_dir(dir.path().join("d")).listen(url).start().await;
            started.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(start("nonsense").await.starts_with("listen on \"nonsense\":"));
        assert!(start("https://127.0.0.1:0").await.contains("TLS needs a certificate"));
        assert!(start("http://256.0.0.1:0").await.starts_with("listen on"));
        assert!(!dir.path().join("d").exists(), "nothing was made");
    }
}
