//! A proposal that somebody waits for, counted for as long as that lasts.
//!
//! Either whoever answers takes it out of the count of those pending, or, if the one that waits goes away first, [`Pending`] does: then
//! the proposal counts as failed too, whatever becomes of it. Both may happen at once; the channel between them decides: an answer
//! that could be sent was sent to somebody. It holds the counters alone, not the member: who waits for a member that is gone hears so.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::oneshot;

use crate::error::ProposeError;
use crate::metrics::Metrics;

/// Resolves with what became of a proposal.
pub(crate) struct Pending<R> {
    answer: oneshot::Receiver<Result<R, ProposeError>>,
    metrics: Arc<Metrics>,
    over: bool,
}

impl<R> Pending<R> {
    /// Of a proposal that has just been counted.
    pub(crate) fn new(answer: oneshot::Receiver<Result<R, ProposeError>>, metrics: Arc<Metrics>) -> Self {
        Pending { answer, metrics, over: false }
    }

    /// As awaiting it, on a thread without an async runtime.
    pub(crate) fn blocking_recv(self) -> Result<R, ProposeError> {
        futures::executor::block_on(self)
    }

    /// The answer, if it is there.
    #[cfg(test)]
    pub(crate) fn try_recv(&mut self) -> Result<Result<R, ProposeError>, oneshot::error::TryRecvError> {
        let answer = self.answer.try_recv();
        match &answer {
            Ok(_) => self.over = true,
            Err(oneshot::error::TryRecvError::Closed) => self.give_up(),
            Err(oneshot::error::TryRecvError::Empty) => {}
        }
        answer
    }

    /// Nobody will answer, or nobody will hear it.
    fn give_up(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.metrics.count_unanswered();
        }
    }
}

impl<R> Future for Pending<R> {
    type Output = Result<R, ProposeError>;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Self::Output> {
        match ready!(Pin::new(&mut self.answer).poll(task)) {
            Ok(answer) => {
                self.over = true;
                Poll::Ready(answer)
            }
            // The member died with the command on its way.
            Err(_) => {
                self.give_up();
                Poll::Ready(Err(ProposeError::Dropped))
            }
        }
    }
}

impl<R> Drop for Pending<R> {
    fn drop(&mut self) {
        self.answer.close();
        if !self.over && self.answer.try_recv().is_err() {
            self.give_up();
        }
    }
}
