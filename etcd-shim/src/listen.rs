//! Listeners: one port for gRPC and HTTP (contract 3.2).
//!
//! Life of a connection: accepted, its tenant decided (see [`crate::tenant`]), TLS if the URL says so, then served until the
//! client leaves or the server stops. Cleartext HTTP/2 is gRPC, HTTP/1 is HTTP. Under TLS a request is gRPC if it is
//! HTTP/2 and its content type says so. An error on a connection ends that connection only. Clients that ping too often are
//! sent away, see [`crate::ping_guard`].

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tenure_storage::TenantId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_rustls::LazyConfigAcceptor;
use url::Url;

use crate::cell::Cell;
use crate::gate;
use crate::gate::Running;
use crate::http_endpoints::{Endpoints, HttpAccess};
use crate::inflight::InFlight;
use crate::ping_guard::{OpenRequests, PingGuard};
use crate::request_body::CountedBody;
use crate::rpc_metrics::RpcMetrics;
use crate::server::Router;
use crate::tenant::{ConnectionIdentity, PeerCertificate, resolve};
use crate::tls::{Tls, peer_certificate};

/// Most connections open at one listener. At the bound further ones wait in the operating system's backlog.
const CONNECTIONS_MAX: usize = 20_000;

/// Connections that may wait for one of those to end.
const BACKLOG: u32 = 1_024;

/// The files that this process may have open, divided by this, bound the connections of one listener too: clients of one
/// tenant leave files for the others, and for the store.
const FILES_PER_CONNECTION: u64 = 4;

/// How long a client may take to finish its TLS handshake, or an HTTP/1 client its headers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long running requests may go on after the stop: etcd's own.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(7);

/// How long their tasks may take to notice that their connection is gone.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause after an accept failed (no file descriptors left, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What one connection may do. The defaults are etcd's.
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
            streams_max: None,
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
    ) -> Result<Self, ListenError> {
        let failed = |error| ListenError { url: url.clone(), error };
        let socket = match url.scheme() {
            "unix" | "unixs" => bind_unix(url).map_err(failed)?,
            _ => Socket::Tcp(bind_tcp(url).await.map_err(failed)?),
        };
        let secure = matches!(url.scheme(), "https" | "unixs");
        let tls = tls.filter(|_| secure);
        let terms = Terms { tenant, serves, tls, client_cert_auth: client_cert_auth && secure };
        Ok(Listener { socket, terms })
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
    let path = PathBuf::from(format!("{authority}{}", url.path()));
    if std::os::unix::net::UnixStream::connect(&path).is_err() && path.exists() {
        std::fs::remove_file(&path)?;
    }
    Ok(Socket::Unix(UnixListener::bind(&path)?, path))
}

