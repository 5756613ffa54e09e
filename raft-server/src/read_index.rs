//! Linearizable reads: everybody who waits shares one ReadIndex round.
//!
//! A round asks the leader for an index that was committed when the round began and that a quorum still
//! confirms its leadership for; then the reader waits until that much is applied here. A reader must not join a round
//! that has begun, since a write may have been acknowledged in between: it waits for the next. At most one round is under way, whatever the
//! number of readers; two where a follower asks its leader without raft's thread ([`ASKED_ROUNDS_MAX`]). What a round is told holds for those that began
//! before it, too.
//!
//! Another member's request says in which term it was made, and so is an answer already: whoever asked had not voted in a later
//! term by then, and neither has the leader that reads it in that same term. If the two are a quorum, as in a group of three, no later
//! leader was elected before the request was made, so whatever was acknowledged before it is committed here, and the leader
//! answers at once with its commit index (decision 0006). If they are not, the request is a reader like any other: it joins the
//! leader's next round instead of beginning one of its own, and is answered with the round's index. A round costs a message to
//! each voter and back, so a group under load has one at a time, not one for each member. Of a member's requests its newest counts.
//!
//! The other way round a leader asks one of those members whether it still follows in its term, for its own readers: the answer is enough, and what
//! was committed when the round began is its index. One is asked for as long as it answers, then another one. The question is a heartbeat and so is known to
//! every release; a mark tells it, and the answer, from raft's own ([`QUESTION_MARK`]), which go on: they are what raft's clocks hear.
//!
//! None of that needs raft's thread, which is dear to wake, while what it has last said of its term holds ([`Role`]): a reader's own thread
//! begins a round, the thread that gets a request answers it, and the one that gets the answer lets the readers read, if that much is applied. What
//! raft's thread has not said yet has left this member in no message: it publishes its role, and what is committed, before it sends anything. So
//! whoever reads a role knows that until then no vote of this member for a later term was on its way, which is what the proof above asks
//! of both sides. Rounds that need more than one answer, answers whose index is not applied yet or that others wait for, and what is lost are for raft's
//! thread; readers ring only if it would not look otherwise.
//!
//! Requests and answers may be lost: a round is asked again under a new name after [`RETRY_TICKS`]. The name carries the
//! member and a random number drawn at start, because the answer to a round of an earlier life must not confirm one of this
//! life, its index may be too old; and the term in which it was drawn, which is after everybody came whom the round serves.
//!
//! This file is the bookkeeping, without raft: pure calls, so that its rules can be tested one by one.

use std::collections::{BTreeMap, VecDeque};

use tokio::sync::oneshot;

use crate::error::ReadError;
use crate::transport::Message;

/// Ticks until a round is asked again.
const RETRY_TICKS: usize = 2;

/// Rounds that a follower has under way: while one is on its way, those who come meanwhile need not wait for its end. More would be more
/// messages for the same readers; for a leader's already a second one is (decision 0006).
const ASKED_ROUNDS_MAX: usize = 2;

/// The index of a heartbeat that asks for a round without raft's thread, and of its answer. Raft gives heartbeats none and looks at none.
pub(crate) const QUESTION_MARK: u64 = 1;

/// Where the read point goes: the applied index at which the read may look.
pub(crate) type ReadSender = oneshot::Sender<Result<u64, ReadError>>;

/// What a member may do for readers without raft's thread, which says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing.
    #[default]
    None,
    /// It follows this leader in this term: it may ask it.
    Asks { term: u64, leader: u64 },
    /// It leads this term and has committed in it: it may answer these voters, each of which is a quorum together with it, and ask any of them.
    Answers { term: u64, members: Vec<u64> },
}

/// A round to ask for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) name: Vec<u8>,
    pub(crate) asked: Asked,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// For an index.
    Leader(u64),
    /// Whether it still follows this member, in its term.
    Follower { term: u64, id: u64 },
}

/// What is to be done when a reader has come, or readers are left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing: something will happen that makes somebody look.
    Wait,
    /// Raft's thread must be told.
    Ring,
    /// [`ReadRounds::begin_here`] is to be called soon, when more readers may have come.
    Begin,
    Ask(Question),
}

struct Waiter {
    sender: ReadSender,
    waited_ticks: usize,
}

