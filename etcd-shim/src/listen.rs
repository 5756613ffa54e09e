//! Listeners: one port for gRPC and HTTP (contract 3.2).
//!
//! Life of a connection: accepted, its tenant decided (see [`crate::tenant`]), TLS if the URL says so, then served until the
//! client leaves or the server stops. Cleartext HTTP/2 is gRPC, HTTP/1 is HTTP. Under TLS a request is gRPC if it is
//! HTTP/2 and its content type says so. An error on a connection ends that connection only. Clients that ping too often are
//! sent away, see [`crate::ping_guard`].

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulConnection;
use rustix::fs::Mode;
use rustls::pki_types::CertificateDer;
use tenure_admin_api::v1::admin_server::AdminServer;
use tenure_storage::{Profile, TenantId, TenantPhase};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_rustls::LazyConfigAcceptor;
use tonic::Code;
use url::Url;

use crate::admin::AdminService;
use crate::audit::{Caller, Line};
use crate::authorities;
use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::cork::cork;
use crate::gate;
use crate::gate::Running;
use crate::handshakes::Handshakes;
use crate::http_endpoints::{Endpoints, HttpAccess, too_many_requests};
use crate::inflight::InFlight;
use crate::own_requests::{Driver, OwnRequests, may_be_short};
use crate::ping_guard::{OpenRequests, PingGuard};
use crate::request_body::CountedBody;
use crate::rpc_metrics::RpcMetrics;
use crate::seldom::Seldom;
use crate::send_rate::{Receiver, SendRate};
use crate::server::Router;
use crate::tenant::{ConnectionIdentity, NoTenant, PeerCertificate, check_admin, resolve, tenant_of_server_name};
use crate::throttle::{OpenCount, TenantUse};
use crate::tls::{Tls, read_certificate};
use crate::turns::{Paced, Turns, fairly};

/// Most connections open at one listener. At the bound further ones wait in the operating system's backlog.
const CONNECTIONS_MAX: usize = 20_000;

/// Connections open at a time of clients whose tenant does not exist: certificates outlive their tenants. They may wait for one
/// of that name, and must not take the others' place.
const GUESTS_MAX: usize = 256;

/// Connections that may wait for one of those to end.
const BACKLOG: u32 = 1_024;

/// The files that this process may have open, divided by this, bound the connections of one listener too: clients of one
/// tenant leave files for the others, and for the store.
const FILES_PER_CONNECTION: u64 = 4;

/// How long a client may take to finish its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an HTTP/1 client may take to send its headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Handshakes under way on a listener; beyond that the oldest are given up.
const HANDSHAKES_MAX: usize = 512;

/// How long running requests may go on after the stop: etcd's own.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(7);

/// The same on a connection whose certificate does not count any more: it has to be closed within a second of that.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

/// How long their tasks may take to notice that their connection is gone.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause after an accept failed (no file descriptors left, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Requests open at a time on one connection, if nobody says otherwise; clients wait with more. What they have been answered and not read
/// counts too, and nothing else bounds that: a few KiB each.
const STREAMS_MAX: u32 = 2_000;

/// Requests that a client has given up before any of it was looked at. Whoever has been away for a moment, or whose server has, gives up
/// hundreds at once; the library's own bound is 20, at which it ends the connection, with all watches on it.
const UNSEEN_RESETS_MAX: usize = 10_000;

/// Mistakes about streams in all the life of a connection, before it is ended. kube-apiservers keep theirs for weeks.
const STREAM_ERRORS_MAX: usize = 1_000_000;

/// How long a connection is idle before the system probes it, and between probes: as etcd's listeners.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);

/// Probes without an answer that end it.
const PROBES_MAX: u32 = 9;

/// How long what was sent may stay unacknowledged, or the other's window closed. It takes the place of the probes' number for the system,
/// so it must leave time for all of them.
const UNANSWERED_MAX: Duration = PROBE_INTERVAL.saturating_mul(PROBES_MAX + 1);

