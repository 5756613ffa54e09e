//! Requests that have begun to arrive are counted.
//!
//! A message is kept whole until its last byte is there, so clients that begin many messages and finish none would fill
//! memory. The bytes of unfinished messages are therefore reserved per tenant, in a budget of their own (see
//! [`crate::inflight`]). Where there is no room the request is refused instead of waiting: half requests that wait would
//! hold the room for ever.
//!
//! What must hold: a message that is complete is not counted any more; the limit on its size bounds it from here on.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

use crate::cell::Tenant;
use crate::inflight::Reservation;
use crate::rpc_metrics::Traffic;
use crate::throttle::WAIT_MAX;

/// gRPC's prefix of a message: a flag and four bytes of length.
pub(crate) const PREFIX_BYTES: usize = 5;

/// Longest pause, so that there is a moment at which it ends.
const PAUSE_MAX: Duration = Duration::from_secs(24 * 3600);

/// A request's body, whose unfinished message is reserved.
pub(crate) struct CountedBody<B> {
    body: B,
    framing: Framing,
    reservation: Reservation,
    /// `None` for a method that does not exist.
    traffic: Option<Traffic>,
    /// Whose limits hold; `None`: it is gone.
    tenant: Option<Tenant>,
    pause: Option<Pause>,
}

/// Nothing is read until then. A limit may be lifted meanwhile, so it is looked every [`WAIT_MAX`] whether anything is still owed.
struct Pause {
    until: Instant,
    look: Pin<Box<Sleep>>,
}

impl Pause {
    fn new(length: Duration) -> Self {
        let now = Instant::now();
        let until = now + length.min(PAUSE_MAX);
        Pause { until, look: Box::pin(sleep_until(until.min(now + WAIT_MAX))) }
    }
}

impl<B> CountedBody<B> {
    /// `reservation` must be empty.
    pub(crate) fn new(body: B, reservation: Reservation, traffic: Option<Traffic>, tenant: Option<Tenant>) -> Self {
        CountedBody { body, framing: Framing::default(), reservation, traffic, tenant, pause: None }
    }

    /// Counts what has come in. A tenant that sends faster than it may is not read on for a while.
    fn count(&mut self, bytes: usize, messages: u64) {
        let Some(traffic) = &self.traffic else { return };
        traffic.received(bytes, messages);
        let Some(tenant) = &self.tenant else { return };
        // The first message of a request was counted with it.
        let is_first = messages > 0 && self.framing.complete == messages;
        let pause = traffic.used().received(&tenant.profile(), bytes, messages - u64::from(is_first));
        if pause > Duration::ZERO {
            self.pause = Some(Pause::new(pause));
        }
    }

    fn owes(&self) -> Duration {
        let of = self.traffic.as_ref().zip(self.tenant.as_ref());
        of.map_or(Duration::ZERO, |(traffic, tenant)| traffic.used().owes(&tenant.profile()))
    }

    fn poll_pause(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some(pause) = &mut self.pause {
            ready!(pause.look.as_mut().poll(context));
            // No longer than was said: what others of the tenant have sent since is theirs to wait for.
            let left = pause.until.saturating_duration_since(Instant::now()).min(self.owes());
            self.pause = (left > Duration::ZERO).then(|| Pause::new(left));
        }
        Poll::Ready(())
    }
}

impl<B> http_body::Body for CountedBody<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        ready!(self.poll_pause(context));
        let frame = match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => return Poll::Pending,
        };
        if let Some(data) = frame.data_ref() {
            let complete_before = self.framing.complete;
            let unfinished_bytes = self.framing.advance(data);
            let (bytes, messages) = (data.len(), self.framing.complete - complete_before);
            self.count(bytes, messages);
            if !self.reservation.try_reach(unfinished_bytes) {
                let refusal = Status::resource_exhausted("etcdserver: too many requests");
                return Poll::Ready(Some(Err(refusal.into())));
            }
            self.reservation.settle(unfinished_bytes);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Where in gRPC's framing a stream of bytes is.
#[derive(Debug, Default)]
pub(crate) struct Framing {
    /// Messages that have ended.
    pub(crate) complete: u64,
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    /// Of the message whose prefix is complete.
    message_left: usize,
    message_got: usize,
}

impl Framing {
    /// Whether nothing has come yet.
    pub(crate) fn is_new(&self) -> bool {
        self.complete == 0 && self.prefix_len == 0
    }

    /// Goes over more bytes; returns how many belong to a message that is not complete yet.
    pub(crate) fn advance(&mut self, mut data: &[u8]) -> usize {
        while let Some((first, rest)) = data.split_first() {
            if self.prefix_len < PREFIX_BYTES {
                self.prefix[self.prefix_len] = *first;
                self.prefix_len += 1;
                data = rest;
                let [_, length @ ..] = self.prefix;
                self.message_left = u32::from_be_bytes(length) as usize;
            } else {
                let taken = self.message_left.min(data.len());
                self.message_left -= taken;
                self.message_got += taken;
                data = &data[taken..];
            }
            if self.prefix_len == PREFIX_BYTES && self.message_left == 0 {
                *self = Framing { complete: self.complete + 1, ..Framing::default() };
            }
        }
        self.prefix_len + self.message_got
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(len: usize) -> Vec<u8> {
        let mut out = vec![0];
        out.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        out.resize(PREFIX_BYTES + len, 7);
        out
    }

    proptest! {
        /// However the bytes are cut, what is unfinished is what lies behind the last complete message.
        #[test]
        fn counts_what_is_unfinished(
            lens in prop::collection::vec(0usize..40, 0..6), cuts in prop::collection::vec(1usize..30, 1..40),
        ) {
            let stream: Vec<u8> = lens.iter().flat_map(|len| message(*len)).collect();
            let mut ends = vec![0];
            for len in &lens {
                ends.push(ends.last().unwrap() + PREFIX_BYTES + len);
            }
            let (mut framing, mut at) = (Framing::default(), 0);
            for cut in cuts {
                let end = (at + cut).min(stream.len());
                let unfinished = framing.advance(&stream[at..end]);
                at = end;
                let complete = ends.iter().filter(|end| **end <= at).max().unwrap();
                prop_assert_eq!(unfinished, at - complete);
                prop_assert_eq!(framing.complete + 1, ends.iter().filter(|end| **end <= at).count() as u64);
            }
        }
    }
}