struct Round {
    name: Vec<u8>,
    asked_ticks: usize,
    /// If a follower alone is asked: which, and what was committed when the round began.
    follower: Option<(u64, u64)>,
    waiters: Vec<Waiter>,
    members: BTreeMap<u64, Vec<u8>>,
}

/// See the module's essay. Bound: `read_waiters_max` readers, and a name for each member.
pub(crate) struct ReadRounds {
    member_id: u64,
    nonce: u64,
    rounds_named: u64,
    /// For the next round.
    joining: Vec<Waiter>,
    /// Other members that ask for an index, and the names of their rounds.
    joining_members: BTreeMap<u64, Vec<u8>>,
    /// In the order in which they began; most often one.
    underway: VecDeque<Round>,
    role: Role,
    /// Whether there is a way to ask without raft's thread.
    has_sender: bool,
    /// Which of the members that it may ask a leader asks: grows when one does not answer.
    asked_place: usize,
    /// Somebody was told to call [`ReadRounds::begin_here`], since the last tick, and has not yet.
    beginning: bool,
    /// Somebody will look here without being told: raft's thread was told, or something must happen first that it hears of, or a round is to begin.
    rung: bool,
    closed: bool,
    /// Confirmed, by growing index; wait for it to be applied.
    confirmed: VecDeque<(u64, Vec<Waiter>)>,
    timeout_ticks: usize,
    /// Readers that waited too long, so far.
    pub(crate) timed_out: u64,
}

impl ReadRounds {
    /// `has_sender`: questions can be sent, and are answered, without raft's thread.
    pub(crate) fn new(member_id: u64, nonce: u64, timeout_ticks: usize, has_sender: bool) -> Self {
        let (joining, underway, confirmed) = (Vec::new(), VecDeque::new(), VecDeque::new());
        let joining_members = BTreeMap::new();
        let (rounds_named, timed_out) = (0, 0);
        ReadRounds {
            member_id,
            nonce,
            rounds_named,
            joining,
            joining_members,
            underway,
            role: Role::None,
            has_sender,
            asked_place: 0,
            beginning: false,
            rung: false,
            closed: false,
            confirmed,
            timeout_ticks,
            timed_out,
        }
    }

    /// Adds a reader. `None`: the member has ended.
    pub(crate) fn join(&mut self, sender: ReadSender) -> Option<Next> {
        if self.closed {
            return None;
        }
        self.joining.push(Waiter { sender, waited_ticks: 0 });
        Some(self.next())
    }

    /// For readers that may be left.
    fn next(&mut self) -> Next {
        if !self.wants_round() || std::mem::replace(&mut self.rung, true) {
            return Next::Wait;
        }
        self.beginning = self.can_ask();
        if self.beginning { Next::Begin } else { Next::Ring }
    }

    /// Whether there is somebody to ask without raft's thread.
    pub(crate) fn can_ask(&self) -> bool {
        let is_somebody = match &self.role {
            Role::None => false,
            Role::Asks { .. } => true,
            Role::Answers { .. } => self.asked_follower().is_some(),
        };
        self.has_sender && is_somebody
    }

    fn asked_follower(&self) -> Option<u64> {
        let Role::Answers { members, .. } = &self.role else { return None };
        members.get(self.asked_place.checked_rem(members.len())?).copied()
    }

    /// Begins a round, if there still is somebody to ask, and few others are under way. `committed_index`: read while this was locked, so that what was
    /// acknowledged before the readers came is in it.
    pub(crate) fn begin_here(&mut self, committed_index: u64) -> Next {
        (self.rung, self.beginning) = (false, false);
        if !(self.can_ask() && self.wants_round()) {
            return self.next();
        }
        let (term, asked, index) = match (&self.role, self.asked_follower()) {
            (Role::Asks { term, leader }, _) => (*term, Asked::Leader(*leader), None),
            (Role::Answers { term, .. }, Some(id)) => {
                (*term, Asked::Follower { term: *term, id }, Some((id, committed_index)))
            }
            (Role::Answers { .. } | Role::None, _) => return self.next(),
        };
        let name = self.begin_with(term, index);
        Next::Ask(Question { name, asked })
    }

    /// What may be done here from now on. The caller has not sent anything yet by which others could know more.
    pub(crate) fn set_role(&mut self, role: Role) {
        if !self.closed {
            self.role = role;
        }
        // Once too often does no harm.
        self.rung = false;
    }