/// What one connection may do. The defaults are etcd's, but for the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Requests open at a time; `None` = no limit.
    pub streams_max: Option<u32>,
    /// How often a client may ping.
    pub ping_interval_min: Duration,
    /// How often an idle client is pinged.
    pub keepalive_interval: Duration,
    /// How long it may take to answer, before the connection is closed.
    pub keepalive_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits {
            streams_max: Some(STREAMS_MAX),
            ping_interval_min: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(2 * 3600),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// Bytes a client may send on one stream before the server has read any of them: small, so that a flood of tiny requests on a
/// watch stream waits at the client.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;

/// The same of one connection. The HTTP/2 library ends a connection whose unread frames cost more than half of it.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// Largest header list of a request.
const HEADERS_BYTES_MAX: u32 = 16 << 10;

/// Why a listener could not be opened. One clear line.
#[derive(Debug, thiserror::Error)]
#[error("listen on {url}: {error}")]
pub struct ListenError {
    url: Url,
    error: io::Error,
}

/// A bound socket, and whose connections come in on it.
pub struct Listener {
    socket: Socket,
    terms: Terms,
}

/// What holds for every connection of a listener.
struct Terms {
    /// The tenant of all its connections, if it is a tenant's own.
    tenant: Option<String>,
    serves: Serves,
    tls: Option<Arc<Tls>>,
    /// Whether a certificate decides the tenant where the listener does not.
    client_cert_auth: bool,
    /// What stands behind the tenant in a server name.
    cell_domain: Option<String>,
    handshakes: Arc<Handshakes>,
}

/// What a listener answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    Everything,
    Grpc,
    /// All of HTTP, and no gRPC.
    Http,
    /// Health and metrics alone.
    Metrics,
    /// The admin API alone, to administrators.
    Admin,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Binds the address of a URL that other members use.
///
/// # Errors
/// [`ListenError`].
pub async fn bind_peer(url: &Url) -> Result<TcpListener, ListenError> {
    bind_tcp(url).await.map_err(|error| ListenError { url: url.clone(), error })
}

impl Listener {
    /// Binds the URL's address. A unix socket file left by a dead server is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub async fn bind(
        url: &Url,
        tenant: Option<String>,
        serves: Serves,
        tls: Option<Arc<Tls>>,
        client_cert_auth: bool,
        cell_domain: Option<String>,
    ) -> Result<Self, ListenError> {
        let failed = |error| ListenError { url: url.clone(), error };
        let socket = match url.scheme() {
            "unix" | "unixs" => bind_unix(url).map_err(failed)?,
            _ => Socket::Tcp(bind_tcp(url).await.map_err(failed)?),
        };
        let secure = matches!(url.scheme(), "https" | "unixs");
        let tls = tls.filter(|_| secure);
        let terms = Terms {
            tenant,
            serves,
            tls,
            client_cert_auth: client_cert_auth && secure,
            cell_domain,
            handshakes: Handshakes::new(HANDSHAKES_MAX),
        };
        Ok(Listener { socket, terms })
    }

    /// Binds a socket file that only this process's user may open, for administrators on this machine. One left by a dead server
    /// is replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn bind_admin_socket(path: PathBuf) -> io::Result<Self> {
        let socket = bind_socket_file(path, Some(Mode::from_raw_mode(0o600)))?;
        let (serves, tls) = (Serves::Admin, None);
        let terms = Terms {
            tenant: None,
            serves,
            tls,
            client_cert_auth: false,
            cell_domain: None,
            handshakes: Handshakes::new(HANDSHAKES_MAX),
        };
        Ok(Listener { socket, terms })
    }

    /// What it answers.
    pub fn serves(&self) -> Serves {
        self.terms.serves
    }

    /// Where it listens; `None` for a unix socket.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }
}

async fn bind_tcp(url: &Url) -> io::Result<TcpListener> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_or_known_default().unwrap_or_default();
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
    // A name may stand for both families; etcd listens on the first, IPv4 preferred.
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    let address = *first.ok_or_else(|| io::Error::other("the name has no address"))?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // So that a restart need not wait for connections of the process before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The socket file of a unix URL: host and path together, as etcd reads it.
fn bind_unix(url: &Url) -> io::Result<Socket> {
    let authority = match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_string(),
        (None, _) => String::new(),
    };
    bind_socket_file(PathBuf::from(format!("{authority}{}", url.path())), None)
}

