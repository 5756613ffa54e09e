//! The key space: which rows exist, how their keys are laid out, and that byte order is the order we scan in.
//!
//! Every key starts with the tenant (u32, big endian), so one tenant's rows are one contiguous range of every family and
//! no scan bounded by a tenant can reach another's. Behind it stands a tag. Tags are persisted and never reused.
//!
//! | family | tag | key behind tenant and tag | value | written by |
//! |---|---|---|---|---|
//! | kv | 1 | user key (escaped), revision descending, tombstone flag | the version in stored form; nothing for a tombstone | put, delete |
//! | head | 1 | user key (raw) | [`head::Head`]: the newest version without its value | put, delete, reclaim |
//! | rev | 1 | revision ascending | [`rev::Row`]: user key, kind, size, previous revision | put, delete |
//! | lease | 1 | lease id | granted TTL in seconds | grant, revoke |
//! | lease | 2 | lease id, user key (raw) | nothing | put, delete, revoke |
//! | meta | 1 | nothing | [`meta::TenantRow`]: name, revisions, usage, alarms | every command |
//! | meta | 2 | nothing, tenant 0 only | the cell's row: applied index, next tenant id, quota | every batch |
//! | meta | 3 | member id (u64), tenant 0 only | a member of the cell: name, URLs, whether it is a learner | changes of members |
//! | meta | 4 | member id (u64), tenant 0 only | nothing: the member was removed | changes of members |
//! | meta | 5 | nothing | [`Profile`](crate::profile::Profile): phase, limits, labels, credentials | an operator |
//! | meta | 6 | tenant id (u64), tenant 0 only | the name of a tenant that was deleted, until its space is given back | delete |
//! | meta | 7 | name (raw), tenant 0 only | nothing: a tenant of this name was deleted once | delete |
//! | meta | 8 | nothing, tenant 0 only | limits of tenants of which nothing else is said | an operator |
//!
//! The user key is escaped only where a revision follows it: raw bytes next to a number would let `"a"` at a high
//! revision sort behind `"a\0"`.

pub(crate) mod head;
pub(crate) mod lease;
pub(crate) mod meta;
pub(crate) mod rev;
pub(crate) mod version;

use crate::types::{KeyRange, TenantId};

/// The tenant every row of the cell itself carries; real tenants start at 1.
pub(crate) const CELL: TenantId = TenantId(0);

/// Tenant and tag: the first five bytes of every key.
fn prefix(tenant: TenantId, tag: u8, rest_len: usize) -> Vec<u8> {
    let mut key = Vec::with_capacity(5 + rest_len);
    key.extend_from_slice(&tenant.0.to_be_bytes());
    key.push(tag);
    key
}

/// All rows of a tenant, in every family.
pub(crate) fn tenant_bounds(tenant: TenantId) -> Bounds {
    let lower = tenant.0.to_be_bytes().to_vec();
    // No tenant has the last number.
    let upper = tenant.0.saturating_add(1).to_be_bytes().to_vec();
    Bounds { lower, upper }
}

/// Where the keys of `(tenant, tag)` end: the first key that no longer has this prefix.
fn prefix_end(tenant: TenantId, tag: u8) -> Vec<u8> {
    prefix(tenant, tag + 1, 0)
}

const PREFIX_LEN: usize = 5;

/// `[lower, upper)` of an engine scan.
#[derive(Debug)]
pub(crate) struct Bounds {
    pub(crate) lower: Vec<u8>,
    pub(crate) upper: Vec<u8>,
}

/// The bounds of a key range in a family whose user keys are raw.
fn raw_bounds(tenant: TenantId, tag: u8, range: &KeyRange) -> Bounds {
    let with = |user_key: &[u8]| {
        let mut key = prefix(tenant, tag, user_key.len() + 1);
        key.extend_from_slice(user_key);
        key
    };
    match range {
        KeyRange::Single(key) => {
            let lower = with(key);
            let mut upper = lower.clone();
            upper.push(0);
            Bounds { lower, upper }
        }
        KeyRange::HalfOpen { start, end } => Bounds { lower: with(start), upper: with(end) },
        KeyRange::From(start) => Bounds { lower: with(start), upper: prefix_end(tenant, tag) },
    }
}

/// Appends `user_key` so that what follows cannot disturb the order of user keys: `00` becomes `00 FF`, and `00 01`
/// ends the key. `00 01` sorts below every continuation of the same key, as a prefix must.
pub(crate) fn escape_to(out: &mut Vec<u8>, user_key: &[u8]) {
    for byte in user_key {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 1]);
}

/// Takes back what [`escape_to`] did; `None` if `escaped` is not exactly one escaped key.
pub(crate) fn unescape(escaped: &[u8]) -> Option<Vec<u8>> {
    let body = escaped.strip_suffix(&[0, 1])?;
    let mut key = Vec::with_capacity(body.len());
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        if *byte == 0 && bytes.next() != Some(&0xff) {
            return None;
        }
        key.push(*byte);
    }
    Some(key)
}

/// Entry for the fuzzer: `None` or a key that escapes back to the same bytes.
#[doc(hidden)]
pub fn fuzz_unescape(escaped: &[u8]) -> Option<Vec<u8>> {
    unescape(escaped)
}

#[doc(hidden)]
pub fn fuzz_escape(user_key: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    escape_to(&mut out, user_key);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Keys where escaping matters: short, over the alphabet that the escape uses.
    fn tricky_key() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), Just(0xfe), Just(0xff), any::<u8>()], 0..8)
    }

    proptest! {
        #[test]
        fn escape_round_trips(key in tricky_key()) {
            prop_assert_eq!(unescape(&fuzz_escape(&key)), Some(key));
        }

        #[test]
        fn escape_keeps_order_whatever_follows(
            a in tricky_key(), b in tricky_key(), tail_a in any::<[u8; 4]>(), tail_b in any::<[u8; 4]>(),
        ) {
            let row = |key: &[u8], tail: &[u8]| [fuzz_escape(key), tail.to_vec()].concat();
            if a != b {
                prop_assert_eq!(a.cmp(&b), row(&a, &tail_a).cmp(&row(&b, &tail_b)));
            }
        }
    }
}
