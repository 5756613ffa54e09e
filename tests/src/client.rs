//! A gRPC client on bare HTTP/2. It can send what no gRPC library would, and not read what it is sent.

use std::net::SocketAddr;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::Request;
use prost::Message;
use tokio::net::TcpStream;
use tonic::{Code, Status};

/// Windows of a client that reads.
const WINDOW_BYTES: u32 = 8 << 20;

/// The largest there is.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// HTTP/2's own initial window: what a client announces that says nothing.
pub const DEFAULT_WINDOW_BYTES: u32 = 65_535;

/// One HTTP/2 connection. Clones are the same connection.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
}

impl Connection {
    /// Connects, ready to read what it asks for.
    pub async fn open(address: SocketAddr) -> Connection {
        Self::open_with_window(address, WINDOW_BYTES).await
    }

    /// As [`Connection::open`], to a server that may be gone.
    pub async fn try_open(address: SocketAddr) -> Result<Connection, Status> {
        Self::try_open_with_window(address, WINDOW_BYTES).await
    }

    /// Connects and announces this window of each stream. What all streams together may receive unread is not limited.
    pub async fn open_with_window(address: SocketAddr, stream_window_bytes: u32) -> Connection {
        Self::try_open_with_window(address, stream_window_bytes).await.unwrap()
    }

    async fn try_open_with_window(address: SocketAddr, stream_window_bytes: u32) -> Result<Connection, Status> {
        let gone = |error: std::io::Error| Status::unavailable(error.to_string());
        let stream = TcpStream::connect(address).await.map_err(gone)?;
        stream.set_nodelay(true).map_err(gone)?;
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(stream_window_bytes)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_reset_streams(10_000)
            .handshake(stream)
            .await
            .map_err(transport)?;
        // Ends with the last clone of the connection.
        tokio::spawn(connection);
        Ok(Connection { requests })
    }

    /// Starts a call of `/package.Service/Method`.
    pub async fn call(&self, method: &str) -> Result<Call, h2::Error> {
        self.call_with(grpc_request(method)).await
    }

    /// Starts whatever request this is.
    pub async fn call_with(&self, request: Request<()>) -> Result<Call, h2::Error> {
        let mut requests = self.requests.clone().ready().await?;
        let (response, stream) = requests.send_request(request, false)?;
        Ok(Call {
            requests: Requests(stream),
            answers: Answers { state: State::Expected(response), received: BytesMut::new() },
        })
    }

    /// One request, one answer.
    pub async fn unary<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A, Status> {
        let mut call = self.call(method).await.map_err(transport)?;
        call.requests.send_bytes(framed(&request.encode_to_vec()), true).await.map_err(transport)?;
        call.answers.only_message().await
    }

    /// Everything that these bytes, sent as the whole request, are answered with: as it came, and how it ended.
    pub async fn bytes_of(&self, method: &str, message: &[u8]) -> (Vec<u8>, Status) {
        let mut call = match self.call(method).await {
            Ok(call) => call,
            Err(error) => return (Vec::new(), transport(error)),
        };
        // The server may have answered before it has read everything.
        let _ = call.requests.send_bytes(framed(message), true).await;
        loop {
            if let Err(status) = call.answers.receive().await {
                return (call.answers.received.to_vec(), status);
            }
        }
    }

    /// The status that these bytes, sent as the whole request, are answered with.
    pub async fn status_of(&self, method: &str, body: Bytes) -> Status {
        let mut call = self.call(method).await.unwrap();
        // The server may have answered before it has read everything.
        let _ = call.requests.send_bytes(body, true).await;
        call.answers.status().await
    }
}

