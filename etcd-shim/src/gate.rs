//! What stands between a connection and the gRPC services: answers in the words of etcd's gRPC library where tonic's
//! differ, and the bytes of a response that are counted until the last of them has been handed to the connection.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use tenure_storage::Profile;
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::StdError;
use tonic::{Code, Status};

use crate::cell_error::CellError;
use crate::inflight::{OpenOne, ResponsePermit};
use crate::ping_guard::OpenRequest;
use crate::request_body::{Framing, PREFIX_BYTES};
use crate::rpc_metrics::Call;
use crate::server::{Router, SERVICES};
use crate::status::in_etcds_words;
use crate::throttle::{OpenCount, TenantUse};
use crate::wire::{RestOfMessage, TakesRest};

/// One request while it is being answered: open on its connection, and counted as a call if its method exists.
pub struct Running {
    pub open: OpenRequest,
    pub call: Option<Call>,
    /// Counted among the requests of its tenant.
    pub counted: Option<OpenCount>,
    /// The same, for the bytes of its answer.
    pub in_flight: OpenOne,
}

impl Running {
    /// Waits until the tenant, which has used so much, may make another request.
    ///
    /// # Errors
    /// [`CellError::TooManyRequests`].
    pub async fn let_in(&mut self, used: &Arc<TenantUse>, profile: &Profile) -> Result<(), CellError> {
        self.counted = Some(used.begin_request(profile).await?);
        Ok(())
    }

    /// The answer to a request that is not let in.
    pub fn refuse(mut self, refusal: Status) -> Response<Body> {
        self.end(refusal.code());
        refusal.into_http()
    }

    fn end(&mut self, code: Code) {
        if let Some(call) = &mut self.call {
            call.end(code);
        }
    }
}

/// Answers one gRPC request.
///
/// The request counts as open until its answer has left or been dropped. What the client said about how long it waits holds
/// for all of the answer.
pub async fn call<B>(router: &Router, mut request: Request<B>, mut running: Running) -> Response<Body>
where
    B: http_body::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    let timeout = request.headers().get(GRPC_TIMEOUT).map(timeout).transpose();
    if let Some(refusal) = refuse(&request).or_else(|| Some(refuse_timeout(timeout.as_ref().err()?))) {
        running.end(Status::from_header_map(refusal.headers()).map_or(Code::Unknown, |status| status.code()));
        return refusal;
    }
    // As etcd does, only who sends gzip is answered in gzip: everybody says that they understand it.
    if request.headers().get(GRPC_ENCODING).is_none_or(|encoding| encoding != "gzip") {
        request.headers_mut().remove(GRPC_ACCEPT_ENCODING);
        request.extensions_mut().insert(TakesRest);
    }
    let uri = request.uri().clone();
    let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
    let deadline = timeout.ok().flatten().and_then(|timeout| Instant::now().checked_add(timeout));
    let answer = router.call(request);
    let response = match deadline {
        None => answer.await,
        Some(deadline) if deadline <= Instant::now() => Ok(deadline_exceeded().into_http()),
        Some(deadline) => match tokio::time::timeout_at(deadline, answer).await {
            Ok(response) => response,
            Err(_) => Ok(deadline_exceeded().into_http()),
        },
    };
    let mut response = match response {
        Ok(response) => finish(uri.path(), response, deadline, running),
        Err(never) => match never {},
    };
    if let Some(content_type) = content_type {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response
}