    #[cfg(test)]
    pub(crate) fn role(&self) -> Role {
        self.role.clone()
    }

    /// The term that this member leads, if it knows by that member's request alone all that was committed before it was made: see the essay.
    pub(crate) fn answers_in_term(&self, id: u64, name: &[u8]) -> Option<u64> {
        match &self.role {
            Role::Answers { term, members } if members.contains(&id) => term_of(name).filter(|of| of == term),
            Role::Answers { .. } | Role::Asks { .. } | Role::None => None,
        }
    }

    /// Whether this member follows that one in that term.
    pub(crate) fn follows(&self, id: u64, in_term: u64) -> bool {
        matches!(self.role, Role::Asks { term, leader } if (term, leader) == (in_term, id))
    }

    /// At which index the round of this name may read that a follower was asked for, now that it, `id`, has answered in this term.
    pub(crate) fn index_followed(&self, id: u64, name: &[u8], term: u64) -> Option<u64> {
        let (asked, committed_index) = self.underway.get(self.place_of(name)?)?.follower?;
        (asked == id && term_of(name) == Some(term)).then_some(committed_index)
    }

    /// Nobody will call [`ReadRounds::begin_here`].
    pub(crate) fn leave_to_raft(&mut self) {
        self.beginning = false;
    }

    /// The round of this name may read at `index`, if that much is applied: gives who may read, and what is next. `None`: it is not, or members
    /// wait too, or there is no such round; then raft's thread has to see the answer.
    pub(crate) fn answered(&mut self, name: &[u8], index: u64, applied_index: u64) -> Option<(Vec<ReadSender>, Next)> {
        if index > applied_index {
            return None;
        }
        let ends = self.place_of(name)?;
        if self.underway.range(..=ends).any(|round| !round.members.is_empty()) {
            return None;
        }
        let waiters = self.underway.drain(..=ends).flat_map(|round| round.waiters);
        let ready = waiters.map(|waiter| waiter.sender).collect();
        self.rung = false;
        Some((ready, self.next()))
    }

    /// On raft's thread, for all readers who came: gives whether a round is to begin now. `can_begin`: whether one could; if nobody is there
    /// for it, the next reader rings.
    pub(crate) fn take(&mut self, can_begin: bool) -> bool {
        if self.beginning && matches!(self.role, Role::Answers { .. }) {
            return false;
        }
        let begins = can_begin && self.wants_round();
        // Its end makes somebody look; until then one who comes may begin another, if there is room for it.
        self.rung = begins || !can_begin || self.underway.len() >= self.rounds_max();
        begins
    }

    /// A member asks this one, which leads, for an index; its round's name. An answer to its newest round is one to those before.
    pub(crate) fn join_member(&mut self, id: u64, name: Vec<u8>) {
        let kept = self.joining_members.entry(id).or_default();
        // The number stands behind the member and its life.
        let of_one_life = 2 * size_of::<u64>();
        let same_life = kept.get(..of_one_life).is_some_and(|life| name.starts_with(life));
        if !same_life || *kept < name {
            *kept = name;
        }
    }

    /// This member does not lead any more: the others ask whoever does.
    pub(crate) fn forget_members(&mut self) {
        self.joining_members.clear();
        self.underway.iter_mut().for_each(|round| round.members.clear());
    }

    /// Whether somebody waits for a round to begin, and one may.
    pub(crate) fn wants_round(&self) -> bool {
        self.underway.len() < self.rounds_max() && !(self.joining.is_empty() && self.joining_members.is_empty())
    }

    fn rounds_max(&self) -> usize {
        if matches!(self.role, Role::Asks { .. }) && self.has_sender { ASKED_ROUNDS_MAX } else { 1 }
    }

    pub(crate) fn is_underway(&self, name: &[u8]) -> bool {
        self.place_of(name).is_some()
    }

    fn place_of(&self, name: &[u8]) -> Option<usize> {
        self.underway.iter().position(|round| round.name == name)
    }

    /// Begins a round for all who joined: its name, for raft. `term`: this member's, now.
    pub(crate) fn begin(&mut self, term: u64) -> Vec<u8> {
        self.begin_with(term, None)
    }

