//! How far the log on disk reaches at least, said beside it: so that rot at its end is not taken for a torn tail.
//!
//! After a crash the newest file ends somewhere in a write that was never acknowledged, in whatever bytes the disk has there; recovery
//! cuts it off at the first batch that is broken. Rot in an earlier batch looks alike, and would take everything behind it along:
//! entries that were acknowledged, or a vote. So each synced write notes in a small file what the log holds at least, and what is
//! recovered must not be less.
//!
//! What must hold: no version of the mark says more than the disk has. It is written after the sync, and that is not synced: it costs a
//! write into the system's memory, which survives the end of the process; a power failure may leave an older version, which says
//! less, or rubbish, which says nothing. Before a write that shortens the log, which is rare, the mark is lowered and synced: every
//! older version would say more.
//!
//! ```text
//! check u32 le (CRC-32 of the rest), last index u64 le, term u64 le, vote u64 le
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use raft::eraftpb::HardState;

const FILE: &str = "synced";
const BYTES: usize = 28;

/// What the log holds at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) last_index: u64,
    pub(super) term: u64,
    pub(super) vote: u64,
}

impl Mark {
    /// With what a write adds. Entries replace what follows them.
    pub(super) fn after(self, last_index: Option<u64>, hard_state: Option<&HardState>) -> Mark {
        let (term, vote) = hard_state.map_or((self.term, self.vote), |state| (state.term, state.vote));
        Mark { last_index: last_index.unwrap_or(self.last_index), term, vote }
    }

    /// Whether a log that holds this much is what was marked, or more.
    pub(super) fn is_met_by(self, last_index: u64, hard_state: &HardState) -> bool {
        let voted = hard_state.term > self.term || self.vote == 0 || hard_state.vote == self.vote;
        last_index >= self.last_index && hard_state.term >= self.term && voted
    }

    fn encode(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        for (at, number) in [self.last_index, self.term, self.vote].into_iter().enumerate() {
            bytes[4 + 8 * at..12 + 8 * at].copy_from_slice(&number.to_le_bytes());
        }
        let check = crc32fast::hash(&bytes[4..]);
        bytes[..4].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Mark> {
        let (check, rest) = bytes.split_first_chunk::<4>()?;
        let (numbers, []) = rest.as_chunks::<8>() else { return None };
        let [last_index, term, vote] = *numbers else { return None };
        let [last_index, term, vote] = [last_index, term, vote].map(u64::from_le_bytes);
        (crc32fast::hash(rest) == u32::from_le_bytes(*check)).then_some(Mark { last_index, term, vote })
    }
}

/// The file, and what it says.
pub(super) struct MarkFile {
    file: File,
    said: Mark,
}

impl MarkFile {
    /// Opens or creates it in the log's directory. One that cannot be read says nothing: the least there is.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut bytes = Vec::new();
        (&mut file).take(2 * BYTES as u64).read_to_end(&mut bytes)?;
        let found = Mark::decode(&bytes);
        if found.is_none() && !bytes.is_empty() {
            tracing::warn!(path = %path.display(), "it cannot be read how far the log reached: a power failure?");
        }
        Ok(MarkFile { file, said: found.unwrap_or_default() })
    }

    pub(super) fn said(&self) -> Mark {
        self.said
    }

    pub(super) fn say(&mut self, mark: Mark) -> io::Result<()> {
        if mark != self.said {
            self.file.write_all_at(&mark.encode(), 0)?;
            self.said = mark;
        }
        Ok(())
    }

    /// Before a write that leaves the log with nothing behind this index. On the disk on return.
    pub(super) fn lower(&mut self, last_index: u64) -> io::Result<()> {
        if last_index < self.said.last_index {
            self.say(Mark { last_index, ..self.said })?;
            self.file.sync_data()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_or_not_at_all() {
        let mark = Mark { last_index: 7, term: 3, vote: 2 };
        let bytes = mark.encode();
        assert_eq!(Mark::decode(&bytes), Some(mark));
        for at in 0..BYTES {
            let mut other = bytes;
            other[at] ^= 1;
            assert_eq!(Mark::decode(&other), None);
            assert_eq!(Mark::decode(&bytes[..at]), None);
        }
        assert_eq!(Mark::decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn a_log_that_lost_an_entry_a_term_or_a_vote_is_less() {
        let mark = Mark { last_index: 7, term: 3, vote: 2 };
        let met =
            |last_index, term, vote| mark.is_met_by(last_index, &HardState { term, vote, ..HardState::default() });
        assert!(met(7, 3, 2) && met(8, 3, 2) && met(7, 4, 1) && met(7, 4, 0));
        assert!(!met(6, 3, 2) && !met(7, 2, 2) && !met(7, 3, 0) && !met(7, 3, 1) && !met(6, 4, 2));
        assert!(Mark { vote: 0, ..mark }.is_met_by(7, &HardState { term: 3, vote: 1, ..HardState::default() }));
    }
}
