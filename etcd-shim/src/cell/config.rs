//! How a cell is opened, and why it could not be.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tenure_raft_server as raft;
use tenure_raft_server::transport::peers::PeerTls;
use tenure_storage::limits::TENANT_NAME_BYTES_MAX;
use tenure_storage::{Fault, RocksOptions};

use super::bootstrap::{BootstrapError, ClusterState, InitialCluster};
#[expect(unused_imports, reason = "named in the documentation")]
use super::{DEFAULT_TENANT, QUOTA_BYTES_DEFAULT};
use crate::auto_compaction::AutoCompaction;
use crate::cell_error::CellError;
use crate::data_dir::DataDirError;
use crate::ids;

/// Longest time to replay the log and elect a leader at start.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(120);

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