    fn begin_with(&mut self, term: u64, follower: Option<(u64, u64)>) -> Vec<u8> {
        assert!(self.wants_round(), "few rounds at a time");
        let waiters = std::mem::take(&mut self.joining);
        let members = std::mem::take(&mut self.joining_members);
        let name = self.name_round(term);
        self.underway.push_back(Round { name: name.clone(), asked_ticks: 0, follower, waiters, members });
        name
    }

    /// The round of this name, and those that began before it, may read at `index`. Names of other rounds are ignored: they were asked again.
    /// Gives the members to tell, and the names of their rounds.
    pub(crate) fn confirm(&mut self, name: &[u8], index: u64) -> BTreeMap<u64, Vec<u8>> {
        let Some(ends) = self.place_of(name) else { return BTreeMap::new() };
        let (mut waiters, mut members) = (Vec::new(), BTreeMap::new());
        for round in self.underway.drain(..=ends) {
            waiters.extend(round.waiters);
            members.extend(round.members);
        }
        if !waiters.is_empty() {
            let at = self.confirmed.partition_point(|(waits_for, _)| *waits_for <= index);
            self.confirmed.insert(at, (index, waiters));
        }
        members
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
        // Whoever was to begin a round had time; its runtime may have ended.
        self.beginning = false;
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
        for round in &mut self.underway {
            expire(&mut round.waiters);
            round.asked_ticks += 1;
        }
        if self.underway.iter().any(|round| round.follower.is_some() && round.asked_ticks >= RETRY_TICKS) {
            self.asked_place += 1;
        }
        let is_over = |round: &Round| round.waiters.is_empty() && round.members.is_empty();
        self.ask_again(term, |round| round.asked_ticks >= RETRY_TICKS || is_over(round))
    }

    /// This member cannot be reached: rounds that it is asked for have to be asked again, under the name that this gives. `term`: this member's, now.
    pub(crate) fn on_unreachable(&mut self, id: u64, term: u64) -> Option<Vec<u8>> {
        if self.asked_follower() != Some(id) {
            return None;
        }
        self.asked_place += 1;
        self.ask_again(term, |round| round.follower.is_some_and(|(asked, _)| asked == id))
    }

    fn ask_again(&mut self, term: u64, is_lost: impl Fn(&Round) -> bool) -> Option<Vec<u8>> {
        // Members ask again by themselves, under a new name.
        let (lost, underway): (VecDeque<_>, _) = std::mem::take(&mut self.underway).into_iter().partition(is_lost);
        self.underway = underway;
        let waiters: Vec<_> = lost.into_iter().flat_map(|round| round.waiters).collect();
        if waiters.is_empty() {
            return None;
        }
        let name = self.name_round(term);
        let members = BTreeMap::new();
        self.underway.push_back(Round { name: name.clone(), asked_ticks: 0, follower: None, waiters, members });
        Some(name)
    }

    /// The end: refuses those who wait and all who come.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.role = Role::None;
        let error = ReadError::Stopped;
        self.forget_members();
        answer(std::mem::take(&mut self.joining), Err(error));
        answer(self.underway.drain(..).flat_map(|round| round.waiters), Err(error));
        answer(std::mem::take(&mut self.confirmed).into_iter().flat_map(|(_, waiters)| waiters), Err(error));
    }

    fn name_round(&mut self, term: u64) -> Vec<u8> {
        self.rounds_named += 1;
        [self.member_id, self.nonce, self.rounds_named, term].map(u64::to_be_bytes).concat()
    }
}

