//! Who is in the cell: what operators may change, and the questions members ask each other.
//!
//! A change of members is decided by the leader alone, one after the other: behind a read barrier, so that whatever an earlier
//! leader began is known, it is held against etcd's rules (contract 1.4) and proposed as a change of raft's configuration,
//! in one entry with the command that records it, provided that no other change came in between. A member that does not lead asks
//! the leader; that call is not repeated, for it may have been executed, unless who was asked says that it does not lead.
//!
//! The rules protect the quorum: nobody is added who could not be down without the loss of it, nobody is removed whose vote
//! the rest needs, a learner gets its vote when it has nearly all of the log. Removing the leader hands over first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use tenure_raft_server::transport::peers::{CallFuture, Calls};
use tenure_raft_server::{ChangeError, MembersChange, Progress};
use tenure_storage::{Command, Envelope, LeaseId, Member, MembersCommand, Membership, Refusal, TenantId};
use tokio::time::{sleep, timeout};
use tonic::Status;

use super::{Cell, Inner, rules};
use crate::cell_error::{CellError, MembershipError};
use crate::ids;
use crate::lessor::Remaining;
use crate::proto::cell::member_change::Kind;
use crate::proto::cell::peer_call::Call;
use crate::proto::cell::{CellMember, CellMembers, Lease, MemberChange, PeerAnswer, PeerCall};
use crate::urls::check_member_url;

/// For how long a member must have been connected to count as healthy: etcd's own.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

/// How much of the leader's log a learner must have to be promoted, in percent: etcd's own.
const PROMOTABLE_PERCENT: u64 = 90;

/// Pause before the membership is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How long a member that joins waits for the newest list of members.
const NEWEST_WITHIN: Duration = Duration::from_secs(1);

/// Pause before the leader is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

impl Cell {
    /// Who is in the cell, as this member has applied it.
    pub fn membership(&self) -> Arc<Membership> {
        self.0.store.membership()
    }

    /// Waits until a change that is made is applied here too, no longer than a request may take. No read barrier would do: a new
    /// voter may have taken the quorum away until it is started.
    pub async fn wait_for_membership(&self, is_so: impl Fn(&Membership) -> bool) {
        let applied = async {
            while !is_so(&self.membership()) {
                sleep(LOOK_AGAIN).await;
            }
        };
        let _ = timeout(self.0.request_timeout, applied).await;
    }

    /// Waits until all that was acknowledged anywhere is applied here.
    ///
    /// # Errors
    /// [`CellError::TimeoutRead`] without a leader.
    pub async fn read_barrier(&self) -> Result<(), CellError> {
        self.0.read_barrier().await
    }

    /// Adds a member. Gives its id; it has to be started with these URLs.
    ///
    /// # Errors
    /// [`MembershipError`], or a refusal: a member has one of the URLs.
    pub async fn add_member(&self, mut peer_urls: Vec<String>, is_learner: bool) -> Result<u64, CellError> {
        if peer_urls.is_empty() || peer_urls.iter().any(|url| check_member_url(url).is_err()) {
            return Err(MembershipError::BadUrls.into());
        }
        peer_urls.sort_unstable();
        let answer =
            self.0.change_members(MemberChange { kind: Kind::Add.into(), id: 0, peer_urls, is_learner }).await?;
        Ok(answer.member_id)
    }

    /// Removes a member, which stops then.
    ///
    /// # Errors
    /// [`MembershipError`]; [`Refusal::MemberNotFound`].
    pub async fn remove_member(&self, id: u64) -> Result<(), CellError> {
        let change = MemberChange { kind: Kind::Remove.into(), id, ..MemberChange::default() };
        self.0.change_members(change).await.map(drop)
    }

    /// Gives a learner its vote.
    ///
    /// # Errors
    /// [`MembershipError::LearnerNotReady`]; [`Refusal::MemberNotFound`], [`Refusal::MemberNotLearner`].
    pub async fn promote_member(&self, id: u64) -> Result<(), CellError> {
        let change = MemberChange { kind: Kind::Promote.into(), id, ..MemberChange::default() };
        self.0.change_members(change).await.map(drop)
    }

