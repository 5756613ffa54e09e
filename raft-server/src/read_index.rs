//! Linearizable reads: everybody who waits shares one ReadIndex round.
//!
//! A round asks the leader (through raft) for an index that was committed when the round began and that a quorum still
//! confirms its leadership for; then the reader waits until that much is applied here. A reader must not join a round
//! that has begun, since a write may have been acknowledged in between: it waits for the next, which starts when the
//! current one ends. So at most one round is under way, whatever the number of readers.
//!
//! Requests and answers may be lost: a round is asked again under a new name after [`RETRY_TICKS`]. The name carries the
//! member and a random number drawn at start: the answer to a round of an earlier life must not confirm one of this
//! life, its index may be too old.
//!
//! This file is the bookkeeping, without raft: pure calls, so that its rules can be tested one by one.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::error::ReadError;

/// Ticks until a round is asked again.
const RETRY_TICKS: usize = 2;

/// Where the read point goes: the applied index at which the read may look.
pub(crate) type ReadSender = oneshot::Sender<Result<u64, ReadError>>;

struct Waiter {
    sender: ReadSender,
    waited_ticks: usize,
}

struct Round {
    name: Vec<u8>,
    asked_ticks: usize,
    waiters: Vec<Waiter>,
}

/// See the module's essay.
pub(crate) struct ReadRounds {
    member_id: u64,
    nonce: u64,
    rounds_named: u64,
    /// For the next round.
    joining: Vec<Waiter>,
    current: Option<Round>,
    /// Confirmed, by growing index; wait for it to be applied.
    confirmed: VecDeque<(u64, Vec<Waiter>)>,
    timeout_ticks: usize,
    /// Readers that waited too long, so far.
    pub(crate) timed_out: u64,
}

impl ReadRounds {
    pub(crate) fn new(member_id: u64, nonce: u64, timeout_ticks: usize) -> Self {
        let (joining, current, confirmed) = (Vec::new(), None, VecDeque::new());
        ReadRounds { member_id, nonce, rounds_named: 0, joining, current, confirmed, timeout_ticks, timed_out: 0 }
    }

    pub(crate) fn join(&mut self, sender: ReadSender) {
        self.joining.push(Waiter { sender, waited_ticks: 0 });
    }

    /// Whether somebody waits for a round to begin.
    pub(crate) fn wants_round(&self) -> bool {
        self.current.is_none() && !self.joining.is_empty()
    }

    /// Begins a round for all who joined: its name, for raft.
    pub(crate) fn begin(&mut self) -> Vec<u8> {
        assert!(self.wants_round(), "one round at a time");
        let waiters = std::mem::take(&mut self.joining);
        let name = self.name_round();
        self.current = Some(Round { name: name.clone(), asked_ticks: 0, waiters });
        name
    }

    /// The round of this name may read at `index`. Names of other rounds are ignored: they were asked again.
    pub(crate) fn confirm(&mut self, name: &[u8], index: u64) {
        if let Some(round) = self.current.take_if(|round| round.name == name) {
            let at = self.confirmed.partition_point(|(waits_for, _)| *waits_for <= index);
            self.confirmed.insert(at, (index, round.waiters));
        }
    }

    /// Answers all whose index is applied.
    pub(crate) fn on_applied(&mut self, applied_index: u64) {
        while self.confirmed.front().is_some_and(|(index, _)| *index <= applied_index) {
            let (_, waiters) = self.confirmed.pop_front().expect("the front was there");
            answer(waiters, Ok(applied_index));
        }
    }

    /// One tick: fails who waited too long. Gives a name if the current round must be asked again.
    pub(crate) fn on_tick(&mut self) -> Option<Vec<u8>> {
        let timeout_ticks = self.timeout_ticks;
        let timed_out = &mut self.timed_out;
        let mut expire = |waiters: &mut Vec<Waiter>| {
            waiters.iter_mut().for_each(|waiter| waiter.waited_ticks += 1);
            let before = waiters.len();
            answer(waiters.extract_if(.., |waiter| waiter.waited_ticks > timeout_ticks), Err(ReadError::Timeout));
            *timed_out += (before - waiters.len()) as u64;
        };
        expire(&mut self.joining);
        self.confirmed.iter_mut().for_each(|(_, waiters)| expire(waiters));
        self.confirmed.retain(|(_, waiters)| !waiters.is_empty());
        let round = self.current.as_mut()?;
        expire(&mut round.waiters);
        round.asked_ticks += 1;
        if round.waiters.is_empty() {
            self.current = None;
            return None;
        }
        if round.asked_ticks < RETRY_TICKS {
            return None;
        }
        let name = self.name_round();
        let round = self.current.as_mut().expect("it was there");
        (round.asked_ticks, round.name) = (0, name.clone());
        Some(name)
    }

