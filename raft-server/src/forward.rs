//! The way of a command from a member that does not lead to the one that does.
//!
//! Both ends in plain bookkeeping, without raft. The sender numbers its commands of a term from 1 and sends them in order. The
//! leader takes the next number and no other ([`Intake`]), so that nothing gets in twice, whatever the network repeats or
//! reorders; it answers how far it has come, and the sender sends again from there when that stands still ([`Sending`]).
//! Commands carry the term: the leader of another term does not take them. Together with that, a term's number names one
//! command for ever, see [`proposals`](crate::proposals).
//!
//! A command that finds its lane full is refused, not held: others of the same member wait behind it. Refusals are repeated
//! with each answer until the sender has heard of them.
//!
//! Bounds: what is sent and unanswered counts against the sender's `inflight_bytes_max`; the leader keeps one [`Intake`] for
//! each life of a member, and refusals for no more numbers than the sender has sent since it last heard.

use std::collections::BTreeMap;

use bytes::Bytes;

/// Ticks without an answer that moves on, after which the rest is sent again.
const RESEND_TICKS: usize = 3;

/// Commands on their way to the leader of `term`, or, without any, the question how far it has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    pub from: u64,
    pub to: u64,
    pub term: u64,
    /// See [`Origin::life`](crate::proposals::Origin::life).
    pub life: u64,
    /// The sender has heard the refusals of all numbers below.
    pub heard: u64,
    /// Numbers, growing; lanes; commands. A number that is left out needs no command any more.
    pub commands: Vec<(u64, u32, Bytes)>,
    /// One after the last number that this message speaks for, left out ones included.
    pub end: u64,
    /// The first number that this message speaks for.
    pub start: u64,
}

/// The leader's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    pub from: u64,
    pub to: u64,
    pub term: u64,
    pub life: u64,
    /// All numbers below were taken, or refused.
    pub next: u64,
    /// Those refused, as far as the sender is not known to have heard of it.
    pub refused: Vec<u64>,
}

/// The sender's side, for one leader of one term.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    pub(crate) term: u64,
    pub(crate) leader: u64,
    /// The number of the next new command.
    pub(crate) next: u64,
    /// The leader has all below.
    pub(crate) acknowledged: u64,
    silent_ticks: usize,
}

impl Sending {
    pub(crate) fn to(term: u64, leader: u64) -> Self {
        Sending { term, leader, next: 1, acknowledged: 1, silent_ticks: 0 }
    }

    /// Numbers for `count` commands: the first of them.
    pub(crate) fn assign(&mut self, count: usize) -> u64 {
        let first = self.next;
        self.next += count as u64;
        first
    }

    /// Takes an answer. Gives whether it belongs to this term and life; if not it says nothing.
    pub(crate) fn on_answer(&mut self, answer: &Forwarded) -> bool {
        // The leader takes what was sent, no more.
        if answer.term != self.term || answer.from != self.leader || answer.next > self.next {
            return false;
        }
        if answer.next > self.acknowledged {
            self.acknowledged = answer.next;
            self.silent_ticks = 0;
        }
        true
    }

    /// One tick. Whether to send again from [`Sending::acknowledged`].
    pub(crate) fn on_tick(&mut self) -> bool {
        if self.acknowledged == self.next {
            self.silent_ticks = 0;
            return false;
        }
        self.silent_ticks += 1;
        if self.silent_ticks < RESEND_TICKS {
            return false;
        }
        self.silent_ticks = 0;
        true
    }
}

/// Lives of one member that are told apart in one term. One that starts so often is not served any more, until the next term.
const LIVES_MAX: usize = 1_000;

/// The leader's side, for one life of a member.
#[derive(Debug)]
pub(crate) struct Intake {
    next: u64,
    refused: BTreeMap<u64, ()>,
}

impl Default for Intake {
    fn default() -> Self {
        Intake { next: 1, refused: BTreeMap::new() }
    }
}

/// All members' intakes, for one term of one's own.
#[derive(Debug, Default)]
pub(crate) struct Intakes {
    term: u64,
    /// By member and life: a message of an earlier life may come late, and must not make this one begin anew.
    of_lives: BTreeMap<(u64, u64), Intake>,
}

