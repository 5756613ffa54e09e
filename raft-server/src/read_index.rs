//! Linearizable reads: everybody who waits shares one ReadIndex round.
//!
//! A round asks the leader (through raft) for an index that was committed when the round began and that a quorum still
//! confirms its leadership for; then the reader waits until that much is applied here. A reader must not join a round
//! that has begun, since a write may have been acknowledged in between: it waits for the next, which starts when the
//! current one ends. So at most one round is under way, whatever the number of readers.
//!
//! Another member's request says in which term it was made, and so is an answer already: whoever asked had not voted in a later
//! term by then, and neither has the leader that reads it in that same term. If the two are a quorum, as in a group of three, no later
//! leader was elected before the request was made, so whatever was acknowledged before it is committed here, and the leader
//! answers at once with its commit index (decision 0006). If they are not, the request is a reader like any other: it joins the
//! leader's next round instead of beginning one of its own, and is answered with the round's index. A round costs a message to
//! each voter and back, so a group under load has one at a time, not one for each member. A member has one request at a time:
//! a newer one takes the place of the older.
//!
//! Readers leave their senders in [`Readers`], and ring only if raft's thread would not look there otherwise; a thread that
//! sleeps is dear to wake. While a round is under way its end will make the thread look.
//!
//! Requests and answers may be lost: a round is asked again under a new name after [`RETRY_TICKS`]. The name carries the
//! member and a random number drawn at start, because the answer to a round of an earlier life must not confirm one of this
//! life, its index may be too old; and the term in which it was drawn, which is after everybody came whom the round serves.
//!
//! This file is the bookkeeping, without raft: pure calls, so that its rules can be tested one by one.

use std::collections::{BTreeMap, VecDeque};

use tokio::sync::oneshot;

use crate::error::ReadError;

/// Ticks until a round is asked again.
const RETRY_TICKS: usize = 2;

/// Where the read point goes: the applied index at which the read may look.
pub(crate) type ReadSender = oneshot::Sender<Result<u64, ReadError>>;

/// Readers that raft's thread has not taken yet. Bound: `read_waiters_max`.
#[derive(Default)]
pub(crate) struct Readers {
    joining: Vec<ReadSender>,
    /// Raft's thread will look here without being told: it was told, or something must happen first that it hears of.
    rung: bool,
    closed: bool,
}

impl Readers {
    /// Adds a reader. Gives whether raft's thread must be told; `None`: the member has ended.
    pub(crate) fn join(&mut self, sender: ReadSender) -> Option<bool> {
        if self.closed {
            return None;
        }
        self.joining.push(sender);
        Some(!std::mem::replace(&mut self.rung, true))
    }

    /// Refuses those who wait and all who come.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        for sender in self.joining.drain(..) {
            let _ = sender.send(Err(ReadError::Stopped));
        }
    }
}

struct Waiter {
    sender: ReadSender,
    waited_ticks: usize,
}

struct Round {
    name: Vec<u8>,
    asked_ticks: usize,
    waiters: Vec<Waiter>,
    members: BTreeMap<u64, Vec<u8>>,
}

