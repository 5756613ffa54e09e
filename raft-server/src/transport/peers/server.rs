//! The other side: what comes in from members.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request as HttpRequest, Response as HttpResponse};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::server::{ClientStreamingService, Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};

use super::client::{
    CALL, CLUSTER_HEADER, FETCH, FROM_HEADER, MEMBERS, MESSAGES, OTHER_CLUSTER, REMOVED, TO_HEADER, VERSION_HEADER,
};
use super::codec::RawCodec;
use super::link::WINDOW_BYTES;
use super::{Inner, PeerTls, Peers, fetch};
use crate::transport::wire;

/// How long the other end may take to finish its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections at a time; further ones are closed. A group has a handful of members with a few connections each.
const CONNECTIONS_MAX: usize = 256;

/// Accepts and serves peers until `stop` ends; then their connections are closed.
pub async fn serve(
    listeners: Vec<TcpListener>,
    tls: Option<Arc<dyn PeerTls>>,
    peers: Peers,
    stop: impl Future<Output = ()> + Send,
) {
    let mut connections = JoinSet::new();
    let mut accepting = JoinSet::new();
    let (sender, mut accepted) = tokio::sync::mpsc::channel::<TcpStream>(1);
    for listener in listeners {
        let sender = sender.clone();
        accepting.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        if sender.send(stream).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accept a peer");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
    }
    tokio::pin!(stop);
    loop {
        let stream = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            Some(stream) = accepted.recv() => stream,
        };
        if connections.len() >= CONNECTIONS_MAX {
            tracing::warn!("too many connections of peers");
            continue;
        }
        let acceptor = tls.as_ref().map(|tls| TlsAcceptor::from(tls.server()));
        let service = PeerService(Arc::clone(&peers.0));
        connections.spawn(async move {
            if let Err(error) = connection(stream, acceptor, service).await {
                tracing::debug!(%error, "a connection of a peer ended");
            }
        });
    }
}

/// Far more than members ever give up or get wrong.
const RESETS_MAX: usize = 100_000;

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, service: PeerService) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match tls {
        None => http2(stream, service).await,
        Some(tls) => {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await;
            http2(handshake.map_err(io::Error::other)??, service).await
        }
    }
}

async fn http2<S>(stream: S, service: PeerService) -> io::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: HttpRequest<hyper::body::Incoming>| service.call(request));
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES)
        .keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        // Members give calls up too, when this one was away for a while, and their connection has all their messages on it.
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(RESETS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}

#[derive(Clone)]
struct PeerService(Arc<Inner>);

impl PeerService {
    fn call(&self, request: HttpRequest<hyper::body::Incoming>) -> BoxFuture<HttpResponse<Body>, Infallible> {
        let service = self.clone();
        Box::pin(async move {
            let grpc = || Grpc::new(RawCodec).max_decoding_message_size(usize::MAX);
            Ok(match request.uri().path() {
                MESSAGES => grpc().client_streaming(service, request).await,
                CALL => grpc().unary(CallService(service), request).await,
                MEMBERS => grpc().unary(MembersService(service), request).await,
                FETCH => grpc().server_streaming(service, request).await,
                _ => Status::unimplemented("").into_http(),
            })
        })
    }
}

impl Inner {
    /// The member that a request comes from, if it is one of this cluster that means us.
    fn sender_of<T>(&self, request: &Request<T>) -> Result<u64, Status> {
        let header = |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let id = |name| u64::from_str_radix(header(name), 16).unwrap_or(0);
        if header(VERSION_HEADER) != wire::PEER_VERSION {
            let (own, theirs) = (wire::PEER_VERSION, header(VERSION_HEADER));
            return Err(Status::failed_precondition(format!("peer version {theirs:?} is not spoken here, {own:?} is")));
        }
        let identity = self.config.identity;
        if id(CLUSTER_HEADER) != identity.cluster_id {
            return Err(Status::failed_precondition(OTHER_CLUSTER));
        }
        if id(TO_HEADER) != identity.member_id {
            return Err(Status::failed_precondition(format!("this is member {:x}", identity.member_id)));
        }
        let from = id(FROM_HEADER);
        self.check_not_removed(from)?;
        Ok(from)
    }

    fn check_not_removed(&self, from: u64) -> Result<(), Status> {
        match self.calls.get().is_some_and(|calls| calls.is_removed(from)) {
            true => Err(Status::permission_denied(REMOVED)),
            false => Ok(()),
        }
    }
}

impl ClientStreamingService<Bytes> for PeerService {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let from = inner.sender_of(&request)?;
            let received = inner.receive(from, request.into_inner()).await;
            if let (Err(_), Some(stats)) = (&received, inner.stats_of(from)) {
                stats.received_failures.fetch_add(1, Ordering::Relaxed);
            }
            received.map(|()| Response::new(Bytes::new()))
        })
    }
}

impl Inner {
    /// Hands on what a stream of `from` carries, until it ends.
    async fn receive(&self, from: u64, mut frames: Streaming<Bytes>) -> Result<(), Status> {
        while let Some(frame) = frames.next().await {
            let frame = frame?;
            // It may have been removed since it connected.
            self.check_not_removed(from)?;
            if let Some(stats) = self.stats_of(from) {
                stats.received_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
            }
            let messages = wire::decode(frame).map_err(|error| {
                tracing::error!(peer = format!("{from:x}"), %error, "end the connection to a peer");
                Status::data_loss(error.to_string())
            })?;
            let Some(local) = self.local() else { continue };
            // A certificate does not say which member it is; what a stream carries it does.
            let own = self.config.identity.member_id;
            local.deliver(messages.into_iter().filter(|of| of.from() == from && of.to() == own).collect());
        }
        Ok(())
    }
}

struct CallService(PeerService);

impl UnaryService<Bytes> for CallService {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let inner = Arc::clone(&self.0.0);
        Box::pin(async move {
            let from = inner.sender_of(&request)?;
            let request = request.into_inner();
            // An empty call measures the way.
            if request.is_empty() {
                return Ok(Response::new(Bytes::new()));
            }
            let calls = inner.calls.get().ok_or_else(|| Status::unavailable("the member is starting"))?;
            calls.call(from, request).await.map(Response::new)
        })
    }
}

struct MembersService(PeerService);

impl UnaryService<Bytes> for MembersService {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, _: Request<Bytes>) -> Self::Future {
        let inner = Arc::clone(&self.0.0);
        Box::pin(async move {
            let calls = inner.calls.get().ok_or_else(|| Status::unavailable("the member is starting"))?;
            calls.members().await.map(Response::new)
        })
    }
}

impl ServerStreamingService<Bytes> for PeerService {
    type Response = Bytes;
    type ResponseStream = fetch::Chunks;
    type Future = BoxFuture<Response<fetch::Chunks>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let from = inner.sender_of(&request)?;
            let local = inner.local().ok_or_else(|| Status::unavailable("the member is starting"))?;
            let rate = inner.config.snapshot_bytes_per_second;
            let stats = inner.stats_of(from).unwrap_or_default();
            fetch::send(&**local, request.into_inner(), rate, &stats.sent_snapshots).await.map(Response::new)
        })
    }
}
