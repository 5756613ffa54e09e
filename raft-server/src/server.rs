//! Starting a member, and what happens when one of its threads cannot go on.

use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use raft::RawNode;
use raft::eraftpb::ConfState;
use tenure_storage::Fault;
use tokio::sync::watch;

use crate::apply::{self, Applier, ApplyHere, ApplySignal, StateMachine};
use crate::config::{Config, FaultHandler};
use crate::error::{MemberFault, StartError};
use crate::events;
use crate::forward::{Intakes, Sending};
use crate::handle::{Handle, Limits};
use crate::lanes::Lanes;
use crate::log::{BOOTSTRAP_INDEX, Conf, EngineLog, Log, LogStore, LogWrite, Position, RaftStorage, Recovered};
use crate::logger;
use crate::node::{DiskWatch, Event, Node, ReadRoleOf, Snapshots};
use crate::proposals::Waiting;
use crate::read_index::ReadRounds;
use crate::replies::Replies;
use crate::shared::{Leadership, ProposalQueue, Shared, StatusCells};
use crate::transport::Transport;
use crate::writer::{self, WriteQueue, Written};

/// Starts a member on the log in `config.data_dir`. Returns once the log is read; leading, and applying what the state
/// lacks, follow on the member's threads. [`Handle::read_barrier`] resolves when it serves.
///
/// # Errors
/// See [`StartError`]. Nothing runs then.
pub fn start<S: StateMachine>(
    config: Config,
    state_machine: S,
    transport: impl Transport + 'static,
) -> Result<(Handle<S::Reply>, JoinGuard), StartError> {
    config.validate()?;
    std::fs::create_dir_all(&config.data_dir).map_err(Fault::Io)?;
    let log = EngineLog::open(&config.data_dir, config.log_bytes_flush)?;
    start_on(config, state_machine, Arc::new(log), transport)
}

/// As [`start`], on a log of the caller's; `config.data_dir` is not used.
///
/// # Errors
/// As [`start`].
pub fn start_on<S: StateMachine>(
    config: Config,
    state_machine: S,
    store: Arc<dyn LogStore>,
    transport: impl Transport + 'static,
) -> Result<(Handle<S::Reply>, JoinGuard), StartError> {
    let Assembled { mut node, applier, handle } = assemble(config, state_machine, store, transport)?;
    let applier = Arc::new(Mutex::new(applier));
    node.applier = Some(Arc::clone(&applier) as Arc<dyn ApplyHere>);
    let (shared, writes, apply) = (Arc::clone(&node.shared), Arc::clone(&node.writes), Arc::clone(&node.apply));
    let (log, handler) = (Arc::clone(&node.log), node.config.fault_handler.clone());
    let supervisor = Supervisor {
        shared: Arc::clone(&shared),
        writes: Arc::clone(&writes),
        apply: Arc::clone(&apply),
        handler: handler.unwrap_or_else(|| Arc::new(abort)),
    };
    let mut guard = JoinGuard { stop: None, threads: Vec::new() };
    let stop = Arc::clone(&supervisor.shared);
    guard.stop = Some(Box::new(move || stop.request_stop()));
    let events = shared.events.clone();
    guard.threads.push(supervisor.spawn("raft-apply", move || {
        apply::run(&applier, |progress| {
            // Raft's thread never waits for this one. It is gone only when the member stops.
            let _ = events.send(progress.into());
        })
    })?);
    let events = shared.events.clone();
    guard.threads.push(supervisor.spawn("raft-log", move || {
        writer::run(&writes, &log, &shared.metrics, |written| match written {
            Written::Ready(number) => drop(events.send(Event::Persisted(number))),
            Written::Install(install) => apply.install(install),
        })
    })?);
    // Last: it is the one that ends the others.
    let end = supervisor.clone();
    guard.threads.push(supervisor.spawn("raft", move || {
        let result = node.run();
        end.stop_others();
        result
    })?);
    Ok((handle, guard))
}

/// A member without its threads.
pub(crate) struct Assembled<S: StateMachine> {
    pub(crate) node: Node<S::Reply>,
    pub(crate) applier: Applier<S>,
    pub(crate) handle: Handle<S::Reply>,
}