/// The headers every gRPC request has.
pub fn grpc_request(method: &str) -> Request<()> {
    Request::post(format!("http://tenured{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// A message as gRPC frames it.
pub fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_slice(&frame_header(0, message.len()));
    frame.put_slice(message);
    frame.freeze()
}

/// What stands before a message: whether it is compressed, and its length.
pub fn frame_header(compressed: u8, message_bytes: usize) -> [u8; 5] {
    let [a, b, c, d] = u32::try_from(message_bytes).unwrap().to_be_bytes();
    [compressed, a, b, c, d]
}

fn transport(error: h2::Error) -> Status {
    Status::new(Code::Unavailable, format!("HTTP/2: {error}"))
}

/// A request on its way, and its answer. The halves can be used by different tasks.
pub struct Call {
    pub requests: Requests,
    pub answers: Answers,
}

/// The client's side of a call. Dropping it leaves the call open.
pub struct Requests(SendStream<Bytes>);

impl Requests {
    /// Sends bytes as they are, as fast as the server takes them.
    pub async fn send_bytes(&mut self, mut bytes: Bytes, end: bool) -> Result<(), h2::Error> {
        while !bytes.is_empty() {
            self.0.reserve_capacity(bytes.len());
            let room = std::future::poll_fn(|task| self.0.poll_capacity(task)).await;
            let Some(room) = room else { return Err(h2::Reason::CANCEL.into()) };
            let piece = bytes.split_to(room?.min(bytes.len()));
            self.0.send_data(piece, false)?;
        }
        if end { self.0.send_data(Bytes::new(), true) } else { Ok(()) }
    }

    /// Sends one message.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), h2::Error> {
        self.send_bytes(framed(&message.encode_to_vec()), false).await
    }

    /// Takes the request back.
    pub fn reset(&mut self) {
        self.0.send_reset(h2::Reason::CANCEL);
    }
}

/// The server's side of a call. Dropping it cancels the call.
pub struct Answers {
    state: State,
    received: BytesMut,
}

enum State {
    Expected(ResponseFuture),
    Body(RecvStream),
    Ended(Status),
}

impl Answers {
    /// Waits for the headers, and no longer. `Some` if they end the call.
    pub async fn started(&mut self) -> Option<Status> {
        if let State::Expected(response) = &mut self.state {
            self.state = match response.await {
                Ok(response) => match Status::from_header_map(response.headers()) {
                    Some(status) => State::Ended(status),
                    None => State::Body(response.into_body()),
                },
                Err(error) => State::Ended(transport(error)),
            };
        }
        match &self.state {
            State::Ended(status) => Some(status.clone()),
            State::Expected(_) | State::Body(_) => None,
        }
    }

    /// The next message, or how the call ended.
    pub async fn message<A: Message + Default>(&mut self) -> Result<A, Status> {
        loop {
            if let Some((header, _)) = self.received.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if self.received.len() >= 5 + length {
                    self.received.advance(5);
                    return Ok(A::decode(self.received.split_to(length)).expect("the server sends protobuf"));
                }
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> Result<(), Status> {
        if let Some(status) = self.started().await {
            return Err(status);
        }
        let State::Body(body) = &mut self.state else { unreachable!("it has started and not ended") };
        match body.data().await {
            Some(Ok(data)) => {
                body.flow_control().release_capacity(data.len()).map_err(transport)?;
                self.received.extend_from_slice(&data);
                return Ok(());
            }
            Some(Err(error)) => self.state = State::Ended(transport(error)),
            None => {
                let trailers = body.trailers().await.map_err(transport)?;
                let status = trailers.as_ref().and_then(Status::from_header_map);
                self.state = State::Ended(status.unwrap_or_else(|| Status::unknown("no status")));
            }
        }
        Ok(())
    }

    /// How the call ends, whatever it answers before.
    pub async fn status(mut self) -> Status {
        loop {
            self.received.clear();
            if let Err(status) = self.receive().await {
                return status;
            }
        }
    }

    async fn only_message<A: Message + Default>(mut self) -> Result<A, Status> {
        let message = self.message().await?;
        let status = self.status().await;
        if status.code() == Code::Ok { Ok(message) } else { Err(status) }
    }
}