impl Intakes {
    /// Takes the commands that come next, each offered to `take`, which answers whether there was room. Gives what to tell
    /// the sender. `term` is the one led now, the message's too.
    pub(crate) fn receive(
        &mut self,
        term: u64,
        message: Forward,
        mut take: impl FnMut(u64, u32, Bytes) -> bool,
    ) -> Forwarded {
        assert_eq!(message.term, term, "commands of another term are not taken");
        let Forward { from: message_from, to: message_to, life, .. } = message;
        if self.term != term {
            *self = Intakes { term, of_lives: BTreeMap::new() };
        }
        let lives = self.of_lives.range((message.from, 0)..=(message.from, u64::MAX)).count();
        let known = self.of_lives.contains_key(&(message.from, message.life));
        if !known && lives >= LIVES_MAX {
            return Forwarded { from: message_to, to: message_from, term, life, next: 1, refused: Vec::new() };
        }
        let intake = self.of_lives.entry((message.from, message.life)).or_default();
        intake.refused = intake.refused.split_off(&message.heard);
        // A gap means that something before was lost: the answer asks for it.
        if message.start <= intake.next && message.end > intake.next {
            for (number, lane, command) in message.commands {
                if number >= intake.next && number < message.end && !take(number, lane, command) {
                    intake.refused.insert(number, ());
                }
            }
            intake.next = message.end;
        }
        let (next, refused) = (intake.next, intake.refused.keys().copied().collect());
        Forwarded { from: message_to, to: message_from, term, life, next, refused }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn forward(numbers: std::ops::Range<u64>, heard: u64) -> Forward {
        let commands = numbers.clone().map(|number| (number, 0, Bytes::new())).collect();
        Forward { from: 2, to: 1, term: 5, life: 9, heard, commands, start: numbers.start, end: numbers.end }
    }

    #[test]
    fn gaps_are_asked_for_and_repeats_are_not_taken() {
        let mut intakes = Intakes::default();
        let mut taken = Vec::new();
        let mut receive = |message| {
            intakes.receive(5, message, |number, _, _| {
                taken.push(number);
                true
            })
        };
        assert_eq!(receive(forward(4..6, 1)).next, 1);
        assert_eq!(receive(forward(1..4, 1)).next, 4);
        assert_eq!(receive(forward(1..6, 1)).next, 6);
        assert_eq!(receive(forward(2..3, 1)).next, 6);
        assert_eq!(taken, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn refusals_are_repeated_until_they_are_heard() {
        let mut intakes = Intakes::default();
        let answer = intakes.receive(5, forward(1..4, 1), |number, _, _| number != 2);
        assert_eq!((answer.next, &answer.refused[..]), (4, &[2][..]));
        let answer = intakes.receive(5, forward(1..4, 1), |_, _, _| panic!("taken"));
        assert_eq!(answer.refused, [2]);
        let answer = intakes.receive(5, forward(4..5, 4), |_, _, _| true);
        assert_eq!((answer.next, answer.refused.len()), (5, 0));
    }

    #[test]
    fn a_new_life_and_a_new_term_begin_anew() {
        let mut intakes = Intakes::default();
        assert_eq!(intakes.receive(5, forward(1..4, 1), |_, _, _| true).next, 4);
        let restarted = Forward { life: 10, ..forward(1..2, 1) };
        assert_eq!(intakes.receive(5, restarted, |_, _, _| true).next, 2);
        assert_eq!(intakes.receive(5, forward(1..4, 1), |_, _, _| panic!("taken")).next, 4, "an old life's, again");
        let later = Forward { term: 6, ..forward(1..3, 1) };
        assert_eq!(intakes.receive(6, later, |_, _, _| true).next, 3);
    }

    proptest! {
        // Whatever the network loses, repeats and reorders, each command gets in once, in order.
        #[test]
        fn every_command_gets_in_once_in_order(order in prop::collection::vec((0usize..8, any::<bool>()), 1..200)) {
            let (mut sending, mut intakes) = (Sending::to(5, 1), Intakes::default());
            let mut wire: Vec<Forward> = Vec::new();
            let mut taken = Vec::new();
            for (pick, new) in order {
                if new {
                    let start = sending.assign(2);
                    wire.push(forward(start..sending.next, sending.acknowledged));
                } else if sending.on_tick() {
                    wire.push(forward(sending.acknowledged..sending.next, sending.acknowledged));
                }
                // The newest, an old one once more, or none.
                if let Some(message) = wire.get(wire.len().saturating_sub(pick)).cloned() {
                    let answer = intakes.receive(5, message, |number, _, _| { taken.push(number); true });
                    prop_assert!(sending.on_answer(&answer));
                }
            }
            let expected: Vec<u64> = (1..sending.acknowledged).collect();
            prop_assert_eq!(taken, expected);
        }
    }
}