/// `mode`: who may open it; else whoever this process's umask lets. At no moment may anybody else: the file has the mode of the
/// socket that makes it, so that is set before there is a file. (Linux's way; a umask would be every thread's.)
fn bind_socket_file(path: PathBuf, mode: Option<Mode>) -> io::Result<Socket> {
    if std::os::unix::net::UnixStream::connect(&path).is_err() && path.exists() {
        std::fs::remove_file(&path)?;
    }
    let socket = UnixSocket::new_stream()?;
    if let Some(mode) = mode {
        rustix::fs::fchmod(&socket, mode)?;
    }
    socket.bind(&path)?;
    Ok(Socket::Unix(socket.listen(BACKLOG)?, path))
}

/// What connections are served with.
#[derive(Clone)]
pub struct Services {
    pub cell: Cell,
    pub router: Router,
    pub admin: AdminServer<AdminService>,
    /// Bytes of requests that are not complete yet.
    pub arriving: InFlight,
    pub rpc_metrics: RpcMetrics,
    pub turns: Arc<Turns>,
    pub access: Arc<HttpAccess>,
    pub limits: ConnectionLimits,
    /// Lines about connections that were refused.
    pub(crate) refused: Arc<Seldom>,
    /// The same, of the admin API.
    pub(crate) refused_administration: Arc<Seldom>,
}

/// How far a listener has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    NotYet,
    /// No more connections and requests; those that run may end.
    Drain,
    /// Those that still run are cut.
    Cut,
}

