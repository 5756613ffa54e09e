//! Who is in the cell: what a [`MembersCommand`] makes of a [`Membership`].
//!
//! Replicated like everything else, so that any member can answer for all, and a member that joins by a snapshot knows whom
//! to talk to. Whether a member votes is decided by raft's changes, which carry the command that belongs to them.

use crate::command::MembersCommand;
use crate::error::Refusal;
use crate::types::{Member, Membership};

/// Changes the membership. Gives the ids of the members it touched, growing.
///
/// # Errors
/// A [`Refusal`]; nothing was changed.
pub(crate) fn apply(membership: &mut Membership, command: MembersCommand) -> Result<Vec<u64>, Refusal> {
    match command {
        MembersCommand::Bootstrap { members } => {
            if !membership.members.is_empty() {
                return Ok(Vec::new());
            }
            let new = members.into_iter().map(|(id, peer_urls)| Member { id, peer_urls, ..Member::default() });
            membership.members = new.collect();
            membership.members.sort_unstable_by_key(|member| member.id);
            membership.members.dedup_by_key(|member| member.id);
            Ok(membership.members.iter().map(|member| member.id).collect())
        }
        MembersCommand::Add { id, peer_urls, is_learner } => {
            let place = membership.members.binary_search_by_key(&id, |member| member.id);
            let Err(place) = place else { return Err(Refusal::MemberExists) };
            if membership.removed.binary_search(&id).is_ok() {
                return Err(Refusal::MemberExists);
            }
            // URLs were looked at before raft was asked. If another member has taken one since, it is told all the same: raft counts the
            // new one already.
            membership.members.insert(place, Member { id, peer_urls, is_learner, ..Member::default() });
            Ok(vec![id])
        }
        MembersCommand::Promote { id } => {
            let member = find(membership, id)?;
            if !member.is_learner {
                return Err(Refusal::MemberNotLearner);
            }
            member.is_learner = false;
            Ok(vec![id])
        }
        MembersCommand::Remove { id } => {
            find(membership, id)?;
            membership.members.retain(|member| member.id != id);
            if let Err(place) = membership.removed.binary_search(&id) {
                membership.removed.insert(place, id);
            }
            Ok(vec![id])
        }
        MembersCommand::SetPeerUrls { id, peer_urls } => {
            let others = membership.members.iter().filter(|member| member.id != id);
            if others.flat_map(|member| &member.peer_urls).any(|url| peer_urls.contains(url)) {
                return Err(Refusal::PeerUrlExists);
            }
            find(membership, id)?.peer_urls = peer_urls;
            Ok(vec![id])
        }
        MembersCommand::Publish { id, name, client_urls, tenant_urls } => {
            let member = find(membership, id)?;
            (member.name, member.client_urls, member.tenant_urls) = (name, client_urls, tenant_urls);
            Ok(vec![id])
        }
    }
}

fn find(membership: &mut Membership, id: u64) -> Result<&mut Member, Refusal> {
    let place = membership.members.binary_search_by_key(&id, |member| member.id);
    place.ok().and_then(|place| membership.members.get_mut(place)).ok_or(Refusal::MemberNotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(host: &str) -> Vec<String> {
        vec![format!("http://{host}:2380")]
    }

    #[test]
    fn members_come_change_and_go_for_ever() {
        let mut all = Membership::default();
        let bootstrap = MembersCommand::Bootstrap { members: vec![(3, url("c")), (1, url("a"))] };
        assert_eq!(apply(&mut all, bootstrap.clone()), Ok(vec![1, 3]));
        assert_eq!(apply(&mut all, bootstrap), Ok(vec![]), "every first member proposes it");
        let add = |id, host| MembersCommand::Add { id, peer_urls: url(host), is_learner: true };
        assert_eq!(apply(&mut all, add(2, "b")), Ok(vec![2]));
        assert_eq!(apply(&mut all, add(2, "d")), Err(Refusal::MemberExists));
        // Raft has it by now: it must be known, so that it can be removed again.
        assert_eq!(apply(&mut all, add(4, "c")), Ok(vec![4]));
        assert_eq!(all.members.iter().map(|member| member.id).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(apply(&mut all, MembersCommand::Remove { id: 4 }), Ok(vec![4]));
        assert_eq!(apply(&mut all, MembersCommand::Promote { id: 2 }), Ok(vec![2]));
        assert_eq!(apply(&mut all, MembersCommand::Promote { id: 2 }), Err(Refusal::MemberNotLearner));
        let taken = MembersCommand::SetPeerUrls { id: 2, peer_urls: url("a") };
        assert_eq!(apply(&mut all, taken), Err(Refusal::PeerUrlExists));
        let same = MembersCommand::SetPeerUrls { id: 2, peer_urls: url("b") };
        assert_eq!(apply(&mut all, same), Ok(vec![2]));
        assert_eq!(apply(&mut all, MembersCommand::Remove { id: 2 }), Ok(vec![2]));
        assert_eq!(apply(&mut all, MembersCommand::Remove { id: 2 }), Err(Refusal::MemberNotFound));
        assert_eq!(apply(&mut all, add(2, "e")), Err(Refusal::MemberExists), "ids are never used again");
        let publish = MembersCommand::Publish { id: 1, name: "m1".into(), client_urls: vec![], tenant_urls: vec![] };
        assert_eq!(apply(&mut all, publish), Ok(vec![1]));
        assert_eq!(all.member(1).unwrap().name, "m1");
    }
}