/// See the module's essay.
pub(crate) struct ReadRounds {
    member_id: u64,
    nonce: u64,
    rounds_named: u64,
    /// For the next round.
    joining: Vec<Waiter>,
    /// Other members that ask for an index, and the names of their rounds.
    joining_members: BTreeMap<u64, Vec<u8>>,
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
        let joining_members = BTreeMap::new();
        let (rounds_named, timed_out) = (0, 0);
        ReadRounds {
            member_id,
            nonce,
            rounds_named,
            joining,
            joining_members,
            current,
            confirmed,
            timeout_ticks,
            timed_out,
        }
    }

    fn join(&mut self, sender: ReadSender) {
        self.joining.push(Waiter { sender, waited_ticks: 0 });
    }

    /// Takes all readers that came. Gives whether a round is to begin now. `can_begin`: whether one could; if nobody is there for it, the next
    /// reader rings.
    pub(crate) fn take(&mut self, readers: &mut Readers, can_begin: bool) -> bool {
        readers.joining.drain(..).for_each(|sender| self.join(sender));
        let begins = can_begin && self.wants_round();
        readers.rung = begins || !can_begin || self.current.is_some();
        begins
    }

    /// A member asks this one, which leads, for an index; its round's name.
    pub(crate) fn join_member(&mut self, id: u64, name: Vec<u8>) {
        self.joining_members.insert(id, name);
    }

    /// This member does not lead any more: the others ask whoever does.
    pub(crate) fn forget_members(&mut self) {
        self.joining_members.clear();
        if let Some(round) = &mut self.current {
            round.members.clear();
        }
    }

    /// Whether somebody waits for a round to begin.
    pub(crate) fn wants_round(&self) -> bool {
        self.current.is_none() && !(self.joining.is_empty() && self.joining_members.is_empty())
    }

    /// Begins a round for all who joined: its name, for raft. `term`: this member's, now.
    pub(crate) fn begin(&mut self, term: u64) -> Vec<u8> {
        assert!(self.wants_round(), "one round at a time");
        let waiters = std::mem::take(&mut self.joining);
        let members = std::mem::take(&mut self.joining_members);
        let name = self.name_round(term);
        self.current = Some(Round { name: name.clone(), asked_ticks: 0, waiters, members });
        name
    }

    /// The round of this name may read at `index`. Names of other rounds are ignored: they were asked again. Gives the members
    /// to tell, and the names of their rounds.
    pub(crate) fn confirm(&mut self, name: &[u8], index: u64) -> BTreeMap<u64, Vec<u8>> {
        let Some(round) = self.current.take_if(|round| round.name == name) else { return BTreeMap::new() };
        if !round.waiters.is_empty() {
            let at = self.confirmed.partition_point(|(waits_for, _)| *waits_for <= index);
            self.confirmed.insert(at, (index, round.waiters));
        }
        round.members
    }

    /// Takes out all whose index is applied: they may read now.
    pub(crate) fn take_applied(&mut self, applied_index: u64) -> Vec<ReadSender> {
        let mut ready = Vec::new();
        let applied = self.confirmed.partition_point(|(index, _)| *index <= applied_index);
        for (_, waiters) in self.confirmed.drain(..applied) {
            ready.extend(waiters.into_iter().map(|waiter| waiter.sender));
        }
        ready
    }

    /// One tick: fails who waited too long. Gives a name if the current round must be asked again. `term`: this member's, now.
    pub(crate) fn on_tick(&mut self, term: u64) -> Option<Vec<u8>> {
        let timeout_ticks = self.timeout_ticks;
        let timed_out = &mut self.timed_out;
        let mut expire = |waiters: &mut Vec<Waiter>| {
            // Who went away gave its place to another, so it must not be kept here.
            waiters.retain(|waiter| !waiter.sender.is_closed());
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
        if round.asked_ticks < RETRY_TICKS && !(round.waiters.is_empty() && round.members.is_empty()) {
            return None;
        }
        // These ask again by themselves, under a new name.
        round.members.clear();
        if round.waiters.is_empty() {
            self.current = None;
            return None;
        }
        let name = self.name_round(term);
        let round = self.current.as_mut().expect("it was there");
        (round.asked_ticks, round.name) = (0, name.clone());
        Some(name)
    }

    /// Answers everybody with `error`.
    pub(crate) fn fail_all(&mut self, error: ReadError) {
        self.forget_members();
        answer(std::mem::take(&mut self.joining), Err(error));
        answer(self.current.take().into_iter().flat_map(|round| round.waiters), Err(error));
        answer(std::mem::take(&mut self.confirmed).into_iter().flat_map(|(_, waiters)| waiters), Err(error));
    }

    fn name_round(&mut self, term: u64) -> Vec<u8> {
        self.rounds_named += 1;
        [self.member_id, self.nonce, self.rounds_named, term].map(u64::to_be_bytes).concat()
    }
}