/// Accepts until `stop` says otherwise, then lets running requests end for a while and cuts the others. On return no
/// connection and no request is left. If the sender of `stop` is gone, everything ends at once.
pub async fn serve(listener: Listener, services: Services, mut stop: watch::Receiver<Stop>) {
    let slots = Arc::new(Semaphore::new(connections_max()));
    let (drain, draining) = watch::channel(false);
    let (cut, cutting) = watch::channel(false);
    let (sender, mut ended) = mpsc::channel(1);
    let alive = Alive { _sender: sender, share: None, own: None };
    let Listener { socket, terms } = listener;
    let shared = Arc::new((terms, services));
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop > Stop::NotYet) => break,
            accepted = accept(&socket, &slots) => accepted,
        };
        match accepted {
            Ok((stream, slot)) => {
                let (shared, draining, alive) = (Arc::clone(&shared), draining.clone(), alive.clone());
                let mut cutting = cutting.clone();
                tokio::spawn(async move {
                    let _slot = slot;
                    tokio::select! {
                        () = connection(&shared.0, &shared.1, stream, draining.clone(), alive) => {}
                        _ = cutting.wait_for(|cut| *cut) => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    if let Socket::Unix(_, path) = &socket {
        let _ = std::fs::remove_file(path);
    }
    // Who connects now is turned away, not left waiting.
    drop((socket, shared, alive, draining));
    drain.send_replace(true);
    tokio::select! {
        // The task of every connection has one of its receivers.
        () = drain.closed() => {}
        () = tokio::time::sleep(DRAIN_TIMEOUT) => {}
        _ = stop.wait_for(|stop| *stop == Stop::Cut) => {}
    }
    cut.send_replace(true);
    // Nobody sends: it answers when the last connection and the last request are gone.
    if tokio::time::timeout(CUT_TIMEOUT, ended.recv()).await.is_err() {
        tracing::warn!("a request goes on after its connection was cut");
    }
}

/// Held by everything that a listener started.
#[derive(Clone)]
struct Alive {
    _sender: mpsc::Sender<std::convert::Infallible>,
    /// Of a tenant's connection: how its tasks take turns with those of others.
    share: Option<(Arc<Turns>, Arc<TenantUse>)>,
    /// Of a client's connection: its requests that are no tasks.
    own: Option<Arc<OwnRequests>>,
}

/// Runs the requests of an HTTP/2 connection.
impl<F> hyper::rt::Executor<F> for Alive
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, request: F) {
        let request = match &self.own {
            Some(own) => own.begin(request),
            None => Some(Box::pin(request)),
        };
        let Some(request) = request else { return };
        let alive = self.clone();
        match alive.share.clone() {
            Some((turns, used)) => {
                tokio::spawn(async move {
                    fairly(turns, used, request).await;
                    drop(alive);
                });
            }
            None => {
                tokio::spawn(async move {
                    request.await;
                    drop(alive);
                });
            }
        }
    }
}

fn connections_max() -> usize {
    let files_max = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let by_files =
        files_max.map_or(usize::MAX, |files| usize::try_from(files / FILES_PER_CONNECTION).unwrap_or(usize::MAX));
    by_files.clamp(1, CONNECTIONS_MAX)
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

async fn accept(socket: &Socket, slots: &Arc<Semaphore>) -> io::Result<(Stream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let stream = match socket {
        Socket::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            if let Err(error) = notice_loss(&stream) {
                tracing::debug!(%error, "keepalive of a connection");
            }
            Stream::Tcp(stream)
        }
        Socket::Unix(listener, _) => Stream::Unix(listener.accept().await?.0),
    };
    Ok((stream, slot))
}

/// Lets the system look whether the other machine is still there, also while HTTP/2 does not: one that lost its power says nothing. It
/// also may not leave what it was sent unacknowledged for ever.
fn notice_loss(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;

    sockopt::set_tcp_keepidle(stream, PROBE_INTERVAL)?;
    sockopt::set_tcp_keepintvl(stream, PROBE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES_MAX)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(UNANSWERED_MAX.as_millis()).unwrap_or(u32::MAX))
}

/// Whether connections are to let their requests end and take no others.
type Draining = watch::Receiver<bool>;

/// Ends when connections are told to drain.
async fn told(mut draining: Draining) {
    // Without its sender the listener is gone.
    let _ = draining.wait_for(|drain| *drain).await;
}

/// Drives a connection to its end. Once it is `leaving` its client is told to send nothing more on it, and running requests go on.
async fn until_left<C: GracefulConnection>(
    connection: C,
    leaving: impl Future<Output = ()>,
    mut driver: Driver,
) -> Result<(), C::Error> {
    let mut connection = pin!(connection);
    tokio::select! {
        ended = poll_fn(|task| driver.poll(task, connection.as_mut())) => return ended,
        () = leaving => connection.as_mut().graceful_shutdown(),
    }
    poll_fn(|task| driver.poll(task, connection.as_mut())).await
}

async fn connection(terms: &Terms, services: &Services, stream: Stream, draining: Draining, alive: Alive) {
    match stream {
        Stream::Tcp(stream) => {
            let end = OtherEnd { address: stream.peer_addr().ok(), user: None };
            secured(terms, services, stream, end, draining, alive).await;
        }
        Stream::Unix(stream) => {
            let end = OtherEnd { address: None, user: stream.peer_cred().ok().map(|of| of.uid()) };
            secured(terms, services, stream, end, draining, alive).await;
        }
    }
}

/// What the system says of a client.
#[derive(Clone, Copy, Debug, Default)]
struct OtherEnd {
    address: Option<SocketAddr>,
    /// Who opened a socket file.
    user: Option<u32>,
}

async fn secured<S>(terms: &Terms, services: &Services, stream: S, end: OtherEnd, draining: Draining, alive: Alive)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(tls) = &terms.tls else {
        let shown = Shown { end, ..Shown::default() };
        return identified(terms, services, stream, shown, draining, alive).await;
    };
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(tls, stream));
    match terms.handshakes.run(handshake).await {
        Some(Ok(Ok((stream, shown)))) => {
            let shown = Shown { end, ..shown };
            identified(terms, services, stream, shown, draining, alive).await;
        }
        // Who only knocks and leaves, as who looks whether a port is open does, was not refused.
        Some(Ok(Err(error))) if terms.serves == Serves::Admin && error.kind() == io::ErrorKind::InvalidData => {
            let caller = Caller::new(None, end.user, end.address);
            services.refuse_administrator(&caller, Code::Unauthenticated, format_args!("TLS handshake: {error}"));
        }
        // An operator looks here for the client that cannot connect and says no more than that.
        Some(Ok(Err(error))) if error.kind() == io::ErrorKind::InvalidData => {
            let shown = Shown { end, ..Shown::default() };
            services.refuse_connection(&shown, format_args!("TLS handshake: {error}"));
        }
        Some(Ok(Err(error))) => tracing::debug!(%error, "TLS handshake"),
        Some(Err(_)) => tracing::debug!("TLS handshake took too long"),
        None => tracing::debug!("TLS handshake made room for others"),
    }
}

