//! The apply thread: committed entries go to the state machine, replies to those who wait for them.
//!
//! Nothing is queued for it: raft's thread moves a watermark, the commit index, and the entries up to it are read from the
//! log, whose newest part is in memory. So a slow state machine costs no memory, however far it falls behind; its
//! proposers are held back by `inflight_bytes_max`.
//!
//! Each round takes all that is committed, up to `apply_bytes_max`, to a [`StateMachine::apply`], which may have room for the first of it
//! alone; publishes the applied index; only then answers, so whoever has a reply finds its effect in the state. What entries do and
//! answer may be far more than they say: replies that nobody here waits for are not kept until the end of a round, so followers and
//! members that replay the log need no room for them.
//!
//! Of a sole voter raft's thread does such a round itself if it is small and nothing is left from before ([`ApplyHere`]); a lock on the
//! applier keeps the two apart, and raft's thread never waits for it.
//!
//! Whose reply it is. An entry proposed here is known by its place; a command that this member forwarded by its origin, which
//! the entry carries. An entry of a new term says of all that still waits from earlier ones that it was lost: it goes
//! back to the lanes ([`proposals`](crate::proposals)).
//!
//! A snapshot of the leader takes the place of entries: raft's thread announces it, what was to be applied before it need not be
//! any more, and the state is switched here, between two rounds ([`snapshot`](crate::snapshot)).
//!
//! The state has no write-ahead log of its own, so from time to time what it holds is made durable and the log truncated
//! to it: when the log has grown to half of `log_bytes_flush` it is asked what is durable by now, at the whole it begins
//! to flush in the background. Only at twice that, when the disk cannot keep up, does the thread wait for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType};
use tenure_storage::Fault;

use crate::error::ProposeError;
use crate::frame::{self, Frame};
use crate::log::{Conf, Log, Position};
use crate::proposals::{Origin, Proposal, Waiter};
use crate::shared::{Answered, Shared};
use crate::snapshot::Snapshotter;

/// One committed raft entry as the state machine sees it: its index and the commands batched in it, in order. A change of
/// members carries the one command that goes with it, an entry of raft's own (the first of a term) none; their index counts
/// all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedEntry {
    pub index: u64,
    pub commands: Vec<Bytes>,
    /// To whose reply somebody at this member listens, by the command's place: the others may be dropped as soon as they are made. Nobody
    /// does after a restart, and on most members.
    pub wanted: Vec<bool>,
}

/// The replicated state, owned by the apply thread.
pub trait StateMachine: Send + 'static {
    /// What a command's proposer gets.
    type Reply: Send + 'static;

    /// Highest index whose effects are in the state, durable or not. 0: empty.
    fn applied_index(&self) -> u64;

    /// Applies entries in order, atomically together with the new applied index: all of them, or so many of the first as it has room for,
    /// at least one; it is given the others again. The indexes go on from [`StateMachine::applied_index`] without a gap.
    /// `replies[i][j]` answers `entries[i].commands[j]`; `None` is for a reply that is not wanted, or for which there was no room.
    ///
    /// # Errors
    /// A [`Fault`] stops the member: it could not carry on without diverging from its peers.
    fn apply(&mut self, entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Option<Self::Reply>>>, Fault>;

    /// Highest applied index that survives power loss now. Never ahead of [`StateMachine::applied_index`]; cheap.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn durable_index(&self) -> Result<u64, Fault>;

    /// Makes everything applied so far durable; gives the index that then is.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn flush(&mut self) -> Result<u64, Fault>;

    /// Starts making everything applied so far durable, and goes on; [`StateMachine::durable_index`] tells when it is. A state
    /// machine that cannot do that in the background does it now.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn begin_flush(&mut self) -> Result<(), Fault> {
        self.flush().map(drop)
    }

    /// What makes copies of this state for other members, from any thread.
    fn snapshotter(&self) -> Arc<dyn Snapshotter>;

    /// Replaces the whole state by that in `dir`, which a [`Snapshotter`] of another member wrote when it had applied `index`, and
    /// takes the directory over. Durable on return, and all or nothing: after a crash the state is the old or the new one.
    ///
    /// # Errors
    /// As [`StateMachine::apply`]; of a directory that is not what it was offered as, before anything is replaced.
    fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault>;
}

/// How far the apply thread may go. A level, not a queue.
#[derive(Default)]
pub(crate) struct ApplySignal {
    state: Mutex<Level>,
    bell: Condvar,
}

#[derive(Default)]
struct Level {
    commit_index: u64,
    /// A snapshot takes the place of what is not applied yet.
    replaced: bool,
    install: Option<Install>,
    stopping: bool,
}