/// The term in which the member that asks drew this name; `None`: its release does not say.
pub(crate) fn term_of(name: &[u8]) -> Option<u64> {
    let term = name.strip_prefix(name.first_chunk::<{ 3 * size_of::<u64>() }>()?)?;
    Some(u64::from_be_bytes(term.try_into().ok()?))
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

    fn on_applied(rounds: &mut ReadRounds, applied_index: u64) {
        for sender in rounds.take_applied(applied_index) {
            sender.send(Ok(applied_index)).unwrap();
        }
    }

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
        let first = rounds.begin(3);
        let mut late = reader(&mut rounds);
        assert!(!rounds.wants_round(), "one round at a time");
        rounds.confirm(&first, 20);
        on_applied(&mut rounds, 19);
        assert!(early[0].try_recv().is_err(), "not applied yet");
        on_applied(&mut rounds, 21);
        for reader in &mut early {
            assert_eq!(reader.try_recv(), Ok(Ok(21)));
        }
        assert!(late.try_recv().is_err());
        let second = rounds.begin(3);
        assert_ne!(first, second);
        rounds.confirm(&second, 21);
        on_applied(&mut rounds, 21);
        assert_eq!(late.try_recv(), Ok(Ok(21)));
    }

    #[test]
    fn lost_rounds_are_asked_again_and_late_answers_ignored() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        let mut waiting = reader(&mut rounds);
        let lost = rounds.begin(3);
        assert_eq!(rounds.on_tick(3), None);
        let again = rounds.on_tick(3).expect("asked again");
        rounds.confirm(&lost, 5);
        on_applied(&mut rounds, 5);
        assert!(waiting.try_recv().is_err());
        rounds.confirm(&again, 6);
        on_applied(&mut rounds, 6);
        assert_eq!(waiting.try_recv(), Ok(Ok(6)));
    }

    #[test]
    fn readers_time_out_wherever_they_wait() {
        let mut rounds = ReadRounds::new(1, 7, 3);
        let mut confirmed = reader(&mut rounds);
        let name = rounds.begin(3);
        rounds.confirm(&name, 100);
        let mut current = reader(&mut rounds);
        rounds.begin(3);
        let mut joining = reader(&mut rounds);
        for _ in 0..4 {
            rounds.on_tick(3);
        }
        for reader in [&mut confirmed, &mut current, &mut joining] {
            assert_eq!(reader.try_recv(), Ok(Err(ReadError::Timeout)));
        }
        assert_eq!(rounds.timed_out, 3);
        assert!(rounds.current.is_none() && rounds.confirmed.is_empty());
    }

    // A member's request is served by the leader's next round, not by the one under way, like any reader; its newest name counts.
    #[test]
    fn members_that_ask_share_the_leaders_rounds() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        let mut own = reader(&mut rounds);
        rounds.join_member(2, b"early".to_vec());
        let first = rounds.begin(3);
        rounds.join_member(3, b"lost".to_vec());
        rounds.join_member(3, b"late".to_vec());
        assert_eq!(rounds.confirm(&first, 20), BTreeMap::from([(2, b"early".to_vec())]));
        on_applied(&mut rounds, 20);
        assert_eq!(own.try_recv(), Ok(Ok(20)));
        assert!(rounds.wants_round(), "a member alone is reason enough");
        let second = rounds.begin(3);
        assert_eq!(rounds.confirm(&second, 21), BTreeMap::from([(3, b"late".to_vec())]));
        rounds.join_member(2, b"again".to_vec());
        let third = rounds.begin(3);
        rounds.join_member(3, b"more".to_vec());
        rounds.forget_members();
        assert!(rounds.confirm(&third, 22).is_empty() && !rounds.wants_round(), "who leads no more tells nobody");
    }

    #[test]
    fn a_round_for_members_alone_ends_when_it_is_lost() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        rounds.join_member(2, b"name".to_vec());
        let lost = rounds.begin(3);
        assert_eq!((rounds.on_tick(3), rounds.current.is_some()), (None, true));
        assert_eq!((rounds.on_tick(3), rounds.current.is_some()), (None, false), "it asks again by itself");
        assert!(rounds.confirm(&lost, 5).is_empty());
    }

    #[test]
    fn who_goes_away_is_forgotten() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        drop(reader(&mut rounds));
        let stays = reader(&mut rounds);
        rounds.on_tick(3);
        assert_eq!((rounds.joining.len(), rounds.timed_out), (1, 0));
        rounds.begin(3);
        drop(stays);
        rounds.on_tick(3);
        assert!(rounds.current.is_none());
    }

    // Whoever comes while raft's thread will look anyway does not wake it.
    #[test]
    fn one_reader_rings_for_many() {
        let (mut rounds, mut readers) = (ReadRounds::new(1, 7, 10), Readers::default());
        let join = |readers: &mut Readers| readers.join(oneshot::channel().0);
        assert_eq!((join(&mut readers), join(&mut readers)), (Some(true), Some(false)));
        assert!(rounds.take(&mut readers, true));
        assert_eq!(join(&mut readers), Some(false), "a round is about to begin");
        let name = rounds.begin(3);
        assert!(!rounds.take(&mut readers, true), "one at a time");
        rounds.confirm(&name, 5);
        assert!(rounds.take(&mut readers, true), "who came meanwhile");
        let name = rounds.begin(3);
        rounds.confirm(&name, 5);
        assert!(!rounds.take(&mut readers, false));
        assert_eq!(join(&mut readers), Some(false), "when a leader is there, the thread hears of it");
        assert!(rounds.take(&mut readers, true));
        rounds.begin(3);
        let (sender, mut waiting) = oneshot::channel();
        readers.join(sender);
        readers.close();
        assert_eq!((waiting.try_recv(), join(&mut readers)), (Ok(Err(ReadError::Stopped)), None));
    }

    #[test]
    fn a_name_says_in_which_term_it_was_drawn() {
        let mut rounds = ReadRounds::new(1, 7, 10);
        let _reader = reader(&mut rounds);
        assert_eq!(term_of(&rounds.begin(3)), Some(3));
        assert_eq!(rounds.on_tick(3), None);
        let again = rounds.on_tick(4).expect("asked again");
        assert_eq!(term_of(&again), Some(4));
        assert_eq!(
            [term_of(&again[..24]), term_of(&again[..31]), term_of(b"")],
            [None; 3],
            "an earlier release's, and none"
        );
    }

    #[test]
    fn names_differ_between_members_and_lives() {
        let name = |id, nonce| {
            let mut rounds = ReadRounds::new(id, nonce, 3);
            let _reader = reader(&mut rounds);
            rounds.begin(3)
        };
        assert!(name(1, 7) != name(2, 7) && name(1, 7) != name(1, 8));
    }
}