/// What a client shows of itself when it connects.
#[derive(Debug, Default)]
struct Shown {
    certificate: Option<PeerCertificate>,
    chain: Vec<CertificateDer<'static>>,
    /// The name it calls the server by.
    server_name: Option<String>,
    end: OtherEnd,
}

type Secured<S> = (tokio_rustls::server::TlsStream<S>, Shown);

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(tls: &Tls, stream: S) -> io::Result<Secured<S>> {
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
    let (config, server_name) = {
        let hello = start.client_hello();
        (tls.choose(&hello), hello.server_name().map(str::to_ascii_lowercase))
    };
    let stream = start.into_stream(config).await?;
    let chain: Vec<_> = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
    let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "the client certificate cannot be read");
    let certificate = chain.first().map(|der| read_certificate(der).ok_or_else(unreadable)).transpose()?;
    Ok((stream, Shown { certificate, chain, server_name, ..Shown::default() }))
}

async fn identified<S>(terms: &Terms, services: &Services, stream: S, shown: Shown, draining: Draining, alive: Alive)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if terms.serves == Serves::Admin {
        let OtherEnd { address, user } = shown.end;
        let caller = Caller::new(shown.certificate.as_ref(), user, address);
        // Followed before it is looked at: no change is missed.
        let changes = services.cell.tenants_changed();
        match check_administrator(services, &shown) {
            Ok(()) => {
                let revoked = administrator_revoked(services, &shown, changes);
                tokio::select! {
                    () = administered(services, stream, caller.clone(), draining, alive) => {}
                    reason = revoked => services.refuse_administrator(&caller, Code::PermissionDenied, reason),
                }
            }
            Err(reason) => services.refuse_administrator(&caller, Code::PermissionDenied, reason),
        }
        return;
    }
    if terms.serves == Serves::Metrics {
        // Whoever watches the member is no client of a tenant: it is not sent away with one.
        match identify(terms, &shown) {
            Ok(identity) => served(terms, services, stream, identity, None, told(draining), alive).await,
            Err(reason) => services.refuse_connection(&shown, reason),
        }
        return;
    }
    match identify(terms, &shown).and_then(|identity| Guest::admit(terms, services, identity, &shown)) {
        Ok(guest) => {
            // Subscribed before it was admitted: no change is missed.
            let expelled = guest.expelled(services);
            let (turns, used) = (Arc::clone(&services.turns), Arc::clone(&guest.used));
            let alive = Alive { share: Some((Arc::clone(&turns), Arc::clone(&used))), ..alive };
            let (leave, to_leave) = oneshot::channel::<()>();
            let leaving = async {
                tokio::select! {
                    () = told(draining) => {}
                    _ = to_leave => {}
                }
            };
            let (identity, receiver) = (guest.identity.clone(), guest.receiver());
            let served = served(terms, services, stream, identity, receiver, leaving, alive);
            let expelled = async {
                let reason = expelled.await;
                tracing::info!(tenant = guest.identity.tenant(), %reason, "close a connection");
                // Its client comes back with what counts now, and none of its requests need fail for it.
                if matches!(reason, NoTenant::Revoked | NoTenant::OtherAuthority) && leave.send(()).is_ok() {
                    tokio::time::sleep(LEAVE_TIMEOUT).await;
                }
            };
            tokio::select! {
                () = fairly(turns, used, served) => {}
                () = expelled => {}
            }
        }
        Err(reason) => services.refuse_connection(&shown, reason),
    }
}

impl Services {
    /// Says in the audit log who was sent away, and why. Who only knocks can cause that as often as they like: a disk full of it, or a log
    /// that is cut, would hide what administrators do.
    fn refuse_administrator(&self, caller: &Caller, code: Code, reason: impl std::fmt::Display) {
        if let Some(left_out) = self.refused_administration.line(Instant::now()) {
            caller.refused(code, reason, left_out);
        }
    }

    /// Says who was sent away, and why.
    fn refuse_connection(&self, shown: &Shown, reason: impl std::fmt::Display) {
        let Some(left_out) = self.refused.line(Instant::now()) else { return };
        let address = shown.end.address.map(|address| address.to_string()).unwrap_or_default();
        let common_name = shown.certificate.as_ref().and_then(|certificate| certificate.common_name.as_deref());
        tracing::warn!(
            "remote-addr" = address,
            "server-name" = shown.server_name.as_deref().unwrap_or_default(),
            "common-name" = common_name.unwrap_or_default(),
            %reason,
            left_out,
            "rejected connection on client endpoint"
        );
    }
}

