//! The whole store in one object: data directory, engine, raft log, lease timing, reclaiming, reading threads.
//!
//! A [`Cell`] is one member of one raft group that holds many tenants. Everything that serves clients (gRPC, HTTP, the
//! in-process client) gets a [`Tenant`] from it and nothing else; a `Tenant` reaches its own data only.
//!
//! Life of a write: [`Tenant::propose`] wraps the command with the tenant's id, raft-server makes it part of a log entry, the
//! apply thread runs it, the outcome comes back. Life of a read: [`Tenant::read_barrier`] waits until this member has applied
//! whatever was acknowledged before, then [`Tenant::reader`] (small reads, on the caller's thread) or [`Tenant::read`] (on
//! the reading threads) looks at one point in time.
//!
//! Three tasks run beside that, all of them only on the leader: one follows leadership and tells the [`Lessor`], one proposes
//! the revokes of expired leases, one proposes the steps that give back compacted space ([`crate::reclaim`]).
//!
//! What must hold: leases stored on disk are known to the lessor before the log goes on being applied, so that no grant or
//! revoke passes it by; and a [`Fault`] ends the member: nothing is applied after it, [`Cell::failed`] tells the
//! program, which stops. The layout of the data directory is described in [`crate::data_dir`].

mod tenant;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use tenure_raft_server as raft;
use tenure_storage::limits::TENANT_NAME_BYTES_MAX;
use tenure_storage::{
    Command, Envelope, Fault, LeaseId, Observer, Outcome, Refusal, RocksEngine, RocksOptions, StateMachine, Store,
    TenantId, TenantReader,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::cell_error::CellError;
use crate::data_dir::{DataDir, DataDirError, Identity};
use crate::ids;
use crate::lessor::{self, Lessor};
use crate::read_pool::ReadPool;
use crate::reclaim::Reclaimer;

pub use self::tenant::{Granted, Tenant};

/// The tenant of a client that says nothing.
pub const DEFAULT_TENANT: &str = "default";

/// Bytes a tenant may hold if the configuration says 0: etcd's default.
pub const QUOTA_BYTES_DEFAULT: i64 = 2 << 30;

/// What etcd adds to two election timeouts to get the time a request may take.
const REQUEST_TIMEOUT_BASE: Duration = Duration::from_secs(5);

/// Longest time to replay the log and elect a leader at start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Revokes of expired leases proposed at the same time. The rest of a poll waits.
const REVOKES_IN_FLIGHT_MAX: usize = 256;

/// The lane of commands that belong to no tenant.
const CELL_LANE: u32 = 0;

/// How a cell is opened.
#[derive(Clone, Debug)]
pub struct CellConfig {
    pub data_dir: PathBuf,
    /// Only for the ids of a new data directory, see [`crate::ids`].
    pub peer_urls: Vec<String>,
    pub cluster_token: String,
    /// Bytes each tenant may hold: 0 = [`QUOTA_BYTES_DEFAULT`], negative = no limit.
    pub quota_backend_bytes: i64,
    /// Made to exist, beside [`DEFAULT_TENANT`].
    pub tenants: Vec<String>,
    pub heartbeat_interval: Duration,
    /// Also decides the shortest lease and how long a request may take.
    pub election_timeout: Duration,
    pub engine: RocksOptions,
}

impl CellConfig {
    /// etcd's defaults, in this directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        CellConfig {
            data_dir: data_dir.into(),
            peer_urls: vec![ids::PEER_URL_DEFAULT.to_string()],
            cluster_token: ids::CLUSTER_TOKEN_DEFAULT.to_string(),
            quota_backend_bytes: 0,
            tenants: Vec::new(),
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_secs(1),
            engine: RocksOptions::default(),
        }
    }
}