/// A snapshot that is to be installed; the log has noted it.
pub(crate) struct Install {
    pub(crate) at: Position,
    pub(crate) conf: Conf,
    pub(crate) path: PathBuf,
}

/// What there is to do.
enum Work {
    /// Entries up to here.
    Apply(u64),
    Install(Install),
}

impl ApplySignal {
    /// Lets entries up to `commit_index` be applied. They are committed, and durable here.
    pub(crate) fn raise(&self, commit_index: u64) {
        let mut level = self.state.lock();
        assert!(commit_index >= level.commit_index, "what is committed stays so");
        level.commit_index = commit_index;
        self.bell.notify_one();
    }

    /// A snapshot comes: no further entry is applied before it.
    pub(crate) fn announce_install(&self) {
        self.state.lock().replaced = true;
    }

    /// Lets the announced snapshot be installed.
    pub(crate) fn install(&self, install: Install) {
        let mut level = self.state.lock();
        assert!(level.replaced, "a snapshot is announced first");
        level.install = Some(install);
        self.bell.notify_one();
    }

    /// As [`ApplySignal::raise`], for entries that the caller applies itself: the apply thread sleeps on. Gives whether the caller may:
    /// nothing else is to be done after `applied`.
    fn raise_quietly(&self, applied: u64, commit_index: u64) -> bool {
        let mut level = self.state.lock();
        let is_idle = !level.replaced && level.install.is_none() && level.commit_index <= applied;
        if is_idle {
            assert!(commit_index >= level.commit_index, "what is committed stays so");
            level.commit_index = commit_index;
        }
        is_idle
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopping = true;
        self.bell.notify_one();
    }

    /// Waits until there is something after `applied`. `None`: stopped.
    fn wait_beyond(&self, applied: u64) -> Option<Work> {
        let mut level = self.state.lock();
        loop {
            if level.stopping {
                return None;
            }
            if let Some(install) = level.install.take() {
                level.replaced = false;
                level.commit_index = level.commit_index.max(install.at.index);
                return Some(Work::Install(install));
            }
            if level.commit_index > applied && !level.replaced {
                return Some(Work::Apply(level.commit_index));
            }
            self.bell.wait(&mut level);
        }
    }

    /// Whether nothing is to be done after `applied`; for a driver that steps the threads' work itself.
    #[cfg(test)]
    pub(crate) fn is_idle(&self, applied: u64) -> bool {
        let level = self.state.lock();
        level.install.is_none() && (level.replaced || level.commit_index <= applied)
    }
}

/// What the apply thread tells raft's thread. Both are levels kept in the status: a notice only says to look.
pub(crate) enum Progress {
    Applied,
    Durable,
    /// The announced snapshot is the state now, and the log begins after it.
    Installed,
}

/// The apply thread's own state.
pub(crate) struct Applier<S: StateMachine> {
    pub(crate) state_machine: S,
    pub(crate) log: Arc<Log>,
    pub(crate) shared: Arc<Shared<S::Reply>>,
    pub(crate) signal: Arc<ApplySignal>,
    pub(crate) apply_bytes_max: u64,
    pub(crate) log_bytes_flush: u64,
    pub(crate) flush_entries: u64,
    pub(crate) slow_apply: Duration,
    pub(crate) flush_on_stop: bool,
    /// Bytes in the log after the durable index, when that was last asked for.
    pub(crate) probed_bytes: u64,
    /// The applied index at which `flush_entries` last began a flush.
    pub(crate) flushed_at: u64,
    /// The term of the last applied entry.
    pub(crate) term: u64,
}

/// The apply thread: runs until the signal is stopped.
///
/// # Errors
/// The state machine's or the log's; the member must stop.
pub(crate) fn run<S: StateMachine>(applier: &Mutex<Applier<S>>, mut notify: impl FnMut(Progress)) -> Result<(), Fault> {
    let (shared, signal) = {
        let applier = applier.lock();
        (Arc::clone(&applier.shared), Arc::clone(&applier.signal))
    };
    while let Some(work) = signal.wait_beyond(shared.status.applied_index.load(Ordering::Acquire)) {
        applier.lock().work(work, &mut notify)?;
    }
    applier.lock().end()
}

/// The applier as raft's thread reaches it.
pub(crate) trait ApplyHere: Send + Sync {
    /// Applies what is committed up to here, on the calling thread, unless the apply thread is at work or behind. `None`: nothing was
    /// done, and the signal is to be raised.
    ///
    /// # Errors
    /// As [`run`].
    fn try_apply(&self, commit_index: u64) -> Result<Option<Progress>, Fault>;
}

