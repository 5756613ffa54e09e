//! A network inside one process, for tests and simulations: members are cut off and come back at will.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Local, PeerMessage, SendFromAnywhere, Transport};
use crate::handle::Handle;
use crate::snapshot::SnapshotOffer;

/// Delivers at once, on the sender's thread, into the receiver's bounded queue. Clones are the same network.
#[derive(Clone, Default)]
pub struct Network {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    members: HashMap<u64, Arc<dyn Local>>,
    cut: HashSet<u64>,
}

impl Network {
    /// The transport of member `id`.
    pub fn endpoint(&self, id: u64) -> Endpoint {
        Endpoint { id, network: self.clone() }
    }

    /// From now on messages to the member reach this handle. Replaces the one of an earlier life.
    pub fn connect<R: Send + 'static>(&self, handle: &Handle<R>) {
        self.inner.lock().members.insert(handle.id(), Arc::new(handle.clone()));
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

    fn reach(&self, from: u64, to: u64) -> Option<Arc<dyn Local>> {
        let inner = self.inner.lock();
        let cut = inner.cut.contains(&from) || inner.cut.contains(&to);
        if cut { None } else { inner.members.get(&to).cloned() }
    }
}

/// One member's side of a [`Network`].
pub struct Endpoint {
    id: u64,
    network: Network,
}

impl Transport for Endpoint {
    fn send(&mut self, messages: Vec<PeerMessage>) {
        messages.into_iter().for_each(|message| SendFromAnywhere::send(self, message));
    }

    fn sender(&self) -> Option<Arc<dyn SendFromAnywhere>> {
        Some(Arc::new(self.network.endpoint(self.id)))
    }

    /// Copies the directory, on a thread of its own.
    fn fetch(&mut self, offer: SnapshotOffer) {
        let source = self.network.reach(self.id, offer.from).and_then(|peer| peer.outgoing_snapshot(offer.at));
        let Some(own) = self.network.inner.lock().members.get(&self.id).cloned() else { return };
        std::thread::spawn(move || {
            let copied = source.is_some_and(|source| copy(&source.path, &offer.path).is_ok());
            own.snapshot_fetched(offer, copied);
        });
    }
}

impl SendFromAnywhere for Endpoint {
    fn send(&self, message: PeerMessage) {
        if let Some(member) = self.network.reach(self.id, message.to()) {
            member.deliver(vec![message]);
        }
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for file in std::fs::read_dir(from)? {
        let file = file?;
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    Ok(())
}