/// Why a cell could not be opened. Each is one clear line.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("open the state: {0}")]
    State(#[from] Fault),
    #[error("start replication: {0}")]
    Raft(#[from] raft::StartError),
    #[error("start threads: {0}")]
    Threads(std::io::Error),
    #[error(transparent)]
    Tenant(#[from] CreateTenantError),
    #[error("set up the cell: {0}")]
    SetUp(CellError),
    /// The log could not be applied.
    #[error("replay the log: {0}")]
    Failed(Arc<str>),
    #[error("no leader within {} s", START_TIMEOUT.as_secs())]
    NoLeader,
}

/// Why a tenant could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateTenantError {
    #[error(transparent)]
    Name(#[from] InvalidTenantName),
    #[error("create tenant: {0}")]
    Cell(#[from] CellError),
}

/// A tenant's name is a DNS label, so that it can be part of a host name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid tenant name {0:?}: want 1 to {TENANT_NAME_BYTES_MAX} of a-z, 0-9 and inner hyphens")]
pub struct InvalidTenantName(pub String);

/// Checks a tenant's name.
///
/// # Errors
/// [`InvalidTenantName`].
pub fn check_tenant_name(name: &str) -> Result<(), InvalidTenantName> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let hyphen_outside = name.starts_with('-') || name.ends_with('-');
    if name.is_empty() || name.len() > TENANT_NAME_BYTES_MAX || hyphen_outside || !name.bytes().all(allowed) {
        return Err(InvalidTenantName(name.to_string()));
    }
    Ok(())
}

/// One member. Cheap to clone. Its data directory is free again when [`Cell::stop`] has returned and all clones, tenants
/// and clients of it are dropped.
#[derive(Clone)]
pub struct Cell(Arc<Inner>);

struct Inner {
    // Dropped in this order: the directory's lock goes last, when nothing of ours has a file in it open.
    server: Mutex<Option<raft::JoinGuard>>,
    raft: raft::Handle<Outcome>,
    leadership: watch::Receiver<raft::Leadership>,
    read_pool: ReadPool,
    tasks: Mutex<JoinSet<()>>,
    store: Store<RocksEngine>,
    lessor: Arc<Lessor>,
    /// What of a tenant does not change, looked up by every request. Filled on first use.
    tenants: RwLock<HashMap<String, Arc<TenantParts>>>,
    defragment: Defragment,
    failure: Failure,
    request_timeout: Duration,
    election_timeout: Duration,
    data_dir: DataDir,
}

/// Why this member cannot go on, once it cannot.
#[derive(Clone)]
struct Failure(Arc<watch::Sender<Option<Arc<str>>>>);

struct TenantParts {
    name: String,
    cluster_id: u64,
    reader: TenantReader<RocksEngine>,
}

/// Engine compactions go one after the other; who comes while one waits shares that one's.
#[derive(Default)]
struct Defragment {
    running: tokio::sync::Mutex<()>,
    begun: AtomicU64,
}

/// What raft-server drives.
struct Applier(StateMachine<RocksEngine>);

/// What storage tells while it applies.
struct Watcher {
    lessor: Arc<Lessor>,
    reclaimer: Arc<Reclaimer>,
}

impl Observer for Watcher {
    fn lease_granted(&self, tenant: TenantId, id: LeaseId, ttl_seconds: i64) {
        self.lessor.granted(tenant, id, ttl_seconds);
    }

    fn lease_revoked(&self, tenant: TenantId, id: LeaseId) {
        self.lessor.revoked(tenant, id);
    }

    fn reclaim_pending(&self, tenant: TenantId) {
        self.reclaimer.add(tenant);
    }
}

impl raft::StateMachine for Applier {
    type Reply = Outcome;

    fn applied_index(&self) -> u64 {
        self.0.applied_index()
    }

    fn apply(&mut self, entries: Vec<raft::CommittedEntry>) -> Result<Vec<Vec<Outcome>>, Fault> {
        self.0.apply(entries.into_iter().map(|entry| (entry.index, entry.commands)).collect())
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        self.0.durable_index()
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        self.0.flush()
    }

    fn begin_flush(&mut self) -> Result<(), Fault> {
        self.0.begin_flush()
    }
}

impl Cell {
    /// Opens or makes the cell in its data directory, and waits until it leads and has replayed its log.
    ///
    /// Must be called in a tokio runtime; the cell's tasks run there.
    ///
    /// # Errors
    /// [`OpenError`]. The directory is released again.
    pub async fn open(config: CellConfig) -> Result<Cell, OpenError> {
        for name in &config.tenants {
            check_tenant_name(name).map_err(CreateTenantError::from)?;
        }
        let for_open = config.clone();
        // Reads the disk.
        let opened = tokio::task::spawn_blocking(move || Inner::open(&for_open)).await;
        let (cell, reclaimer) = opened.map_err(|_| OpenError::SetUp(CellError::Stopped))??;
        cell.start_tasks(reclaimer);
        let set_up = tokio::select! {
            set_up = cell.set_up(&config) => set_up,
            cause = cell.failed() => Err(OpenError::Failed(cause)),
            () = tokio::time::sleep(START_TIMEOUT) => Err(OpenError::NoLeader),
        };
        match set_up {
            Ok(()) => Ok(cell),
            Err(error) => {
                cell.stop().await;
                Err(error)
            }
        }
    }

    fn start_tasks(&self, reclaimer: Arc<Reclaimer>) {
        let mut tasks = self.0.tasks.lock();
        tasks.spawn(follow_leadership(Arc::downgrade(&self.0), self.0.leadership.clone()));
        tasks.spawn(revoke_expired(Arc::downgrade(&self.0)));
        let cell = Arc::downgrade(&self.0);
        tasks.spawn(async move {
            reclaimer
                .run(async move |tenant, command| match cell.upgrade() {
                    Some(cell) => cell.propose(tenant, command).await?.result.map_err(CellError::from),
                    None => Err(CellError::Stopped),
                })
                .await;
        });
    }

    /// Waits for the log, then brings what the cell holds in line with its configuration.
    async fn set_up(&self, config: &CellConfig) -> Result<(), OpenError> {
        // A long log takes longer to replay than a request may.
        while let Err(error) = self.0.read_barrier().await {
            if !matches!(error, CellError::TimeoutRead) {
                return Err(OpenError::SetUp(error));
            }
        }
        let quota_bytes = match config.quota_backend_bytes {
            0 => QUOTA_BYTES_DEFAULT,
            given => given,
        };
        if self.0.store.quota_bytes() != quota_bytes {
            let configured = self.0.propose(TenantId(0), Command::Configure { quota_bytes }).await;
            configured.map_err(OpenError::SetUp)?;
        }
        for name in [DEFAULT_TENANT].into_iter().chain(config.tenants.iter().map(String::as_str)) {
            self.create_tenant(name).await?;
        }
        Ok(())
    }

    /// The tenant of that name, if there is one.
    pub fn tenant(&self, name: &str) -> Option<Tenant> {
        if let Some(parts) = self.0.tenants.read().get(name) {
            return Some(Tenant { cell: Arc::clone(&self.0), parts: Arc::clone(parts) });
        }
        let id = self.0.store.tenant_id(name)?;
        let parts = Arc::new(TenantParts {
            name: name.to_string(),
            cluster_id: self.0.cluster_id_of(id, name),
            reader: self.0.store.reader(id)?,
        });
        self.0.tenants.write().insert(name.to_string(), Arc::clone(&parts));
        Some(Tenant { cell: Arc::clone(&self.0), parts })
    }

    /// Makes a tenant, or finds the one that is there.
    ///
    /// # Errors
    /// [`CreateTenantError`]; [`Refusal::TooManyTenants`] at the cell's bound.
    pub async fn create_tenant(&self, name: &str) -> Result<Tenant, CreateTenantError> {
        check_tenant_name(name)?;
        if let Some(tenant) = self.tenant(name) {
            return Ok(tenant);
        }
        let command = Command::CreateTenant { name: name.to_string() };
        self.0.propose(TenantId(0), command).await?.result.map_err(CellError::from)?;
        // Storage publishes a tenant before it answers.
        self.tenant(name).ok_or_else(|| CellError::from(Refusal::TenantNotFound).into())
    }

    /// Names of all tenants, in the order they were made.
    pub fn tenant_names(&self) -> Vec<String> {
        self.0.store.tenants().into_iter().map(|(_, name)| name).collect()
    }

    pub fn member_id(&self) -> u64 {
        self.0.identity().member_id
    }

    pub fn cluster_id(&self) -> u64 {
        self.0.identity().cluster_id
    }

    /// The member that leads, as this one knows it; 0 = none.
    pub fn leader_id(&self) -> u64 {
        self.0.leader_id()
    }

    pub fn raft_term(&self) -> u64 {
        self.0.raft.status().term
    }

    /// Where the log stands, for metrics.
    pub fn raft_status(&self) -> raft::Status {
        self.0.raft.status()
    }

    /// What raft-server counts, for metrics.
    pub fn raft_metrics(&self) -> &raft::Metrics {
        self.0.raft.metrics()
    }

    /// The read side of all tenants, for metrics.
    pub fn store(&self) -> &Store<RocksEngine> {
        &self.0.store
    }

    /// Waits until this member cannot go on, and answers why. The program should say so and end: after a fault, nothing
    /// is applied any more.
    pub async fn failed(&self) -> Arc<str> {
        let mut failure = self.0.failure.0.subscribe();
        loop {
            if let Some(cause) = failure.borrow_and_update().clone() {
                return cause;
            }
            if failure.changed().await.is_err() {
                // The sender lives in the cell, which `self` keeps.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends the tasks and the raft server, with everything applied flushed to disk. Requests that come in from now on
    /// answer [`CellError::Stopped`].
    pub async fn stop(&self) {
        self.0.tasks.lock().abort_all();
        let server = self.0.server.lock().take();
        if let Some(server) = server {
            // It joins threads.
            if let Err(error) = tokio::task::spawn_blocking(move || server.stop()).await {
                tracing::error!(%error, "stop the raft server");
            }
        }
    }
}

impl Inner {
    fn open(config: &CellConfig) -> Result<(Cell, Arc<Reclaimer>), OpenError> {
        let member_id = ids::member_id(&config.peer_urls, &config.cluster_token);
        let first = Identity { member_id, cluster_id: ids::cluster_id(&[member_id]) };
        let data_dir = DataDir::open(&config.data_dir, first)?;
        let identity = data_dir.identity();
        let engine = Arc::new(RocksEngine::open(&data_dir.state(), &config.engine)?);
        let lessor = Arc::new(Lessor::new(config.election_timeout));
        let reclaimer = Arc::new(Reclaimer::default());
        let observer = Watcher { lessor: Arc::clone(&lessor), reclaimer: Arc::clone(&reclaimer) };
        let state = StateMachine::open(engine, Arc::new(observer))?;
        let store = state.store();
        load_leases(&store, &lessor)?;
        let failure = Failure(Arc::new(watch::Sender::new(None)));
        let raft_config = raft_config(config, identity, data_dir.log(), failure.clone())?;
        let (raft, server) = raft::start(raft_config, Applier(state), raft::NoPeers)?;
        let inner = Inner {
            server: Mutex::new(Some(server)),
            leadership: raft.leadership(),
            raft,
            read_pool: ReadPool::for_this_machine().map_err(OpenError::Threads)?,
            tasks: Mutex::new(JoinSet::new()),
            store,
            lessor,
            tenants: RwLock::default(),
            defragment: Defragment::default(),
            failure,
            request_timeout: request_timeout(config),
            election_timeout: config.election_timeout,
            data_dir,
        };
        Ok((Cell(Arc::new(inner)), reclaimer))
    }

    fn identity(&self) -> Identity {
        self.data_dir.identity()
    }

    fn leader_id(&self) -> u64 {
        self.raft.status().leader_id
    }

    /// The default tenant is what a single etcd of this configuration would be.
    fn cluster_id_of(&self, tenant: TenantId, name: &str) -> u64 {
        let cluster_id = self.identity().cluster_id;
        if name == DEFAULT_TENANT { cluster_id } else { ids::tenant_cluster_id(cluster_id, tenant) }
    }

    async fn propose(&self, tenant: TenantId, command: Command) -> Result<Outcome, CellError> {
        let lane = match &command {
            Command::CreateTenant { .. } | Command::Configure { .. } => CELL_LANE,
            Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact { .. }
            | Command::Reclaim { .. }
            | Command::LeaseGrant { .. }
            | Command::LeaseRevoke { .. }
            | Command::Alarm { .. } => tenant.0,
        };
        let envelope = Envelope { tenant, member_id: self.identity().member_id, command }.encode();
        let deadline = Instant::now() + self.request_timeout;
        let written = timeout_at(deadline, self.propose_when_led(lane, envelope)).await;
        written.unwrap_or(Err(CellError::TimeoutWrite))
    }

    /// As in etcd, a write without a leader waits for one, as long as it may.
    async fn propose_when_led(&self, lane: u32, envelope: Bytes) -> Result<Outcome, CellError> {
        loop {
            match self.raft.propose(lane, envelope.clone()).await {
                Ok(outcome) => return Ok(outcome),
                Err(raft::ProposeError::NotLeader { .. }) => self.wait_for_leadership().await?,
                Err(raft::ProposeError::QueueFull) => return Err(CellError::TooManyRequests),
                Err(raft::ProposeError::TooLarge) => return Err(CellError::TooLarge),
                Err(raft::ProposeError::Dropped) => return Err(CellError::LeaderChanged),
                Err(raft::ProposeError::Stopped) => return Err(CellError::Stopped),
            }
        }
    }

    async fn wait_for_leadership(&self) -> Result<(), CellError> {
        let mut leadership = self.leadership.clone();
        leadership.wait_for(|now| now.is_leader).await.map(|_| ()).map_err(|_| CellError::Stopped)
    }

    async fn read_barrier(&self) -> Result<(), CellError> {
        // The only voter knows without asking: spare the timer.
        if self.raft.read_point_now().is_some() {
            return Ok(());
        }
        let deadline = Instant::now() + self.request_timeout;
        match timeout_at(deadline, self.raft.read_barrier()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(raft::ReadError::Timeout)) | Err(_) => Err(CellError::TimeoutRead),
            Ok(Err(raft::ReadError::QueueFull)) => Err(CellError::TooManyRequests),
            Ok(Err(raft::ReadError::Stopped)) => Err(CellError::Stopped),
        }
    }

    fn report(&self, fault: Fault) -> CellError {
        self.failure.report(&fault.to_string());
        fault.into()
    }

    async fn defragment(&self) -> Result<(), CellError> {
        let arrived = self.defragment.begun.load(Ordering::Acquire);
        let _running = self.defragment.running.lock().await;
        if self.defragment.begun.load(Ordering::Acquire) > arrived {
            return Ok(());
        }
        self.defragment.begun.fetch_add(1, Ordering::AcqRel);
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || store.compact_engine()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(fault)) => Err(self.report(fault)),
            Err(_) => Err(CellError::Stopped),
        }
    }
}

impl Failure {
    /// The first cause is the one to tell of.
    fn report(&self, cause: &str) {
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert_with(|| Arc::from(cause));
            is_first
        });
    }
}

