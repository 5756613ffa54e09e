//! One HTTP/2 connection to another member, which ends for good when it breaks.
//!
//! A `tonic` channel makes a connection anew behind its user's back. Streams must not have that: each attempt is counted, logged
//! and followed by a pause of our own. And an attempt must end with its connection: over some thousand connections that broke in
//! their first moments, requests were left over for which neither an answer nor an error ever came, and their stream was silent
//! for good. So a [`Link`] watches its socket: when that is closed, whatever still waits for an answer has failed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;

use super::PeersConfig;

/// Bytes under way on a stream, so that a link with some delay carries them.
pub(super) const WINDOW_BYTES: u32 = 8 << 20;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Cheap to clone. The connection is closed when all clones are gone.
#[derive(Clone)]
pub(super) struct Link {
    requests: http2::SendRequest<Body>,
    authority: Authority,
    /// Closed with the socket.
    closed: watch::Receiver<()>,
}

impl Link {
    /// Connects to a URL, within `config.timeout`.
    pub(super) async fn open(config: &PeersConfig, url: &str) -> Result<Link, Error> {
        let opened = tokio::time::timeout(config.timeout, Self::open_at_leisure(config, url)).await;
        opened.unwrap_or_else(|_| Err("no answer in time".into()))
    }

    /// Whether a request on it can only fail.
    pub(super) fn is_closed(&self) -> bool {
        self.requests.is_closed() || self.closed.has_changed().is_err()
    }

    async fn open_at_leisure(config: &PeersConfig, url: &str) -> Result<Link, Error> {
        let uri: Uri = url.parse()?;
        let authority = uri.authority().ok_or("a URL has a host")?.clone();
        let host = authority.host().trim_matches(['[', ']']);
        let secure = uri.scheme() == Some(&Scheme::HTTPS);
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let tls = match (secure, &config.tls) {
            (false, _) => None,
            (true, Some(tls)) => Some(TlsConnector::from(tls.client())),
            (true, None) => return Err("no certificate for peers is configured".into()),
        };
        let (open, closed) = watch::channel(());
        let socket = Socket { io: dial(host, port, tls).await?, _open: open };
        let (requests, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(config.timeout / 2)
            .keep_alive_timeout(config.timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(2 * WINDOW_BYTES)
            .handshake(TokioIo::new(socket))
            .await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a peer ended");
            }
        });
        Ok(Link { requests, authority, closed })
    }
}

impl tower::Service<Request<Body>> for Link {
    type Response = Response<Incoming>;
    /// Unavailable: whether the request got there is not known.
    type Error = Status;
    type Future = BoxFuture<Response<Incoming>, Status>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.requests.poll_ready(context).map_err(|error| Status::unavailable(with_sources(&error)))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone()).path_and_query(path).build();
        let mut closed = self.closed.clone();
        let answered = uri.map(|uri| {
            *request.uri_mut() = uri;
            self.requests.send_request(request)
        });
        Box::pin(async move {
            let answered = answered.map_err(|error| Status::internal(error.to_string()))?;
            tokio::select! {
                // An answer that came counts, whatever became of the connection.
                biased;
                answer = answered => answer.map_err(|error| Status::unavailable(with_sources(&error))),
                _ = closed.changed() => Err(Status::unavailable("the connection was closed")),
            }
        })
    }
}

/// An error's text with those behind it, which say what happened.
pub(super) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(behind) = source {
        text.push_str(": ");
        text.push_str(&behind.to_string());
        source = behind.source();
    }
    text
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

async fn dial(host: &str, port: u16, tls: Option<TlsConnector>) -> io::Result<Box<dyn Io>> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = rustls::pki_types::ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    Ok(Box::new(tls.connect(name, stream).await?))
}

/// What the connection owns; gone with it.
struct Socket {
    io: Box<dyn Io>,
    _open: watch::Sender<()>,
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