fn identify(terms: &Terms, shown: &Shown) -> Result<ConnectionIdentity, NoTenant> {
    let certificate = shown.certificate.as_ref().filter(|_| terms.client_cert_auth);
    let domain = terms.cell_domain.as_deref();
    let named = shown.server_name.as_deref().zip(domain).and_then(|(name, domain)| tenant_of_server_name(name, domain));
    let tenant = resolve(terms.tenant.as_deref(), certificate, named)?;
    let common_name = certificate.and_then(|certificate| certificate.common_name.as_deref());
    Ok(ConnectionIdentity::new(&tenant, common_name))
}

/// Over TLS a certificate says it; a socket file is opened by whoever may.
fn check_administrator(services: &Services, shown: &Shown) -> Result<(), NoTenant> {
    match (&shown.certificate, shown.end.user) {
        (Some(certificate), _) => {
            check_admin(certificate)?;
            // Administrators are the operator's people, whose tenant is this one: the numbers of their certificates are refused there.
            let operators = services.cell.tenant(DEFAULT_TENANT).map(|tenant| tenant.profile());
            match operators.is_some_and(|profile| profile.revoked.contains_key(&certificate.serial[..])) {
                true => Err(NoTenant::Revoked),
                false => Ok(()),
            }
        }
        (None, Some(_)) => Ok(()),
        (None, None) => Err(NoTenant::NotAdmin),
    }
}

/// Ends when an administrator's certificate counts no more.
async fn administrator_revoked(services: &Services, shown: &Shown, mut changes: watch::Receiver<u64>) -> NoTenant {
    loop {
        if changes.changed().await.is_err() {
            // The cell has stopped; the connection ends with it.
            std::future::pending::<()>().await;
        }
        if let Err(reason) = check_administrator(services, shown) {
            return reason;
        }
    }
}

/// A connection that a tenant was let in by, until it has to go.
struct Guest {
    identity: ConnectionIdentity,
    certificate: Option<PeerCertificate>,
    /// `None`: there was no such tenant; its requests are refused one by one.
    tenant: Option<Tenant>,
    changes: watch::Receiver<u64>,
    /// The tenant's own CAs when it was let in.
    trusted_ca: Vec<Bytes>,
    /// What the tenant uses of this member; those of no tenant count together.
    used: Arc<TenantUse>,
    _counted: OpenCount,
}

impl Guest {
    fn admit(
        terms: &Terms,
        services: &Services,
        mut identity: ConnectionIdentity,
        shown: &Shown,
    ) -> Result<Self, NoTenant> {
        let Shown { certificate, chain, .. } = shown;
        let certificate = certificate.clone();
        let (changed, made) = (services.cell.tenants_changed(), services.cell.tenants_made());
        let tenant = services.cell.tenant(identity.tenant());
        // Who belongs to no tenant waits for one of that name.
        let changes = if tenant.is_some() { changed } else { made };
        let trusted_ca = tenant.as_ref().map(|tenant| tenant.profile().trusted_ca.clone()).unwrap_or_default();
        // Once more, now that the tenant is known and its changes are followed: it may have come in by the listener's name or the server's,
        // or been verified by a CA that the tenant has no more.
        let is_vouched_for = match (&certificate, trusted_ca.is_empty()) {
            (None, _) => true,
            (Some(_), false) => authorities::vouch_for(&trusted_ca, chain),
            (Some(_), true) => terms.tls.as_ref().is_some_and(|tls| tls.vouches_for(chain)),
        };
        if !is_vouched_for {
            return Err(NoTenant::OtherAuthority);
        }
        let (used, counted) = match &tenant {
            Some(tenant) => {
                check_welcome(tenant, certificate.as_ref(), &trusted_ca)?;
                identity.admit(tenant.id());
                let used = services.rpc_metrics.used(tenant.id());
                // On a listener of its own nobody else waits for a place.
                let most = if terms.tenant.is_some() { usize::MAX } else { (connections_max() / 4 * 3).max(1) };
                let counted = used.connect(&tenant.profile(), most);
                (used, counted)
            }
            None => {
                let used = services.rpc_metrics.used(NO_TENANT);
                let counted = used.connect(&Profile::default(), GUESTS_MAX.min(connections_max() / 4).max(1));
                (used, counted)
            }
        };
        let counted = counted.ok_or(NoTenant::TooManyConnections)?;
        Ok(Guest { identity, certificate, tenant, changes, trusted_ca, used, _counted: counted })
    }