    /// Changes where a member is reached by the others.
    ///
    /// # Errors
    /// [`Refusal::MemberNotFound`], [`Refusal::PeerUrlExists`].
    pub async fn set_peer_urls(&self, id: u64, peer_urls: Vec<String>) -> Result<(), CellError> {
        let command = Command::Members(MembersCommand::SetPeerUrls { id, peer_urls });
        self.0.propose(TenantId(0), command).await?.result?;
        Ok(())
    }

    /// Makes another member the leader. Returns when it is.
    ///
    /// # Errors
    /// [`MembershipError::NotLeader`] if this member is not it, [`MembershipError::BadTransferee`],
    /// [`MembershipError::TransferTimeout`].
    pub async fn move_leader(&self, to: u64) -> Result<(), CellError> {
        if self.leader_id() != self.member_id() {
            return Err(MembershipError::NotLeader.into());
        }
        if self.membership().member(to).is_none_or(|member| member.is_learner) {
            return Err(MembershipError::BadTransferee.into());
        }
        if to == self.member_id() {
            return Ok(());
        }
        if self.0.hand_over(to).await { Ok(()) } else { Err(MembershipError::TransferTimeout.into()) }
    }

    /// Waits until this member finds that it was removed from the cell. The program should say so and end.
    pub async fn removed(&self) {
        let mut removed = self.0.raft.removed();
        if removed.wait_for(|removed| *removed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Whether enough voters have started for a quorum of `voters` and one more.
fn can_add_voter(voters: &[&Member]) -> bool {
    let started = voters.iter().filter(|member| !member.name.is_empty()).count();
    let after = voters.len() + 1;
    // A second member may be added to one: so a cell grows from a restored member.
    (started == 1 && after == 2) || started > after / 2
}

/// Promotions that this member decided on as the leader.
#[derive(Debug, Default)]
pub(super) struct Promotions {
    pub(super) made: AtomicU64,
    not_learner: AtomicU64,
    not_ready: AtomicU64,
    too_few_started: AtomicU64,
    unknown: AtomicU64,
}

impl Promotions {
    fn refused(&self, error: &CellError) {
        let is = |refused: Refusal| matches!(error, CellError::Refused(other) if *other == refused);
        let breaks = |rule: MembershipError| matches!(error, CellError::Membership(other) if *other == rule);
        let counts = [
            (&self.unknown, is(Refusal::MemberNotFound)),
            (&self.not_learner, is(Refusal::MemberNotLearner)),
            (&self.not_ready, breaks(MembershipError::LearnerNotReady)),
            (&self.too_few_started, breaks(MembershipError::NotEnoughStarted)),
        ];
        for (count, is_it) in counts {
            count.fetch_add(u64::from(is_it), Ordering::Relaxed);
        }
    }

    /// By reason, as a label of the metric.
    pub(super) fn by_reason(&self) -> [(&'static str, u64); 4] {
        let all = [
            ("member not found", &self.unknown),
            ("not learner", &self.not_learner),
            ("learner not ready", &self.not_ready),
            ("not enough started members", &self.too_few_started),
        ];
        all.map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
    }
}

impl Inner {
    /// Hands leadership over (0: to whoever is furthest) and waits for that, as long as it may take.
    pub(super) async fn hand_over(&self, to: u64) -> bool {
        let mut leadership = self.leadership.clone();
        let own = self.identity().member_id;
        self.raft.transfer_leadership(to);
        let moved =
            leadership.wait_for(|now| now.leader_id != own && now.leader_id != 0 && (to == 0 || now.leader_id == to));
        timeout(2 * self.election_timeout, moved).await.is_ok_and(|moved| moved.is_ok())
    }

    /// How many of these members count as healthy, this one among them.
    fn healthy_among(&self, members: &[&Member]) -> usize {
        let own = self.identity().member_id;
        let connected = |id| self.has_been_connected(id).is_some_and(|time| time >= HEALTHY_AFTER);
        members.iter().filter(|member| member.id == own || connected(member.id)).count()
    }

    fn has_been_connected(&self, id: u64) -> Option<Duration> {
        self.peers.stats().into_iter().find(|(known, _)| *known == id)?.1.connected_for()
    }

    /// Asks the leader, if another member is it. `None`: nobody answered, or it does not lead (any more); asked again after a
    /// moment, if the question may be repeated.
    pub(super) async fn ask_leader(&self, call: Call) -> Option<PeerAnswer> {
        let leader = self.leader_id();
        if leader != 0 && leader != self.identity().member_id {
            let request = PeerCall { call: Some(call) }.encode_to_vec().into();
            let answer = self.peers.call(leader, request, self.request_timeout).await.ok();
            let answer = answer.and_then(|answer| PeerAnswer::decode(answer).ok()).filter(|answer| !answer.not_leader);
            if answer.is_some() {
                return answer;
            }
        }
        sleep(ASK_AGAIN).await;
        None
    }

    async fn change_members(&self, change: MemberChange) -> Result<PeerAnswer, CellError> {
        let own = self.identity().member_id;
        let is_promotion = change.kind() == Kind::Promote;
        // As in etcd, a promotion waits for a leader; the others do not, if what endangers the quorum is refused.
        if self.leader_id() == 0 && !is_promotion && self.strict_reconfig_check {
            return Err(MembershipError::Unhealthy.into());
        }
        let changed = async {
            loop {
                let leader = self.leader_id();
                let answer = if leader == own {
                    self.change_members_as_leader(change.clone()).await?
                } else if leader != 0 {
                    let request = PeerCall { call: Some(Call::MemberChange(change.clone())) }.encode_to_vec().into();
                    let answer = self.peers.call(leader, request, self.request_timeout).await;
                    // It may have been done: the client has to look.
                    let answer = answer.map_err(|error| {
                        tracing::warn!(%error, "ask the leader to change members");
                        CellError::LeaderChanged
                    })?;
                    PeerAnswer::decode(answer).map_err(|_| CellError::LeaderChanged)?
                } else {
                    PeerAnswer { not_leader: true, ..PeerAnswer::default() }
                };
                if answer.code != 0 {
                    return Err(MembershipError::AtLeader { code: answer.code, text: answer.text }.into());
                }
                if !answer.not_leader {
                    return Ok(answer);
                }
                sleep(ASK_AGAIN).await;
            }
        };
        let late = if is_promotion { CellError::NoLeader } else { CellError::TimeoutWrite };
        timeout(self.request_timeout, changed).await.unwrap_or(Err(late))
    }

    async fn change_members_as_leader(&self, change: MemberChange) -> Result<PeerAnswer, CellError> {
        let _one_at_a_time = self.changing_members.lock().await;
        let own = self.identity().member_id;
        let is_promotion = change.kind() == Kind::Promote;
        if change.kind() == Kind::Remove && change.id == own && self.raft.status().voters > 1 {
            self.check_removal(&self.store.membership(), own)?;
            if !self.hand_over(0).await {
                return Err(MembershipError::TransferTimeout.into());
            }
            return Ok(PeerAnswer { not_leader: true, ..PeerAnswer::default() });
        }
        // A change that came in between is applied first, and what was decided on what was there before it is decided anew.
        let changed = async {
            loop {
                let seen = self.raft.conf_index();
                self.read_barrier().await?;
                let (raft_change, command, id) = self.check_change(&self.store.membership(), change.clone())?;
                let command = Envelope { tenant: TenantId(0), member_id: own, command: Command::Members(command) };
                match self.raft.change_members(raft_change, seen, command.encode()).await {
                    Err(ChangeError::UnderWay) => sleep(ASK_AGAIN).await,
                    other => return Ok::<_, CellError>((id, other)),
                }
            }
        };
        let (member_id, changed) =
            timeout(self.request_timeout, changed).await.map_err(|_| CellError::TimeoutWrite)??;
        match changed {
            Ok(outcome) => {
                outcome.outcome.result?;
                self.promotions.made.fetch_add(u64::from(is_promotion), Ordering::Relaxed);
                Ok(PeerAnswer { member_id, ..PeerAnswer::default() })
            }
            Err(ChangeError::NotLeader { .. }) => Err(CellError::LeaderChanged),
            Err(ChangeError::Invalid) => Err(MembershipError::NotEnoughStarted.into()),
            Err(ChangeError::UnderWay) => Err(CellError::TimeoutWrite),
            Err(ChangeError::Propose(error)) => Err(error.into()),
        }
    }

    /// Holds a change against etcd's rules.
    fn check_change(
        &self,
        membership: &Membership,
        change: MemberChange,
    ) -> Result<(MembersChange, MembersCommand, u64), CellError> {
        let id = change.id;
        let voters: Vec<&Member> = membership.members.iter().filter(|member| !member.is_learner).collect();
        Ok(match change.kind() {
            Kind::Add => {
                if self.strict_reconfig_check {
                    if !change.is_learner && !can_add_voter(&voters) {
                        return Err(MembershipError::NotEnoughStarted.into());
                    }
                    // The new member counts as down.
                    if voters.len() > 1 && self.healthy_among(&voters) <= voters.len().div_ceil(2) {
                        return Err(MembershipError::Unhealthy.into());
                    }
                }
                let taken = membership.members.iter().flat_map(|member| &member.peer_urls);
                if taken.into_iter().any(|url| change.peer_urls.contains(url)) {
                    return Err(Refusal::PeerUrlExists.into());
                }
                let learners = membership.members.len() - voters.len();
                if change.is_learner && learners >= self.max_learners {
                    return Err(MembershipError::TooManyLearners.into());
                }
                let id = new_member_id(membership, &change.peer_urls);
                let is_learner = change.is_learner;
                let raft = if is_learner { MembersChange::AddLearner(id) } else { MembersChange::AddVoter(id) };
                (raft, MembersCommand::Add { id, peer_urls: change.peer_urls, is_learner }, id)
            }
            Kind::Remove => {
                self.check_removal(membership, id)?;
                if membership.member(id).is_none() {
                    return Err(Refusal::MemberNotFound.into());
                }
                (MembersChange::Remove(id), MembersCommand::Remove { id }, id)
            }
            Kind::Promote => {
                self.check_promotion(membership, id).inspect_err(|error| self.promotions.refused(error))?;
                (MembersChange::AddVoter(id), MembersCommand::Promote { id }, id)
            }
        })
    }

    fn check_removal(&self, membership: &Membership, id: u64) -> Result<(), CellError> {
        if !self.strict_reconfig_check || membership.member(id).is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        let own = self.identity().member_id;
        let voters: Vec<&Member> = membership.members.iter().filter(|member| !member.is_learner).collect();
        let left = voters.iter().filter(|member| member.id != id);
        let started = left.clone().filter(|member| !member.name.is_empty()).count();
        if started <= left.count() / 2 {
            return Err(MembershipError::NotEnoughStarted.into());
        }
        // One that is down takes nothing from the quorum there is.
        if id != own && self.has_been_connected(id).is_none() {
            return Ok(());
        }
        if self.healthy_among(&voters).saturating_sub(1) < 1 + (voters.len() - 1) / 2 {
            return Err(MembershipError::Unhealthy.into());
        }
        Ok(())
    }

    fn check_promotion(&self, membership: &Membership, id: u64) -> Result<(), CellError> {
        let member = membership.member(id).ok_or(Refusal::MemberNotFound)?;
        check_learner(member, &self.raft.progress(), self.identity().member_id)?;
        if self.strict_reconfig_check {
            let voters = membership.members.iter().filter(|member| !member.is_learner || member.id == id);
            let (mut started, mut all) = (0, 0);
            for voter in voters {
                started += usize::from(!voter.name.is_empty());
                all += 1;
            }
            if started <= all / 2 {
                return Err(MembershipError::NotEnoughStarted.into());
            }
        }
        Ok(())
    }

    fn cell_members(&self) -> CellMembers {
        let membership = self.store.membership();
        let members = membership.members.iter().map(|member| CellMember {
            id: member.id,
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            is_learner: member.is_learner,
        });
        CellMembers { cluster_id: self.identity().cluster_id, members: members.collect() }
    }
}

/// Whether a member is a learner that may vote from now on. A voter is told what it is whatever the leader knows of its progress, which
/// may be nothing.
fn check_learner(member: &Member, progress: &[Progress], leader: u64) -> Result<(), CellError> {
    if !member.is_learner {
        return Err(Refusal::MemberNotLearner.into());
    }
    if !is_in_sync(progress, leader, member.id) {
        return Err(MembershipError::LearnerNotReady.into());
    }
    Ok(())
}

/// Whether a member is near enough to the leader to vote. Nobody is while the leader has not counted: it does so once a tick, so
/// one that was just elected knows of no member's progress, its own included.
fn is_in_sync(progress: &[Progress], leader: u64, id: u64) -> bool {
    let matched = |id: u64| progress.iter().find(|of| of.id == id).map(|of| of.matched_index);
    matched(leader)
        .zip(matched(id))
        .is_some_and(|(leader, member)| member.saturating_mul(100) >= leader.saturating_mul(PROMOTABLE_PERCENT))
}

/// etcd's formula: from the URLs and the second. An id that was used makes the next second's.
fn new_member_id(membership: &Membership, peer_urls: &[String]) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let ids = (now..).map(|second| ids::member_id(peer_urls, &second.to_string()));
    let taken = |id: u64| id == 0 || membership.member(id).is_some() || membership.removed.contains(&id);
    ids.into_iter().find(|id| !taken(*id)).unwrap_or(0)
}

/// Answers other members' questions.
pub(super) struct Answers(pub(super) std::sync::Weak<Inner>);

impl Calls for Answers {
    fn call(&self, _: u64, request: bytes::Bytes) -> CallFuture {
        let cell = self.0.upgrade();
        Box::pin(async move {
            let cell = cell.ok_or_else(|| Status::unavailable("the member is stopping"))?;
            let call = PeerCall::decode(request).map_err(|error| Status::invalid_argument(error.to_string()))?.call;
            let answer = match call {
                Some(Call::LeaseRenew(lease)) => renew(&cell, lease).await,
                Some(Call::LeaseRemaining(lease)) => remaining(&cell, lease).await,
                Some(Call::MemberChange(change)) => change_for(&cell, change).await,
                Some(Call::Rules(_)) => rules::answer(),
                None => return Err(Status::unimplemented("a question of a newer release")),
            };
            Ok(answer.encode_to_vec().into())
        })
    }

    fn members(&self) -> CallFuture {
        let cell = self.0.upgrade();
        Box::pin(async move {
            let cell = cell.ok_or_else(|| Status::unavailable("the member is stopping"))?;
            // Without a quorum this is the newest there is: the member that asks may be the one that is missing for it.
            let _ = timeout(NEWEST_WITHIN, cell.read_barrier()).await;
            Ok(cell.cell_members().encode_to_vec().into())
        })
    }

    fn is_removed(&self, id: u64) -> bool {
        self.0.upgrade().is_some_and(|cell| cell.store.membership().removed.binary_search(&id).is_ok())
    }
}

/// Whether the lease's tenant is there, for the leader. Who asks may have applied more than is applied here, and so may this member have done
/// before it was started again.
///
/// # Errors
/// The answer of a member that does not lead, or not any more.
async fn has_tenant(cell: &Inner, tenant: TenantId) -> Result<bool, PeerAnswer> {
    let not_leader = || PeerAnswer { not_leader: true, ..PeerAnswer::default() };
    let term = cell.lessor.led_term().ok_or_else(not_leader)?;
    if cell.store.reader(tenant).is_some() {
        return Ok(true);
    }
    match cell.leads_still(term).await {
        Ok(true) => Ok(cell.store.reader(tenant).is_some()),
        Ok(false) | Err(_) => Err(not_leader()),
    }
}

async fn renew(cell: &Inner, Lease { tenant, id }: Lease) -> PeerAnswer {
    let missing = PeerAnswer { missing: true, ..PeerAnswer::default() };
    match has_tenant(cell, TenantId(tenant)).await {
        Ok(true) => {}
        Ok(false) => return missing,
        Err(answer) => return answer,
    }
    let renewed = cell.renew_lease_as_leader(TenantId(tenant), LeaseId(id));
    match timeout(cell.request_timeout, renewed).await {
        Ok(Ok(Some(0))) => missing,
        Ok(Ok(Some(ttl_seconds))) => PeerAnswer { ttl_seconds, ..PeerAnswer::default() },
        Ok(Ok(None)) | Ok(Err(_)) | Err(_) => PeerAnswer { not_leader: true, ..PeerAnswer::default() },
    }
}

async fn remaining(cell: &Inner, Lease { tenant, id }: Lease) -> PeerAnswer {
    let not_leader = PeerAnswer { not_leader: true, ..PeerAnswer::default() };
    let Some(term) = cell.lessor.led_term() else { return not_leader };
    // Whoever asks knows of no lease that is not applied anywhere, but of some that are not applied here.
    if !cell.leads_still(term).await.unwrap_or(false) || cell.lessor.led_term() != Some(term) {
        return not_leader;
    }
    match cell.lessor.remaining(TenantId(tenant), LeaseId(id)) {
        Some(Remaining { seconds, granted_seconds }) => {
            PeerAnswer { ttl_seconds: seconds, granted_seconds, ..PeerAnswer::default() }
        }
        None => PeerAnswer { missing: true, ..PeerAnswer::default() },
    }
}

async fn change_for(cell: &Arc<Inner>, change: MemberChange) -> PeerAnswer {
    if cell.leader_id() != cell.identity().member_id {
        return PeerAnswer { not_leader: true, ..PeerAnswer::default() };
    }
    match cell.change_members_as_leader(change).await {
        Ok(answer) => answer,
        Err(error) => {
            let status = Status::from(error);
            PeerAnswer { code: status.code().into(), text: status.message().to_string(), ..PeerAnswer::default() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A learner that never ran got its vote in the first tick after an election: nothing was not less than nothing.
    #[test]
    fn nobody_is_in_sync_before_the_leader_has_counted() {
        let of = |id, matched_index| Progress { id, matched_index, is_active: true, is_learner: id == 2 };
        assert!(!is_in_sync(&[], 1, 2));
        assert!(!is_in_sync(&[of(1, 100)], 1, 2), "added since");
        assert!(!is_in_sync(&[of(2, 100)], 1, 2));
        assert!(!is_in_sync(&[of(1, 100), of(2, 89)], 1, 2));
        assert!(is_in_sync(&[of(1, 100), of(2, 90)], 1, 2));
    }

    // Right after an election a voter was told that it was not in sync, instead of that it was no learner.
    #[test]
    fn a_voter_is_no_learner_whatever_the_leader_has_counted() {
        let member = |is_learner| Member { id: 2, is_learner, ..Member::default() };
        let counted: Vec<Progress> =
            [1, 2].map(|id| Progress { id, matched_index: 100, is_active: true, is_learner: id == 2 }).into();
        for progress in [&[], counted.as_slice()] {
            let checked = check_learner(&member(false), progress, 1);
            assert!(matches!(checked, Err(CellError::Refused(Refusal::MemberNotLearner))), "{checked:?}");
        }
        let early = check_learner(&member(true), &[], 1);
        assert!(matches!(early, Err(CellError::Membership(MembershipError::LearnerNotReady))), "{early:?}");
        check_learner(&member(true), &counted, 1).expect("in sync");
    }

    #[test]
    fn voters_are_added_while_a_quorum_has_started() {
        let member = |name: &str| Member { name: name.to_string(), ..Member::default() };
        let (up, down) = (member("m"), member(""));
        assert!(can_add_voter(&[&up]) && can_add_voter(&[&up, &up]) && can_add_voter(&[&up, &up, &up]));
        assert!(!can_add_voter(&[&up, &down]), "two of three would be down");
        assert!(can_add_voter(&[&up, &up, &up, &down]));
    }
}
