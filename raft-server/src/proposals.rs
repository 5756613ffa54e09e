//! Who waits for which command, and how it is known what became of it.
//!
//! A leader's own proposals wait for an entry by its place: an index alone does not name an entry (another leader may have put
//! its own there), index and term together do. A follower's proposals travel to the leader ([`forward`](crate::forward)) and wait
//! by the term they were sent in and their number in it, which the entry carries back ([`Origin`]).
//!
//! Either way a command belongs to one term: it is proposed by that term's leader in that term or never. Entries are applied in
//! order of their terms, so once an entry of a later term is applied, a command that has not been seen never will be, and may
//! be proposed again: [`Waiting::take_dead`]. So a change of leaders loses no command and applies none twice. The outcome is unknown only where
//! a snapshot takes the place of commands on their way, or the member stops.
//!
//! Bound: `inflight_bytes_max` stops new batches, so what waits here is bounded by it plus one batch.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::ProposeError;
use crate::lanes::COMMAND_OVERHEAD_BYTES;
use crate::log::Position;

/// Where a proposal's reply goes.
pub(crate) type ReplySender<R> = oneshot::Sender<Result<R, ProposeError>>;

/// Which command of another member's this is: what the member that waits for it recognises in the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Origin {
    /// The member's life: drawn at random when it starts, so that a restarted member does not take an earlier life's command
    /// for its own. Never 0.
    pub(crate) life: u64,
    /// Counts that life's forwarded commands of one term, from 1.
    pub(crate) number: u64,
}

/// Who is to hear of a command.
pub(crate) enum Waiter<R> {
    /// Somebody here.
    Local(ReplySender<R>),
    /// Somebody at the member it came from, who is told there.
    Remote(Origin),
}

/// A command on its way to a batch.
pub(crate) struct Proposal<R> {
    pub(crate) lane: u32,
    pub(crate) command: Bytes,
    /// What it counts for in batches and on its way: its length, or more if it does more than it says.
    pub(crate) cost_bytes: usize,
    pub(crate) waiter: Waiter<R>,
    /// If set, it is proposed by this member as the leader of this term, or not at all.
    pub(crate) only_in: Option<u64>,
}

impl<R> Proposal<R> {
    /// Whether nobody waits for it any more. It was not proposed, so it need not be.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.waiter {
            Waiter::Local(reply) => reply.is_closed(),
            Waiter::Remote(_) => false,
        }
    }

    /// What the command counts for against `inflight_bytes_max`.
    pub(crate) fn counted_bytes(&self) -> u64 {
        (self.cost_bytes + COMMAND_OVERHEAD_BYTES) as u64
    }
}

/// The proposals that travel in one entry, in the order of its commands.
pub(crate) struct Batch<R> {
    pub(crate) at: Position,
    pub(crate) bytes: u64,
    pub(crate) proposals: Vec<Proposal<R>>,
}

impl<R> Batch<R> {
    pub(crate) fn new(at: Position, proposals: Vec<Proposal<R>>) -> Self {
        let bytes = proposals.iter().map(Proposal::counted_bytes).sum();
        Batch { at, bytes, proposals }
    }
}

/// Proposals on their way and not yet applied here.
pub(crate) struct Waiting<R> {
    inner: Mutex<Inner<R>>,
}

struct Inner<R> {
    /// Proposed here, oldest first, by growing index.
    batches: VecDeque<Batch<R>>,
    /// Forwarded, by the term they were sent in and their number.
    forwarded: BTreeMap<(u64, u64), Proposal<R>>,
    bytes: u64,
}

impl<R> Waiting<R> {
    pub(crate) fn new() -> Self {
        Waiting { inner: Mutex::new(Inner { batches: VecDeque::new(), forwarded: BTreeMap::new(), bytes: 0 }) }
    }

    /// Bytes of commands that wait to be applied.
    pub(crate) fn bytes(&self) -> u64 {
        self.inner.lock().bytes
    }

    pub(crate) fn register(&self, batch: Batch<R>) {
        let mut inner = self.inner.lock();
        // Of an index that another leader took, an older batch may still wait; it is dead and taken out with that entry.
        assert!(inner.batches.back().is_none_or(|last| last.at.term < batch.at.term || last.at.index < batch.at.index));
        inner.bytes += batch.bytes;
        inner.batches.push_back(batch);
    }

    /// Which of the `count` commands of that entry, of which `origins` came from members, somebody here waits for.
    pub(crate) fn wanted(&self, at: Position, origins: &[(usize, Origin)], life: u64, count: usize) -> Vec<bool> {
        let inner = self.inner.lock();
        let is_wanted = |proposal: &Proposal<R>| matches!(&proposal.waiter, Waiter::Local(reply) if !reply.is_closed());
        if let Some(batch) = inner.batches.iter().find(|batch| batch.at == at) {
            return batch.proposals.iter().map(is_wanted).collect();
        }
        let mut wanted = vec![false; count];
        for (place, origin) in origins.iter().filter(|(_, origin)| origin.life == life) {
            let proposal = inner.forwarded.get(&(at.term, origin.number));
            if let (Some(wanted), Some(proposal)) = (wanted.get_mut(*place), proposal) {
                *wanted = is_wanted(proposal);
            }
        }
        wanted
    }