    /// Answers everybody with `error`.
    pub(crate) fn fail_all(&mut self, error: ReadError) {
        answer(std::mem::take(&mut self.joining), Err(error));
        answer(self.current.take().into_iter().flat_map(|round| round.waiters), Err(error));
        answer(std::mem::take(&mut self.confirmed).into_iter().flat_map(|(_, waiters)| waiters), Err(error));
    }

    fn name_round(&mut self) -> Vec<u8> {
        self.rounds_named += 1;
        [self.member_id, self.nonce, self.rounds_named].map(u64::to_be_bytes).concat()
    }
}

fn answer(waiters: impl IntoIterator<Item = Waiter>, result: Result<u64, ReadError>) {
    for waiter in waiters {
        // A reader that went away needs no answer.
        let _ = waiter.sender.send(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(rounds: &mut ReadRounds) -> oneshot::Receiver<Result<u64, ReadError>> {
        let (sender, receiver) = oneshot::channel();
        rounds.join(sender);
        receiver
    }

    // A reader that comes while a round is under way waits for the next: a write acknowledged in between would be
    // missing from the round's index.
    #[test]
    fn a_round_serves_only_those_who_came_before_it() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        let mut early = [reader(&mut rounds), reader(&mut rounds)];
        let first = rounds.begin();
        let mut late = reader(&mut rounds);
        assert!(!rounds.wants_round(), "one round at a time");
        rounds.confirm(&first, 20);
        rounds.on_applied(19);
        assert!(early[0].try_recv().is_err(), "not applied yet");
        rounds.on_applied(21);
        for reader in &mut early {
            assert_eq!(reader.try_recv(), Ok(Ok(21)));
        }
        assert!(late.try_recv().is_err());
        let second = rounds.begin();
        assert_ne!(first, second);
        rounds.confirm(&second, 21);
        rounds.on_applied(21);
        assert_eq!(late.try_recv(), Ok(Ok(21)));
    }

    #[test]
    fn lost_rounds_are_asked_again_and_late_answers_ignored() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        let mut waiting = reader(&mut rounds);
        let lost = rounds.begin();
        assert_eq!(rounds.on_tick(), None);
        let again = rounds.on_tick().expect("asked again");
        rounds.confirm(&lost, 5);
        rounds.on_applied(5);
        assert!(waiting.try_recv().is_err());
        rounds.confirm(&again, 6);
        rounds.on_applied(6);
        assert_eq!(waiting.try_recv(), Ok(Ok(6)));
    }

    #[test]
    fn readers_time_out_wherever_they_wait() {
        let mut rounds = ReadRounds::new(1, 7, 3);
        let mut confirmed = reader(&mut rounds);
        let name = rounds.begin();
        rounds.confirm(&name, 100);
        let mut current = reader(&mut rounds);
        rounds.begin();
        let mut joining = reader(&mut rounds);
        for _ in 0..4 {
            rounds.on_tick();
        }
        for reader in [&mut confirmed, &mut current, &mut joining] {
            assert_eq!(reader.try_recv(), Ok(Err(ReadError::Timeout)));
        }
        assert_eq!(rounds.timed_out, 3);
        assert!(rounds.current.is_none() && rounds.confirmed.is_empty());
    }

    #[test]
    fn names_differ_between_members_and_lives() {
        let name = |id, nonce| {
            let mut rounds = ReadRounds::new(id, nonce, 3);
            let _reader = reader(&mut rounds);
            rounds.begin()
        };
        assert!(name(1, 7) != name(2, 7) && name(1, 7) != name(1, 8));
    }
}
