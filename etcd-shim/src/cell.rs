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
//! Tasks run beside that. Some have something to do only on the leader: they follow leadership and tell the [`Lessor`], and propose the
//! revokes of expired leases, the steps that give back compacted space ([`crate::reclaim`]), old revisions' compaction
//! ([`crate::auto_compaction`]) and newer rules (`cell/rules.rs`). The others look at the disk ([`crate::disk`]), deliver events to very many
//! watchers ([`crate::delivery`]) and give back the space of deleted tenants (`cell/tenants.rs`).
//!
//! What must hold: leases stored on disk are known to the lessor before the log goes on being applied, so that no grant or
//! revoke passes it by; and a [`Fault`] ends the member: nothing is applied after it, [`Cell::failed`] tells the
//! program, which stops. The layout of the data directory is described in [`crate::data_dir`].

mod bootstrap;
mod members;
mod rules;
mod tenant;
mod tenants;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use tenure_raft_server as raft;
use tenure_raft_server::transport::peers::{PeerIdentity, PeerStats, PeerTls, Peers, PeersConfig};
pub use tenure_storage::apply::QUOTA_BYTES_DEFAULT;
use tenure_storage::limits::TENANT_NAME_BYTES_MAX;
use tenure_storage::{
    Command, Copier, Envelope, Fault, Labels, LeaseId, MembersCommand, Membership, Observer, Outcome, Refusal,
    RocksEngine, RocksOptions, StateMachine, Store, TenantChange, TenantId, TenantLimits, TenantPhase, TenantReader,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::auto_compaction::{AutoCompaction, AutoCompactor, Seen};
use crate::cell_error::CellError;
use crate::data_dir::{DataDir, DataDirError, First, Identity};
use crate::delivery::Deliveries;
use crate::disk::{self, Disk};
use crate::ids;
use crate::inflight::{Budget, InFlight, OpenRequests, Reservation};
use crate::lessor::{self, Lessor};
use crate::read_pool::ReadPool;
use crate::reclaim::Reclaimer;
use crate::turns::Turns;

use self::bootstrap::Beginning;
pub use self::bootstrap::{BootstrapError, ClusterState, InitialCluster};
pub use self::tenant::{Granted, Tenant};
pub(crate) use self::tenants::now_ms;
pub use self::tenants::{TenantUpdate, may_be_deleted};

/// The tenant of a client that says nothing.
pub const DEFAULT_TENANT: &str = "default";

/// What etcd adds to two election timeouts to get the time a request may take.
const REQUEST_TIMEOUT_BASE: Duration = Duration::from_secs(5);

/// How much longer than its time a read waits for raft's thread to say that there is no leader.
const READ_GRACE: Duration = Duration::from_secs(1);

/// Longest time to replay the log and elect a leader at start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Revokes of expired leases proposed at the same time. The rest of a poll waits.
const REVOKES_IN_FLIGHT_MAX: usize = 256;

/// How fast a copy of the state is sent to a member, so that it takes no more than a part of disk and link.
const SNAPSHOT_BYTES_PER_SECOND: u64 = 128 << 20;

/// How often a member that starts looks at what its peers say of it.
const LOOK_AT_PEERS_PERIOD: Duration = Duration::from_millis(100);

/// The lane of commands that belong to no tenant.
const CELL_LANE: u32 = 0;

/// How this member presents itself in a member list.
#[derive(Clone, Debug, Default)]
pub struct MemberNames {
    pub name: String,
    pub peer_urls: Vec<String>,
    /// Where clients whose certificate says whose they are connect, and those of `default`.
    pub client_urls: Vec<String>,
    /// The listeners of a tenant's own, by its name. Only these are told to its clients: behind any other URL they would be
    /// another tenant.
    pub tenant_client_urls: BTreeMap<String, Vec<String>>,
}

/// How a cell is opened.
#[derive(Clone, Debug)]
pub struct CellConfig {
    pub data_dir: PathBuf,
    /// What this member tells of itself. Its peer URLs also make the ids of a new data directory, see [`crate::ids`].
    pub names: MemberNames,
    /// Free bytes on the disk below which writes are refused; `None`: see [`crate::disk`].
    pub disk_reserve_bytes: Option<u64>,
    /// Whether this member goes on alone with what it has, and removes the others. Default false.
    pub force_new_cluster: bool,
    /// The members of a new cell, or of the one to join; empty: this one alone. Of no meaning once there is data.
    pub initial_cluster: InitialCluster,
    pub cluster_state: ClusterState,
    pub cluster_token: String,
    /// How other members are reached, where their URLs are `https`.
    pub peer_tls: Option<Arc<dyn PeerTls>>,
    /// Whether changes of members that endanger the quorum are refused. Default true.
    pub strict_reconfig_check: bool,
    /// Learners at a time. Default 1.
    pub max_learners: usize,
    /// Whether a member asks if it could win before it disturbs the others with an election. Default true.
    pub pre_vote: bool,
    /// An apply that takes longer is counted and logged. Default 100 ms.
    pub slow_apply: Duration,
    /// If not 0, the state is made durable after this many log entries, and not only for their bytes.
    pub snapshot_count: u64,
    /// Entries kept for members that are behind. Default 5,000.
    pub snapshot_catchup_entries: u64,
    /// Which revisions go without anybody's asking. Default: none.
    pub auto_compaction: Option<AutoCompaction>,
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
            names: MemberNames {
                name: "default".to_string(),
                peer_urls: vec![ids::PEER_URL_DEFAULT.to_string()],
                ..MemberNames::default()
            },
            disk_reserve_bytes: None,
            force_new_cluster: false,
            initial_cluster: Vec::new(),
            cluster_state: ClusterState::New,
            cluster_token: ids::CLUSTER_TOKEN_DEFAULT.to_string(),
            peer_tls: None,
            strict_reconfig_check: true,
            max_learners: 1,
            pre_vote: true,
            slow_apply: Duration::from_millis(100),
            snapshot_count: 0,
            snapshot_catchup_entries: 5_000,
            auto_compaction: None,
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
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    #[error("the member has been permanently removed from the cluster; its data directory must be removed")]
    Removed,
    /// Its data, its token or its peers are another cluster's.
    #[error("all other members are of another cluster than {0:x}, which the data directory belongs to")]
    OtherCluster(u64),
    #[error("look for room on the disk: {0}")]
    Disk(std::io::Error),
    #[error("start replication: {0}")]
    Raft(#[from] raft::StartError),
    #[error("start threads: {0}")]
    Threads(std::io::Error),
    #[error(transparent)]
    Tenant(#[from] CreateTenantError),
    #[error("set up the cell: {0}")]
    SetUp(CellError),
    /// A bug.
    #[error("open the cell: {0}")]
    Panicked(String),
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
    peers: Peers,
    changing_members: tokio::sync::Mutex<()>,
    strict_reconfig_check: bool,
    max_learners: usize,
    promotions: members::Promotions,
    raft: raft::Handle<Answer>,
    open_requests: OpenRequests,
    leadership: watch::Receiver<raft::Leadership>,
    read_pool: ReadPool,
    turns: Arc<Turns>,
    tasks: Mutex<JoinSet<()>>,
    store: Store<RocksEngine>,
    lessor: Arc<Lessor>,
    changes: Arc<tenants::Changes>,
    /// What of a tenant does not change, looked up by every request. Filled on first use.
    tenants: RwLock<HashMap<String, Arc<TenantParts>>>,
    defragment: Defragment,
    /// Read-locked by whoever rewrites the state's files.
    compacting: Arc<tokio::sync::RwLock<()>>,
    disk: Disk,
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
    read_ns: AtomicU64,
}

/// Engine compactions go one after the other; who comes while one waits shares that one's.
#[derive(Default)]
struct Defragment {
    running: tokio::sync::Mutex<()>,
    begun: AtomicU64,
}

/// What raft-server drives.
struct Applier {
    state_machine: StateMachine<RocksEngine>,
    undelivered: InFlight,
}

/// An outcome on its way to who waits for it.
struct Answer {
    outcome: Outcome,
    /// Counts it until it is fetched.
    _held: Reservation,
}

/// Work that apply leaves to tasks.
#[derive(Default)]
struct Background {
    reclaimer: Reclaimer,
    deliveries: Deliveries,
}

/// What storage tells while it applies.
struct Watcher {
    lessor: Arc<Lessor>,
    background: Arc<Background>,
    peers: Peers,
    changes: Arc<tenants::Changes>,
    /// Set when the state is open: what comes before that is read from it then.
    store: std::sync::OnceLock<Store<RocksEngine>>,
    failure: Failure,
}

impl Observer for Watcher {
    fn lease_granted(&self, tenant: TenantId, id: LeaseId, ttl_seconds: i64) {
        self.lessor.granted(tenant, id, ttl_seconds);
    }

    fn lease_revoked(&self, tenant: TenantId, id: LeaseId) {
        self.lessor.revoked(tenant, id);
    }

    fn reclaim_pending(&self, tenant: TenantId) {
        self.background.reclaimer.add(tenant);
    }

    fn reclaimed(&self, tenant: TenantId) {
        self.background.reclaimer.remove(tenant);
    }

    fn delivery_pending(&self, tenant: TenantId) {
        self.background.deliveries.add(tenant);
    }

    fn tenant_changed(&self, tenant: TenantId, change: TenantChange) {
        match change {
            TenantChange::Created => return self.changes.count_made(),
            TenantChange::Forgotten => {}
            TenantChange::Profile => self.follow_phase(tenant),
            TenantChange::Deleted => {
                self.lessor.forget(tenant);
                self.changes.deleted(tenant);
            }
        }
        self.changes.count();
    }

    fn members_changed(&self, membership: &Membership) {
        // An empty state knows nobody yet.
        if !membership.members.is_empty() {
            let members = membership.members.iter().map(|member| (member.id, member.peer_urls.clone()));
            self.peers.set_members(&members.collect::<Vec<_>>());
        }
    }

    fn state_replaced(&self) {
        let Some(store) = self.store.get() else { return };
        if let Err(fault) = load_leases(store, &self.lessor) {
            self.failure.report(&fault.to_string());
        }
        self.changes.count();
        self.changes.count_made();
    }
}

impl raft::StateMachine for Applier {
    type Reply = Answer;

    fn applied_index(&self) -> u64 {
        self.state_machine.applied_index()
    }

    /// Of outcomes that are not fetched as fast as they are made, so many are kept as others have room for in their budget of answers: a few
    /// bytes of a txn can answer megabytes.
    fn apply(&mut self, entries: Vec<raft::CommittedEntry>) -> Result<Vec<Vec<Option<Answer>>>, Fault> {
        let mut answers: Vec<Vec<Option<Answer>>> =
            entries.iter().map(|entry| Vec::with_capacity(entry.commands.len())).collect();
        let (wanted, entries): (Vec<_>, Vec<_>) =
            entries.into_iter().map(|entry| (entry.wanted, (entry.index, entry.commands))).unzip();
        let applied = self.state_machine.apply_round(&entries, |entry, place, tenant, outcome| {
            let is_wanted = wanted[entry].get(place).copied().unwrap_or(false);
            let held = if is_wanted { self.undelivered.hold(tenant, outcome.data_bytes()) } else { None };
            answers[entry].push(held.map(|held| Answer { outcome, _held: held }));
        })?;
        answers.truncate(applied);
        Ok(answers)
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        self.state_machine.durable_index()
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        self.state_machine.flush()
    }

    fn begin_flush(&mut self) -> Result<(), Fault> {
        self.state_machine.begin_flush()
    }

    fn snapshotter(&self) -> Arc<dyn raft::Snapshotter> {
        Arc::new(StateCopier(self.state_machine.copier()))
    }

    fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault> {
        self.state_machine.install(dir, index)
    }
}

struct StateCopier(Copier<RocksEngine>);

impl raft::Snapshotter for StateCopier {
    fn write_to(&self, dir: &Path) -> Result<u64, Fault> {
        self.0.write_to(dir)
    }
}

impl Cell {
    /// Opens or makes the cell in its data directory, and waits until it has a leader and this member has applied whatever was
    /// acknowledged before. Of several members that may take until enough of them are there; one alone does not wait
    /// for ever.
    ///
    /// Must be called in a tokio runtime; the cell's tasks run there.
    ///
    /// # Errors
    /// [`OpenError`]. The directory is released again.
    pub async fn open(config: CellConfig) -> Result<Cell, OpenError> {
        Cell::begin(config).await?.complete().await
    }

    /// As [`Cell::open`], up to where other members can be served: the first of several needs them to go on.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn begin(config: CellConfig) -> Result<Opening, OpenError> {
        for name in &config.tenants {
            check_tenant_name(name).map_err(CreateTenantError::from)?;
        }
        let beginning = bootstrap::beginning(&config, &config.peers(bootstrap::nobody())).await?;
        let for_open = config.clone();
        let runtime = tokio::runtime::Handle::current();
        // Reads the disk.
        let opened = tokio::task::spawn_blocking(move || Inner::open(&for_open, beginning, &runtime)).await;
        let (cell, background, bootstrap) = opened.map_err(|error| OpenError::Panicked(error.to_string()))??;
        cell.start_tasks(&background);
        if let Some(kept) = config.auto_compaction {
            cell.0.tasks.lock().spawn(compact_old(Arc::downgrade(&cell.0), kept));
        }
        Ok(Opening { cell, config, bootstrap })
    }

    fn start_tasks(&self, background: &Arc<Background>) {
        let mut tasks = self.0.tasks.lock();
        tasks.spawn(follow_leadership(Arc::downgrade(&self.0), self.0.leadership.clone()));
        tasks.spawn(revoke_expired(Arc::downgrade(&self.0)));
        tasks.spawn(rules::raise(Arc::downgrade(&self.0)));
        tasks.spawn(watch_disk(Arc::downgrade(&self.0)));
        tasks.spawn(tenants::clear(Arc::downgrade(&self.0), Arc::clone(&self.0.changes)));
        let (cell, of_cell) = (Arc::downgrade(&self.0), Arc::clone(background));
        tasks.spawn(async move {
            let deliver =
                |tenant, watchers_max| cell.upgrade().is_some_and(|cell| cell.store.deliver(tenant, watchers_max));
            of_cell.deliveries.run(deliver).await;
        });
        let (cell, of_cell) = (Arc::downgrade(&self.0), Arc::clone(background));
        tasks.spawn(async move {
            of_cell
                .reclaimer
                .run(async move |tenant, command| match cell.upgrade() {
                    // Every member knows what is left, and may lead one day; one of them is enough.
                    Some(cell) if !cell.raft.status().is_leader => Err(CellError::NoLeader),
                    Some(cell) => cell.propose(tenant, command).await?.result.map_err(CellError::from),
                    None => Err(CellError::Stopped),
                })
                .await;
        });
    }

    /// Waits for the log, then brings what the cell holds in line with its configuration.
    async fn set_up(&self, config: &CellConfig, bootstrap: Vec<(u64, Vec<String>)>) -> Result<(), OpenError> {
        // A long log takes longer to replay than a request may, and so do members that are not there yet.
        while let Err(error) = self.0.read_barrier().await {
            if !matches!(error, CellError::TimeoutRead) {
                return Err(OpenError::SetUp(error));
            }
        }
        if self.membership().members.is_empty() {
            self.settle(MembersCommand::Bootstrap { members: bootstrap }).await?;
        }
        if config.force_new_cluster {
            self.forget_others().await?;
        }
        self.publish(&config.names).await?;
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

    /// Raft knows no other member any more; now the cell does not either.
    async fn forget_others(&self) -> Result<(), OpenError> {
        let own = self.member_id();
        let membership = self.membership();
        if membership.member(own).is_some_and(|member| member.is_learner) {
            self.settle(MembersCommand::Promote { id: own }).await?;
        }
        for other in membership.members.iter().filter(|member| member.id != own) {
            tracing::warn!(member = format!("{:x}", other.id), name = other.name, "remove a member that is lost");
            self.settle(MembersCommand::Remove { id: other.id }).await?;
        }
        Ok(())
    }

    /// Tells the others who this member is, if they do not know.
    async fn publish(&self, names: &MemberNames) -> Result<(), OpenError> {
        let id = self.member_id();
        let tenant_urls: Vec<(String, String)> = names
            .tenant_client_urls
            .iter()
            .flat_map(|(tenant, urls)| urls.iter().map(|url| (tenant.clone(), url.clone())))
            .collect();
        let (name, client_urls) = (names.name.clone(), names.client_urls.clone());
        let known = self.membership().member(id).is_some_and(|member| {
            member.name == name && member.client_urls == client_urls && member.tenant_urls == tenant_urls
        });
        if known { Ok(()) } else { self.settle(MembersCommand::Publish { id, name, client_urls, tenant_urls }).await }
    }

    /// Proposes until it is applied.
    async fn settle(&self, command: MembersCommand) -> Result<(), OpenError> {
        loop {
            match self.0.propose(TenantId(0), Command::Members(command.clone())).await {
                Ok(Outcome { result: Ok(_), .. }) => return Ok(()),
                Ok(Outcome { result: Err(Refusal::MemberNotFound), .. }) => return Err(OpenError::Removed),
                Ok(Outcome { result: Err(refusal), .. }) => return Err(OpenError::SetUp(refusal.into())),
                // A new cell's first leader may be gone before it has said much.
                Err(CellError::TimeoutWrite | CellError::TimeoutApply | CellError::LeaderChanged) => {}
                Err(error) => return Err(OpenError::SetUp(error)),
            }
        }
    }

    /// The tenant of that name, if there is one.
    pub fn tenant(&self, name: &str) -> Option<Tenant> {
        if let Some(parts) = self.0.tenants.read().get(name)
            && !parts.reader.is_deleted()
        {
            return Some(Tenant { cell: Arc::clone(&self.0), parts: Arc::clone(parts) });
        }
        let id = self.0.store.tenant_id(name)?;
        let parts = Arc::new(TenantParts {
            name: name.to_string(),
            cluster_id: self.0.cluster_id_of(id, name),
            reader: self.0.store.reader(id)?,
            read_ns: AtomicU64::new(0),
        });
        self.0.tenants.write().insert(name.to_string(), Arc::clone(&parts));
        Some(Tenant { cell: Arc::clone(&self.0), parts })
    }

    /// Makes a tenant, or finds the one that is there.
    ///
    /// # Errors
    /// [`CreateTenantError`]; [`Refusal::TooManyTenants`] at the cell's bound.
    pub async fn create_tenant(&self, name: &str) -> Result<Tenant, CreateTenantError> {
        let (tenant, _) = self.create_tenant_with(name, TenantLimits::default(), Labels::default()).await?;
        Ok(tenant)
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

    /// Learners that got their vote from this member as the leader.
    pub fn learners_promoted(&self) -> u64 {
        self.0.promotions.made.load(Ordering::Relaxed)
    }

    /// Promotions that this member refused as the leader, by reason.
    pub fn promotions_refused(&self) -> [(&'static str, u64); 4] {
        self.0.promotions.by_reason()
    }

    /// Where requests of network clients are counted.
    pub(crate) fn open_requests(&self) -> &OpenRequests {
        &self.0.open_requests
    }

    /// Whose turn it is on this member's threads.
    pub(crate) fn turns(&self) -> Arc<Turns> {
        Arc::clone(&self.0.turns)
    }

    /// The disk of the data directory.
    pub fn disk(&self) -> &Disk {
        &self.0.disk
    }

    /// Ends when all the other members say that they are of another cluster.
    async fn among_strangers(&self) {
        let mut look = tokio::time::interval(LOOK_AT_PEERS_PERIOD);
        loop {
            look.tick().await;
            let peers = self.peer_stats();
            if !peers.is_empty() && peers.iter().all(|(_, stats)| stats.is_of_other_cluster()) {
                return;
            }
        }
    }

    /// The other members, for whoever listens for them.
    pub fn peers(&self) -> &Peers {
        &self.0.peers
    }

    /// What is counted of each other member, for metrics.
    pub fn peer_stats(&self) -> Vec<(u64, Arc<PeerStats>)> {
        self.0.peers.stats()
    }

    /// Hands leadership over if this member has it, then ends the tasks and the raft server, with everything applied flushed to
    /// disk. Requests that come in from now on answer [`CellError::Stopped`].
    pub async fn stop(&self) {
        let status = self.0.raft.status();
        if status.is_leader && status.voters > 1 && !self.0.hand_over(0).await {
            tracing::warn!("nobody took over the leadership in time");
        }
        self.0.tasks.lock().abort_all();
        let server = self.0.server.lock().take();
        if let Some(server) = server {
            // It joins threads.
            if let Err(error) = tokio::task::spawn_blocking(move || server.stop()).await {
                tracing::error!(%error, "stop the raft server");
            }
        }
        self.0.peers.stop();
        // They hold the state on threads of their own, and may have begun just now.
        self.0.store.stop_compacting();
        drop(self.0.compacting.write().await);
    }
}

/// A member that serves other members already, and no clients yet.
pub struct Opening {
    cell: Cell,
    config: CellConfig,
    bootstrap: Vec<(u64, Vec<String>)>,
}

impl Opening {
    /// What other members talk to.
    pub fn peers(&self) -> &Peers {
        self.cell.peers()
    }

    /// The cell as it is so far, to be looked at: it may hold no tenant yet.
    pub fn cell(&self) -> &Cell {
        &self.cell
    }

    /// Waits until it serves; see [`Cell::open`].
    ///
    /// # Errors
    /// [`OpenError`]. The directory is released again.
    pub async fn complete(self) -> Result<Cell, OpenError> {
        let Opening { cell, config, bootstrap } = self;
        let alone = config.initial_cluster.len() <= 1 && config.cluster_state == ClusterState::New;
        let patience = async {
            tokio::time::sleep(START_TIMEOUT).await;
            // A cell of one may have grown since its flags were written.
            if !alone || cell.raft_status().voters > 1 {
                std::future::pending::<()>().await;
            }
        };
        let set_up = tokio::select! {
            set_up = cell.set_up(&config, bootstrap) => set_up,
            cause = cell.failed() => Err(OpenError::Failed(cause)),
            () = cell.removed() => Err(OpenError::Removed),
            () = cell.among_strangers() => Err(OpenError::OtherCluster(cell.cluster_id())),
            () = patience => Err(OpenError::NoLeader),
        };
        match set_up {
            Ok(()) => Ok(cell),
            Err(error) => {
                // After a fault everything else fails because of it.
                let cause = cell.0.failure.0.borrow().clone();
                cell.stop().await;
                Err(cause.map_or(error, OpenError::Failed))
            }
        }
    }

    /// Gives up.
    pub async fn stop(self) {
        self.cell.stop().await;
    }
}

impl CellConfig {
    fn peers(&self, identity: PeerIdentity) -> PeersConfig {
        PeersConfig {
            identity,
            tls: self.peer_tls.clone(),
            timeout: self.election_timeout.max(Duration::from_secs(1)),
            snapshot_bytes_per_second: SNAPSHOT_BYTES_PER_SECOND,
        }
    }
}

impl Inner {
    #[expect(clippy::type_complexity, reason = "named where it is taken apart")]
    fn open(
        config: &CellConfig,
        beginning: Beginning,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(Cell, Arc<Background>, Vec<(u64, Vec<String>)>), OpenError> {
        let voters = beginning.voters();
        let Beginning { identity, first } = beginning;
        let mut data_dir = DataDir::open(&config.data_dir, identity, &config.cluster_token, &first)?;
        let First { members, .. } = first;
        let disk = Disk::new(data_dir.path(), config.disk_reserve_bytes).map_err(OpenError::Disk)?;
        let engine = Arc::new(RocksEngine::open(&data_dir.state(), &config.engine)?);
        let Identity { member_id, cluster_id } = identity;
        let peers = Peers::new(config.peers(PeerIdentity { member_id, cluster_id }), runtime.clone());
        peers.set_members(&members);
        let lessor = Arc::new(Lessor::new(config.election_timeout));
        let background = Arc::new(Background::default());
        let failure = Failure(Arc::new(watch::Sender::new(None)));
        let changes = Arc::new(tenants::Changes::default());
        let observer = Arc::new(Watcher {
            lessor: Arc::clone(&lessor),
            changes: Arc::clone(&changes),
            background: Arc::clone(&background),
            peers: peers.clone(),
            store: std::sync::OnceLock::new(),
            failure: failure.clone(),
        });
        let state = StateMachine::open(engine, Arc::clone(&observer) as Arc<dyn Observer>)?;
        let store = state.store();
        let known = store.membership();
        let known: Vec<_> = known.members.iter().map(|member| (member.id, member.peer_urls.clone())).collect();
        bootstrap::check_not_another(config, identity, if known.is_empty() { &members } else { &known })?;
        load_leases(&store, &lessor)?;
        assert!(observer.store.set(store.clone()).is_ok(), "set once");
        let raft_config = raft::Config {
            append_paused: disk.append_paused(),
            ..raft_config(config, identity, voters, &data_dir, failure.clone(), runtime)?
        };
        let open_requests = OpenRequests::default();
        let undelivered = InFlight::new(Budget::default(), open_requests.clone());
        let applier = Applier { state_machine: state, undelivered };
        data_dir.adopt_layout()?;
        let (raft, server) = raft::start(raft_config, applier, peers.transport())?;
        peers.attach(&raft);
        let turns = Arc::<Turns>::default();
        let inner = Inner {
            server: Mutex::new(Some(server)),
            peers: peers.clone(),
            changing_members: tokio::sync::Mutex::default(),
            strict_reconfig_check: config.strict_reconfig_check,
            max_learners: config.max_learners,
            promotions: members::Promotions::default(),
            leadership: raft.leadership(),
            open_requests,
            raft,
            read_pool: ReadPool::for_this_machine(Arc::clone(&turns)).map_err(OpenError::Threads)?,
            turns,
            tasks: Mutex::new(JoinSet::new()),
            store,
            lessor,
            changes,
            tenants: RwLock::default(),
            defragment: Defragment::default(),
            compacting: Arc::default(),
            disk,
            failure,
            request_timeout: request_timeout(config),
            election_timeout: config.election_timeout,
            data_dir,
        };
        let inner = Arc::new(inner);
        peers.answer_calls(Arc::new(members::Answers(Arc::downgrade(&inner))));
        Ok((Cell(inner), background, members))
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
        self.propose_in(None, tenant, command).await
    }

    /// With a term: by this member as its leader, or not at all.
    async fn propose_in(&self, term: Option<u64>, tenant: TenantId, command: Command) -> Result<Outcome, CellError> {
        let lane = match &command {
            Command::Tenant(_)
            | Command::Configure { .. }
            | Command::SetDefaults { .. }
            | Command::RaiseRules { .. }
            | Command::Members(_) => CELL_LANE,
            Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact { .. }
            | Command::Reclaim { .. }
            | Command::LeaseGrant { .. }
            | Command::LeaseRevoke { .. }
            | Command::Alarm { .. } => tenant.0,
        };
        // The reserve of the disk is not for clients.
        if self.disk.is_full() && command.quota_cost_bytes() > 0 {
            return Err(Refusal::NoSpace.into());
        }
        let unseen_bytes = command.unseen_bytes();
        let envelope = Envelope { tenant, member_id: self.identity().member_id, command }.encode();
        let cost_bytes = envelope.len() + unseen_bytes;
        let deadline = Instant::now() + self.request_timeout;
        // As in etcd, a write without a leader waits for one, as long as it may, and is said to have found none, or to have been given
        // to one that did not get it through.
        let had_leader = self.raft.status().leader_id != 0;
        let written = async {
            match term {
                Some(term) => self.raft.propose_in_term(term, lane, envelope).await,
                None => self.raft.propose_counted(lane, envelope, cost_bytes).await,
            }
        };
        match timeout_at(deadline, written).await {
            Ok(written) => written.map(|answer| answer.outcome).map_err(CellError::from),
            Err(_) if had_leader => Err(CellError::TimeoutApply),
            Err(_) => Err(CellError::TimeoutWrite),
        }
    }

    /// Whether this member led `term` at some moment after the call: the others say so.
    async fn leads_still(&self, term: u64) -> Result<bool, CellError> {
        match self.read_barrier().await {
            Ok(()) => {
                let status = self.raft.status();
                Ok(status.is_leader && status.term == term)
            }
            Err(CellError::TimeoutRead) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn read_barrier(&self) -> Result<(), CellError> {
        // A member that is alone knows without asking: spare the timer.
        if self.raft.read_point_now().is_some() {
            return Ok(());
        }
        // Rounds end by themselves after as many ticks, and count those who waited so long. This is for a thread that stands still.
        let deadline = Instant::now() + self.request_timeout + READ_GRACE;
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
        let (store, compacting) = (self.store.clone(), Arc::clone(&self.compacting).read_owned().await);
        let compacted = tokio::task::spawn_blocking(move || {
            let compacted = store.compact_engine();
            drop(store);
            drop(compacting);
            compacted
        });
        match compacted.await {
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

/// raft-server's configuration. A read waits as long as a request may.
fn raft_config(
    config: &CellConfig,
    identity: Identity,
    initial_voters: Vec<u64>,
    data_dir: &DataDir,
    failure: Failure,
    runtime: &tokio::runtime::Handle,
) -> Result<raft::Config, OpenError> {
    let tick_ms = u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX).max(1);
    let ticks = |duration: Duration| {
        let ticks = duration.as_millis().div_ceil(u128::from(tick_ms));
        usize::try_from(ticks).map_err(|_| raft::StartError::Config(format!("{duration:?} is too long")))
    };
    let election_timeout_ticks = ticks(config.election_timeout)?;
    Ok(raft::Config {
        tick_ms,
        initial_voters,
        force_sole_voter: config.force_new_cluster,
        snapshot_dir: data_dir.snapshots(),
        election_timeout_ticks,
        election_jitter_ticks: (election_timeout_ticks / 2).max(2),
        read_timeout_ticks: ticks(request_timeout(config))?,
        pre_vote: config.pre_vote,
        flush_entries: config.snapshot_count,
        slow_apply: config.slow_apply,
        log_catchup_entries: config.snapshot_catchup_entries,
        cost_bytes: tenure_storage::command::cost_bytes,
        reply_runtime: Some(runtime.clone()),
        fault_handler: Some(Arc::new(move |fault| failure.report(&format!("{}: {}", fault.thread, fault.cause)))),
        ..raft::Config::new(identity.member_id, data_dir.log())
    })
}

/// How long a request may take: etcd's own formula.
fn request_timeout(config: &CellConfig) -> Duration {
    REQUEST_TIMEOUT_BASE + 2 * config.election_timeout
}

/// Tells the lessor of the leases on disk. Only tenants that have some are read.
fn load_leases(store: &Store<RocksEngine>, lessor: &Lessor) -> Result<(), Fault> {
    let (mut leases, mut suspended) = (Vec::new(), Vec::new());
    for (tenant, _) in store.tenants() {
        let Some(reader) = store.reader(tenant) else { continue };
        if reader.state().usage.leases > 0 {
            leases.extend(reader.leases()?.into_iter().map(|(id, ttl_seconds)| (tenant, id, ttl_seconds)));
        }
        if reader.profile().phase == TenantPhase::Suspended {
            suspended.push(tenant);
        }
    }
    lessor.replace(&leases, &suspended);
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
                        cell.lessor.promote(term);
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

/// Proposes what auto-compaction finds due, if this member leads.
async fn compact_old(cell: Weak<Inner>, kept: AutoCompaction) {
    let mut compactor = AutoCompactor::new(kept);
    let mut look = tokio::time::interval(compactor.period());
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let Some(cell) = cell.upgrade() else { return };
        let due = compactor.look(cell.store.states().iter().map(|(tenant, state)| Seen::of(*tenant, state)));
        let mut tenants = 0;
        for (tenant, revision) in due {
            if !cell.raft.status().is_leader {
                break;
            }
            // What a suspended tenant is due it gets at the first look after it is resumed.
            if cell.store.reader(tenant).is_none_or(|reader| reader.profile().phase == TenantPhase::Suspended) {
                continue;
            }
            match cell.propose(tenant, Command::Compact { revision }).await {
                Ok(Outcome { result: Ok(_), .. }) => {
                    compactor.compacted(tenant);
                    tenants += 1;
                }
                // It compacted itself, or was deleted or suspended meanwhile.
                Ok(Outcome { result: Err(refusal), .. }) => tracing::debug!(%tenant, %refusal, "auto compaction"),
                Err(error) => tracing::warn!(%tenant, revision, %error, "failed auto compaction"),
            }
        }
        if tenants > 0 {
            tracing::info!(tenants, "completed auto compaction");
        }
    }
}

/// Keeps an eye on the disk, and the leadership away from a full one.
async fn watch_disk(cell: Weak<Inner>) {
    let mut look = tokio::time::interval(disk::LOOK_PERIOD);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // When all disks are full, whom it is handed to hands it on. Whoever leads has to lead for a while, or no lease ends, and what could
    // give room back stays.
    let mut handed_over: Option<Instant> = None;
    let mut pause = disk::HAND_OVER_PERIOD;
    loop {
        look.tick().await;
        let Some(cell) = cell.upgrade() else { return };
        cell.disk.look();
        if !cell.disk.is_full() {
            (handed_over, pause) = (None, disk::HAND_OVER_PERIOD);
            continue;
        }
        let status = cell.raft.status();
        let is_due = handed_over.is_none_or(|before| before.elapsed() >= pause);
        if status.is_leader && status.voters > 1 && is_due {
            if handed_over.is_some() {
                pause = (2 * pause).min(disk::HAND_OVER_PERIOD_MAX);
            }
            handed_over = Some(Instant::now());
            cell.raft.transfer_leadership(0);
        }
    }
}

async fn revoke_expired(cell: Weak<Inner>) {
    let mut poll = tokio::time::interval(lessor::POLL_PERIOD);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        poll.tick().await;
        let Some(cell) = cell.upgrade() else { return };
        let Some(term) = cell.lessor.led_term() else { continue };
        let cell = &cell;
        futures::stream::iter(cell.lessor.take_expired())
            .for_each_concurrent(REVOKES_IN_FLIGHT_MAX, |(tenant, id)| async move {
                // Those before it may have taken long: it may have been revoked, and granted anew, meanwhile.
                if !cell.lessor.is_expired(tenant, id) {
                    return;
                }
                match cell.propose_in(Some(term), tenant, Command::LeaseRevoke { id }).await {
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