    pub(crate) fn register_forwarded(&self, term: u64, first_number: u64, proposals: Vec<Proposal<R>>) {
        let mut inner = self.inner.lock();
        for (number, proposal) in (first_number..).zip(proposals) {
            inner.bytes += proposal.counted_bytes();
            let before = inner.forwarded.insert((term, number), proposal);
            assert!(before.is_none(), "numbers are used once");
        }
    }

    /// The batch of exactly that entry.
    pub(crate) fn take_batch(&self, at: Position) -> Option<Batch<R>> {
        let mut inner = self.inner.lock();
        let place = inner.batches.iter().position(|batch| batch.at == at)?;
        let batch = inner.batches.remove(place)?;
        inner.bytes -= batch.bytes;
        Some(batch)
    }

    /// The forwarded command of that term and number.
    pub(crate) fn take_forwarded(&self, term: u64, number: u64) -> Option<Proposal<R>> {
        let mut inner = self.inner.lock();
        let proposal = inner.forwarded.remove(&(term, number))?;
        inner.bytes -= proposal.counted_bytes();
        Some(proposal)
    }

    /// Lanes and commands that were sent in `term` and still wait, from `from_number` on, up to `bytes_max` (one at least):
    /// to be sent again. Those in between that are gone are not in it, so each comes with its number. Gives the number that this
    /// ends before, if there are more.
    pub(crate) fn forwarded_from(
        &self,
        term: u64,
        from_number: u64,
        bytes_max: usize,
    ) -> (Vec<(u64, u32, Bytes)>, Option<u64>) {
        let inner = self.inner.lock();
        let mut bytes = 0;
        let mut commands = Vec::new();
        for ((_, number), proposal) in inner.forwarded.range((term, from_number)..=(term, u64::MAX)) {
            if bytes >= bytes_max {
                return (commands, Some(*number));
            }
            bytes += proposal.command.len() + COMMAND_OVERHEAD_BYTES;
            commands.push((*number, proposal.lane, proposal.command.clone()));
        }
        (commands, None)
    }

    /// Takes out what was proposed in a term before `term`, an entry of which is applied: none of it ever will be.
    pub(crate) fn take_dead(&self, term: u64) -> Vec<Proposal<R>> {
        let mut inner = self.inner.lock();
        let mut dead = Vec::new();
        while inner.batches.front().is_some_and(|batch| batch.at.term < term) {
            let batch = inner.batches.pop_front().expect("the front was there");
            inner.bytes -= batch.bytes;
            dead.extend(batch.proposals);
        }
        if inner.forwarded.first_key_value().is_some_and(|((sent_in, _), _)| *sent_in < term) {
            let alive = inner.forwarded.split_off(&(term, 0));
            for proposal in std::mem::replace(&mut inner.forwarded, alive).into_values() {
                inner.bytes -= proposal.counted_bytes();
                dead.push(proposal);
            }
        }
        dead
    }

    /// Takes out everything.
    pub(crate) fn take_all(&self) -> Vec<Proposal<R>> {
        let mut inner = self.inner.lock();
        inner.bytes = 0;
        let forwarded = std::mem::take(&mut inner.forwarded).into_values();
        let batches = std::mem::take(&mut inner.batches);
        batches.into_iter().flat_map(|batch| batch.proposals).chain(forwarded).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(lane: u32) -> Proposal<()> {
        let waiter = Waiter::Remote(Origin { life: 1, number: 1 });
        Proposal { lane, command: Bytes::new(), cost_bytes: 0, waiter, only_in: None }
    }

    fn lanes(proposals: &[Proposal<()>]) -> Vec<u32> {
        proposals.iter().map(|proposal| proposal.lane).collect()
    }

    #[test]
    fn an_entry_of_a_later_term_decides_about_all_of_earlier_ones() {
        let waiting = Waiting::<()>::new();
        for index in 5..8 {
            waiting.register(Batch::new(Position { index, term: 2 }, vec![proposal(u32::try_from(index).unwrap())]));
        }
        waiting.register_forwarded(1, 1, vec![proposal(11), proposal(12)]);
        waiting.register_forwarded(3, 1, vec![proposal(31), proposal(32)]);
        assert_eq!(lanes(&waiting.take_dead(1)), []);
        assert_eq!(lanes(&waiting.take_batch(Position { index: 6, term: 2 }).unwrap().proposals), [6]);
        assert!(waiting.take_batch(Position { index: 7, term: 3 }).is_none(), "another leader's entry");
        assert_eq!(lanes(&waiting.take_dead(3)), [5, 7, 11, 12]);
        assert_eq!(waiting.take_forwarded(3, 1).unwrap().lane, 31);
        assert!(waiting.take_forwarded(3, 1).is_none());
        waiting.register_forwarded(3, 3, vec![proposal(33)]);
        let numbers = |bytes_max| {
            let (commands, cut) = waiting.forwarded_from(3, 1, bytes_max);
            (commands.iter().map(|(number, _, _)| *number).collect::<Vec<_>>(), cut)
        };
        assert_eq!(numbers(1000), (vec![2, 3], None));
        assert_eq!(numbers(1), (vec![2], Some(3)), "cut in front of what is left");
        let (left, _) = waiting.forwarded_from(3, 1, 1);
        assert_eq!(left.iter().map(|(number, lane, _)| (*number, *lane)).collect::<Vec<_>>(), [(2, 32)]);
        assert_eq!(lanes(&waiting.take_all()), [32, 33]);
        assert_eq!(waiting.bytes(), 0);
    }
}
