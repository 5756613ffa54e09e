//! A log in memory: the model of [`EngineLog`](super::EngineLog), and a disk for tests that want none.

use parking_lot::Mutex;
use raft::eraftpb::Entry;
use tenure_storage::Fault;

use super::{Appended, Conf, LogStore, LogWrite, Position, Recovered, entry_bytes, hard_state_after};

/// Loses nothing while it lives; a "restart" is a second member on the same one, shared in an `Arc`.
#[derive(Default)]
pub struct MemoryLog {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    recovered: Recovered,
    entries: Vec<Entry>,
}

impl LogStore for MemoryLog {
    fn recover(&self) -> Result<Recovered, Fault> {
        let inner = self.inner.lock();
        let last_index = inner.recovered.truncated.index + inner.entries.len() as u64;
        Ok(Recovered { last_index, ..inner.recovered.clone() })
    }

    fn bootstrap(&self, member_id: u64, at: Position, conf: &Conf) -> Result<(), Fault> {
        let mut inner = self.inner.lock();
        inner.recovered.member_id = Some(member_id);
        inner.recovered.truncated = at;
        inner.recovered.conf = conf.clone();
        inner.recovered.hard_state.term = at.term;
        inner.recovered.hard_state.commit = at.index;
        Ok(())
    }

    fn append(&self, write: &LogWrite) -> Result<Appended, Fault> {
        let mut inner = self.inner.lock();
        if let Some(first) = write.entries.first() {
            let kept = usize::try_from(first.index - inner.recovered.truncated.index - 1).expect("fits memory");
            assert!(kept <= inner.entries.len(), "entries are contiguous");
            inner.entries.truncate(kept);
            inner.entries.extend(write.entries.iter().cloned());
        }
        if let Some(hard_state) = &write.hard_state {
            inner.recovered.hard_state = hard_state.clone();
        }
        if let Some(conf) = &write.conf {
            inner.recovered.conf = conf.clone();
        }
        let bytes = write.entries.iter().map(entry_bytes).sum::<usize>() as u64;
        Ok(Appended { bytes, ..Appended::default() })
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, Fault> {
        let inner = self.inner.lock();
        let offset = inner.recovered.truncated.index + 1;
        let range = usize::try_from(low - offset).expect("fits")..usize::try_from(high - offset).expect("fits");
        let mut entries = Vec::new();
        let mut bytes = 0;
        for entry in &inner.entries[range] {
            entries.push(entry.clone());
            bytes += entry_bytes(entry) as u64;
            if bytes >= bytes_max {
                break;
            }
        }
        Ok(entries)
    }

    fn truncate(&self, through: Position) -> Result<(), Fault> {
        let mut inner = self.inner.lock();
        let gone = usize::try_from(through.index - inner.recovered.truncated.index).expect("fits memory");
        inner.entries.drain(..gone);
        inner.recovered.truncated = through;
        Ok(())
    }

    fn begin_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.inner.lock().recovered.installing = Some((at, conf.clone()));
        Ok(())
    }

    fn cancel_install(&self) -> Result<(), Fault> {
        self.inner.lock().recovered.installing = None;
        Ok(())
    }

    fn finish_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        let mut inner = self.inner.lock();
        let hard_state = hard_state_after(&inner.recovered.hard_state, at);
        inner.entries.clear();
        let recovered = &mut inner.recovered;
        (recovered.truncated, recovered.conf, recovered.hard_state) = (at, conf.clone(), hard_state);
        recovered.installing = None;
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.inner.lock().entries.iter().map(entry_bytes).sum::<usize>() as u64
    }
}
