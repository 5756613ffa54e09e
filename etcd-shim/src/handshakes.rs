//! TLS handshakes that are under way on one listener: who is longest at it makes room for who comes.
//!
//! A handshake takes milliseconds; who takes longer is far away, or says nothing and costs its place, and nobody knows yet who it is.
//! So there is a bound, apart from that of connections, and at the bound the oldest is given up instead of the newest turned away: a
//! crowd of silent clients cannot keep others out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// See the module's essay.
pub(crate) struct Handshakes {
    most: usize,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    begun: u64,
    /// By age. Dropping one gives its handshake up.
    places: BTreeMap<u64, oneshot::Sender<Infallible>>,
}

impl Handshakes {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        assert!(most > 0, "somebody has to get in");
        Arc::new(Handshakes { most, pending: Mutex::default() })
    }

    /// The handshake's own result; `None` if it was given up.
    pub(crate) async fn run<T>(self: &Arc<Self>, handshake: impl Future<Output = T>) -> Option<T> {
        let (place, given_up) = self.take_place();
        let done = tokio::select! {
            done = handshake => Some(done),
            _ = given_up => None,
        };
        drop(place);
        done
    }

    fn take_place(self: &Arc<Self>) -> (Place, oneshot::Receiver<Infallible>) {
        let (sender, given_up) = oneshot::channel();
        let mut pending = self.pending.lock();
        if pending.places.len() >= self.most {
            pending.places.pop_first();
        }
        let number = pending.begun;
        pending.begun += 1;
        pending.places.insert(number, sender);
        (Place { of: Arc::clone(self), number }, given_up)
    }
}

struct Place {
    of: Arc<Handshakes>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.pending.lock().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Silent clients, one more than there are places for: the first is given up, whoever ends leaves its place.
    #[tokio::test]
    async fn the_oldest_makes_room() {
        let handshakes = Handshakes::new(2);
        let silent = |_| {
            let handshakes = Arc::clone(&handshakes);
            tokio::spawn(async move { handshakes.run(std::future::pending::<()>()).await })
        };
        let mut begun = Vec::new();
        for number in 0..2 {
            begun.push(silent(number));
            while handshakes.pending.lock().places.len() <= number {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(handshakes.run(async { "done" }).await, Some("done"));
        assert_eq!(begun.remove(0).await.unwrap(), None, "given up");
        assert_eq!(handshakes.run(async { "done" }).await, Some("done"), "there is a place");
        assert!(!begun[0].is_finished());
        begun[0].abort();
        assert!(begun.remove(0).await.is_err());
        assert!(handshakes.pending.lock().places.is_empty());
    }
}