/// Reads the log and puts a member together; nothing runs yet.
///
/// # Errors
/// As [`start`].
pub(crate) fn assemble<S: StateMachine>(
    config: Config,
    state_machine: S,
    store: Arc<dyn LogStore>,
    transport: impl Transport + 'static,
) -> Result<Assembled<S>, StartError> {
    config.validate()?;
    let durable = state_machine.durable_index()?;
    prepare_snapshot_dir(&config.snapshot_dir)?;
    let (recovered, applied) = recover(&config, &*store, state_machine.applied_index())?;
    assert!(durable <= applied, "durable is not ahead of applied");
    let conf = recovered.conf.clone();
    let log = Arc::new(Log::new(store, recovered, config.log_cache_bytes_max, config.log_bytes_flush / 16));
    let storage = RaftStorage(Arc::clone(&log));
    let last_index = log.last_index();
    let last_term = log.term_at(last_index)?;
    // Of several survivors of a lost majority, the one with the highest of these is to go on.
    tracing::info!(last_term, last_index, applied_index = applied, voters = ?conf.state.voters, "what the log holds");
    let raw = RawNode::new(&raft_config(&config, applied), storage, &logger::to_tracing())
        .map_err(|error| StartError::Raft(error.to_string()))?;

    let (event_sender, events) = events::queue(config.event_queue_max);
    let lanes = Lanes::new(config.lane_queue_bytes_max, config.queue_bytes_max);
    let life = if config.life == 0 { random_u64() | 1 } else { config.life };
    let sender = transport.sender();
    let shared = Arc::new(Shared {
        id: config.id,
        queue: Mutex::new(ProposalQueue { lanes, rung: false }),
        life,
        outgoing: Arc::clone(&log.outgoing),
        waiting: Waiting::new(),
        reads: Mutex::new(ReadRounds::new(config.id, life, config.read_timeout_ticks, sender.is_some())),
        sender,
        read_waiters: AtomicU64::new(0),
        status: StatusCells {
            applied_index: AtomicU64::new(applied),
            durable_index: AtomicU64::new(durable),
            ..StatusCells::default()
        },
        members: RwLock::new(Arc::from(Vec::new())),
        progress: RwLock::new(Arc::from(Vec::new())),
        removed: watch::Sender::new(false),
        leadership: watch::Sender::new(Leadership::default()),
        metrics: Arc::default(),
        events: event_sender,
        stopping: AtomicBool::new(false),
        faulted: AtomicBool::new(false),
        replies: Replies::on(config.reply_runtime.as_ref()).map_err(Fault::from)?,
    });
    let writes = Arc::new(WriteQueue::default());
    let apply = Arc::new(ApplySignal::default());
    let limits = Limits {
        command_bytes_max: config.command_bytes_max,
        cost_bytes: config.cost_bytes,
        batch_bytes_max: config.batch_bytes_max,
        read_waiters_max: config.read_waiters_max as u64,
    };
    let mut node = Node {
        raw,
        shared: Arc::clone(&shared),
        log: Arc::clone(&log),
        writes: Arc::clone(&writes),
        apply: Arc::clone(&apply),
        applier: None,
        transport: Box::new(transport),
        read_role: ReadRoleOf::default(),
        outgoing: Vec::new(),
        events,
        next_tick: Instant::now() + Duration::from_millis(config.tick_ms),
        underway: Default::default(),
        outbox: Default::default(),
        unsaved: LogWrite::default(),
        conf: Conf::default(),
        read_floor: None,
        again: false,
        sending: Sending::default(),
        intakes: Intakes::default(),
        leads_term: None,
        told_committed: 0,
        disk: DiskWatch::default(),
        snapshots: Snapshots {
            snapshotter: state_machine.snapshotter(),
            making: false,
            made: 0,
            idle_ticks: 0,
            offer_ticks: 0,
            fetching: None,
            part: None,
            fetched: None,
            installing: None,
        },
        config: config.clone(),
    };
    node.set_conf(conf);
    let applier = Applier {
        state_machine,
        log: Arc::clone(&log),
        shared: Arc::clone(&shared),
        signal: Arc::clone(&apply),
        apply_bytes_max: config.apply_bytes_max as u64,
        log_bytes_flush: config.log_bytes_flush,
        flush_entries: config.flush_entries,
        slow_apply: config.slow_apply,
        flush_on_stop: config.flush_on_stop,
        probed_bytes: 0,
        flushed_at: 0,
        term: 0,
    };
    Ok(Assembled { node, applier, handle: Handle::new(shared, limits) })
}

fn prepare_snapshot_dir(dir: &Path) -> Result<(), Fault> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    Ok(std::fs::create_dir_all(dir)?)
}

/// What the log and the state say, brought together: what raft starts from, and which index is applied.
fn recover(config: &Config, store: &dyn LogStore, state_applied: u64) -> Result<(Recovered, u64), StartError> {
    let mut recovered = store.recover()?;
    if recovered.member_id.is_none() {
        let mut state = ConfState::default();
        state.voters.clone_from(&config.initial_voters);
        let joins = config.initial_voters.is_empty();
        let at = if joins { Position::default() } else { Position { index: BOOTSTRAP_INDEX, term: 1 } };
        store.bootstrap(config.id, at, &Conf { index: at.index, state })?;
        recovered = store.recover()?;
    }
    let found = recovered.member_id.expect("bootstrapped");
    if found != config.id {
        return Err(StartError::OtherMember { found, expected: config.id });
    }
    if let Some((at, conf)) = recovered.installing.take() {
        // The state was switched before the crash, or it was not.
        if state_applied >= at.index {
            store.finish_install(at, &conf)?;
        } else {
            store.cancel_install()?;
        }
        recovered = store.recover()?;
    }
    if config.force_sole_voter {
        recovered.conf = go_alone(config.id, store, &recovered)?;
    }
    // There is no entry before it, so the empty state has applied it; but a member that joins does not even have that.
    let applied = state_applied.max(recovered.truncated.index.min(BOOTSTRAP_INDEX));
    let first = recovered.truncated.index + 1;
    if applied + 1 < first {
        return Err(StartError::StateBehindLog { applied, first });
    }
    if applied > recovered.last_index {
        return Err(StartError::LogBehindState { applied, last: recovered.last_index });
    }
    // The commit index is saved with the next write, so it may lag behind; what is applied was committed, and so was the change of members
    // that the log has a record of. To commit that one again could take a voter that it brought, which for want of a snapshot could not answer:
    // one is made of a state that knows of the change.
    let committed = recovered.hard_state.commit.max(recovered.conf.index);
    if committed > recovered.last_index {
        return Err(StartError::Fault(Fault::Corrupt { what: "commit index beyond the raft log", key: Vec::new() }));
    }
    recovered.hard_state.commit = committed.max(applied);
    Ok((recovered, applied))
}

