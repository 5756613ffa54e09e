//! A tenant's limit on what this member sends it per second, at its sockets.
//!
//! What an answer's bytes cost is known when it is made, too late to refuse it. So they are taken from the tenant's bucket as they are
//! written, and whoever owes does not write on until nothing is owed: its answers and events take longer, none is lost, and what
//! waits meanwhile is bounded by `response_bytes_in_flight`, by what a watcher may be behind, and by flow control. A tenant with a
//! limit writes [`WRITE_BYTES_MAX`] at a time, and looks before each write what all its connections owe together.
//!
//! What keeps a connection alive is not held: the answer to a ping would else come too late on a connection that has sent nothing, because
//! of what others of the tenant were sent.
//!
//! The limit is looked up with each write, and every [`LOOK_AGAIN`] while one waits: it may change while a connection lasts.
//! Without one a write costs that look.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::cell::Tenant;
use crate::throttle::TenantUse;

/// What one write of a limited tenant takes.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// Writes up to this are let pass, and counted: the answer to a ping, to settings, or room that the client is given to send. Answers and
/// events are larger.
const CONTROL_BYTES_MAX: usize = 48;

/// Longest wait until it is looked again what is owed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Whose connection it is.
#[derive(Clone)]
pub(crate) struct Receiver {
    pub(crate) tenant: Tenant,
    pub(crate) used: Arc<TenantUse>,
}

impl Receiver {
    fn is_limited(&self) -> bool {
        self.used.limits_sending(&self.tenant.profile())
    }

    /// Bytes were sent. When to look again whether it may write on; `None`: it may.
    fn sent(&self, bytes: usize) -> Option<Instant> {
        let now = Instant::now();
        let wait = self.used.sent(&self.tenant.profile(), bytes, now);
        (!wait.is_zero()).then(|| now + wait.min(LOOK_AGAIN))
    }
}

/// A connection that writes no faster than its tenant may.
pub(crate) struct SendRate<S> {
    stream: S,
    receiver: Option<Receiver>,
    waits: Option<Pin<Box<Sleep>>>,
}

impl<S> SendRate<S> {
    /// Without a receiver there is no limit.
    pub(crate) fn new(stream: S, receiver: Option<Receiver>) -> Self {
        SendRate { stream, receiver, waits: None }
    }
}

impl<S: AsyncWrite + Unpin> SendRate<S> {
    fn write(
        &mut self,
        task: &mut Context<'_>,
        bytes: usize,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>, usize) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let Some(receiver) = self.receiver.as_ref().filter(|receiver| receiver.is_limited()) else {
                return write(Pin::new(&mut self.stream), task, usize::MAX);
            };
            if bytes <= CONTROL_BYTES_MAX {
                break;
            }
            if let Some(waits) = &mut self.waits {
                ready!(waits.as_mut().poll(task));
                self.waits = None;
            }
            let Some(until) = receiver.sent(0) else { break };
            self.waits = Some(Box::pin(sleep_until(until)));
        }
        let written = ready!(write(Pin::new(&mut self.stream), task, WRITE_BYTES_MAX))?;
        if let Some(receiver) = &self.receiver {
            receiver.sent(written);
        }
        Poll::Ready(Ok(written))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for SendRate<S> {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(task, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for SendRate<S> {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(task, bytes.len(), |stream, task, most| stream.poll_write(task, &bytes[..bytes.len().min(most)]))
    }

    // One slice at a time if there is a bound: the others would be cut somewhere in the middle.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes: usize = slices.iter().map(|slice| slice.len()).sum();
        self.write(task, bytes, |stream, task, most| {
            if bytes <= most {
                return stream.poll_write_vectored(task, slices);
            }
            let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| slice);
            stream.poll_write(task, &first[..first.len().min(most)])
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(task)
    }
}

#[cfg(test)]
mod tests {
    use tenure_storage::Limit;

    use super::*;
    use crate::cell::TenantUpdate;
    use crate::service::testing::TestCell;

    /// A client that hears nothing after a ping takes its connection for dead, whatever another one of its tenant is sent.
    #[tokio::test]
    async fn what_is_owed_does_not_hold_the_answer_to_a_ping() {
        let cell = TestCell::open().await;
        let tenant = cell.tenant("other");
        let limits = vec![(Limit::ResponseBytesPerSecond, Some(1))];
        cell.context().cell.update_tenant(&tenant, TenantUpdate { limits, ..Default::default() }).await.unwrap();
        let receiver = Receiver { tenant, used: Arc::default() };
        let mut list = SendRate::new(Vec::new(), Some(receiver.clone()));
        let mut watch = SendRate::new(Vec::new(), Some(receiver));
        let write = async |stream: &mut SendRate<Vec<u8>>, bytes| {
            let bytes = vec![0; bytes];
            let written = std::future::poll_fn(|task| Pin::new(&mut *stream).poll_write(task, &bytes));
            matches!(futures::poll!(std::pin::pin!(written)), Poll::Ready(Ok(_)))
        };
        assert!(write(&mut list, 1 << 20).await);
        assert!(!write(&mut list, 1 << 20).await && !write(&mut watch, 100).await, "both wait");
        assert!(write(&mut watch, 17).await && write(&mut watch, 17).await);
        assert!(!write(&mut watch, 100).await);
    }
}
