//! What stands between a connection and the gRPC services: answers in the words of etcd's gRPC library where tonic's
//! differ, and the bytes of a response that are counted until the last of them has been handed to the connection.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use crate::inflight::ResponsePermit;
use crate::ping_guard::OpenRequest;
use crate::request_body::Framing;
use crate::rpc_metrics::Call;
use crate::status::in_etcds_words;

/// Every service whose routes exist, for telling an unknown method from an unknown service.
const SERVICES: &[&str] = &[
    "etcdserverpb.KV",
    "etcdserverpb.Watch",
    "etcdserverpb.Lease",
    "etcdserverpb.Cluster",
    "etcdserverpb.Maintenance",
    "etcdserverpb.Auth",
    "grpc.health.v1.Health",
];

/// One request while it is being answered: open on its connection, and counted as a call if its method exists.
pub struct Running {
    pub open: OpenRequest,
    pub call: Option<Call>,
}

impl Running {
    fn end(&mut self, code: Code) {
        if let Some(call) = &mut self.call {
            call.end(code);
        }
    }
}

/// Answers one gRPC request.
///
/// The request counts as open until its answer has left or been dropped.
pub async fn call(routes: Routes, request: Request<Body>, mut running: Running) -> Response<Body> {
    if let Some(refusal) = refuse(&request) {
        running.end(Status::from_header_map(refusal.headers()).map_or(Code::Unknown, |status| status.code()));
        return refusal;
    }
    let path = request.uri().path().to_string();
    let response = match routes.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    finish(&path, response, running)
}

/// Requests that never reach a service.
fn refuse(request: &Request<Body>) -> Option<Response<Body>> {
    if request.method() != Method::POST {
        return Some(http_refusal(
            StatusCode::METHOD_NOT_ALLOWED,
            Status::internal(format!(
                "http2Server.operateHeaders parsed a :method field: {:?} which should be POST",
                request.method().as_str()
            )),
        ));
    }
    let content_type = request.headers().get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if !is_grpc(content_type) {
        let text = format!("invalid gRPC request content-type {:?}", String::from_utf8_lossy(content_type));
        return Some(http_refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, Status::invalid_argument(text)));
    }
    let version = request.headers().get("client-api-version");
    if version.is_some_and(|version| std::str::from_utf8(version.as_bytes()).is_err()) {
        return Some(Status::invalid_argument("etcdserver: invalid client api version").into_http());
    }
    None
}

fn is_grpc(content_type: &[u8]) -> bool {
    match content_type.strip_prefix(b"application/grpc") {
        Some(rest) => matches!(rest.first(), None | Some(b'+' | b';')),
        None => false,
    }
}

fn http_refusal(code: StatusCode, status: Status) -> Response<Body> {
    let mut response = status.into_http();
    *response.status_mut() = code;
    response
}

fn finish(path: &str, mut response: Response<Body>, mut running: Running) -> Response<Body> {
    if let Some(status) = Status::from_header_map(response.headers()) {
        let status = if status.code() == tonic::Code::Unimplemented && status.message().is_empty() {
            unknown_method(path)
        } else {
            in_etcds_words(status)
        };
        running.end(status.code());
        response = status.into_http();
    }
    let permit = response.extensions_mut().remove::<ResponsePermit>();
    response.map(|body| {
        Body::new(PiecewiseBody { body, rest: Bytes::new(), framing: Framing::default(), running, _permit: permit })
    })
}

fn unknown_method(path: &str) -> Status {
    let mut parts = path.trim_start_matches('/').rsplitn(2, '/');
    let method = parts.next().unwrap_or_default();
    let service = parts.next().unwrap_or_default();
    if SERVICES.contains(&service) {
        return Status::unimplemented(format!("unknown method {method} for service {service}"));
    }
    Status::unimplemented(format!("unknown service {service}"))
}

/// Most bytes of a body handed to the connection at a time. The connection takes a whole frame as soon as the client has
/// room for a byte, so a larger one would lie in its buffer, uncounted, until a client that may never read has read it.
const PIECE_BYTES: usize = 64 << 10;

/// A body in pieces. Its bytes go back to the budget when the connection has taken the last piece or dropped it; of a
/// stream, the next message is asked for when the last piece of the one before is gone.
struct PiecewiseBody {
    body: Body,
    /// What is left of the frame being handed out.
    rest: Bytes,
    framing: Framing,
    running: Running,
    _permit: Option<ResponsePermit>,
}

impl http_body::Body for PiecewiseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other @ (Poll::Ready(_) | Poll::Pending) => return other,
            };
            match frame.into_data() {
                Ok(data) => {
                    let this = &mut *self;
                    let complete_before = this.framing.complete;
                    this.framing.advance(&data);
                    if let Some(call) = &this.running.call {
                        call.traffic().sent(data.len(), this.framing.complete - complete_before);
                    }
                    this.rest = data;
                }
                Err(trailers) => {
                    let status = trailers.trailers_ref().and_then(Status::from_header_map);
                    self.running.end(status.map_or(Code::Unknown, |status| status.code()));
                    return Poll::Ready(Some(Ok(trailers)));
                }
            }
        }
        let piece_bytes = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(piece_bytes)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