/// Writes down that the member is the only voter from its newest entry on: changes of members in entries up to there are not
/// made when they are applied.
fn go_alone(id: u64, store: &dyn LogStore, recovered: &Recovered) -> Result<Conf, StartError> {
    let before = &recovered.conf.state;
    let groups = [&before.voters, &before.voters_outgoing, &before.learners, &before.learners_next];
    if !groups.iter().any(|group| group.contains(&id)) {
        return Err(StartError::NotAMember);
    }
    let state = ConfState { voters: vec![id], ..ConfState::default() };
    let conf = Conf { index: recovered.last_index, state };
    tracing::warn!(?before, at = conf.index, "go on as the only voter");
    store.append(&LogWrite { conf: Some(conf.clone()), ..LogWrite::default() })?;
    Ok(conf)
}

fn raft_config(config: &Config, applied: u64) -> raft::Config {
    raft::Config {
        id: config.id,
        election_tick: config.election_timeout_ticks,
        heartbeat_tick: config.heartbeat_timeout_ticks,
        applied,
        max_size_per_msg: config.message_bytes_max,
        max_inflight_msgs: config.inflight_messages_max,
        max_committed_size_per_ready: config.apply_bytes_max as u64,
        pre_vote: config.pre_vote,
        check_quorum: true,
        // We do it: see `Node::tell_commit`.
        skip_bcast_commit: true,
        min_election_tick: config.election_timeout_ticks + 1,
        max_election_tick: config.election_timeout_ticks + 1 + config.election_jitter_ticks,
        ..raft::Config::default()
    }
}

/// From the standard library's hash seeds: enough to tell two lives of a member apart.
fn random_u64() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

/// Starts threads and ends all of them when one fails.
struct Supervisor<R> {
    shared: Arc<Shared<R>>,
    writes: Arc<WriteQueue>,
    apply: Arc<ApplySignal>,
    handler: FaultHandler,
}

impl<R> Clone for Supervisor<R> {
    fn clone(&self) -> Self {
        Supervisor {
            shared: Arc::clone(&self.shared),
            writes: Arc::clone(&self.writes),
            apply: Arc::clone(&self.apply),
            handler: Arc::clone(&self.handler),
        }
    }
}

impl<R: Send + 'static> Supervisor<R> {
    fn spawn(
        &self,
        name: &'static str,
        run: impl FnOnce() -> Result<(), Fault> + Send + 'static,
    ) -> Result<JoinHandle<()>, StartError> {
        let supervisor = self.clone();
        let body = move || {
            let cause = match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(())) => return,
                Ok(Err(fault)) => fault.to_string(),
                Err(panic) => panic_message(&*panic),
            };
            supervisor.fail(&MemberFault { thread: name, cause });
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| {
            self.stop_others();
            StartError::Thread(error)
        })
    }

    fn fail(&self, fault: &MemberFault) {
        // One fault is enough: the others follow from it.
        if !self.shared.faulted.swap(true, Ordering::AcqRel) {
            (self.handler)(fault);
        }
        self.shared.request_stop();
        self.stop_others();
    }

    /// The log thread writes what it was given, the apply thread finishes its round; nobody waits any longer.
    fn stop_others(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.writes.stop();
        self.apply.stop();
        self.shared.close();
    }
}

fn abort(fault: &MemberFault) {
    tracing::error!(thread = fault.thread, cause = fault.cause, "stop the member: it cannot keep its promises");
    std::process::abort();
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic without a message".to_owned())
}

/// Ends the member when dropped, and waits until its threads are gone: after that the log and the state are released.
pub struct JoinGuard {
    stop: Option<Box<dyn FnOnce() + Send>>,
    threads: Vec<JoinHandle<()>>,
}

impl JoinGuard {
    /// Stops the member and waits for it.
    pub fn stop(self) {
        drop(self);
    }

    /// Waits until the member stops by itself: a handle's `request_stop`, or a fault whose handler returned.
    pub fn wait(mut self) {
        self.stop = None;
    }
}

impl Drop for JoinGuard {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop();
        }
        for thread in self.threads.drain(..) {
            // A panic was caught inside; this fails only if the fault handler panicked.
            let _ = thread.join();
        }
    }
}