/// What connections are served with.
#[derive(Clone)]
pub struct Services {
    pub cell: Cell,
    pub router: Router,
    /// Bytes of requests that are not complete yet.
    pub arriving: InFlight,
    pub rpc_metrics: RpcMetrics,
    pub access: Arc<HttpAccess>,
    pub limits: ConnectionLimits,
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
    let graceful = GracefulShutdown::new();
    let (cut, cutting) = watch::channel(false);
    let (sender, mut ended) = mpsc::channel(1);
    let alive = Alive { _sender: sender };
    let Listener { socket, terms } = listener;
    let shared = Arc::new((terms, services));
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop > Stop::NotYet) => break,
            accepted = accept(&socket, &slots) => accepted,
        };
        match accepted {
            Ok((stream, slot)) => {
                let (shared, watcher, alive) = (Arc::clone(&shared), graceful.watcher(), alive.clone());
                let mut cutting = cutting.clone();
                tokio::spawn(async move {
                    let _slot = slot;
                    tokio::select! {
                        () = connection(&shared.0, &shared.1, stream, watcher, alive) => {}
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
    drop((socket, shared, alive));
    tokio::select! {
        () = graceful.shutdown() => {}
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
}

/// Runs the requests of an HTTP/2 connection.
impl<F> hyper::rt::Executor<F> for Alive
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, request: F) {
        let alive = self.clone();
        tokio::spawn(async move {
            request.await;
            drop(alive);
        });
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
            Stream::Tcp(stream)
        }
        Socket::Unix(listener, _) => Stream::Unix(listener.accept().await?.0),
    };
    Ok((stream, slot))
}

type Watcher = hyper_util::server::graceful::Watcher;

async fn connection(terms: &Terms, services: &Services, stream: Stream, watcher: Watcher, alive: Alive) {
    match stream {
        Stream::Tcp(stream) => secured(terms, services, stream, watcher, alive).await,
        Stream::Unix(stream) => secured(terms, services, stream, watcher, alive).await,
    }
}

async fn secured<S>(terms: &Terms, services: &Services, stream: S, watcher: Watcher, alive: Alive)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(tls) = &terms.tls else {
        if let Some(identity) = identify(terms, None) {
            served(terms, services, stream, identity, watcher, alive).await;
        }
        return;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(tls, stream)).await {
        Ok(Ok((stream, certificate))) => {
            if let Some(identity) = identify(terms, certificate.as_ref()) {
                served(terms, services, stream, identity, watcher, alive).await;
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake"),
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

type Secured<S> = (tokio_rustls::server::TlsStream<S>, Option<PeerCertificate>);

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(tls: &Tls, stream: S) -> io::Result<Secured<S>> {
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
    let config = tls.choose(&start.client_hello());
    let stream = start.into_stream(config).await?;
    let first = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = first.map(peer_certificate);
    Ok((stream, certificate))
}

fn identify(terms: &Terms, certificate: Option<&PeerCertificate>) -> Option<ConnectionIdentity> {
    let certificate = certificate.filter(|_| terms.client_cert_auth);
    match resolve(terms.tenant.as_deref(), certificate) {
        Ok(tenant) => {
            let common_name = certificate.and_then(|certificate| certificate.common_name.as_deref());
            Some(ConnectionIdentity::new(&tenant, common_name))
        }
        Err(reason) => {
            tracing::warn!(%reason, "refuse a connection");
            None
        }
    }
}

async fn served<S>(
    terms: &Terms,
    services: &Services,
    stream: S,
    identity: ConnectionIdentity,
    watcher: Watcher,
    alive: Alive,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = services.limits;
    let open = OpenRequests::default();
    let io = TokioIo::new(PingGuard::new(stream, open.clone(), limits.ping_interval_min));
    let mut builder = auto::Builder::new(alive);
    // The other protocol ends the connection.
    match terms.serves {
        Serves::Everything | Serves::Metrics => {}
        Serves::Grpc => builder = builder.http2_only(),
        Serves::Http => builder = builder.http1_only(),
    }
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_concurrent_streams(limits.streams_max);
    let services = services.clone();
    let (serves, secure) = (terms.serves, terms.tls.is_some());
    let grpc_is = GrpcIs::on(serves, secure);
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        let Services { cell, router, arriving, rpc_metrics, access, .. } = services.clone();
        let open = open.open();
        // A tenant that is gone has nothing to reserve for: its requests are refused before they are read.
        let tenant = cell.tenant(identity.tenant()).map_or(TenantId(0), |tenant| tenant.id());
        request.extensions_mut().insert(identity.clone());
        async move {
            let response = if grpc_is.grpc(&request) {
                let call = rpc_metrics.begin(tenant, request.uri().path());
                let traffic = call.as_ref().map(|call| call.traffic().clone());
                let counted = |body| CountedBody::new(body, arriving.reservation(tenant), traffic);
                gate::call(&router, request.map(counted), Running { open, call }).await
            } else {
                Endpoints { cell: &cell, rpc_metrics: &rpc_metrics, access: &access, serves, secure }
                    .answer(&request)
                    .await
            };
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = builder.serve_connection(io, service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "connection ended");
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
            (Serves::Http | Serves::Metrics, _) => GrpcIs::Nothing,
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