const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// gRPC's timeouts: up to eight digits and a unit.
///
/// # Errors
/// What is wrong with it, in the words of etcd's gRPC library.
fn timeout(value: &HeaderValue) -> Result<Duration, String> {
    let text = String::from_utf8_lossy(value.as_bytes());
    if text.len() < 2 {
        return Err(format!("transport: timeout string is too short: {text:?}"));
    }
    if text.len() > 9 {
        return Err(format!("transport: timeout string is too long: {text:?}"));
    }
    let not_recognized = || format!("transport: timeout unit is not recognized: {text:?}");
    let (digits, unit) = text.split_at_checked(text.len() - 1).ok_or_else(not_recognized)?;
    let one = match unit {
        "H" => Duration::from_secs(3600),
        "M" => Duration::from_secs(60),
        "S" => Duration::from_secs(1),
        "m" => Duration::from_millis(1),
        "u" => Duration::from_micros(1),
        "n" => Duration::from_nanos(1),
        _ => return Err(not_recognized()),
    };
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let count = digits.parse::<u32>().ok().filter(|_| is_number);
    Ok(one * count.ok_or_else(|| format!("strconv.ParseUint: parsing {digits:?}: invalid syntax"))?)
}

fn refuse_timeout(error: &str) -> Response<Body> {
    http_refusal(StatusCode::BAD_REQUEST, Status::internal(format!("malformed grpc-timeout: {error}")))
}

fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

