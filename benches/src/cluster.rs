//! What three members do that one cannot: lose their leader, and catch up.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tenure_etcd_shim::proto::etcdserverpb::{PutRequest, RangeRequest, StatusRequest};

use crate::fields::{integer, submessages};
use crate::load::{self, Load, Progress, Target};
use crate::server::Server;

/// Bounds what should long be over.
const PATIENCE: Duration = Duration::from_secs(300);

/// Pause between attempts and looks.
const PAUSE: Duration = Duration::from_millis(10);

/// What a client waits for one answer.
const GIVE_UP: Duration = Duration::from_secs(2);

fn at(member: &str) -> Target {
    let addresses = vec![member.to_string()];
    Target { name: String::new(), addresses, tls: Vec::new(), members: Vec::new(), pids: Vec::new() }
}

/// A member's own id and its leader's, if it answers.
async fn ids(member: &str) -> Option<(u64, u64)> {
    let member = at(member);
    let status = load::call(&member, "/etcdserverpb.Maintenance/Status", &StatusRequest {});
    let status = tokio::time::timeout(GIVE_UP, status).await.ok()?.ok()?;
    let header = submessages(&status, 1).next()?;
    Some((integer(header, 2), integer(&status, 4)))
}

/// The revision of a member as it is, without asking the others.
async fn revision(member: &str) -> Option<u64> {
    let request = RangeRequest { key: "revision".into(), serializable: true, ..RangeRequest::default() };
    let member = at(member);
    let answer = load::call(&member, "/etcdserverpb.KV/Range", &request);
    let answer = tokio::time::timeout(GIVE_UP, answer).await.ok()?.ok()?;
    Some(integer(submessages(&answer, 1).next()?, 3))
}

/// Waits until all members know the same leader. Gives its place.
async fn leader(members: &[String]) -> anyhow::Result<usize> {
    let from = Instant::now();
    while from.elapsed() < PATIENCE {
        let mut known = Vec::new();
        for member in members {
            known.extend(ids(member).await);
        }
        let leading = known.iter().position(|(own, leader)| own == leader);
        if let Some(place) = leading
            && known.len() == members.len()
            && known.iter().all(|(_, leader)| *leader == known[place].0)
        {
            return Ok(place);
        }
        tokio::time::sleep(PAUSE).await;
    }
    bail!("no leader that all members know")
}

/// Kills the leader, and starts it again afterwards. Gives the time from the kill to the first write that is acknowledged, by
/// either of the others, to clients that ask again and again.
///
/// # Errors
/// If the members do not come to a leader.
pub fn leaderless_seconds(servers: &mut [Server], target: &Target) -> anyhow::Result<f64> {
    let leading = load::block_on(leader(&target.members))?;
    servers[leading].kill()?;
    let from = Instant::now();
    let others: Vec<String> =
        target.members.iter().filter(|member| **member != target.members[leading]).cloned().collect();
    let written = load::block_on(async {
        let (sender, mut first) = tokio::sync::mpsc::channel(1);
        let asking = async {
            for number in 0usize.. {
                let (member, sender) = (others[number % others.len()].clone(), sender.clone());
                tokio::task::spawn_local(async move {
                    let put = PutRequest { key: "leaderless".into(), ..PutRequest::default() };
                    if load::call(&at(&member), "/etcdserverpb.KV/Put", &put).await.is_ok() {
                        let _ = sender.try_send(from.elapsed());
                    }
                });
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            written = first.recv() => written,
            () = asking => None,
            () = tokio::time::sleep(PATIENCE) => None,
        }
    });
    servers[leading].launch_again()?;
    load::block_on(leader(&target.members))?;
    Ok(written.context("no write was acknowledged after the leader was killed")?.as_secs_f64())
}

/// How a member caught up.
#[derive(Clone, Copy, Debug)]
pub struct CaughtUp {
    /// How long the others took to write what it missed.
    pub written_seconds: f64,
    /// From its start to where they were.
    pub seconds: f64,
}

/// Keeps a follower away while the others take a load, and starts it.
///
/// # Errors
/// If the load fails, or the member does not catch up.
pub fn catch_up(
    servers: &mut [Server],
    target: &Target,
    missed: &Load,
    progress: Progress<'_>,
) -> anyhow::Result<CaughtUp> {
    let leading = load::block_on(leader(&target.members))?;
    let away = (leading + 1) % servers.len();
    servers[away].kill()?;
    let mut others = Target { pids: Vec::new(), ..target.clone() };
    let member = others.members.remove(away);
    others.addresses = others.members.clone();
    let from = Instant::now();
    load::block_on(load::fill(&others, missed, progress))?;
    let written_seconds = from.elapsed().as_secs_f64();
    let goal = load::block_on(revision(&target.members[leading])).context("the leader answers")?;
    let from = Instant::now();
    servers[away].launch_again()?;
    let caught = load::block_on(async {
        while from.elapsed() < PATIENCE {
            if revision(&member).await.is_some_and(|revision| revision >= goal) {
                return Some(from.elapsed());
            }
            tokio::time::sleep(PAUSE).await;
        }
        None
    });
    Ok(CaughtUp { written_seconds, seconds: caught.context("the member catches up")?.as_secs_f64() })
}
