//! What wakes raft's thread: a bounded queue of events, and a thread that sleeps when there are none.
//!
//! The queue is a crossbeam channel; several events that come together wake the thread once, which its own way of waiting cannot.
//! Before it sleeps the thread lets others run and looks again, [`LOOKS`] times: what they send meanwhile makes one batch. A thread that
//! sleeps at once is woken by the first proposal of many, and syncs the disk for it alone (decision 0006).
//!
//! What must hold: no event waits while the thread sleeps. The thread says that it is about to sleep and then looks once more; who
//! sends puts the event in and then looks whether it sleeps; a fence between the two on both sides lets at least one see the other.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::Thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, SendError, Sender, TryRecvError, TrySendError};

/// See the module's essay.
const LOOKS: usize = 4;

#[derive(Default)]
struct Sleeper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Sleeper {
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed)
            && self.asleep.swap(false, Ordering::Acquire)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

/// A queue of at most `capacity` events.
pub(crate) fn queue<E>(capacity: usize) -> (EventSender<E>, EventReceiver<E>) {
    let (sender, receiver) = crossbeam_channel::bounded(capacity);
    let sleeper = Arc::new(Sleeper::default());
    (EventSender { sender, sleeper: Arc::clone(&sleeper) }, EventReceiver { receiver, sleeper })
}

/// Puts events in.
pub(crate) struct EventSender<E> {
    sender: Sender<E>,
    sleeper: Arc<Sleeper>,
}

impl<E> Clone for EventSender<E> {
    fn clone(&self) -> Self {
        EventSender { sender: self.sender.clone(), sleeper: Arc::clone(&self.sleeper) }
    }
}

impl<E> EventSender<E> {
    /// Never waits.
    ///
    /// # Errors
    /// The queue is full, or its thread has ended.
    pub(crate) fn try_send(&self, event: E) -> Result<(), TrySendError<E>> {
        self.sender.try_send(event)?;
        self.sleeper.wake();
        Ok(())
    }

    /// Puts several in and wakes the thread once, if there are any. Never waits; gives how many there was no room for.
    pub(crate) fn try_send_all(&self, events: impl Iterator<Item = E>) -> u64 {
        let (mut sent, mut dropped) = (false, 0);
        for event in events {
            match self.sender.try_send(event) {
                Ok(()) => sent = true,
                Err(_) => dropped += 1,
            }
        }
        if sent {
            self.sleeper.wake();
        }
        dropped
    }

    /// Waits for room: a thread that is to take events is not asleep while there are any.
    ///
    /// # Errors
    /// Its thread has ended.
    pub(crate) fn send(&self, event: E) -> Result<(), SendError<E>> {
        self.sender.send(event)?;
        self.sleeper.wake();
        Ok(())
    }
}

/// Takes events out; on one thread.
pub(crate) struct EventReceiver<E> {
    receiver: Receiver<E>,
    sleeper: Arc<Sleeper>,
}

impl<E> EventReceiver<E> {
    pub(crate) fn try_recv(&self) -> Result<E, TryRecvError> {
        self.receiver.try_recv()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }

    /// Waits for the next event until `deadline`; `None`: there was none.
    pub(crate) fn recv_until(&self, deadline: Instant) -> Option<E> {
        self.sleeper.thread.get_or_init(std::thread::current);
        loop {
            for _ in 0..LOOKS {
                if let Ok(event) = self.receiver.try_recv() {
                    return Some(event);
                }
                std::thread::yield_now();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // Whoever sees it sees the thread too.
            self.sleeper.asleep.store(true, Ordering::Release);
            fence(Ordering::SeqCst);
            if self.receiver.is_empty() {
                std::thread::park_timeout(left);
            }
            self.sleeper.asleep.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LATER: Duration = Duration::from_secs(300);

    // A wake that got lost would leave the thread asleep until its deadline, and this test with it.
    #[test]
    fn no_event_waits_while_the_thread_sleeps() {
        let (sender, receiver) = queue(4);
        let senders: Vec<_> = (0..3)
            .map(|number| {
                let sender = sender.clone();
                std::thread::spawn(move || {
                    for count in 0..20_000 {
                        sender.send((number, count)).unwrap();
                        if count % 7 == 0 {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0; 3];
        for _ in 0..60_000 {
            let (number, count) = receiver.recv_until(Instant::now() + LATER).unwrap();
            assert_eq!(count, next[number], "in order");
            next[number] += 1;
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        assert!(receiver.is_empty());
        assert_eq!(receiver.recv_until(Instant::now() + Duration::from_millis(1)), None);
        assert_eq!(sender.try_send_all((0..6).map(|count| (0, count))), 2, "there is room for four");
        assert!(sender.try_send((0, 0)).is_err());
    }
}
