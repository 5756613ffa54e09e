//! Who is in the group, and who leads it: changes of members, one at a time (decision 0008), and handing over.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};
use tokio::sync::oneshot;

use super::{ChangeReply, MembersChange, Node};
use crate::error::ChangeError;
use crate::frame;
use crate::pending::Pending;
use crate::proposals::{Proposal, Waiter};

impl<R: Send + 'static> Node<R> {
    pub(super) fn on_change(&mut self, change: MembersChange, seen: u64, command: Bytes, reply: ChangeReply<R>) {
        let refuse = |reply: ChangeReply<R>, error| drop(reply.send(Err(error)));
        let raft = &self.raw.raft;
        if !self.is_leader() || raft.lead_transferee.is_some() {
            let leader = (raft.leader_id != 0 && raft.leader_id != self.config.id).then_some(raft.leader_id);
            return refuse(reply, ChangeError::NotLeader { leader });
        }
        let is_under_way = raft.has_pending_conf() || !self.conf.state.voters_outgoing.is_empty();
        if is_under_way || self.conf.index != seen {
            return refuse(reply, ChangeError::UnderWay);
        }
        let (kind, node_id) = match change {
            MembersChange::AddVoter(id) => (ConfChangeType::AddNode, id),
            MembersChange::AddLearner(id) => (ConfChangeType::AddLearnerNode, id),
            MembersChange::Remove(id) => (ConfChangeType::RemoveNode, id),
        };
        // A leader hands over first; the only voter cannot.
        if change == MembersChange::Remove(self.config.id) {
            return refuse(reply, ChangeError::Invalid);
        }
        let mut single = ConfChangeSingle::default();
        (single.change_type, single.node_id) = (kind, node_id);
        let change_of_one = ConfChangeV2 {
            // One member at a time, so no joint configuration is needed, and none is wanted: to leave it takes a quorum of those before,
            // which whoever is being removed may be needed for (decision 0008).
            transition: ConfChangeTransition::Auto,
            changes: vec![single].into(),
            context: frame::encode([(&command, None)].into_iter()).into(),
            ..ConfChangeV2::default()
        };
        if let Err(error) = self.raw.propose_conf_change(Vec::new(), change_of_one) {
            tracing::warn!(%error, ?change, "propose a change of members");
            return refuse(reply, ChangeError::Invalid);
        }
        let (sender, receiver) = oneshot::channel();
        self.shared.metrics.proposals_pending.fetch_add(1, Ordering::Relaxed);
        // In another term it would be a command like any other, without raft's change.
        let only_in = Some(self.raw.raft.term);
        let cost_bytes = command.len();
        self.register(vec![Proposal { lane: 0, command, cost_bytes, waiter: Waiter::Local(sender), only_in }]);
        let _ = reply.send(Ok(Pending::new(receiver, Arc::clone(&self.shared.metrics))));
    }

    /// Completes what an earlier release began, whose changes were joint ones; raft itself does only for its own.
    pub(super) fn finish_joint_change(&mut self) {
        let raft = &self.raw.raft;
        let is_joint = !self.conf.state.voters_outgoing.is_empty() && self.conf.state.auto_leave;
        if is_joint
            && self.is_leader()
            && raft.commit_to_current_term()
            && !raft.has_pending_conf()
            && let Err(error) = self.raw.propose_conf_change(Vec::new(), ConfChangeV2::default())
        {
            tracing::debug!(%error, "leave the joint configuration");
        }
    }

    pub(super) fn transfer(&mut self, to: u64) {
        if !self.is_leader() {
            return;
        }
        let own = self.config.id;
        let voters = &self.conf.state.voters;
        let furthest = || {
            let progress = self.raw.raft.prs().iter();
            let able = progress.filter(|(id, of)| **id != own && of.recent_active && voters.contains(id));
            able.max_by_key(|(id, of)| (of.matched, **id)).map(|(id, _)| *id)
        };
        if let Some(to) = if to == 0 { furthest() } else { Some(to) } {
            self.raw.transfer_leader(to);
        }
    }
}