    fn receiver(&self) -> Option<Receiver> {
        Some(Receiver { tenant: self.tenant.clone()?, used: Arc::clone(&self.used) })
    }

    /// Ends when the connection has to be closed, with the reason.
    fn expelled(&self, services: &Services) -> impl Future<Output = NoTenant> + use<> {
        let (name, cell) = (self.identity.clone(), services.cell.clone());
        let (certificate, mut changes) = (self.certificate.clone(), self.changes.clone());
        let (admitted, trusted_ca) = (self.tenant.as_ref().map(Tenant::id), self.trusted_ca.clone());
        async move {
            loop {
                if changes.changed().await.is_err() {
                    // The cell has stopped; the connection ends with it.
                    std::future::pending::<()>().await;
                }
                let now = cell.tenant(name.tenant());
                match (&now, admitted) {
                    // Another tenant that has got the name is another one.
                    (Some(tenant), Some(id)) if tenant.id() == id => {
                        if let Err(reason) = check_welcome(tenant, certificate.as_ref(), &trusted_ca) {
                            return reason;
                        }
                    }
                    (None, None) => {}
                    (Some(_) | None, _) => return NoTenant::Gone,
                }
            }
        }
    }
}

/// `trusted_ca`: those of the tenant that its certificate was held against.
fn check_welcome(tenant: &Tenant, certificate: Option<&PeerCertificate>, trusted_ca: &[Bytes]) -> Result<(), NoTenant> {
    let profile = tenant.profile();
    if profile.phase == TenantPhase::Suspended {
        return Err(NoTenant::Suspended);
    }
    match certificate {
        Some(certificate) if profile.is_revoked(&certificate.serial, certificate.not_before_ms) => {
            Err(NoTenant::Revoked)
        }
        Some(_) if profile.trusted_ca != trusted_ca => Err(NoTenant::OtherAuthority),
        Some(_) | None => Ok(()),
    }
}

/// Whose the requests are that belong to no tenant.
const NO_TENANT: TenantId = TenantId(0);

/// Serves the admin API on one connection.
async fn administered<S>(services: &Services, stream: S, caller: Caller, draining: Draining, alive: Alive)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(alive).http2_only();
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEADERS_BYTES_MAX);
    let admin = services.admin.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        let line = Line::begin(caller.clone(), request.uri().path());
        request.extensions_mut().insert(line.call());
        let mut admin = admin.clone();
        async move {
            let Ok(response) = tonic::codegen::Service::call(&mut admin, request).await;
            line.end(response.headers());
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    let driver = Arc::<OwnRequests>::default().driver();
    if let Err(error) = until_left(connection, told(draining), driver).await {
        tracing::debug!(%error, "connection of an administrator ended");
    }
}

