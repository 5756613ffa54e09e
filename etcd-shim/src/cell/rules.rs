//! Raising the rules that the cell decides by, when all its members know newer ones ([`Rules`]).
//!
//! As etcd's cluster version is: the leader asks every member, learners and those that have not started yet too, which rules it knows, and
//! proposes the newest that all know. Who does not answer holds that up: it may be of any release, and would stop at a rule that it does not
//! know. The command names the members that were asked, so that one that was added meanwhile is asked first; and it is proposed in
//! the leader's own term or not at all.
//!
//! A member that runs the newest rules has nothing to do here any more, for as long as it lives.

use std::sync::{Arc, Weak};
use std::time::Duration;

use prost::Message as _;
use tenure_storage::{Command, Refusal, Rules, TenantId};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Inner;
use crate::cell_error::CellError;
use crate::proto::cell::peer_call::Call;
use crate::proto::cell::{PeerAnswer, PeerCall, RulesAsked};

/// Between two attempts.
const PERIOD: Duration = Duration::from_secs(1);

/// Between two lines that say who holds it up.
const SAY_PERIOD: Duration = Duration::from_secs(60);

/// Raises the cell's rules while this member leads, until they are the newest that this release knows.
pub(super) async fn raise(cell: Weak<Inner>) {
    let mut attempts = interval(PERIOD);
    attempts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said: Option<Instant> = None;
    loop {
        attempts.tick().await;
        let Some(cell) = cell.upgrade() else { return };
        if cell.store.rules() == Rules::NEWEST {
            return;
        }
        let Some(term) = cell.lessor.led_term() else { continue };
        match attempt(&cell, term).await {
            Ok(None) => {}
            Ok(Some(holds_up)) => {
                if said.is_none_or(|said| said.elapsed() >= SAY_PERIOD) {
                    said = Some(Instant::now());
                    let (rules, newest) = (cell.store.rules().number(), Rules::NEWEST.number());
                    let member = format!("{holds_up:x}");
                    tracing::info!(
                        member,
                        rules,
                        newest,
                        "the cell keeps its rules: a member did not say that it knows newer ones"
                    );
                }
            }
            Err(error) => tracing::debug!(%error, "raise the cell's rules"),
        }
    }
}

/// Gives the member that holds it up, if one does.
async fn attempt(cell: &Arc<Inner>, term: u64) -> Result<Option<u64>, CellError> {
    cell.read_barrier().await?;
    let members: Vec<u64> = cell.store.membership().members.iter().map(|member| member.id).collect();
    let mut known = Rules::NEWEST.number();
    for id in members.iter().copied().filter(|id| *id != cell.identity().member_id) {
        let theirs = ask(cell, id).await;
        known = known.min(theirs);
        if known <= cell.store.rules().number() {
            return Ok(Some(id));
        }
    }
    let raise = Command::RaiseRules { number: known, members };
    match cell.propose_in(Some(term), TenantId(0), raise).await?.result {
        Ok(_) | Err(Refusal::MembersChanged) => Ok(None),
        Err(refusal) => Err(refusal.into()),
    }
}

/// The newest that a member knows; 0 if it does not say.
async fn ask(cell: &Inner, id: u64) -> u32 {
    let question = PeerCall { call: Some(Call::Rules(RulesAsked {})) }.encode_to_vec().into();
    let answer = cell.peers.call(id, question, cell.request_timeout).await.ok();
    answer.and_then(|answer| PeerAnswer::decode(answer).ok()).map_or(0, |answer| answer.rules_newest)
}

/// What this member answers to that.
pub(super) fn answer() -> PeerAnswer {
    PeerAnswer { rules_newest: Rules::NEWEST.number(), ..PeerAnswer::default() }
}
