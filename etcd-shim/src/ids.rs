//! Member and cluster ids, by etcd's formulas (contract 1.4).
//!
//! An id is the first 8 bytes, big endian, of a SHA-1. Nothing secret hangs on it: the hash only has to give the same id
//! for the same bootstrap configuration, on every member, and the ids that etcd's tools know.

use sha1::{Digest, Sha1};
use tenure_storage::TenantId;

/// etcd's `--initial-cluster-token` unless given.
pub const CLUSTER_TOKEN_DEFAULT: &str = "etcd-cluster";

/// etcd's `--initial-advertise-peer-urls` unless given.
pub const PEER_URL_DEFAULT: &str = "http://localhost:2380";

/// Id of a member of the first configuration: its peer URLs, sorted and joined, then the cluster token.
pub fn member_id(peer_urls: &[String], cluster_token: &str) -> u64 {
    let mut sorted: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let parts = sorted.into_iter().chain([cluster_token]).map(str::as_bytes);
    first_eight(parts)
}

/// Id of a cluster: the ids of its first members, sorted.
pub fn cluster_id(member_ids: &[u64]) -> u64 {
    let mut sorted: Vec<[u8; 8]> = member_ids.iter().map(|id| id.to_be_bytes()).collect();
    sorted.sort_unstable();
    first_eight(sorted.iter().map(<[u8; 8]>::as_slice))
}

/// The cluster id that clients of a tenant see. Every tenant has its own, so that a client which was pointed at another
/// tenant by mistake notices; it is derived, so all members agree and nothing is stored.
pub fn tenant_cluster_id(cluster_id: u64, tenant: TenantId) -> u64 {
    first_eight([cluster_id.to_be_bytes().as_slice(), tenant.0.to_be_bytes().as_slice()])
}

fn first_eight<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut hash = Sha1::new();
    for part in parts {
        hash.update(part);
    }
    let digest: [u8; 20] = hash.finalize().into();
    let [a, b, c, d, e, f, g, h, ..] = digest;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `etcd` with no flags logs as its local-member-id and cluster-id.
    #[test]
    fn defaults_are_etcds_own_ids() {
        let member = member_id(&[PEER_URL_DEFAULT.to_string()], CLUSTER_TOKEN_DEFAULT);
        assert_eq!(format!("{member:x}"), "8e9e05c52164694d");
        assert_eq!(format!("{:x}", cluster_id(&[member])), "cdf818194e3a8c32");
    }

    /// What etcd logs of three members, one of them with two URLs, with `--initial-cluster-token tkn`.
    #[test]
    fn three_members_have_etcds_ids() {
        let urls = [
            &["http://127.0.0.1:23801"][..],
            &["http://127.0.0.1:23802", "http://localhost:23812"],
            &["http://127.0.0.1:23803"],
        ];
        let urls = urls.map(|urls| urls.iter().map(ToString::to_string).collect::<Vec<_>>());
        let ids = urls.map(|urls| member_id(&urls, "tkn"));
        assert_eq!(ids.map(|id| format!("{id:x}")), ["6c120a4f29d80e03", "40bc8bb5fb0ea0c7", "4be80d0b5085b838"]);
        assert_eq!(format!("{:x}", cluster_id(&ids)), "e67a70e0b23494dc");
    }

    #[test]
    fn order_of_the_configuration_does_not_matter() {
        let urls = |urls: [&str; 2]| urls.map(str::to_string);
        let one = urls(["http://a:2380", "http://b:2380"]);
        let other = urls(["http://b:2380", "http://a:2380"]);
        assert_eq!(member_id(&one, "t"), member_id(&other, "t"));
        assert_eq!(cluster_id(&[1, 2]), cluster_id(&[2, 1]));
    }

    #[test]
    fn tenants_differ_from_each_other_and_between_cells() {
        let ids = [(7, 1), (7, 2), (8, 1)].map(|(cluster, tenant)| tenant_cluster_id(cluster, TenantId(tenant)));
        assert!(ids[0] != ids[1] && ids[0] != ids[2] && ids[1] != ids[2]);
    }
}