async fn served<S>(
    terms: &Terms,
    services: &Services,
    stream: S,
    identity: ConnectionIdentity,
    receiver: Option<Receiver>,
    leaving: impl Future<Output = ()>,
    alive: Alive,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = services.limits;
    let used = alive.share.as_ref().map(|(_, used)| Arc::clone(used));
    let open = OpenRequests::default();
    let (stream, uncork) = cork(Paced(SendRate::new(stream, receiver)));
    let io = TokioIo::new(PingGuard::new(stream, open.clone(), limits.ping_interval_min, HEADER_TIMEOUT));
    let own = Arc::<OwnRequests>::default();
    let driver = own.driver();
    let mut builder = auto::Builder::new(Alive { own: Some(Arc::clone(&own)), ..alive });
    // The other protocol ends the connection.
    match terms.serves {
        Serves::Everything | Serves::Metrics | Serves::Admin => {}
        Serves::Grpc => builder = builder.http2_only(),
        Serves::Http => builder = builder.http1_only(),
    }
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_concurrent_streams(limits.streams_max)
        .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
        .max_local_error_reset_streams(STREAM_ERRORS_MAX);
    let (serves, secure) = (terms.serves, terms.tls.is_some());
    let grpc_is = GrpcIs::on(serves, secure);
    // The connection's own, so that its requests count no references that those of others count too.
    let shared = Arc::new((services.clone(), used));
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        own.next_is(may_be_short(&request));
        let shared = Arc::clone(&shared);
        let open = open.open();
        let tenant = identity.tenant_in(&shared.0.cell);
        request.extensions_mut().insert(identity.clone());
        async move {
            let (Services { cell, router, arriving, rpc_metrics, access, .. }, used) = &*shared;
            let profile = tenant.as_ref().map(Tenant::profile).unwrap_or_default();
            let response = if grpc_is.grpc(&request) {
                // A tenant that is gone has nothing to reserve for: its requests are refused before they are read.
                let id = tenant.as_ref().map_or(NO_TENANT, Tenant::id);
                let call = rpc_metrics.begin(id, request.uri().path());
                let traffic = call.as_ref().map(|call| call.traffic().clone());
                let in_flight = arriving.open_requests().open(id);
                let mut running = Running { open, call, counted: None, in_flight };
                let let_in = match used {
                    Some(used) => running.let_in(used, &profile).await,
                    None => running.let_in(&rpc_metrics.used(id), &profile).await,
                };
                match let_in {
                    Ok(()) => {
                        let counted = |body| CountedBody::new(body, arriving.reservation(id), traffic, tenant);
                        gate::call(router, request.map(counted), running).await
                    }
                    Err(error) => running.refuse(error.into()),
                }
            } else {
                let counted = match used {
                    Some(used) => used.begin_request(&profile).await.map(Some),
                    // Whoever watches the member.
                    None => Ok(None),
                };
                match counted {
                    Ok(_counted) => Endpoints { cell, rpc_metrics, access, serves, secure }.answer(&request).await,
                    Err(_) => too_many_requests(),
                }
            };
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = builder.serve_connection(io, service).into_owned();
    match uncork.around(until_left(connection, leaving, driver)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "connection ended"),
        Err(error) => tracing::debug!(%error, "connection broken"),
    }
}

/// Which requests of a connection are gRPC.
#[derive(Clone, Copy)]
enum GrpcIs {
    Nothing,
    Http2,
    Http2WithContentType,
}

impl GrpcIs {
    fn on(serves: Serves, secure: bool) -> Self {
        match (serves, secure) {
            (Serves::Http | Serves::Metrics | Serves::Admin, _) => GrpcIs::Nothing,
            (Serves::Grpc, _) | (Serves::Everything, false) => GrpcIs::Http2,
            (Serves::Everything, true) => GrpcIs::Http2WithContentType,
        }
    }

    fn grpc(self, request: &Request<Incoming>) -> bool {
        let is_http2 = request.version() == http::Version::HTTP_2;
        let content_type = request.headers().get(http::header::CONTENT_TYPE);
        let says_grpc = content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        match self {
            GrpcIs::Nothing => false,
            GrpcIs::Http2 => is_http2,
            GrpcIs::Http2WithContentType => is_http2 && says_grpc,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    // A machine that loses its power says nothing: its connections would be kept, and what is on its way to it.
    #[tokio::test]
    async fn the_system_looks_whether_clients_are_there() {
        use rustix::net::sockopt;

        let socket = Socket::Tcp(bind_tcp(&"http://127.0.0.1:0".parse().unwrap()).await.unwrap());
        let Socket::Tcp(listener) = &socket else { unreachable!() };
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _slot) = accept(&socket, &Arc::new(Semaphore::new(1))).await.unwrap();
        let Stream::Tcp(stream) = stream else { unreachable!() };
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let probes = [sockopt::tcp_keepidle(&stream).unwrap(), sockopt::tcp_keepintvl(&stream).unwrap()];
        assert_eq!(probes, [Duration::from_secs(30); 2]);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), 9);
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 300_000, "all probes have their time");
    }

    // Whoever gets in between the file and its mode is an administrator for good: so there must be nothing in between. Nobody sets the
    // mode of the file here: it has it from the moment it exists.
    #[tokio::test]
    async fn the_socket_of_administrators_is_never_open_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        // Twice: the file of a dead server is replaced, whatever its mode was.
        for _ in 0..2 {
            let _listener = Listener::bind_admin_socket(path.clone()).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        }
    }
}