/// Whether this heartbeat, or the answer to one, is a round's that was asked for without raft's thread.
pub(crate) fn is_question(message: &Message) -> bool {
    message.index == QUESTION_MARK && !message.context.is_empty()
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
        rounds.join(sender).unwrap();
        receiver
    }

    // A reader that comes while a round is under way waits for the next: a write acknowledged in between would be
    // missing from the round's index.
    #[test]
    fn a_round_serves_only_those_who_came_before_it() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
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
        let mut rounds = ReadRounds::new(1, 7, 10, true);
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
        let mut rounds = ReadRounds::new(1, 7, 3, true);
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
        assert!(rounds.underway.is_empty() && rounds.confirmed.is_empty());
    }

    // A member's request is served by the leader's next round, not by the one under way, like any reader; its newest name counts.
    #[test]
    fn members_that_ask_share_the_leaders_rounds() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
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
        let mut asks = ReadRounds::new(4, 9, 10, true);
        let (older, newer) = (asks.name_round(3), asks.name_round(3));
        let of_next_life = ReadRounds::new(4, 8, 10, true).name_round(3);
        for (name, kept) in [(&newer, &newer), (&older, &newer), (&of_next_life, &of_next_life)] {
            rounds.join_member(4, name.clone());
            assert_eq!(rounds.joining_members.get(&4), Some(kept), "two threads may send in any order");
        }
        let third = rounds.begin(3);
        rounds.join_member(3, b"more".to_vec());
        rounds.forget_members();
        assert!(rounds.confirm(&third, 22).is_empty() && !rounds.wants_round(), "who leads no more tells nobody");
    }

    #[test]
    fn a_round_for_members_alone_ends_when_it_is_lost() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        rounds.join_member(2, b"name".to_vec());
        let lost = rounds.begin(3);
        assert_eq!((rounds.on_tick(3), !rounds.underway.is_empty()), (None, true));
        assert_eq!((rounds.on_tick(3), !rounds.underway.is_empty()), (None, false), "it asks again by itself");
        assert!(rounds.confirm(&lost, 5).is_empty());
    }

    #[test]
    fn who_goes_away_is_forgotten() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        drop(reader(&mut rounds));
        let stays = reader(&mut rounds);
        rounds.on_tick(3);
        assert_eq!((rounds.joining.len(), rounds.timed_out), (1, 0));
        rounds.begin(3);
        drop(stays);
        rounds.on_tick(3);
        assert!(rounds.underway.is_empty());
    }

    // Whoever comes while raft's thread will look anyway does not wake it.
    #[test]
    fn one_reader_rings_for_many() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        let mut readers = Vec::new();
        let mut join = |rounds: &mut ReadRounds| {
            let (sender, receiver) = oneshot::channel();
            readers.push(receiver);
            rounds.join(sender)
        };
        assert_eq!((join(&mut rounds), join(&mut rounds)), (Some(Next::Ring), Some(Next::Wait)));
        assert!(rounds.take(true));
        assert_eq!(join(&mut rounds), Some(Next::Wait), "a round is about to begin");
        let name = rounds.begin(3);
        assert_eq!(join(&mut rounds), Some(Next::Wait), "its end will make the thread look");
        assert!(!rounds.take(true), "one at a time");
        rounds.confirm(&name, 5);
        assert!(rounds.take(true), "who came meanwhile");
        let name = rounds.begin(3);
        rounds.confirm(&name, 5);
        assert!(!rounds.take(false));
        assert_eq!(join(&mut rounds), Some(Next::Wait), "when a leader is there, the thread hears of it");
        assert!(rounds.take(true));
        rounds.begin(3);
        join(&mut rounds);
        rounds.close();
        assert_eq!(join(&mut rounds), None);
        for mut waiting in readers {
            let answer = waiting.try_recv();
            assert!(answer == Ok(Err(ReadError::Stopped)) || answer.is_err(), "{answer:?}");
        }
    }

    // A follower's readers ask its leader themselves, and raft's thread sees nothing of it.
    #[test]
    fn rounds_follow_each_other_without_raft() {
        let mut rounds = ReadRounds::new(2, 7, 10, true);
        rounds.set_role(Role::Asks { term: 3, leader: 1 });
        let (sender, mut early) = oneshot::channel();
        assert_eq!(rounds.join(sender), Some(Next::Begin));
        let _with_it = reader(&mut rounds);
        let Next::Ask(first) = rounds.begin_here(0) else { panic!("asks") };
        assert_eq!(rounds.begin_here(0), Next::Wait, "for nobody");
        assert_eq!((&first.asked, term_of(&first.name)), (&Asked::Leader(1), Some(3)));
        assert!(!rounds.take(true), "nor does raft's thread begin one");
        let (sender, mut late) = oneshot::channel();
        assert_eq!(rounds.join(sender), Some(Next::Begin), "whatever raft's thread has looked at meanwhile");
        assert!(rounds.answered(&first.name, 20, 19).is_none(), "not applied yet");
        assert!(rounds.answered(b"of an earlier life", 5, 19).is_none());
        let (ready, next) = rounds.answered(&first.name, 19, 19).unwrap();
        ready.into_iter().for_each(|sender| sender.send(Ok(19)).unwrap());
        assert_eq!((early.try_recv(), late.try_recv().is_err()), (Ok(Ok(19)), true));
        assert_eq!(next, Next::Begin, "for who came meanwhile");
        let Next::Ask(second) = rounds.begin_here(0) else { panic!("asks") };
        assert_ne!(first, second);
        assert!(rounds.answered(&first.name, 19, 30).is_none(), "an answer that came twice");
        let (ready, next) = rounds.answered(&second.name, 21, 30).unwrap();
        assert_eq!((ready.len(), next), (1, Next::Wait));

        let _in_turn: Vec<_> = (0..3).map(|_| reader(&mut rounds)).collect();
        let Next::Ask(slow) = rounds.begin_here(0) else { panic!("asks") };
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Begin), "beside the one under way");
        let Next::Ask(quick) = rounds.begin_here(0) else { panic!("asks") };
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Wait), "two at a time");
        let (ready, next) = rounds.answered(&quick.name, 30, 30).unwrap();
        assert_eq!((ready.len(), next), (4, Next::Begin), "what began before is told too");
        assert!(rounds.answered(&slow.name, 30, 30).is_none());
        let Next::Ask(last) = rounds.begin_here(0) else { panic!("asks") };
        assert_eq!(rounds.answered(&last.name, 30, 30).map(|(ready, next)| (ready.len(), next)), Some((1, Next::Wait)));

        let _third = reader(&mut rounds);
        let Next::Ask(third) = rounds.begin_here(0) else { panic!("asks") };
        let _left = reader(&mut rounds);
        rounds.set_role(Role::None);
        let (_, next) = rounds.answered(&third.name, 21, 30).unwrap();
        assert_eq!(next, Next::Ring, "nobody to ask any more: that is for raft's thread");
        rounds.set_role(Role::Asks { term: 4, leader: 3 });
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Begin));
        rounds.set_role(Role::None);
        assert_eq!((rounds.begin_here(0), rounds.begin_here(0)), (Next::Ring, Next::Ring));
    }

    #[test]
    fn a_leader_answers_members_that_are_a_quorum_with_it_in_its_own_term() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        let name = |term| ReadRounds::new(2, 9, 10, true).name_round(term);
        assert_eq!(rounds.answers_in_term(2, &name(3)), None);
        rounds.set_role(Role::Answers { term: 3, members: vec![2, 3] });
        assert_eq!([2, 3].map(|id| rounds.answers_in_term(id, &name(3))), [Some(3); 2]);
        for (id, name, why) in [
            (4, name(3), "no voter"),
            (2, name(2), "it may have voted for another since"),
            (2, name(4), "the leader may have been replaced"),
            (2, b"no term".to_vec(), "an earlier release's"),
        ] {
            assert_eq!(rounds.answers_in_term(id, &name), None, "{why}");
        }
        rounds.set_role(Role::Answers { term: 3, members: vec![] });
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Ring), "with more to ask its own rounds are raft's");
        rounds.set_role(Role::Answers { term: 3, members: vec![2, 3] });
        rounds.close();
        assert_eq!(rounds.answers_in_term(2, &name(3)), None);
    }

    /// A leader's round: whom it asks, and the round's name.
    fn ask_follower(rounds: &mut ReadRounds, committed_index: u64) -> (u64, Vec<u8>) {
        let Next::Ask(Question { name, asked: Asked::Follower { id, term: 3 } }) = rounds.begin_here(committed_index)
        else {
            panic!("asks a follower")
        };
        (id, name)
    }

    // Whatever the follower has seen committed meanwhile: the readers came before the round, and what was committed then is what they need.
    #[test]
    fn a_leader_reads_at_what_was_committed_when_a_follower_was_asked() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        rounds.set_role(Role::Answers { term: 3, members: vec![2, 3] });
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Begin));
        assert!(!rounds.take(true), "a task is about to begin it");
        let (asked, name) = ask_follower(&mut rounds, 20);
        assert_eq!((asked, rounds.is_underway(&name)), (2, true));
        assert_eq!(rounds.join(oneshot::channel().0), Some(Next::Wait), "one at a time");
        assert!(!rounds.take(true));
        assert_eq!(rounds.index_followed(2, &name, 4), None, "not of the term in which it was asked");
        assert_eq!(rounds.index_followed(3, &name, 3), None, "it was not asked");
        assert_eq!(rounds.index_followed(2, &name, 3), Some(20));
        assert!(rounds.answered(&name, 20, 19).is_none(), "not applied: for raft's thread");
        let (ready, next) = rounds.answered(&name, 20, 20).unwrap();
        assert_eq!((ready.len(), next), (1, Next::Begin));
        assert_eq!(
            (rounds.index_followed(2, &name, 3), rounds.is_underway(&name)),
            (None, false),
            "whoever answers last"
        );

        let (_, second) = ask_follower(&mut rounds, 21);
        rounds.set_role(Role::None);
        let member = rounds.index_followed(2, &second, 3).map(|index| rounds.confirm(&second, index));
        assert_eq!((member, rounds.take_applied(21).len()), (Some(BTreeMap::new()), 1), "it was asked in time");
        rounds.join(oneshot::channel().0).unwrap();
        let by_raft = rounds.begin(4);
        assert_eq!((rounds.index_followed(2, &by_raft, 4), rounds.is_underway(&by_raft)), (None, true));
    }

    #[test]
    fn a_leader_asks_another_follower_when_one_does_not_answer() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        rounds.set_role(Role::Answers { term: 3, members: vec![2, 3] });
        let mut waits = reader(&mut rounds);
        let (_, lost) = ask_follower(&mut rounds, 20);
        assert_eq!(rounds.on_tick(3), None);
        let again = rounds.on_tick(3).expect("all are asked");
        assert_eq!((rounds.is_underway(&lost), rounds.index_followed(2, &again, 3)), (false, None));
        rounds.confirm(&again, 20);
        on_applied(&mut rounds, 20);
        assert_eq!(waits.try_recv(), Ok(Ok(20)));

        let _next = reader(&mut rounds);
        let (asked, name) = ask_follower(&mut rounds, 20);
        assert_eq!((asked, rounds.on_unreachable(2, 3)), (3, None), "nobody was asked that cannot be reached");
        let again = rounds.on_unreachable(3, 3).expect("all are asked");
        assert_eq!((rounds.is_underway(&name), rounds.is_underway(&again)), (false, true));
        rounds.confirm(&again, 20);
        let _last = reader(&mut rounds);
        assert_eq!(ask_follower(&mut rounds, 20).0, 2);
    }

    // Who was told to begin a round may be a task of a runtime that has ended.
    #[test]
    fn a_round_that_nobody_begins_is_begun_by_rafts_thread() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
        rounds.set_role(Role::Answers { term: 3, members: vec![2, 3] });
        let _waits = reader(&mut rounds);
        assert!(!rounds.take(true));
        rounds.on_tick(3);
        assert!(rounds.take(true));
        ask_follower(&mut rounds, 20);
        let _waits = reader(&mut rounds);
        rounds.set_role(Role::Answers { term: 4, members: vec![] });
        assert_eq!(rounds.on_unreachable(2, 4), None, "nobody is asked");
        assert!(!rounds.take(true), "one is under way");
    }

    #[test]
    fn a_follower_answers_the_leader_that_it_follows_in_its_term() {
        let mut rounds = ReadRounds::new(2, 7, 10, true);
        assert!(!rounds.follows(1, 3));
        rounds.set_role(Role::Asks { term: 3, leader: 1 });
        assert!(rounds.follows(1, 3));
        assert!(!rounds.follows(1, 2) && !rounds.follows(1, 4) && !rounds.follows(3, 3));
        let question = Message { index: QUESTION_MARK, context: vec![1].into(), ..Message::default() };
        assert!(is_question(&question));
        assert!(!is_question(&Message { index: 0, ..question }) && !is_question(&Message::default()), "raft's own");
        rounds.close();
        assert!(!rounds.follows(1, 3), "it may have ended long ago");
    }

    #[test]
    fn a_name_says_in_which_term_it_was_drawn() {
        let mut rounds = ReadRounds::new(1, 7, 10, true);
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
            let mut rounds = ReadRounds::new(id, nonce, 3, true);
            let _reader = reader(&mut rounds);
            rounds.begin(3)
        };
        assert!(name(1, 7) != name(2, 7) && name(1, 7) != name(1, 8));
    }
}