/// Requests that never reach a service.
fn refuse<B>(request: &Request<B>) -> Option<Response<Body>> {
    if request.method() != Method::POST {
        return Some(http_refusal(
            StatusCode::METHOD_NOT_ALLOWED,
            Status::internal(format!(
                "Received a HEADERS frame with :method {:?} which should be POST",
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

fn finish(path: &str, mut response: Response<Body>, deadline: Option<Instant>, mut running: Running) -> Response<Body> {
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
    let behind = response.extensions_mut().remove::<RestOfMessage>();
    response.map(|body| {
        Body::new(PiecewiseBody {
            body,
            behind: behind.map(|rest| rest.0.into()).unwrap_or_default(),
            rest: Bytes::new(),
            framing: Framing::default(),
            running,
            deadline,
            overdue: None,
            _permit: permit,
        })
    })
}

fn unknown_method(path: &str) -> Status {
    let Some((service, method)) = path.strip_prefix('/').unwrap_or(path).rsplit_once('/') else {
        return Status::unimplemented(format!("malformed method name: {path:?}"));
    };
    if SERVICES.contains(&service) {
        return Status::unimplemented(format!("unknown method {method} for service {service}"));
    }
    Status::unimplemented(format!("unknown service {service}"))
}

/// Most bytes of a body handed to the connection at a time. The connection takes a whole frame as soon as the client has
/// room for a byte, so a larger one would lie in its buffer, uncounted, until a client that may never read has read it.
const PIECE_BYTES: usize = 64 << 10;

/// The last piece of a larger frame, or part: with the room for its first byte the connection takes all of it, and the trailers behind it, and the
/// request is over here, whenever its client reads that. So this much of an answer is not counted, and no more.
const LAST_PIECE_BYTES: usize = 1 << 10;

/// A body in pieces. Its bytes go back to the budget when the connection has taken the last piece or dropped it; of a
/// stream, the next message is asked for when the last piece of the one before is gone.
struct PiecewiseBody {
    body: Body,
    /// What belongs behind the first frame, to its message; see [`RestOfMessage`].
    behind: VecDeque<Bytes>,
    /// What is left of the frame, or part of a message, being handed out.
    rest: Bytes,
    framing: Framing,
    running: Running,
    deadline: Option<Instant>,
    /// Ends at the deadline; made when there is something to wait for.
    overdue: Option<Pin<Box<Sleep>>>,
    _permit: Option<ResponsePermit>,
}

impl PiecewiseBody {
    fn piece_bytes(&self) -> usize {
        if !self.behind.is_empty() {
            return self.rest.len().min(PIECE_BYTES);
        }
        match self.rest.len().checked_sub(LAST_PIECE_BYTES) {
            Some(more) if more > 0 => more.min(PIECE_BYTES),
            Some(_) | None => self.rest.len(),
        }
    }

    /// Begins to hand out a frame of the body: the first is the whole of a message, if more of that is behind it.
    fn take_frame(&mut self, mut data: Bytes) {
        if self.framing.is_new() && !self.behind.is_empty() {
            data = longer(&data, self.behind.iter().map(Bytes::len).sum());
        }
        self.take_part(data);
    }

    fn take_part(&mut self, data: Bytes) {
        let complete_before = self.framing.complete;
        self.framing.advance(&data);
        if let Some(call) = &self.running.call {
            call.traffic().sent(data.len(), self.framing.complete - complete_before);
        }
        self.rest = data;
    }

    /// Whether the client waits no longer, asked while there is nothing to send.
    fn is_overdue(&mut self, context: &mut Context<'_>) -> bool {
        let Some(deadline) = self.deadline else { return false };
        let overdue = self.overdue.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        overdue.as_mut().poll(context).is_ready()
    }
}

impl http_body::Body for PiecewiseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        while self.rest.is_empty()
            && !self.framing.is_new()
            && let Some(part) = self.behind.pop_front()
        {
            self.take_part(part);
        }
        if self.rest.is_empty() {
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Pending if self.is_overdue(context) => {
                    self.deadline = None;
                    self.body = Body::empty();
                    self.behind.clear();
                    let mut trailers = HeaderMap::new();
                    let status = deadline_exceeded();
                    self.running.end(status.code());
                    // Fails only if the message is not ASCII.
                    let _ = status.add_header(&mut trailers);
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                other @ (Poll::Ready(_) | Poll::Pending) => return other,
            };
            match frame.into_data() {
                Ok(data) => self.take_frame(data),
                Err(trailers) => {
                    let status = trailers.trailers_ref().and_then(Status::from_header_map);
                    self.running.end(status.map_or(Code::Unknown, |status| status.code()));
                    self.behind.clear();
                    return Poll::Ready(Some(Ok(trailers)));
                }
            }
        }
        let piece_bytes = self.piece_bytes();
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(piece_bytes)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.behind.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// The frame of a message that goes on behind it for so many bytes.
fn longer(frame: &[u8], behind_bytes: usize) -> Bytes {
    assert_eq!(frame.first(), Some(&0), "only what is not compressed goes on behind its frame");
    let mut frame = BytesMut::from(frame);
    let message_bytes = frame.len() - PREFIX_BYTES + behind_bytes;
    let message_bytes =
        u32::try_from(message_bytes).expect("what `take_large` takes is at most half of what a frame can say");
    frame[1..PREFIX_BYTES].copy_from_slice(&message_bytes.to_be_bytes());
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_grpcs() {
        for (text, wanted) in [
            ("1n", Ok(Duration::from_nanos(1))),
            ("34S", Ok(Duration::from_secs(34))),
            ("99999999H", Ok(Duration::from_secs(99_999_999 * 3600))),
            ("100000000m", Err("transport: timeout string is too long: \"100000000m\"")),
            ("5", Err("transport: timeout string is too short: \"5\"")),
            ("", Err("transport: timeout string is too short: \"\"")),
            ("1x", Err("transport: timeout unit is not recognized: \"1x\"")),
            ("+5S", Err("strconv.ParseUint: parsing \"+5\": invalid syntax")),
        ] {
            assert_eq!(timeout(&HeaderValue::from_static(text)), wanted.map_err(str::to_string), "{text}");
        }
    }

    #[test]
    fn a_frame_says_how_long_its_message_is_with_what_is_behind_it() {
        let mut framing = Framing::default();
        assert!(framing.is_new());
        framing.advance(&longer(&[0, 0, 0, 0, 2, 7, 7], 300));
        assert!(!framing.is_new());
        framing.advance(&[7; 299]);
        assert_eq!(framing.complete, 0);
        framing.advance(&[7]);
        assert_eq!(framing.complete, 1);
    }

    #[test]
    fn what_is_no_method_is_named() {
        assert_eq!(unknown_method("/foo").message(), "malformed method name: \"/foo\"");
        assert_eq!(unknown_method("/a.B/C").message(), "unknown service a.B");
        assert_eq!(unknown_method("/etcdserverpb.KV/C").message(), "unknown method C for service etcdserverpb.KV");
    }
}
