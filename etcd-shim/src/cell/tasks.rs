//! What a member does beside serving: follows leadership, ends leases, compacts what is old, keeps an eye on the disk.

use std::sync::Weak;

use futures::StreamExt;
use tenure_raft_server as raft;
use tenure_storage::{Command, Outcome, Refusal, TenantPhase};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Inner;
use crate::auto_compaction::{AutoCompaction, AutoCompactor, Seen};
use crate::cell_error::CellError;
use crate::{disk, lessor};

/// Revokes of expired leases proposed at the same time. The rest of a poll waits.
const REVOKES_IN_FLIGHT_MAX: usize = 256;

/// Tells the lessor when this member begins to lead, with all of earlier terms applied, and when it does no more.
pub(super) async fn follow_leadership(cell: Weak<Inner>, mut leadership: watch::Receiver<raft::Leadership>) {
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
pub(super) async fn compact_old(cell: Weak<Inner>, kept: AutoCompaction) {
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
pub(super) async fn watch_disk(cell: Weak<Inner>) {
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

/// Proposes the revokes of expired leases while this member leads.
pub(super) async fn revoke_expired(cell: Weak<Inner>) {
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
