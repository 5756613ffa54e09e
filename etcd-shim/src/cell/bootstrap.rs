//! How a member comes to know who it is: from its data, from the first configuration of a new cell, or from the members of
//! the cell that it joins (contract 1.4, 4.1).
//!
//! The first configuration of a cell also lets in a member that was added since: whoever restarts members (a StatefulSet) gives all of them the
//! same flags for ever. A member whose place in the cell is another's by now, or nobody's, is refused before anything is written.
//!
//! Once a data directory has an identity, that is who the member is: flags that say how to begin are for the beginning, and need not be
//! given again. But if they name members of another cell, or another token, the directory is in the wrong place, and the member refuses
//! to start.

use std::time::Duration;

use prost::Message as _;
use tenure_raft_server::transport::peers::{PeerIdentity, PeersConfig, call_url, is_of_other_cluster};

use super::CellConfig;
use crate::data_dir::{DataDir, DataDirError, First, Identity};
use crate::ids;
use crate::proto::cell::{CellMember, CellMembers};

/// How long each member of a cell may take to say who is in it.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long each may take to say whether it is of this cell.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether the cell is made now or exists: `--initial-cluster-state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClusterState {
    #[default]
    New,
    Existing,
}

/// Who is to be in the cell, by name: `--initial-cluster`.
pub type InitialCluster = Vec<(String, Vec<String>)>;

/// Why a member cannot find out who it is. In etcd's words where etcd has some.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("couldn't find local name {0:?} in the initial cluster configuration")]
    NameMissing(String),
    #[error("--initial-cluster has {in_cluster} for this member but --initial-advertise-peer-urls has {advertised}")]
    UrlsDiffer { in_cluster: String, advertised: String },
    #[error("--initial-cluster has duplicate peer URL {0:?}")]
    DuplicateUrl(String),
    #[error("member {0:x} has already been bootstrapped: without its data it must be removed and added anew")]
    AlreadyBootstrapped(u64),
    #[error(
        "cluster {cluster:x} has no member with the peer URLs {urls}: it was removed, or has to be added first (etcdctl member add)"
    )]
    NotAdded { cluster: u64, urls: String },
    #[error(
        "the members at the URLs of --initial-cluster are of cluster {found:x}; these flags make cluster {own:x} \
         (other members, URLs or --initial-cluster-token)"
    )]
    OtherCluster { found: u64, own: u64 },
    #[error(
        "the members at the URLs of --initial-cluster are not of cluster {0:x}, which the data directory belongs to"
    )]
    AmongStrangers(u64),
    #[error(
        "the data directory is of member {found:x} but --initial-advertise-peer-urls has those of member {given:x}: each \
         member has a data directory of its own"
    )]
    OtherMember { found: u64, given: u64 },
    #[error("could not retrieve cluster information from the given URLs: {0}")]
    NobodyAnswers(String),
    #[error("error validating peerURLs: {0}")]
    MembersDiffer(String),
}

/// What a member begins with.
pub(super) struct Beginning {
    pub(super) identity: Identity,
    /// Whom to talk to before the state says it, and who votes in a new group.
    pub(super) first: First,
}

impl Beginning {
    /// Empty if the group exists. Of no meaning when there is data.
    pub(super) fn voters(&self) -> Vec<u64> {
        let all = self.first.members.iter().map(|(id, _)| *id);
        all.filter(|_| self.first.is_new_cell).collect()
    }
}