/// raft-server's configuration for a cell of one voter. A read waits as long as a request may.
fn raft_config(
    config: &CellConfig,
    identity: Identity,
    log_dir: PathBuf,
    failure: Failure,
) -> Result<raft::Config, OpenError> {
    let tick_ms = u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX).max(1);
    let ticks = |duration: Duration| {
        let ticks = duration.as_millis().div_ceil(u128::from(tick_ms));
        usize::try_from(ticks).map_err(|_| raft::StartError::Config(format!("{duration:?} is too long")))
    };
    Ok(raft::Config {
        tick_ms,
        election_timeout_ticks: ticks(config.election_timeout)?,
        read_timeout_ticks: ticks(request_timeout(config))?,
        reply_runtime: tokio::runtime::Handle::try_current().ok(),
        fault_handler: Some(Arc::new(move |fault| failure.report(&format!("{}: {}", fault.thread, fault.cause)))),
        ..raft::Config::new(identity.member_id, log_dir)
    })
}

/// How long a request may take: etcd's own formula.
fn request_timeout(config: &CellConfig) -> Duration {
    REQUEST_TIMEOUT_BASE + 2 * config.election_timeout
}

/// Tells the lessor of the leases on disk. Only tenants that have some are read.
fn load_leases(store: &Store<RocksEngine>, lessor: &Lessor) -> Result<(), Fault> {
    for (tenant, _) in store.tenants() {
        let Some(reader) = store.reader(tenant) else { continue };
        if reader.state().usage.leases > 0 {
            for (id, ttl_seconds) in reader.leases()? {
                lessor.granted(tenant, id, ttl_seconds);
            }
        }
    }
    Ok(())
}

