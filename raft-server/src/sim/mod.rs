//! A deterministic simulation: whole members, with storage on its in-memory engine, driven by one seeded scheduler.
//!
//! Nothing here has a thread or a clock. Each step the scheduler draws one thing that could happen next: a tick of some
//! member's clock, a message that arrives, is lost or arrives twice, a turn of a member's raft, log or apply work, a client's
//! write or read, a crash (now, or at one of the next writes to the disk: [`disk`] says what is on it then), a restart, a
//! partition, a member that stands still for a while, a change of members. So time passes at another pace on every member, and
//! every order of events that the threads could produce can be drawn. The same seed gives the same run; its trace is a number,
//! to compare.
//!
//! Each run has some of these kinds of trouble, and is quick or slow beside its clocks: all kinds at once would cut each other short, and an
//! election, a write on the other side and a read on this one have to come after each other within one partition.
//!
//! A group begins with one, three or five members. Learners join, get their votes, and are removed, as voters are; a leader hands over
//! now and then, and before it is removed. Who is removed mostly runs on, crashes and restarts as the others do, whether it knows or not.
//!
//! Clients put keys, with and without a lease, revoke leases, compact (in every second run), read, and watch: a watcher is
//! on one member and goes on at another where it stopped.
//!
//! In the end everything is healed, and the group must answer everybody and agree. The checks ([`check`]): what was
//! acknowledged is there, once, where its revision says; revisions follow real time; a linearizable read shows whatever was
//! acknowledged before it; a watcher saw every change, once, in order, whole revisions at a time, as the members have it; all
//! members, learners too, have the same history, leases and hash, and know of the same members.
//!
//! `make sim` runs seeds without end; `make test` two thousand of them. A failing seed is printed with the command that
//! runs it alone, and belongs into [`tests::FOUND_BEFORE`].

mod check;
mod disk;
mod member;
mod tests;
mod watcher;
mod world;

pub(crate) use self::check::Violation;
use self::world::World;
pub(crate) use self::world::{Bug, Run, run};
