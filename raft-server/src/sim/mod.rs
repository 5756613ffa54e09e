//! A deterministic simulation: whole members, with storage on its in-memory engine, driven by one seeded scheduler.
//!
//! Nothing here has a thread or a clock. Each step the scheduler draws one thing that could happen next: a tick of some
//! member's clock, a message that arrives, is lost or arrives twice, a turn of a member's raft, log or apply work, a client's
//! write or read, a crash (which loses what was not synced, and maybe what was on its way to the disk), a restart, a
//! partition, a change of members. So time passes at another pace on every member, and every order of events that the
//! threads could produce can be drawn. The same seed gives the same run; its trace is a number, to compare.
//!
//! Clients put keys, with and without a lease, revoke leases, compact (in every second run), read, and watch: a watcher is
//! on one member and goes on at another where it stopped. A batch that a crash tears is one that was not written: the log on disk
//! cuts it away by its checksum, which the log's own tests show.
//!
//! In the end everything is healed, and the group must answer everybody and agree. The checks ([`check`]): what was
//! acknowledged is there, once, where its revision says; revisions follow real time; a linearizable read shows whatever was
//! acknowledged before it; a watcher saw every change, once, in order, whole revisions at a time, as the members have it; all
//! members have the same history, leases and hash.
//!
//! `make sim` runs seeds without end; `make test` a thousand of them. A failing seed is printed with the command that
//! runs it alone, and belongs into [`tests::FOUND_BEFORE`].

mod check;
mod member;
mod tests;
mod watcher;
mod world;

pub(crate) use self::check::Violation;
pub(crate) use self::world::{Bug, Run, run};
