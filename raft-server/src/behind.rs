//! Letting the tasks go first that are ready on this thread of the runtime.
//!
//! The runtime's own way to yield keeps a task for the thread that polled it, until that thread has looked at the network; no other can take it, so
//! it waits as long as that thread does anything else. Here it goes to the end of the thread's queue, from where others may take it.
//!
//! What must hold: it is polled again without anybody's doing. Left out: to look at the network.

use std::future::poll_fn;
use std::task::Poll;

/// Resolves when the tasks were polled that were ready on this thread before, or when another thread has taken it meanwhile.
pub async fn behind_ready_tasks() {
    let mut is_behind = false;
    poll_fn(|task| {
        if std::mem::replace(&mut is_behind, true) {
            return Poll::Ready(());
        }
        task.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[tokio::test]
    async fn ready_tasks_go_first() {
        let order = Arc::<Mutex<Vec<&str>>>::default();
        let note = |what| {
            let order = Arc::clone(&order);
            async move { order.lock().push(what) }
        };
        let last = note("last");
        let waits = tokio::spawn(async move {
            behind_ready_tasks().await;
            last.await;
        });
        let first = tokio::spawn(note("first"));
        waits.await.unwrap();
        first.await.unwrap();
        assert_eq!(*order.lock(), ["first", "last"]);
    }
}
