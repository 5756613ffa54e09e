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

mod apply;
mod bootstrap;
mod config;
mod members;
mod rules;
mod tasks;
mod tenant;
mod tenants;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tenure_raft_server as raft;
use tenure_raft_server::transport::peers::{PeerIdentity, PeerStats, Peers, PeersConfig};
pub use tenure_storage::apply::QUOTA_BYTES_DEFAULT;
use tenure_storage::{
    Command, Envelope, Fault, Labels, MembersCommand, Observer, Outcome, Refusal, RocksEngine, StateMachine, Store,
    TenantId, TenantLimits, TenantPhase, TenantReader,
};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::cell_error::CellError;
use crate::data_dir::{DataDir, First, Identity};
use crate::delivery::Deliveries;
use crate::disk::Disk;
use crate::ids;
use crate::inflight::{Budget, InFlight, OpenRequests};
use crate::lessor::Lessor;
use crate::read_pool::ReadPool;
use crate::reclaim::Reclaimer;
use crate::turns::Turns;

use self::apply::{Answer, Applier, CellObserver};
use self::bootstrap::Beginning;
pub use self::bootstrap::{BootstrapError, ClusterState, InitialCluster};
use self::config::START_TIMEOUT;
pub use self::config::{CellConfig, CreateTenantError, InvalidTenantName, MemberNames, OpenError, check_tenant_name};
use self::tasks::{compact_old, follow_leadership, revoke_expired, watch_disk};
pub use self::tenant::{Granted, Tenant};
pub(crate) use self::tenants::now_ms;
pub use self::tenants::{TenantUpdate, may_be_deleted};

/// The tenant of a client that says nothing.
pub const DEFAULT_TENANT: &str = "default";

/// What etcd adds to two election timeouts to get the time a request may take.
const REQUEST_TIMEOUT_BASE: Duration = Duration::from_secs(5);

/// How much longer than its time a read waits for raft's thread to say that there is no leader.
const READ_GRACE: Duration = Duration::from_secs(1);

/// How fast a copy of the state is sent to a member, so that it takes no more than a part of disk and link.
const SNAPSHOT_BYTES_PER_SECOND: u64 = 128 << 20;

/// Replays of one tenant that wait for a reading thread or have one; others wait for their turn to do so. There may be as many streams
/// that are behind as a tenant may have reads waiting, and its lists would be refused.
const REPLAYS_MAX: usize = 32;

/// How often a member that starts looks at what its peers say of it.
const LOOK_AT_PEERS_PERIOD: Duration = Duration::from_millis(100);

/// The lane of commands that belong to no tenant.
const CELL_LANE: u32 = 0;

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
    /// Turns of its replays.
    replays: Semaphore,
}

/// Engine compactions go one after the other; who comes while one waits shares that one's.
#[derive(Default)]
struct Defragment {
    running: tokio::sync::Mutex<()>,
    begun: AtomicU64,
}

/// Work that apply leaves to tasks.
#[derive(Default)]
struct Background {
    reclaimer: Reclaimer,
    deliveries: Deliveries,
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
            return Some(Tenant::new(Arc::clone(parts), Arc::clone(&self.0)));
        }
        let id = self.0.store.tenant_id(name)?;
        let parts = Arc::new(TenantParts {
            name: name.to_string(),
            cluster_id: self.0.cluster_id_of(id, name),
            reader: self.0.store.reader(id)?,
            read_ns: AtomicU64::new(0),
            replays: Semaphore::new(REPLAYS_MAX),
        });
        self.0.tenants.write().insert(name.to_string(), Arc::clone(&parts));
        Some(Tenant::new(parts, Arc::clone(&self.0)))
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
        let observer = Arc::new(CellObserver {
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

#[cfg(test)]
mod tests;
