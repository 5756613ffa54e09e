//! Sends away clients that ping too often, by the rule of etcd's gRPC library (contract 3.2).
//!
//! The HTTP/2 library answers pings by itself and tells nobody, so this stands between it and the socket and reads along: the
//! nine bytes before each frame, in both directions. A ping is a strike if it comes sooner than the minimum after the one before,
//! or, while no request is open, sooner than two hours. Sending headers or data forgives all strikes with the next ping, which is none
//! whenever it comes. After the third the client gets GOAWAY with ENHANCE_YOUR_CALM and `too_many_pings`, which makes it double its own interval, and the
//! connection ends.
//!
//! HTTP/1 has no frames: what does not start with HTTP/2's preface is passed on unread.
//!
//! Until it is clear which of the two a client speaks, neither library counts the time; so that is done here. Whoever says nothing, or has
//! vanished, does not keep its connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// What a client sends first when it speaks HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PING: u8 = 6;
const ACK: u8 = 1;

/// Strikes that are forgiven; the next one ends the connection.
const STRIKES_MAX: u32 = 2;

/// How often a client without an open request may ping.
const IDLE_PING_INTERVAL: Duration = Duration::from_secs(2 * 3600);

/// How long a client may take to read its farewell.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// GOAWAY on stream 0: last stream 2^31-1, code ENHANCE_YOUR_CALM, and the text that clients look for.
const GOAWAY: &[u8] = b"\x00\x00\x16\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x0btoo_many_pings";