/// Finds out.
///
/// # Errors
/// [`BootstrapError`]; nothing was written.
pub(super) async fn beginning(config: &CellConfig, peers: &PeersConfig) -> Result<Beginning, BootstrapError> {
    let cluster = initial_cluster(config);
    let computed: Vec<(u64, Vec<String>)> =
        cluster.iter().map(|(_, urls)| (ids::member_id(urls, &config.cluster_token), urls.clone())).collect();
    if let Some(identity) = DataDir::identity_in(&config.data_dir, &config.cluster_token)? {
        check_not_among_strangers(config, peers, identity, &cluster).await?;
        let first = match DataDir::first_in(&config.data_dir)? {
            Some(first) => first,
            // Of an earlier release: what the flags say, if they are those it began with.
            None if computed.iter().any(|(id, _)| *id == identity.member_id) => {
                First { is_new_cell: config.cluster_state == ClusterState::New, members: computed }
            }
            None => First { is_new_cell: false, members: Vec::new() },
        };
        return Ok(Beginning { identity, first });
    }
    check(config, &cluster)?;
    let own_urls = sorted(&config.names.peer_urls);
    let others: Vec<&String> =
        cluster.iter().filter(|(name, _)| *name != config.names.name).flat_map(|(_, urls)| urls).collect();
    let found = ask(peers, &others).await;
    if let Ok(found) = &found
        && let Some(beginning) = added_since(found, &computed, &own_urls)?
    {
        return Ok(beginning);
    }
    if !cluster.iter().any(|(name, _)| *name == config.names.name) {
        return Err(BootstrapError::NameMissing(config.names.name.clone()));
    }
    match config.cluster_state {
        ClusterState::New => {
            let member_id = ids::member_id(&own_urls, &config.cluster_token);
            let cluster_id = founded_by(&computed);
            if let Ok(found) = found {
                if found.cluster_id != cluster_id {
                    let (found, own) = (found.cluster_id, cluster_id);
                    return Err(BootstrapError::OtherCluster { found, own });
                }
                check_not_bootstrapped(&found, member_id)?;
            }
            let first = First { is_new_cell: true, members: computed };
            Ok(Beginning { identity: Identity { member_id, cluster_id }, first })
        }
        ClusterState::Existing => {
            let found = found.map_err(BootstrapError::NobodyAnswers)?;
            if found.members.len() != cluster.len() {
                let (known, given) = (found.members.len(), cluster.len());
                return Err(BootstrapError::MembersDiffer(format!(
                    "member count is unequal: the cluster has {known}, --initial-cluster has {given}"
                )));
            }
            for (name, urls) in &cluster {
                if !found.members.iter().any(|member| sorted(&member.peer_urls) == sorted(urls)) {
                    return Err(BootstrapError::MembersDiffer(format!(
                        "unmatched member while checking PeerURLs ({name}={})",
                        urls.join(",")
                    )));
                }
            }
            let own = found.members.iter().find(|member| sorted(&member.peer_urls) == own_urls);
            let own = own.ok_or_else(|| BootstrapError::NameMissing(config.names.name.clone()))?;
            check_not_bootstrapped(&found, own.id)?;
            Ok(joining(&found, own))
        }
    }
}

/// Joins the cell as this one of its members.
fn joining(found: &CellMembers, own: &CellMember) -> Beginning {
    let members = found.members.iter().map(|member| (member.id, member.peer_urls.clone())).collect();
    Beginning {
        identity: Identity { member_id: own.id, cluster_id: found.cluster_id },
        first: First { is_new_cell: false, members },
    }
}

/// The id of the cell that begins with these members.
fn founded_by(members: &[(u64, Vec<String>)]) -> u64 {
    ids::cluster_id(&members.iter().map(|(id, _)| *id).collect::<Vec<_>>())
}

/// Who this member is if the cell that the flags have made has other members by now. `None`: what the flags say holds.
///
/// A founder's id counts for as long as the cell has it, then no more: whoever was removed and added has another one, and one that would
/// begin under its old one could never take part.
fn added_since(
    found: &CellMembers,
    founders: &[(u64, Vec<String>)],
    own_urls: &[String],
) -> Result<Option<Beginning>, BootstrapError> {
    // One that answers may not know yet who is in its cell.
    if found.cluster_id != founded_by(founders) || found.members.is_empty() {
        return Ok(None);
    }
    let is_founder = |id: u64| founders.iter().any(|(founder, _)| *founder == id);
    let founded = founders.iter().find(|(_, urls)| sorted(urls) == own_urls).map(|(id, _)| *id);
    if founded.is_some_and(|id| found.members.iter().any(|member| member.id == id)) {
        return Ok(None);
    }
    let own = found.members.iter().find(|member| sorted(&member.peer_urls) == own_urls && !is_founder(member.id));
    let own = own.ok_or_else(|| BootstrapError::NotAdded { cluster: found.cluster_id, urls: own_urls.join(",") })?;
    check_not_bootstrapped(found, own.id)?;
    Ok(Some(joining(found, own)))
}

