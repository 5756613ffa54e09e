//! A network inside one process, for tests and simulations: members are cut off and come back at will.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Message, Transport};
use crate::handle::Handle;

type Deliver = Arc<dyn Fn(Message) + Send + Sync>;

/// Delivers at once, on the sender's thread, into the receiver's bounded queue. Clones are the same network.
#[derive(Clone, Default)]
pub struct Network {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    members: HashMap<u64, Deliver>,
    cut: HashSet<u64>,
}

impl Network {
    /// The transport of member `id`.
    pub fn endpoint(&self, id: u64) -> Endpoint {
        Endpoint { id, network: self.clone() }
    }

    /// From now on messages to the member reach this handle. Replaces the one of an earlier life.
    pub fn connect<R: Send + 'static>(&self, handle: &Handle<R>) {
        let deliver = handle.clone();
        self.inner.lock().members.insert(handle.id(), Arc::new(move |message| deliver.deliver(message)));
    }

    /// Drops everything to and from the member until [`Network::heal`].
    pub fn cut(&self, id: u64) {
        self.inner.lock().cut.insert(id);
    }

    pub fn heal(&self, id: u64) {
        self.inner.lock().cut.remove(&id);
    }

    /// Forgets the member, and with it its handle.
    pub fn disconnect(&self, id: u64) {
        self.inner.lock().members.remove(&id);
    }
}

/// One member's side of a [`Network`].
pub struct Endpoint {
    id: u64,
    network: Network,
}

impl Transport for Endpoint {
    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            let deliver = {
                let inner = self.network.inner.lock();
                let cut = inner.cut.contains(&self.id) || inner.cut.contains(&message.to);
                if cut { None } else { inner.members.get(&message.to).cloned() }
            };
            if let Some(deliver) = deliver {
                deliver(message);
            }
        }
    }
}
