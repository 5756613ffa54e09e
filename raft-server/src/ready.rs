//! Carrying out one `Ready`, in the order raft demands.
//!
//! Raft hands out what it wants done and goes on at once; what depends on the disk comes back as `Persisted`. Three things
//! must wait for it: committing by our own vote (raft sees to it, told by `on_persist_ready`), applying (raft hands out
//! only entries that are durable here), and a non-leader's messages, which are promises about what it has on disk
//! ([`Outbox`]). A leader's messages need not wait (Raft thesis, 10.2.1).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType};
use tenure_storage::Fault;

use crate::log::{Conf, LogWrite};
use crate::node::{Node, raft_fault};
use crate::transport::Message;
use crate::writer;

/// Messages that wait for the disk. Bound: raft's own windows, since peers stop sending when they get no answer.
#[derive(Default)]
pub(crate) struct Outbox {
    /// The newest `Ready` given to the log thread, and the newest that it reported.
    written: u64,
    persisted: u64,
    held: VecDeque<Held>,
}

struct Held {
    /// The write that must be durable first; may be of an earlier `Ready` than the messages.
    after: u64,
    ready_number: u64,
    messages: Vec<Message>,
}

impl Outbox {
    /// Whether all that was to be written is.
    fn is_empty(&self) -> bool {
        self.written == self.persisted
    }
}

impl<R: Send + 'static> Node<R> {
    /// # Errors
    /// If a committed change of members cannot be read.
    pub(crate) fn on_ready(&mut self) -> Result<(), Fault> {
        let mut ready = self.raw.ready();
        let number = ready.number();
        self.send(ready.take_messages());
        for state in ready.take_read_states() {
            self.reads.confirm(&state.request_ctx, state.index);
        }
        assert!(ready.snapshot().is_empty(), "snapshots are not let in");
        // Readable first: raft looks its entries up in the log from here on.
        let entries = ready.take_entries();
        self.log.append(&entries);
        let hard_state = ready.hs().cloned();
        let committed = ready.take_committed_entries();
        let promises = ready.take_persisted_messages();
        let mut must_write = ready.must_sync();
        self.raw.advance_append_async(ready);

        must_write |= self.apply_conf_changes(&committed)?;
        self.unsaved.merge(LogWrite { entries, hard_state, conf: None });
        let mut written_here = false;
        if must_write {
            let write = std::mem::take(&mut self.unsaved);
            // Whatever the log thread was given before must be on the disk before this.
            written_here = self.is_sole_voter() && self.outbox.is_empty();
            self.outbox.written = number;
            if written_here {
                writer::write(&self.log, &self.shared.metrics, &write)?;
            } else {
                self.writes.push(number, write);
            }
        }
        self.hold(number, promises);
        if written_here {
            self.on_persisted(number);
            self.again = true;
        }
        if let Some(last) = committed.last() {
            // Before anybody can see it applied.
            self.shared.status.last_index.fetch_max(last.index, Ordering::Release);
            self.shared.status.commit_index.fetch_max(last.index, Ordering::Release);
            self.apply.raise(last.index);
        }
        Ok(())
    }

    /// Sends what is a promise about the disk once the disk has kept it.
    fn hold(&mut self, ready_number: u64, messages: Vec<Message>) {
        let after = self.outbox.written;
        if after <= self.outbox.persisted {
            self.send(messages);
            self.raw.on_persist_ready(ready_number);
        } else if !messages.is_empty() {
            self.outbox.held.push_back(Held { after, ready_number, messages });
        }
    }

    pub(crate) fn on_persisted(&mut self, number: u64) {
        self.outbox.persisted = number;
        self.raw.on_persist_ready(number);
        while self.outbox.held.front().is_some_and(|held| held.after <= number) {
            let held = self.outbox.held.pop_front().expect("the front was there");
            self.send(held.messages);
            self.raw.on_persist_ready(held.ready_number);
        }
        let persisted_index = self.raw.raft.raft_log.persisted;
        while self.unpersisted.front().is_some_and(|index| *index <= persisted_index) {
            self.unpersisted.pop_front();
        }
    }

    fn send(&mut self, messages: Vec<Message>) {
        if !messages.is_empty() {
            self.transport.send(messages);
        }
    }

    /// Makes the changes of members among the entries. Gives whether there was one; it must be on disk before its entry is
    /// truncated, so it is written at once.
    fn apply_conf_changes(&mut self, committed: &[Entry]) -> Result<bool, Fault> {
        let mut changed = false;
        for entry in committed {
            // The record may be newer than the state: then entries are replayed whose changes it contains.
            if entry.entry_type == EntryType::EntryNormal || entry.index <= self.conf.index {
                continue;
            }
            let corrupt =
                |_| Fault::Corrupt { what: "change of members in raft entry", key: entry.index.to_be_bytes().to_vec() };
            let state = if entry.entry_type == EntryType::EntryConfChange {
                self.raw.apply_conf_change(&ConfChange::parse_from_bytes(&entry.data).map_err(corrupt)?)
            } else {
                self.raw.apply_conf_change(&ConfChangeV2::parse_from_bytes(&entry.data).map_err(corrupt)?)
            };
            let state = state.map_err(raft_fault)?;
            self.set_conf(Conf { index: entry.index, state });
            changed = true;
        }
        Ok(changed)
    }

    pub(crate) fn set_conf(&mut self, conf: Conf) {
        let mut voters = conf.state.voters.clone();
        voters.sort_unstable();
        self.shared.status.voters.store(voters.len() as u64, Ordering::Release);
        // Another voter may acknowledge writes from now on.
        self.shared.status.reads_freely.store(false, Ordering::Release);
        *self.shared.members.write() = Arc::from(voters);
        self.conf = conf.clone();
        self.unsaved.conf = Some(conf);
    }
}