/// Data in the wrong place must not be served where another cell's member is expected. Members that do not answer are no
/// hindrance: a whole cell may be starting. Nor are a few strangers, as long as this member and those that do not answer can be a
/// majority: then it may be they who are in the wrong place.
async fn check_not_among_strangers(
    config: &CellConfig,
    peers: &PeersConfig,
    identity: Identity,
    cluster: &InitialCluster,
) -> Result<(), BootstrapError> {
    let Identity { member_id, cluster_id } = identity;
    let peers = PeersConfig { identity: PeerIdentity { member_id, cluster_id }, ..peers.clone() };
    let others = cluster.iter().filter(|(name, _)| *name != config.names.name);
    let asked = others.map(async |(_, urls)| {
        let asked = urls.iter().map(|url| is_of_other_cluster(&peers, url, HELLO_TIMEOUT));
        futures::future::join_all(asked).await
    });
    let answers = futures::future::join_all(asked).await;
    let strangers = answers.iter().filter(|of_urls| of_urls.contains(&Some(true))).count();
    let is_known = answers.iter().any(|of_urls| of_urls.contains(&Some(false)));
    if strangers > 0 && 2 * strangers >= cluster.len() && !is_known {
        return Err(BootstrapError::AmongStrangers(cluster_id));
    }
    Ok(())
}

/// Data of another member of the cell must not be served where this one is expected: it may be a copy, and of two members with
/// one id both would vote. `known` is who is where, as far as the data says. Who has become another's successor at its URLs, and
/// does not know it yet, catches up with the URLs it had.
pub(super) fn check_not_another(
    config: &CellConfig,
    identity: Identity,
    known: &[(u64, Vec<String>)],
) -> Result<(), BootstrapError> {
    // Whoever is left of a lost majority is begun with where there is a machine for it. And of no flags nothing follows.
    let is_said = !config.initial_cluster.is_empty() || config.names.peer_urls != [ids::PEER_URL_DEFAULT];
    if config.force_new_cluster || !is_said {
        return Ok(());
    }
    let given = sorted(&config.names.peer_urls);
    let is_elsewhere = |(id, urls): &&(u64, Vec<String>)| {
        *id != identity.member_id && sorted(urls).iter().any(|url| given.contains(url))
    };
    match known.iter().find(is_elsewhere) {
        Some((given, _)) => Err(BootstrapError::OtherMember { found: identity.member_id, given: *given }),
        None => Ok(()),
    }
}

/// A member that lost its data must not vote again as if it had none: it may have voted otherwise, and counted as one of those
/// that have what was acknowledged. It is removed and added anew. One that has told its name has run.
fn check_not_bootstrapped(found: &CellMembers, id: u64) -> Result<(), BootstrapError> {
    match found.members.iter().find(|member| member.id == id && !member.name.is_empty()) {
        Some(_) => Err(BootstrapError::AlreadyBootstrapped(id)),
        None => Ok(()),
    }
}

/// As configured; without it this member alone.
fn initial_cluster(config: &CellConfig) -> InitialCluster {
    match config.initial_cluster.as_slice() {
        [] => vec![(config.names.name.clone(), config.names.peer_urls.clone())],
        given => given.to_vec(),
    }
}

/// What is wrong with the flags whoever answers. A member that they do not name may have been added since.
fn check(config: &CellConfig, cluster: &InitialCluster) -> Result<(), BootstrapError> {
    if let Some((_, urls)) = cluster.iter().find(|(name, _)| *name == config.names.name)
        && sorted(urls) != sorted(&config.names.peer_urls)
    {
        return Err(BootstrapError::UrlsDiffer {
            in_cluster: urls.join(","),
            advertised: config.names.peer_urls.join(","),
        });
    }
    let mut all: Vec<&String> = cluster.iter().flat_map(|(_, urls)| urls).collect();
    all.sort_unstable();
    match all.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(BootstrapError::DuplicateUrl(pair[0].clone())),
        None => Ok(()),
    }
}

/// Asks each URL until one answers.
async fn ask(peers: &PeersConfig, urls: &[&String]) -> Result<CellMembers, String> {
    let mut last = "there is none but its own".to_string();
    for url in urls {
        match call_url(peers, url, ASK_TIMEOUT).await {
            Ok(answer) => match CellMembers::decode(answer) {
                Ok(found) => return Ok(found),
                Err(error) => last = error.to_string(),
            },
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

fn sorted(urls: &[String]) -> Vec<String> {
    let mut sorted: Vec<String> = urls.iter().map(|url| url.trim_end_matches('/').to_string()).collect();
    sorted.sort_unstable();
    sorted
}

/// For questions before the identity is known.
pub(super) fn nobody() -> PeerIdentity {
    PeerIdentity { member_id: 0, cluster_id: 0 }
}