async fn follow_leadership(cell: Weak<Inner>, mut leadership: watch::Receiver<raft::Leadership>) {
    let mut led_term = None;
    loop {
        let now = *leadership.borrow_and_update();
        let leads_term = now.is_leader.then_some(now.term);
        if leads_term != led_term {
            let Some(cell) = cell.upgrade() else { return };
            match leads_term {
                // Only what is applied can expire; wait until that is everything of earlier terms.
                Some(term) => match cell.read_barrier().await {
                    Ok(()) => {
                        tracing::info!(term, "lead");
                        cell.lessor.promote();
                    }
                    Err(CellError::Stopped) => return,
                    // Not the leader any more, or too busy to tell: look again.
                    Err(error) => {
                        tracing::debug!(term, %error, "wait for the log before leading");
                        tokio::time::sleep(lessor::POLL_PERIOD).await;
                        continue;
                    }
                },
                None => cell.lessor.demote(),
            }
            led_term = leads_term;
        }
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

async fn revoke_expired(cell: Weak<Inner>) {
    let mut poll = tokio::time::interval(lessor::POLL_PERIOD);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        poll.tick().await;
        let Some(cell) = cell.upgrade() else { return };
        let cell = &cell;
        futures::stream::iter(cell.lessor.take_expired())
            .for_each_concurrent(REVOKES_IN_FLIGHT_MAX, |(tenant, id)| async move {
                match cell.propose(tenant, Command::LeaseRevoke { id }).await {
                    // A client may have revoked it first.
                    Ok(Outcome { result: Ok(_) | Err(Refusal::LeaseNotFound(_)), .. }) => {}
                    Ok(Outcome { result: Err(refusal), .. }) => {
                        tracing::warn!(%tenant, lease = %id, %refusal, "revoke an expired lease");
                    }
                    Err(error) => tracing::debug!(%tenant, lease = %id, %error, "revoke an expired lease"),
                }
            })
            .await;
    }
}

#[cfg(test)]
mod tests;