impl<S: StateMachine> ApplyHere for Mutex<Applier<S>> {
    fn try_apply(&self, commit_index: u64) -> Result<Option<Progress>, Fault> {
        let Some(mut applier) = self.try_lock() else { return Ok(None) };
        if !applier.signal.raise_quietly(applier.applied(), commit_index) {
            return Ok(None);
        }
        let mut progress = Progress::Applied;
        while applier.applied() < commit_index {
            applier.work(Work::Apply(commit_index), &mut |made| {
                if matches!(made, Progress::Durable) {
                    progress = made;
                }
            })?;
        }
        Ok(Some(progress))
    }
}

impl<S: StateMachine> Applier<S> {
    fn applied(&self) -> u64 {
        self.shared.status.applied_index.load(Ordering::Relaxed)
    }

    /// One round.
    fn work(&mut self, work: Work, notify: &mut impl FnMut(Progress)) -> Result<(), Fault> {
        match work {
            Work::Install(install) => {
                self.install(install)?;
                notify(Progress::Installed);
            }
            Work::Apply(commit_index) => {
                let applied = self.applied();
                if commit_index <= applied {
                    // Raft's thread was here meanwhile.
                    return Ok(());
                }
                // Nothing, if a snapshot was announced meanwhile and has taken the entries' place in the log.
                if let Some(entries) = self.log.entries_between(applied + 1, commit_index + 1, self.apply_bytes_max)? {
                    let mut rest = entries;
                    while !rest.is_empty() {
                        let applied = self.apply(&rest)?;
                        rest.drain(..applied);
                        notify(Progress::Applied);
                        if self.maybe_flush()? {
                            notify(Progress::Durable);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Fault> {
        if self.flush_on_stop && !self.shared.faulted() {
            let durable = self.state_machine.flush()?;
            self.shared.status.durable_index.store(durable, Ordering::Release);
        }
        Ok(())
    }

    /// Waits for work and does one round of it; for a driver that steps the threads' work itself.
    ///
    /// # Errors
    /// As [`run`].
    #[cfg(test)]
    pub(crate) fn step(&mut self, notify: &mut impl FnMut(Progress)) -> Result<(), Fault> {
        match self.signal.wait_beyond(self.applied()) {
            Some(work) => self.work(work, notify),
            None => Ok(()),
        }
    }

    /// Applies, publishes, answers. Gives how many of the entries that was.
    fn apply(&mut self, entries: &[Entry]) -> Result<usize, Fault> {
        let indexes = entries.iter().map(|entry| entry.index);
        assert!(indexes.eq((self.applied() + 1..).take(entries.len())), "entries are applied in order, without a gap");
        let mut places = Vec::with_capacity(entries.len());
        let mut committed = Vec::with_capacity(entries.len());
        for entry in entries {
            let at = Position { index: entry.index, term: entry.term };
            let Frame { commands, origins } = decode(entry)?;
            let wanted = self.shared.waiting.wanted(at, &origins, self.shared.life, commands.len());
            places.push((at, commands.len(), origins));
            committed.push(CommittedEntry { index: at.index, commands, wanted });
        }
        let began = Instant::now();
        let replies = self.state_machine.apply(committed)?;
        places.truncate(replies.len());
        let last = places.last().expect("one entry at least is applied").0.index;
        let took = began.elapsed();
        self.shared.metrics.backend_commit_duration.observe(took);
        if took > self.slow_apply {
            self.shared.metrics.slow_applies.fetch_add(1, Ordering::Relaxed);
            let (took_ms, expected_ms) = (took.as_millis(), self.slow_apply.as_millis());
            tracing::warn!(took_ms, expected_ms, through = last, entries = places.len(), "apply took too long");
        }
        assert!(
            replies.iter().map(Vec::len).eq(places.iter().map(|(_, count, _)| *count)),
            "one reply for each command"
        );
        assert_eq!(self.state_machine.applied_index(), last, "the applied index follows the log");
        self.shared.status.applied_index.store(last, Ordering::Release);
        let (mut answered, places_count) = (Vec::new(), places.len());
        for ((at, _, origins), replies) in places.into_iter().zip(replies) {
            self.on_term(at.term);
            self.answer(at, &origins, replies, &mut answered);
        }
        if !answered.is_empty() {
            self.shared.complete(answered);
        }
        Ok(places_count)
    }

    /// What was proposed in earlier terms and is not applied by now never will be.
    fn on_term(&mut self, term: u64) {
        assert!(term >= self.term, "terms of the log grow");
        if term > self.term {
            self.term = term;
            let dead = self.shared.waiting.take_dead(term);
            if !dead.is_empty() {
                self.shared.requeue(dead);
            }
        }
    }

    fn answer(
        &self,
        at: Position,
        origins: &[(usize, Origin)],
        replies: Vec<Option<S::Reply>>,
        answered: &mut Answered<S::Reply>,
    ) {
        let waiting = &self.shared.waiting;
        if let Some(batch) = waiting.take_batch(at) {
            if replies.is_empty() {
                // A change of members that raft put off: it became an empty entry.
                return self.shared.refuse(batch.proposals, ProposeError::Dropped);
            }
            assert_eq!(batch.proposals.len(), replies.len(), "an entry carries the commands it was proposed with");
            let local =
                batch.proposals.into_iter().zip(replies).filter_map(|(proposal, reply)| match proposal.waiter {
                    Waiter::Local(sender) => Some((sender, reply.ok_or(ProposeError::NoRoomForReply))),
                    Waiter::Remote(_) => None,
                });
            return answered.extend(local);
        }
        let mut own = origins.iter().filter(|(_, origin)| origin.life == self.shared.life).peekable();
        if own.peek().is_none() {
            return;
        }
        let mut replies = replies.into_iter().enumerate();
        for (place, origin) in own {
            let reply = replies.find(|(at, _)| at == place).map(|(_, reply)| reply);
            let proposal = waiting.take_forwarded(at.term, origin.number);
            if let (Some(Proposal { waiter: Waiter::Local(sender), .. }), Some(reply)) = (proposal, reply) {
                answered.push((sender, reply.ok_or(ProposeError::NoRoomForReply)));
            }
        }
    }

    /// Makes the snapshot the state, and the log begin after it.
    fn install(&mut self, Install { at, conf, path }: Install) -> Result<(), Fault> {
        let applied = at.index;
        self.state_machine.install(&path, applied)?;
        assert_eq!(self.state_machine.applied_index(), applied, "a snapshot is what it was offered as");
        assert_eq!(self.state_machine.durable_index()?, applied, "a snapshot is durable");
        self.log.store().finish_install(at, &conf)?;
        self.shared.status.applied_index.store(applied, Ordering::Release);
        self.shared.status.durable_index.store(applied, Ordering::Release);
        self.probed_bytes = 0;
        self.term = self.term.max(at.term);
        // What it contains of these, nobody can tell.
        self.shared.refuse(self.shared.waiting.take_all(), ProposeError::Dropped);
        tracing::info!(index = at.index, term = at.term, "installed a snapshot");
        Ok(())
    }

    /// Whether there is a newer durable index than before, so that the log can be truncated.
    fn maybe_flush(&mut self) -> Result<bool, Fault> {
        let (applied, durable) = {
            let status = &self.shared.status;
            (status.applied_index.load(Ordering::Relaxed), status.durable_index.load(Ordering::Relaxed))
        };
        let unflushed = self.log.bytes_after(durable);
        self.probed_bytes = self.probed_bytes.min(unflushed);
        let many_entries = self.flush_entries > 0 && applied - durable.max(self.flushed_at) >= self.flush_entries;
        // A flush in the background takes its time; beginning another at once would not help.
        let more_bytes =
            unflushed >= self.log_bytes_flush / 2 && unflushed >= self.probed_bytes + self.log_bytes_flush / 8;
        if !many_entries && !more_bytes && self.flushed_at <= durable {
            return Ok(false);
        }
        let now = if unflushed >= 2 * self.log_bytes_flush {
            self.state_machine.flush()?
        } else {
            if many_entries || (more_bytes && unflushed >= self.log_bytes_flush) {
                self.state_machine.begin_flush()?;
                self.flushed_at = applied;
            }
            self.state_machine.durable_index()?
        };
        if !many_entries && !more_bytes {
            return Ok(self.publish_durable(now));
        }
        self.probed_bytes = unflushed;
        Ok(self.publish_durable(now))
    }

    /// Gives whether the index moved.
    fn publish_durable(&self, now: u64) -> bool {
        let before = self.shared.status.durable_index.swap(now, Ordering::AcqRel);
        assert!(now >= before, "what is durable stays so");
        now > before
    }
}

/// The commands of an entry. A change of members has one beside it.
fn decode(entry: &Entry) -> Result<Frame, Fault> {
    let index = entry.index;
    let corrupt = |what| Fault::Corrupt { what, key: index.to_be_bytes().to_vec() };
    let frame = match entry.entry_type {
        EntryType::EntryNormal => entry.data.clone(),
        EntryType::EntryConfChange => {
            let change = ConfChange::parse_from_bytes(&entry.data);
            change.map_err(|_| corrupt("change of members in raft entry"))?.context
        }
        EntryType::EntryConfChangeV2 => {
            let change = ConfChangeV2::parse_from_bytes(&entry.data);
            change.map_err(|_| corrupt("change of members in raft entry"))?.context
        }
    };
    frame::decode(frame).map_err(|error| {
        tracing::error!(index, %error, "decode raft entry");
        corrupt("raft entry")
    })
}
