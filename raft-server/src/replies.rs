//! How replies get from raft's threads to those who wait for them.
//!
//! Those who wait are tasks of a runtime. Several replies go there as one task, which sends them: each of those who wait is then woken by a
//! thread that may run it, and the runtime lets its other threads in.
//!
//! With a single reply there is nothing for those to do. Yet the runtime wakes a thread of its own that sleeps for any task that is woken from outside,
//! and that one another, and both want the one lock of the system's events: a fifth of the CPU of one client's put (decision 0003). So a single
//! reply is left in a list, and a bell is rung that the runtime hears as it hears of its sockets: the thread that waits for those wakes up, sends
//! it, and polls who has got it.
//!
//! What must hold: a reply that was given is sent, or dropped with its sender, which tells the one who waits. A single reply is sent also where
//! the runtime or the member ends first, or the bell fails: then by whoever finds that out. The list is bounded by those who wait.

use std::io::{self, PipeWriter, Write as _};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;

type Reply = Box<dyn FnOnce() + Send>;

/// Where replies are given; see the module's essay.
pub(crate) struct Replies(Option<(Handle, Arc<Waiting>)>);

struct Waiting {
    /// `None`: nobody takes them any more.
    list: Mutex<Option<Vec<Reply>>>,
    /// Rung, with a byte, when the list gets its first. The byte is read before the list is taken, so there are never more than two.
    bell: Arc<PipeWriter>,
}

impl Replies {
    /// To be sent on a runtime; without one, where they are given.
    ///
    /// # Errors
    /// The system's, where it has no file descriptor left.
    pub(crate) fn on(runtime: Option<&Handle>) -> io::Result<Self> {
        let Some(runtime) = runtime else { return Ok(Replies(None)) };
        let (heard, bell) = io::pipe()?;
        let mut heard = {
            let _of_it = runtime.enter();
            pipe::Receiver::from_owned_fd(OwnedFd::from(heard))?
        };
        let waiting = Arc::new(Waiting { list: Mutex::new(Some(Vec::new())), bell: Arc::new(bell) });
        let taker = Taker(Arc::downgrade(&waiting));
        runtime.spawn(async move {
            let mut rings = [0; 16];
            while let Ok(1..) = heard.read(&mut rings).await {
                let Some(waiting) = taker.0.upgrade() else { break };
                waiting.send_all(Last::No);
            }
        });
        Ok(Replies(Some((runtime.clone(), waiting))))
    }

    /// On which they are sent.
    pub(crate) fn runtime(&self) -> Option<&Handle> {
        self.0.as_ref().map(|(runtime, _)| runtime)
    }

    /// Gives what sends `replies` of them.
    pub(crate) fn give(&self, replies: usize, send: impl FnOnce() + Send + 'static) {
        match &self.0 {
            // Dropped with its runtime, it drops the senders, and who waits learns that.
            Some((runtime, _)) if replies > 1 => drop(runtime.spawn(async move { send() })),
            Some((_, waiting)) if replies == 1 => waiting.give(send),
            _ => send(),
        }
    }
}

impl Drop for Replies {
    /// So that the task ends.
    fn drop(&mut self) {
        if let Some((_, waiting)) = self.0.take() {
            waiting.send_all(Last::Yes);
            let bell = Arc::clone(&waiting.bell);
            drop(waiting);
            let _ = ring(&bell);
        }
    }
}

/// Whether the list takes replies after that.
#[derive(PartialEq, Eq)]
enum Last {
    No,
    Yes,
}

impl Waiting {
    fn give(&self, send: impl FnOnce() + Send + 'static) {
        let mut list = self.list.lock();
        let Some(replies) = &mut *list else {
            drop(list);
            return send();
        };
        let is_first = replies.is_empty();
        replies.push(Box::new(send));
        drop(list);
        if is_first && ring(&self.bell).is_err() {
            self.send_all(Last::No);
        }
    }

    fn send_all(&self, last: Last) {
        let replies = {
            let mut list = self.list.lock();
            if last == Last::Yes { list.take() } else { list.as_mut().map(std::mem::take) }
        };
        replies.into_iter().flatten().for_each(|reply| reply());
    }
}

fn ring(mut bell: &PipeWriter) -> io::Result<usize> {
    bell.write(&[0])
}

/// In the task that takes replies; gone with it.
struct Taker(Weak<Waiting>);

impl Drop for Taker {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.upgrade() {
            waiting.send_all(Last::Yes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    fn runtime() -> Runtime {
        Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    }

    /// Gives one whose sending is seen, with the name of the thread that did it.
    fn give(replies: &Replies, count: usize) -> Receiver<Option<String>> {
        let (sender, sent) = channel();
        replies.give(count, move || sender.send(std::thread::current().name().map(str::to_owned)).unwrap());
        sent
    }

    #[test]
    fn one_and_several_are_sent_on_the_runtime() {
        let runtime = runtime();
        let replies = Replies::on(Some(runtime.handle())).unwrap();
        for count in [1, 2, 1, 1, 5] {
            let on = give(&replies, count).recv().unwrap();
            assert_ne!(on.as_deref(), std::thread::current().name(), "{count}");
        }
        let many: Vec<_> = (0..1_000).map(|_| give(&replies, 1)).collect();
        many.into_iter().for_each(|sent| drop(sent.recv().unwrap()));
    }

    #[test]
    fn without_a_runtime_they_are_sent_where_they_are_given() {
        let here = std::thread::current().name().map(str::to_owned);
        assert_eq!(give(&Replies::on(None).unwrap(), 1).try_recv(), Ok(here.clone()));

        let runtime = runtime();
        let replies = Replies::on(Some(runtime.handle())).unwrap();
        drop(runtime);
        assert_eq!(give(&replies, 1).try_recv(), Ok(here));
        assert!(give(&replies, 2).recv().is_err(), "dropped, with its sender");
    }

    /// Whoever ends first, the runtime or the member, what was not sent yet is.
    #[test]
    fn what_nobody_has_taken_is_sent_at_the_end() {
        for member_first in [false, true] {
            let idle = Builder::new_current_thread().enable_all().build().unwrap();
            let replies = Replies::on(Some(idle.handle())).unwrap();
            let sent = give(&replies, 1);
            sent.try_recv().unwrap_err();
            if member_first {
                drop(replies);
            } else {
                drop(idle);
            }
            sent.try_recv().unwrap();
        }
    }

    #[test]
    fn the_task_ends_with_the_member() {
        let runtime = runtime();
        let replies = Replies::on(Some(runtime.handle())).unwrap();
        let waiting = Arc::downgrade(&replies.0.as_ref().unwrap().1);
        give(&replies, 1).recv().unwrap();
        drop(replies);
        while runtime.metrics().num_alive_tasks() > 0 {
            std::thread::yield_now();
        }
        assert!(waiting.upgrade().is_none());
    }
}
