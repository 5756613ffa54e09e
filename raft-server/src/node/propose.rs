//! From the lanes into the log: batches that this member proposes as the leader, those that it forwards to one, and what it takes from
//! members as one. When a batch goes is in the essay of [`node`](super).

use bytes::Bytes;

use super::Node;
use crate::error::ProposeError;
use crate::forward::{Forward, Forwarded, Sending};
use crate::frame;
use crate::log::Position;
use crate::proposals::{Batch, Origin, Proposal, Waiter};
use crate::transport::PeerMessage;

impl<R: Send + 'static> Node<R> {
    pub(super) fn propose_batches(&mut self) {
        if self.is_leader() {
            self.forget_arrived();
            while let Some(batch) = self.next_batch()
                && self.propose(batch)
            {}
        } else {
            self.forward_batches();
        }
    }

    /// What to propose now; see the module's essay.
    pub(super) fn next_batch(&mut self) -> Option<Vec<Proposal<R>>> {
        let has_room = self.underway.len() < self.config.inflight_batches_max
            && self.shared.waiting.bytes() < self.config.inflight_bytes_max as u64
            // Handing over: raft would drop it.
            && self.raw.raft.lead_transferee.is_none();
        self.shared.queue.lock().next_batch(has_room, !self.underway.is_empty(), &self.config)
    }

    /// Gives whether raft takes proposals.
    pub(super) fn propose(&mut self, mut proposals: Vec<Proposal<R>>) -> bool {
        let abandoned: Vec<_> = proposals.extract_if(.., |proposal| proposal.is_abandoned()).collect();
        self.shared.refuse(abandoned, ProposeError::Dropped);
        let term = self.raw.raft.term;
        let late = proposals.extract_if(.., |proposal| proposal.only_in.is_some_and(|only_in| only_in != term));
        self.shared.refuse(late.collect::<Vec<_>>(), ProposeError::OtherTerm);
        if proposals.is_empty() {
            return true;
        }
        let frame = frame::encode(proposals.iter().map(|proposal| {
            let origin = match &proposal.waiter {
                Waiter::Local(_) => None,
                Waiter::Remote(origin) => Some(*origin),
            };
            (&proposal.command, origin)
        }));
        if let Err(error) = self.raw.propose(Vec::new(), frame) {
            // Nothing was appended. What other members sent they send again, in another term.
            tracing::debug!(%error, "propose batch");
            self.shared.requeue(proposals);
            return false;
        }
        // Goes to the others with their new entries.
        self.told_committed = self.raw.raft.raft_log.committed;
        self.register(proposals);
        true
    }

    /// Tells the others what is committed, unless the next batch just has. Raft itself would send each of them a message for that, and get an
    /// answer, in the same turn as the batch that waited for it.
    pub(super) fn tell_commit(&mut self) {
        let committed = self.raw.raft.raft_log.committed;
        if self.is_leader() && committed > self.told_committed {
            self.told_committed = committed;
            self.raw.raft.bcast_append();
        }
    }

    /// Remembers who waits for the entry that was just appended.
    pub(super) fn register(&mut self, proposals: Vec<Proposal<R>>) {
        let at = Position { index: self.raw.raft.raft_log.last_index(), term: self.raw.raft.term };
        self.shared.waiting.register(Batch::new(at, proposals));
        self.underway.push_back(at.index);
    }

    /// Sends what waits to the leader. Without one it goes on waiting.
    pub(super) fn forward_batches(&mut self) {
        let (term, leader) = (self.raw.raft.term, self.raw.raft.leader_id);
        if leader != 0 && (self.sending.term, self.sending.leader) != (term, leader) {
            assert!(self.sending.term < term, "a term has one leader");
            self.sending = Sending::to(term, leader);
        }
        loop {
            let has_room = leader != 0 && self.shared.waiting.bytes() < self.config.inflight_bytes_max as u64;
            let is_underway = self.sending.acknowledged < self.sending.next;
            let batch = self.shared.queue.lock().next_batch(has_room, is_underway, &self.config);
            let Some(mut proposals) = batch else { return };
            let abandoned: Vec<_> = proposals.extract_if(.., |proposal| proposal.is_abandoned()).collect();
            self.shared.refuse(abandoned, ProposeError::Dropped);
            let own: Vec<_> = proposals.extract_if(.., |proposal| proposal.only_in.is_some()).collect();
            self.shared.refuse(own, ProposeError::OtherTerm);
            let start = self.sending.assign(proposals.len());
            let commands = (start..).zip(&proposals).map(|(number, p)| (number, p.lane, p.command.clone())).collect();
            self.shared.waiting.register_forwarded(term, start, proposals);
            self.send_forward(start, commands, self.sending.next);
        }
    }

    pub(super) fn send_again(&mut self) {
        let (term, start) = (self.sending.term, self.sending.acknowledged);
        if term != self.raw.raft.term || self.sending.leader != self.raw.raft.leader_id {
            return;
        }
        let (commands, cut) = self.shared.waiting.forwarded_from(term, start, self.config.batch_bytes_max);
        let end = cut.unwrap_or(self.sending.next);
        self.send_forward(start, commands, end);
    }

    pub(super) fn send_forward(&mut self, start: u64, commands: Vec<(u64, u32, Bytes)>, end: u64) {
        let Sending { term, leader, acknowledged, .. } = self.sending;
        let (from, life) = (self.config.id, self.shared.life);
        let message = Forward { from, to: leader, term, life, heard: acknowledged, commands, end, start };
        self.outgoing.push(PeerMessage::Forward(message));
    }

    pub(super) fn on_forward(&mut self, message: Forward) {
        if !self.is_leader() || message.term != self.raw.raft.term || self.shared.stopping() {
            return;
        }
        let (life, paused) = (message.life, self.append_paused());
        // The sender has it proposed again when it sees an entry of a later term.
        let only_in = Some(message.term);
        // Before proposers here have to wait for the queue.
        let costs = message.commands.iter().map(|(number, _, command)| (*number, (self.config.cost_bytes)(command)));
        let mut costs = costs.collect::<Vec<_>>().into_iter();
        let answer = {
            let mut queue = self.shared.queue.lock();
            self.intakes.receive(message.term, message, |number, lane, command| {
                let waiter = Waiter::Remote(Origin { life, number });
                let bytes = command.len();
                let cost_bytes = costs.find(|(of, _)| *of == number).map_or(bytes, |(_, cost_bytes)| cost_bytes);
                let proposal = Proposal { lane, command, cost_bytes, waiter, only_in };
                !paused
                    && bytes <= self.config.command_bytes_max
                    && queue.lanes.push(lane, bytes, cost_bytes, proposal).is_ok()
            })
        };
        self.outgoing.push(PeerMessage::Forwarded(answer));
    }

    pub(super) fn on_forwarded(&mut self, answer: &Forwarded) {
        if answer.life != self.shared.life || !self.sending.on_answer(answer) {
            return;
        }
        let refused = answer.refused.iter().filter_map(|n| self.shared.waiting.take_forwarded(answer.term, *n));
        self.shared.refuse(refused, ProposeError::QueueFull);
    }
}