/// Requests of one connection that are being answered.
#[derive(Clone, Debug, Default)]
pub struct OpenRequests(Arc<AtomicUsize>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct OpenRequest(Arc<AtomicUsize>);

impl OpenRequests {
    /// Counts one more until the result is dropped.
    pub fn open(&self) -> OpenRequest {
        self.0.fetch_add(1, Ordering::Relaxed);
        OpenRequest(Arc::clone(&self.0))
    }

    fn none(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is read along.
#[derive(Debug)]
pub struct PingGuard<S> {
    stream: S,
    requests: OpenRequests,
    received: Frames,
    sent: Frames,
    policy: Policy,
    /// What is left of the farewell, once it has begun.
    farewell: Option<&'static [u8]>,
    /// Then it ends, whether the client takes it or not.
    farewell_ends: Option<Pin<Box<Sleep>>>,
    /// Until then the client has to have said what it speaks; `None` once it has.
    silence_ends: Option<Pin<Box<Sleep>>>,
}

impl<S> PingGuard<S> {
    /// `min_interval`: how often a client with an open request may ping. `silence_max`: how long it may take to say what it speaks. Needs
    /// tokio's clock.
    pub fn new(stream: S, requests: OpenRequests, min_interval: Duration, silence_max: Duration) -> Self {
        PingGuard {
            stream,
            requests,
            received: Frames::of_client(),
            sent: Frames::of_server(),
            policy: Policy { min_interval, last_ping: None, strikes: 0, forgives_next: false },
            farewell: None,
            farewell_ends: None,
            silence_ends: Some(Box::pin(sleep(silence_max))),
        }
    }

    /// Whether the client has taken too long to say what it speaks.
    fn is_silent(&mut self, context: &mut Context<'_>) -> bool {
        if !matches!(self.received, Frames::Preface(_)) {
            self.silence_ends = None;
        }
        self.silence_ends.as_mut().is_some_and(|end| end.as_mut().poll(context).is_ready())
    }
}

/// grpc-go's enforcement policy.
#[derive(Debug)]
struct Policy {
    min_interval: Duration,
    last_ping: Option<Instant>,
    strikes: u32,
    /// Headers or data were sent since the last ping.
    forgives_next: bool,
}

impl Policy {
    /// Whether this ping is one too many.
    fn ping(&mut self, now: Instant, idle: bool) -> bool {
        let allowed_after = if idle { IDLE_PING_INTERVAL } else { self.min_interval };
        let too_soon = self.last_ping.is_some_and(|last| now.duration_since(last) < allowed_after);
        self.last_ping = Some(now);
        if std::mem::take(&mut self.forgives_next) {
            self.strikes = 0;
            return false;
        }
        self.strikes += u32::from(too_soon);
        self.strikes > STRIKES_MAX
    }

    fn forgive(&mut self) {
        self.forgives_next = true;
    }
}

/// Follows the frames in a stream of bytes.
#[derive(Debug)]
enum Frames {
    /// Matching the preface, so far this much of it.
    Preface(usize),
    /// In a frame's header, so far this much of it.
    Header([u8; FRAME_HEADER_BYTES], usize),
    Payload(usize),
    /// Not HTTP/2.
    Unknown,
}

impl Frames {
    fn of_client() -> Self {
        Frames::Preface(0)
    }

    fn of_server() -> Self {
        Frames::Header([0; FRAME_HEADER_BYTES], 0)
    }

    fn is_between_frames(&self) -> bool {
        matches!(self, Frames::Header(_, 0))
    }

    /// Goes over more bytes; `frame` is called with type and flags of each frame that begins.
    fn advance(&mut self, mut bytes: &[u8], frame: &mut dyn FnMut(u8, u8)) {
        while let Some((first, rest)) = bytes.split_first() {
            match self {
                Frames::Unknown => return,
                Frames::Preface(matched) => {
                    if PREFACE.get(*matched) != Some(first) {
                        *self = Frames::Unknown;
                        return;
                    }
                    *matched += 1;
                    bytes = rest;
                    if *matched == PREFACE.len() {
                        *self = Frames::of_server();
                    }
                }
                Frames::Header(header, len) => {
                    header[*len] = *first;
                    *len += 1;
                    bytes = rest;
                    if *len == FRAME_HEADER_BYTES {
                        let [a, b, c, kind, flags, ..] = *header;
                        let payload = u32::from_be_bytes([0, a, b, c]) as usize;
                        frame(kind, flags);
                        *self = if payload == 0 { Frames::of_server() } else { Frames::Payload(payload) };
                    }
                }
                Frames::Payload(left) => {
                    let taken = bytes.len().min(*left);
                    *left -= taken;
                    bytes = &bytes[taken..];
                    if *left == 0 {
                        *self = Frames::of_server();
                    }
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> PingGuard<S> {
    /// Writes what can be written of the farewell, then ends the connection.
    ///
    /// # Errors
    /// The client took too long.
    fn poll_farewell(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ends = self.farewell_ends.get_or_insert_with(|| Box::pin(sleep(FAREWELL_MAX)));
        if ends.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        while let Some(rest) = self.farewell.filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut self.stream).poll_write(context, rest) {
                Poll::Ready(Ok(written)) if written > 0 => self.farewell = rest.get(written..),
                Poll::Ready(Ok(_) | Err(_)) => self.farewell = Some(&[]),
                Poll::Pending => return Poll::Pending,
            }
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for PingGuard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.farewell.is_none() {
            let before = buffer.filled().len();
            let read = Pin::new(&mut this.stream).poll_read(context, buffer);
            if read.is_pending() && this.is_silent(context) {
                tracing::debug!("a client that says nothing");
                // The end of the stream, as if it had left.
                return Poll::Ready(Ok(()));
            }
            let Poll::Ready(Ok(())) = read else { return read };
            let mut too_many = false;
            let (policy, requests) = (&mut this.policy, &this.requests);
            this.received.advance(&buffer.filled()[before..], &mut |kind, flags| {
                if kind == PING && flags & ACK == 0 {
                    too_many |= policy.ping(Instant::now(), requests.none());
                }
            });
            if !too_many {
                return Poll::Ready(Ok(()));
            }
            tracing::debug!("too many pings");
            buffer.set_filled(before);
            // Half a frame of another kind may be on its way; a GOAWAY in the middle of it would be noise.
            this.farewell = Some(if this.sent.is_between_frames() { GOAWAY } else { &[] });
        }
        // Then the end of the stream, as if the client had left.
        this.poll_farewell(context).map(|_| Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PingGuard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.farewell.is_some() {
            // Nothing comes after it. The connection ends when it is written, as if the client had left; an error would end it before.
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = written
            && !matches!(this.received, Frames::Unknown)
        {
            let policy = &mut this.policy;
            this.sent.advance(&bytes[..written], &mut |kind, _| {
                if matches!(kind, DATA | HEADERS) {
                    policy.forgive();
                }
            });
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.farewell.is_some() {
            return self.poll_farewell(context);
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let len = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![len[1], len[2], len[3], kind, flags, 0, 0, 0, 0];
        frame.resize(FRAME_HEADER_BYTES + payload, PING);
        frame
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_cut() {
        let stream =
            [PREFACE.to_vec(), frame(4, 0, 0), frame(PING, 0, 8), frame(DATA, 1, 40), frame(PING, ACK, 8)].concat();
        for cut in 1..20 {
            let (mut frames, mut found) = (Frames::of_client(), Vec::new());
            for piece in stream.chunks(cut) {
                frames.advance(piece, &mut |kind, flags| found.push((kind, flags)));
            }
            assert_eq!(found, [(4, 0), (PING, 0), (DATA, 1), (PING, ACK)], "pieces of {cut}");
            assert!(frames.is_between_frames());
        }
        let mut http1 = Frames::of_client();
        http1.advance(b"GET / HTTP/1.1\r\n", &mut |_, _| panic!("no frames"));
        assert!(matches!(http1, Frames::Unknown));
    }

    /// Each connection is one of those that a listener may have: who connects and says nothing, or half a preface, must not keep it.
    #[tokio::test]
    async fn a_client_that_says_nothing_is_sent_away() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        let silence_max = Duration::from_millis(20);
        let guard = |stream| PingGuard::new(stream, OpenRequests::default(), Duration::ZERO, silence_max);
        for said in [&b""[..], &PREFACE[..20]] {
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(said).await.unwrap();
            let (began, mut read) = (Instant::now(), Vec::new());
            guard(server).read_to_end(&mut read).await.unwrap();
            assert!(began.elapsed() >= silence_max && read == said, "{read:?}");
        }
        for said in [&b"GET"[..], PREFACE] {
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(said).await.unwrap();
            let mut read = Vec::new();
            let mut guard = guard(server);
            let reading = guard.read_to_end(&mut read);
            assert!(tokio::time::timeout(10 * silence_max, reading).await.is_err(), "the library counts from here on");
        }
    }

    #[test]
    fn the_third_strike_ends_it() {
        let policy =
            || Policy { min_interval: Duration::from_secs(5), last_ping: None, strikes: 0, forgives_next: false };
        let mut idle = policy();
        let mut policy = policy();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in [0, 5, 10, 15] {
            assert!(!policy.ping(at(seconds), false), "often enough");
        }
        assert!(!policy.ping(at(16), false) && !policy.ping(at(17), false), "two strikes");
        policy.forgive();
        assert!(!policy.ping(at(18), false), "forgiven, and not looked at");
        assert!(!policy.ping(at(19), false) && !policy.ping(at(20), false), "two strikes again");
        assert!(policy.ping(at(21), false));
        assert!([0, 10, 20].iter().all(|seconds| !idle.ping(at(*seconds), true)));
        assert!(idle.ping(at(30), true), "an idle client has no reason to ping");
    }
}
